"""The Python face: its names and signatures, and a federation from cut to evaluation."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import legolm as lg
from helpers import PAIRS
from legolm import config as configs
from legolm import pipeline

SIGNATURES = {
    "LLM": "(name)",
    "Block": "(name, path, method, coverage, base_fingerprint, parameters, sparsity, file_bytes, details=<factory>)",
    "Change": "(delta, received, examples, rank, sent=<factory>)",
    "Client": "(holds, data, validation=None, test=None, rank=None, joins=1, leaves=None)",
    "Coverage": "(shape, layers, groups, neurons, masks=<factory>)",
    "Example": "(messages, raw=False, tools='')",
    "Federation": "(llm, clients, scheme='heteagg', rounds=3, trainer='adamw', seed=0, **sections)",
    "LegolmError": "(*args, **kwargs)",
    "Message": "(role, content, more='')",
    "Run": "(folder)",
    "Scheme": "()",
    "Start": "(shape, make, rank, seed=0, server=<factory>, arrived=<class 'dict'>)",
    "Task": "(model, coverage, start, scale, examples, config, precision, steps, seed, done=0, total=None, frozen=(), "
    "proximal=0.0, dropout=0.0, dp=None, parts=())",
    "ablate": "(run, out=None, *, questions=None, retrain=False, only=())",
    "compare": "(study, out, *, changes=(), models=True, seeds=1, jobs=1)",
    "compose": "(sources, into, out, *, base=None, method='heteagg', form=None, scaling=None, density=None, "
    "weights=None, validate=None, rows=None)",
    "criterion": "(name, needs)",
    "cut": "(llm, out, *, method='structured', recover=0, calibration='pydoc', samples=32, length=256, seed=0, "
    "precision='fp32', **target)",
    "evaluate": "(models, questions, *, precision='fp32')",
    "load": "(name)",
    "questions": "(tasks=(), *, include=None, data=None, layout='auto', fields=None, text=None, limit=None, "
    "rouge=False, length=None, windows=None)",
    "read": "(source, *, layout='auto', instruction=None, input=None, answer=None, messages=None, text=None, "
    "bad_rows='refuse', system=None)",
    "read_block": "(path)",
    "scheme": "(name)",
    "trainer": "(name, *, private=False, moves=None)",
}


def signature(thing: Any) -> str:
    """Without types, which are long; `<factory>` stands for a default that is made."""
    try:
        found = inspect.signature(thing)
    except ValueError:
        return "(*args, **kwargs)"
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def test_the_public_names_and_their_signatures_are_these() -> None:
    assert set(lg.__all__) == set(SIGNATURES) | {"__version__"}
    assert {name: signature(getattr(lg, name)) for name in SIGNATURES} == SIGNATURES
    for name in SIGNATURES:
        assert inspect.getdoc(getattr(lg, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'Federaton'"):
        _ = lg.Federaton


def test_importing_takes_nothing_heavy() -> None:
    code = (
        "import legolm, sys; dir(legolm); print([one for one in ('torch', 'pydantic', 'numpy') if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@lg.scheme("bounded_mean")
def bounded_mean(changes: torch.Tensor, weight: torch.Tensor, *, bound: float = 3.0) -> torch.Tensor:
    """Changes cut to a multiple of their median size."""
    most = bound * changes.abs().nanmedian()
    return changes.clamp(-most, most).nanmean(0)


@pytest.fixture(scope="module")
def small(llm: lg.LLM, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> lg.Block:
    out = tmp_path_factory.mktemp("blocks") / "small"
    return lg.cut(llm, out, calibration=str(corpus), samples=4, length=64, intermediate_size=64)


def federation(llm: lg.LLM, small: lg.Block, **changes: Any) -> lg.Federation:
    clients = {"paris": lg.Client(small, PAIRS["paris"]), "rome": lg.Client(llm, PAIRS["rome"])}
    given: dict[str, Any] = {
        "llm": llm, "clients": clients, "rounds": 2, "precision": "fp32", "lora": {"rank": 4},
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 0.01}, "federation": {"engine": "local"},
    }  # fmt: skip
    return lg.Federation(**given | changes)


def test_from_the_cut_to_the_evaluation(llm: lg.LLM, small: lg.Block, tmp_path: Path) -> None:
    fed = federation(llm, small, scheme=bounded_mean(bound=2.0))
    assert "paris" in str(fed.plan()) and "bounded_mean (bound 2.0)" in str(fed.plan())
    assert "All 2 clients count the same" in str(federation(llm, small).plan())  # 14 examples and 10, and the cap
    assert "count the same" not in str(federation(llm, small, aggregate={"weight": "examples"}).plan())
    run = fed.run(tmp_path / "run", resume=True)
    losses = [record.llm.loss for record in run.rounds if record.llm is not None]
    assert len(losses) == 3 and losses[2] < losses[0]
    again = fed.run(tmp_path / "run", resume=True)  # finished: nothing is trained anew
    assert [record.seconds for record in again.rounds] == [record.seconds for record in run.rounds]
    assert run.config.aggregate.settings == {"bound": 2.0}
    assert run.summary.llm.loss_after == pytest.approx(min(losses[1:]))
    assert len(run.summary.to_frame("clients")) == 2
    svg = run.plot("loss", "others")._repr_svg_()
    assert svg.startswith("<svg") and "xmlns=" in svg
    with pytest.raises(lg.LegolmError, match=r"Run\.plot: `data` = 'nobody': must be 'own' or 'others'"):
        run.plot("loss", "nobody")  # type: ignore[arg-type]
    model, tokenizer = run.model("paris")
    assert model.config.intermediate_size == 64
    with torch.no_grad():  # asked as it is in memory, not as it is on disk
        model.lm_head.weight.mul_(3.0)
    asked = lg.questions(
        data=str(tmp_path / "run" / "data" / "*" / "train" / "rome.jsonl"), fields={"messages": "messages"}
    )
    found, on_disk = (
        {one.model: one.figure.value for one in lg.evaluate([first, llm], asked) if one.metric == "answer loss"}
        for first in (model, run.block("paris"))
    )
    assert len(found) == 2 and found[llm.name] == on_disk[llm.name]
    assert found["paris (in memory)"] != pytest.approx(on_disk[str(run.block("paris").path)])
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"


def test_data_in_memory_are_written_whole(llm: lg.LLM, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Add"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}], "weight": 1},
    ]
    rows = [{"messages": turns, "tools": [{"function": {"name": "add"}}]}, {"prompt": "a", "completion": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "c"}]))
    examples = lg.read(str(tmp_path / "rows.jsonl"))
    assert [bool(one.tools) for one in examples] == [True, False, False]
    config = lg.Federation(llm, {"paris": lg.Client(llm, examples)}).config(tmp_path / "run")
    assert list(lg.read(config.data.train)) == list(examples)


def test_yaml_and_python_end_in_the_same_run(llm: lg.LLM, small: lg.Block, tmp_path: Path) -> None:
    run = federation(llm, small).run(tmp_path / "python")
    section = {"train": f"{tmp_path}/yaml/*.jsonl", "fields": {"messages": "messages"}}
    (tmp_path / "yaml").mkdir()
    for id, pairs in PAIRS.items():
        turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
        (tmp_path / "yaml" / f"{id}.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    raw = {
        "model": llm.name, "precision": "fp32", "data": section, "lora": {"rank": 4},
        "blocks": [{"name": "small", "path": str(small.path)}, {"name": "dense", "method": "dense"}],
        "clients": [{"id": "paris", "block": "small"}, {"id": "rome", "block": "dense"}],
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 0.01}, "federation": {"engine": "local", "rounds": 2},
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(raw))
    pipeline.run(configs.load(path), tmp_path / "folder")
    for number in range(3):
        one, two = (
            load_file(folder / f"rounds/000{number}/adapter.safetensors")
            for folder in (run.folder, tmp_path / "folder")
        )
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_cut_that_is_there_is_taken_and_another_is_not(llm: lg.LLM, small: lg.Block, corpus: Path) -> None:
    text = {"calibration": str(corpus), "samples": 4, "length": 64}
    before = (small.path / "manifest.json").stat().st_mtime_ns
    assert lg.cut(llm, small.path, **text, intermediate_size=64).coverage.hash == small.coverage.hash
    assert (small.path / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(lg.LegolmError, match="holds another block"):
        lg.cut(llm, small.path, **text, intermediate_size=32)


def test_own_validation_and_test_examples(llm: lg.LLM, small: lg.Block, tmp_path: Path) -> None:
    own = lg.Client(small, PAIRS["paris"], validation=PAIRS["paris"][:3], test=PAIRS["paris"][3:5])
    run = federation(llm, small, clients={"paris": own}, evaluate={"local_only": False}).run(
        tmp_path / "run", models=False
    )
    record = run.rounds[0].by_client()["paris"].root["paris"]
    assert record.examples == 2
    with pytest.raises(lg.LegolmError, match="no final model 'paris'; the run has none yet"):
        run.model("paris")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"clients": {"paris": []}}, "'paris' is list; give a Client"),
        ({"scheme": "bounded_men"}, "scheme 'bounded_men' is not known; did you mean `bounded_mean`?"),
        ({"trian": {"steps": 1}}, "no section 'trian'; did you mean `train`?"),
        ({"train": {"stepps": 1}}, "unknown key `train.stepps`"),
        ({"rounds": 0}, "`federation.rounds` = 0"),
    ],
)
def test_bad_federations_are_one_line(change: dict[str, Any], says: str, llm: lg.LLM, small: lg.Block) -> None:
    with pytest.raises(lg.LegolmError) as caught:
        federation(llm, small, **change).plan()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_clients_are_one_line(llm: lg.LLM, small: lg.Block, tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    good = lg.Client(small, PAIRS["paris"])
    for client, says in (
        (lg.Client(small, []), "clients: 'x' has no examples; give it some"),
        (lg.Client(small, ["text"]), "train example 0 of 'x' is str; give Examples"),  # type: ignore[list-item]
        (lg.Client("small", PAIRS["paris"]), "'x' holds 'small'; give a Block"),  # type: ignore[arg-type]
        (lg.Client(lg.LLM(str(tiny("mistral"))), PAIRS["paris"]), "the federation's LLM is"),
        (lg.Client(small, PAIRS["paris"], test=PAIRS["rome"]), "'good' has no test examples and others have"),
        (lg.Client(small, PAIRS["paris"][:1]), "'x' is left without"),
    ):
        with pytest.raises(lg.LegolmError) as caught:
            federation(llm, small, clients={"good": good, "x": client}).plan()
        assert says in str(caught.value)
    for call, says in (
        (lambda: bounded_mean(bund=2.0), "unknown key `bund` of scheme 'bounded_mean'; did you mean `bound`?"),
        (lambda: bounded_mean(bound="much"), "`bound` = 'much'"),
        (lambda: lg.LLM("no/such/model"), "neither `starter`, a folder with a checkpoint, nor a hub id"),
        (lambda: lg.Run(tmp_path), "no config.yaml"),
        (lambda: lg.evaluate([3], lg.questions(data="x")), "data"),
        (lambda: federation(llm, small, scheme=3), "federation.scheme: is 3; give a registered scheme"),
    ):
        with pytest.raises(lg.LegolmError) as caught:
            call()  # type: ignore[no-untyped-call]
        assert says in str(caught.value)


def test_a_trainer_of_this_script_stays_in_this_process(
    llm: lg.LLM, small: lg.Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    def still(task: lg.Task) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        zero = {key: torch.zeros_like(t) for key, t in task.start.items() if key not in task.frozen}
        return zero, dict.fromkeys(("loss_first", "loss_last", "steps", "tokens", "seconds"), 0.0)

    still.__module__ = "__main__"
    entry = lg.trainer("still")(still)
    with pytest.raises(lg.LegolmError, match="trainer 'still': is defined in this script"):
        federation(llm, small, trainer=entry(), federation={"engine": "flower"}).plan()
    assert federation(llm, small, trainer=entry()).plan().plan.clients[0].id == "paris"


@pytest.mark.usefixtures("shipped")
def test_the_notebook_runs(
    tiny: Callable[[str], Path],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its code cells one after the other, with other values in the cell that is tagged for it."""
    path = Path(__file__).parents[2] / "examples" / "federation.ipynb"
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    cut = {"intermediate_size": 64, "calibration": str(corpus)}
    given = f"model, out = {str(tiny('llama'))!r}, {str(tmp_path / 'out')!r}\ncut = {cut!r}\nsteps, rounds = 1, 2\n"
    tagged = ["parameters" in cell["metadata"].get("tags", ()) for cell in cells]
    assert tagged.count(True) == 1
    code = [given if tag else "".join(cell["source"]) for tag, cell in zip(tagged, cells, strict=True)]
    monkeypatch.chdir(tmp_path)
    script = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    exec(compile("\n".join(code), "federation.ipynb", "exec"), vars(script))
    assert "bounded_mean (bound 3.0)" in capsys.readouterr().out
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "run" / "final" / "weak").config.intermediate_size == 64
    )
