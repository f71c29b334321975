"""The command as users meet it: a process, its exit code, one line for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))


def legolm(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "legolm.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def assert_one_line(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for part in says:
        assert part in lines[0]


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


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_loads_and_plans(example: Path) -> None:
    done = legolm("run", example, "--dry-run")
    assert done.returncode == 0, done.stderr
    for word in ("block", "client", "tokens a round", "memory", "Nothing was done."):
        assert word in done.stdout


def test_prune_eval_and_report(
    config: Callable[..., Path], tiny: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    cut = ("prune", tiny("llama"), "--out", tmp_path / "b", "--calibration", corpus, "--samples", 4, "--length", 64)
    done = legolm(*cut, "--method", "structured", "--intermediate-size", 64, "--recover", 1)
    assert done.returncode == 0, done.stderr
    done = legolm("inspect", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    # q, o 64x64, k, v 32x64 and three 96x64 in a layer; 64 of 96 neurons are left: 24,576 of 30,720 weights.
    assert "80.0%" in done.stdout
    assert_one_line(legolm("inspect", tmp_path), "no manifest.json; give a folder that `legolm prune` wrote")
    path = config()
    done = legolm("eval", tmp_path / "b", "--data", tmp_path / "fr.jsonl", "--text", corpus, "--length", 128)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("answer loss", "exact match", "perplexity"))
    assert legolm("run", path, "--out", tmp_path / "run").returncode == 0
    page = tmp_path / "run" / "report.html"
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
    for kind, architecture, says in (
        ("bert", "BertModel", "is not a causal LM"),
        ("gpt2", "GPT2LMHeadModel", "known: llama, mistral, qwen2, qwen3"),
    ):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [architecture]}))
        fails(says, model=str(tmp_path / kind))


def test_help_names_the_commands() -> None:
    done = legolm("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("run", "prune", "inspect", "eval", "report"))


def test_help_needs_no_heavy_import() -> None:
    script = (
        "import sys, legolm.cli; print([m for m in ('torch', 'transformers', 'flwr', 'pydantic') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"
