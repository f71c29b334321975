"""The command as users meet it: its exit code, what it prints, one line for what is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers import assert_one_line, legolm

EXAMPLES = sorted(
    path
    for path in (Path(__file__).parents[2] / "examples").rglob("*.yaml")
    # Those of rates are the runs of others at other rates; that they load, `test_federation` holds.
    if path.parent.name != "tasks" and not path.stem.endswith("_rates")
)


@pytest.fixture
def config(tiny: Callable[[str], Path], corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: object) -> Path:
        rows = [{"instruction": f"Say {i}", "output": "ab"} for i in range(20)]
        (tmp_path / "fr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        raw: dict[str, object] = {
            "model": str(tiny("llama")),
            "data": {"train": str(tmp_path / "fr.jsonl")},
            "blocks": [
                {
                    "name": "a",
                    "method": "wanda",
                    "sparsity": 0.5,
                    "calibration": {"text": str(corpus), "samples": 4, "length": 64},
                }
            ],
            "clients": [{"id": "fr", "block": "a"}],
            "federation": {"engine": "local", "rounds": 1},
        }
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(raw | changes))
        return path

    return write


@pytest.fixture
def public_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins, in the current folder, for the public data that the FLAN examples say how to get."""
    private = ["cola", "definite_pronoun_resolution", "fix_punct", "glue_qqp", "snli", "trec", "web_nlg_en", "wic"]
    other = {0: "qnli", 5: "sentiment140", 6: "gigaword", 7: "word_segment"}

    def rows(*tasks: str) -> list[dict[str, str]]:
        return [{"instruction": "Is it?", "output": "yes", "task": task} for task in tasks for _ in range(3)]

    # Blocks are cut on 128 samples of 256 tokens.
    long = [{"instruction": "Is it? " * 90, "output": "yes", "task": "qnli"}] * 128
    for folder, files in {
        "dataset1": {0: rows(*private)},
        "dataset2": {n: rows(one) for n, one in other.items()} | {1: long},
    }.items():
        there = tmp_path / "data" / "FedDPA" / "data" / folder
        (there / "8").mkdir(parents=True)
        for number, found in files.items():
            (there / "8" / f"local_training_{number}.json").write_text(json.dumps(found))
        test = "".join(json.dumps(row) + "\n" for found in files.values() for row in found)
        (there / "flan_test_200_selected_nstrict_1.jsonl").write_text(test)
    (tmp_path / "data" / "labels").mkdir()
    labels = [row for task in ("ag_news", "cr", "mpqa", "sst2", "subj", "trec") for row in rows(task)]
    for part in ("train", "test"):
        text = "".join(json.dumps(row | {"instruction": f"{part} {row['instruction']}"}) + "\n" for row in labels)
        (tmp_path / "data" / "labels" / f"{part}.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)


def widest(shown: str) -> int:
    """Of a table's lines: sentences and paths are left to the terminal to wrap."""
    sentence = re.compile(r"\. |\.$|, codec|^folder ")
    return max(len(line) for line in shown.splitlines() if not sentence.search(line))


@pytest.mark.usefixtures("public_data")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_loads_and_plans(example: Path) -> None:
    done = legolm("compare" if "variants:" in example.read_text() else "run", example, "--dry-run")
    assert done.returncode == 0, done.stderr
    for word in ("block", "client", "tokens", "memory", "Nothing was done."):
        assert word in done.stdout
    assert widest(done.stdout) <= 80


@pytest.mark.usefixtures("public_data")
def test_the_papers_setting_needs_a_model_with_its_layers(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    paper = Path(__file__).parents[2] / "examples" / "paper"
    for command, name in (("run", "heterogeneous.yaml"), ("compare", "compare.yaml")):
        done = legolm(command, paper / name, "--out", tmp_path / "out", "--set", f"model={tiny('gpt_neox')}")
        assert_one_line(
            done, "lora.targets: 'q_proj' is not a linear layer of family 'gpt_neox'; known: query_key_value"
        )
        assert not (tmp_path / "out").exists()


def test_prune_eval_and_report(
    config: Callable[..., Path], tiny: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    cut = ("prune", tiny("llama"), "--out", tmp_path / "b", "--calibration", corpus, "--samples", 4, "--length", 64)
    done = legolm(*cut, "--method", "structured", "--intermediate-size", 64, "--recover", 1)
    assert done.returncode == 0, done.stderr
    assert widest(done.stdout) <= 80 and f"folder {tmp_path / 'b'}" in done.stdout
    done = legolm("inspect", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert widest(done.stdout.partition("LLM layers cut")[0]) <= 80
    # q, o 64x64, k, v 32x64 and three 96x64 in a layer; 64 of 96 neurons are left: 24,576 of 30,720 weights.
    assert "80.0%" in done.stdout
    for path in (tmp_path, tmp_path / "b" / "config.json"):
        assert_one_line(legolm("inspect", path), "no manifest.json; give a folder that `legolm prune` wrote")
    (tmp_path / "unread").mkdir()
    (tmp_path / "unread" / "manifest.json").symlink_to("/proc/self/mem")  # opens, and gives an error to who reads it
    assert_one_line(legolm("inspect", tmp_path / "unread"), "manifest.json: cannot be read (")
    path = config()
    asked = ("--data", tmp_path / "fr.jsonl", "--text", corpus, "--length", 128)
    done = legolm("eval", tmp_path / "b", *asked)  # its LLM is the one that it was cut from
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("answer loss", "exact match", "perplexity"))
    assert legolm("run", path, "--out", tmp_path / "run").returncode == 0
    page = tmp_path / "run" / "report.html"
    # The LLM of a run's final block is the one that the run recorded.
    own = legolm("eval", tmp_path / "run" / "final" / "fr", "--data", tmp_path / "fr.jsonl")
    assert own.returncode == 0, own.stderr
    before = page.read_text()
    page.unlink()
    assert legolm("report", tmp_path / "run").returncode == 0
    assert page.read_text() == before


def test_a_dry_run_does_nothing(config: Callable[..., Path], tmp_path: Path) -> None:
    path = config()
    before = sorted(tmp_path.rglob("*"))
    assert legolm("run", path, "--dry-run", "--out", tmp_path / "run").returncode == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_is_one_line_and_nothing_is_written(config: Callable[..., Path], tmp_path: Path) -> None:
    def fails(*says: str, sets: tuple[str, ...] = (), **changes: object) -> None:
        options = [part for one in sets for part in ("--set", one)]
        assert_one_line(legolm("run", config(**changes), "--out", tmp_path / "run", *options), *says)
        assert not (tmp_path / "run").exists()

    fails("unknown key `train.stepz`", "did you mean `steps`", sets=("train.stepz=1",))
    fails("blocks.0.sparsity", "1.5", sets=("blocks.0.sparsity=1.5",))
    fails("data.train", "none.jsonl", data={"train": str(tmp_path / "none.jsonl")})
    fails("no part 'xx'", clients=[{"id": "xx", "block": "a"}])
    fails("no field `answer`", "fr.jsonl:1", data={"train": str(tmp_path / "fr.jsonl"), "fields": {"answer": "answer"}})
    (tmp_path / "broken.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    fails("broken.jsonl:2", data={"train": str(tmp_path / "broken.jsonl")})
    (tmp_path / "empty.jsonl").write_text("")
    fails("empty.jsonl", data={"train": str(tmp_path / "empty.jsonl")})
    fails("neither `starter`, a folder", model="no such model")
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n')
    # What would be missed only after the cuts.
    fails("lora.ranks: 'bogus'", "known: q_proj", sets=("lora.ranks={bogus: 1}",))
    fails("lora.start: no folder", sets=("aggregate.form=factor", "lora.start=nowhere"))
    fails("aggregate.start: no folder nowhere", sets=("aggregate.start=nowhere",))
    fails("block a: calibration.text: no file nowhere.txt", sets=("blocks.0.calibration.text=nowhere.txt",))
    fails(
        "chats.jsonl:1: `messages` must be a list of two messages",
        sets=(f"blocks.0.calibration.text={tmp_path}/chats.jsonl",),
    )
    fails(
        "lora.rank 65: the factors that stay frozen are orthonormal, and the hidden size is 64", sets=("lora.rank=65",)
    )
    for place in ("run", "run/rounds", "run/blocks/x", "."):
        fails("is the run folder, in it or around it", sets=(f"final={tmp_path / place}",))
    fails("train example 0 of 'fr' is longer than 16", sets=("train.long_examples=refuse", "train.max_length=16"))
    fails("block a: recover.text: no file", sets=("blocks.0.recover={steps: 1, text: nowhere.txt}",))
    fails("statistics: nowhere: no such file", sets=("blocks.0.calibration={statistics: [nowhere]}",))
    if not torch.backends.mps.is_available():
        fails("device = 'mps'", "take auto", sets=("device=mps",))
    for kind, architecture, says in (
        ("bort", "BortModel", "family 'bort' is not known"),
        ("llama", "LlamaModel", "is not a causal LM"),
        ("mixtral", "MixtralForCausalLM", "'mixtral' is a mixture of experts"),
    ):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [architecture]}))
        fails(says, model=str(tmp_path / kind))


def test_an_out_that_cannot_be_made_is_refused_before_the_work(
    config: Callable[..., Path], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    path, file, model = config(), tmp_path / "fr.jsonl", tiny("llama")
    below = ("--out", file / "x")
    for command in (
        ("run", path),
        ("prune", model, "--method", "wanda", "--sparsity", "0.5"),
        ("calibrate", model, "--text", file),
        ("eval", model, "--data", file),
        ("compose", tmp_path, "--into", "llm"),
        ("ablate", tmp_path),
    ):
        assert_one_line(legolm(*command, *below), f"{file} is a file")


def test_a_folder_of_shared_blocks_that_cannot_be_is_one_line(config: Callable[..., Path], tmp_path: Path) -> None:
    study, file, cut = tmp_path / "study.yaml", tmp_path / "file", tmp_path / "store" / ".cut"
    study.write_text(yaml.safe_dump({"run": str(config()), "variants": [{"name": "a"}]}))
    file.write_text("")
    compare = ("compare", study, "--out", tmp_path / "out")
    for more in ((), ("--dry-run",)):
        for blocks in (file, file / "below"):
            assert_one_line(legolm(*compare, "--blocks", blocks, *more), f"{file} is a file; give another --blocks")
    assert_one_line(legolm("compare", study, "--out", file, "--dry-run"), f"{file} is a file; give another --out")
    assert not (tmp_path / "out").exists()
    cut.parent.mkdir()
    cut.write_text("")
    assert_one_line(legolm(*compare, "--blocks", cut.parent), f"{cut}/", ": cannot be written (", "give another place")


def test_options_that_would_do_nothing_are_refused(
    config: Callable[..., Path], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    config()
    data = ("--data", tmp_path / "fr.jsonl")
    assert_one_line(legolm("eval", tiny("llama"), "--base", "nope", *data), "--base nope", " is a block")
    assert_one_line(legolm("ablate", tmp_path, "--limit", 3), "only with --tasks")


@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize(
    "command",
    [
        ("relay", "--server", "x:1", "--home", "x", "--region", "x", "--away-s"),
        ("client", "--server", "x:1", "--home", "x", "--data", "x", "--memory-mb"),
        ("pick", "x", "--data", "x", "--min-tokens-per-s"),
    ],
)
def test_an_option_of_no_finite_number_is_one_line(command: tuple[str, ...], number: str) -> None:
    assert_one_line(legolm(*command, number), f"{command[-1]} {number}: must be a finite number")


@pytest.mark.parametrize(
    ("variant", "says"),
    [
        ({"name": "blocks"}, "'blocks' is the comparison's own"),
        ({"name": "a", "match_bytes": True}, "match_bytes is for a variant with `block`"),
        ({"name": "a", "set": {"aggregate": "heteagg"}}, "`aggregate` = 'heteagg'"),
        ({"name": "a", "set": {"aggregate": None}}, "`aggregate` = None"),
        ({"name": "a", "set": {"seed": date(2026, 1, 1)}}, "`seed`"),
    ],
)
def test_a_bad_variant_is_one_line(
    variant: dict[str, object], says: str, config: Callable[..., Path], tmp_path: Path
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({"run": str(config()), "variants": [variant]}))
    assert_one_line(legolm("compare", study, "--dry-run"), says)


def test_several_blocks_at_once_and_private_calibration(
    tiny: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    text = ("--samples", 4, "--length", 64)
    bare = ("prune", tiny("llama"), "--method", "structured")
    cut = (*bare, "--calibration", corpus, *text)
    done = legolm(*cut, "--sparsity", "0.25, 0.5", "--out", tmp_path / "blocks")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "blocks").iterdir()) == ["structured-0.25", "structured-0.5"]
    for client in "ab":
        sums = tmp_path / "sums" / client  # its folder is made
        done = legolm("calibrate", tiny("llama"), "--text", corpus, "--out", sums, *text)
        assert done.returncode == 0, done.stderr
    given = ("--statistics", tmp_path / "sums" / "a", "--statistics", tmp_path / "sums" / "b")
    twice = (*given, "--statistics", tmp_path / "sums" / ".." / "sums" / "a")
    assert_one_line(
        legolm(*bare, "--sparsity", 0.5, *twice, "--out", tmp_path / "x"), "a is named twice, so that its client"
    )
    done = legolm(*bare, "--intermediate-size", 40, *given, "--out", tmp_path / "private")
    assert done.returncode == 0, done.stderr
    width = ("--intermediate-size", 40, *given, "--out", tmp_path / "x")
    assert_one_line(legolm(*cut, *width), "--calibration: only with --recover beside --statistics")
    assert_one_line(legolm(*bare, *width, "--samples", 4), "--samples: only with --recover")
    assert_one_line(legolm(*bare, "--sparsity", 0.5, *given, "--out", tmp_path / "x"), "to choose a shape", "text")
    assert_one_line(legolm(*cut, "--params", "many", "--out", tmp_path / "x"), "`params`", "70M")
    assert_one_line(legolm(*cut, "--params", 10, "--out", tmp_path / "x"), "wants params 10; this model gives")
    assert_one_line(legolm(*cut, "--sparsity", 0.5, "--out", tmp_path / "private"), "is already there")
    for sparsity, folder, says in (
        ("0.5, x y", "x", "`sparsity` = 'x y'"),
        ("0.5,", "x", "`sparsity` = ''"),
        ("0.5", "a b", "a b: a block is called as its folder"),
        ("0.5", "llm", "llm: a block is called as its folder"),
    ):
        assert_one_line(legolm(*cut, "--sparsity", sparsity, "--out", tmp_path / folder), says)
    assert_one_line(legolm(*cut, "--sparsity", "0.5,0.5", "--out", tmp_path / "x"), "structured-0.5 is asked for twice")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("prune", "--method", "magnitude", "--sparsity", 0.5, "--calibration", "pydoc"), "magnitude reads no text"),
        (("prune", "--method", "magnitude", "--sparsity", 0.5, "--statistics", "sums"), "as magnitude does not"),
        (("chat", "--base", "starter"), "--base: only with --compare"),
        (("bench", "--runtimes", "transformers", "--quant", "q4_0"), "--quant: only with llama.cpp among --runtimes"),
        (("pick", "--data", "x.json", "--runtime", "transformers", "--quant", "f16"), "only with --runtime llama.cpp"),
        (("eval", "--text", "x.txt", "--template", "chatml"), "--template: only with --data"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    command: tuple[str, ...], says: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    name, *options = command
    out = ("--out", tmp_path / "x") if name == "prune" else ()
    assert_one_line(legolm(name, tiny("llama"), *options, *out), says)
    assert not (tmp_path / "x").exists()


def test_rows_of_other_layouts_and_names_beside_a_config(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    text = ("--samples", 2, "--length", 32)
    dolly, named = tmp_path / "dolly.jsonl", tmp_path / "named.jsonl"
    row = {"instruction": "Which town?", "context": "It is Lyon.", "response": "Lyon", "category": "qa"}
    dolly.write_text(f"{json.dumps(row)}\n" * 3)
    named.write_text(dolly.read_text().replace("instruction", "q").replace("context", "c").replace("response", "a"))
    names = ("--instruction", "q", "--input", "c", "--answer", "a")
    cut = ("prune", tiny("llama"), "--method", "wanda", "--sparsity", 0.5, *text)
    sums = ("calibrate", tiny("llama"), "--needs", "diagonal", *text)
    for name, rows in (("plain", (dolly,)), ("named", (named, *names))):
        done = legolm(*cut, "--out", tmp_path / name, "--calibration", *rows)
        assert done.returncode == 0, done.stderr
        assert "--calibration: nothing uses field `category` (3 rows)." in done.stderr
        done = legolm(*sums, "--out", tmp_path / f"{name}.sums", "--text", *rows)
        assert done.returncode == 0, done.stderr
    assert (
        "--text: dolly: 3 of 3 rows, 3 with context." in legolm(*sums, "--out", tmp_path / "b", "--text", dolly).stderr
    )
    one, two = (load_file(tmp_path / f"{name}.sums") for name in ("plain", "named"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert_one_line(legolm(*cut, "--out", tmp_path / "x", "--calibration", named), "known layout", "--instruction")
    assert_one_line(
        legolm(*cut, "--out", tmp_path / "x", "--calibration", dolly, "--layout", "doly"), "layout", "dolly"
    )


def test_bad_input_ends_a_process_with_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "legolm.cli", "run", str(tmp_path / "none.yaml")]
    assert_one_line(subprocess.run(command, capture_output=True, text=True), "none.yaml: no such file")


def test_help_names_the_commands() -> None:
    done = legolm("--help")
    assert done.returncode == 0
    commands = ("run", "compare", "prune", "calibrate", "inspect", "eval", "compose", "ablate", "report", "status")
    assert all(command in done.stdout for command in (*commands, "client", "certs", "devices"))


def test_help_says_what_arguments_are_and_the_version_is_told() -> None:
    assert "hub id" in legolm("eval", "--help").stdout
    assert legolm("--version").stdout == f"{version('legolm')}\n"


def test_help_needs_no_heavy_import() -> None:
    script = (
        "import sys, legolm.cli; print([m for m in ('torch', 'transformers', 'flwr', 'pydantic') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"
