"""What scripts give: models in memory are none but themselves, and what is of no kind is one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import legolm as lg
from legolm.models import autocast, dtype_of

ROWS = '{"instruction": "Say 1", "output": "fr"}\n{"instruction": "Say 2", "output": "de"}\n'


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    return tmp_path / "rows.jsonl"


def test_models_in_memory_stand_for_nobody(llm: lg.LLM, corpus: Path, rows: Path, tmp_path: Path) -> None:
    block = lg.cut(llm, tmp_path / "block", calibration=str(corpus), samples=4, length=64, intermediate_size=64)
    tuned, same, cut = (AutoModelForCausalLM.from_pretrained(path) for path in (llm.path, llm.path, block.path))
    with torch.no_grad():
        for model in (tuned, cut):
            model.lm_head.weight.mul_(3.0)
    asked = lg.questions(data=str(rows))

    def losses(*models: Any) -> dict[str, tuple[float, str | None]]:
        found = lg.evaluate(models, asked)
        return {one.model: (one.figure.value, one.against) for one in found if one.metric == "answer loss"}

    base = losses(llm)[llm.name][0]
    memory = f"{llm.path.name} (in memory)"
    alone = losses(tuned)[memory][0]
    assert alone != pytest.approx(base)
    assert losses(same, tuned) == {memory: (base, None), f"{memory}-2": (alone, memory)}
    assert losses(llm, tuned) == {llm.name: (base, None), memory: (alone, llm.name)}
    # A block is beside its LLM as it was, and so is one in memory.
    found = losses(tuned, block, cut)
    assert list(found) == [memory, llm.name, str(block.path), "block (in memory)"]
    assert found[llm.name] == (base, memory) and found[memory] == (alone, None)
    assert found[str(block.path)][1] == found["block (in memory)"][1] == llm.name
    assert found[str(block.path)][0] != pytest.approx(found["block (in memory)"][0])


def test_what_is_of_no_kind_is_one_line(llm: lg.LLM, rows: Path, tmp_path: Path) -> None:
    given: Any = lg
    asked = lg.questions(data=rows, limit=1)
    assert len(asked.examples) == 1
    out = tmp_path / "out"
    cut = {"llm": llm, "out": out, "method": "magnitude", "sparsity": 0.5}
    says: dict[str, Callable[[], Any]] = {
        "evaluate: `models` = 'a/model': must be list[": lambda: given.evaluate("a/model", asked),
        "evaluate: `questions` = 'arc_easy': must be Questions": lambda: given.evaluate([llm], "arc_easy"),
        "evaluate: `precision` = 'fp16': must be 'fp32' or 'bf16'": lambda: given.evaluate(
            [llm], asked, precision="fp16"
        ),
        "evaluate: Linear is no model": lambda: lg.evaluate([torch.nn.Linear(1, 1)], asked),
        "models: none to evaluate": lambda: lg.evaluate([], asked),
        "questions: `tasks` = 'arc_easy': must be list[str]": lambda: lg.questions("arc_easy"),
        "questions: `data` = 5: must be str | Path | None": lambda: given.questions(data=5),
        "--limit 0: must be at least 1": lambda: lg.questions(data=rows, limit=0),
        "--limit -1: must be at least 1": lambda: lg.questions(data=rows, limit=-1),
        "--layout, --instruction, --input, --answer, --messages, --bad-rows: only with --data": lambda: lg.questions(
            text=rows, layout="dolly"
        ),
        "--windows 0: must be at least 1": lambda: lg.questions(text=rows, windows=0),
        "--length 1: must be at least 2": lambda: lg.questions(text=rows, length=1),
        "compose: `sources` = 'a': must be list[str | Path | Block]": lambda: lg.compose("a", "llm", out),
        "cannot be made ([Errno 36] File name too long": lambda: lg.compose(["a"], "llm", tmp_path / ("a" * 300)),
        "sources: none given": lambda: lg.compose([], "llm", out),
        "compose: `rows` says how": lambda: lg.compose(["a"], "llm", out, rows={"layout": "dolly"}),
        "compare: `changes` = 'a.b=1': must be list[str]": lambda: lg.compare("study.yaml", out, changes="a.b=1"),
        "--seeds 0: must be at least 1": lambda: lg.compare("study.yaml", out, seeds=0),
        "--jobs 0: must be at least 1": lambda: lg.compare("study.yaml", out, jobs=0),
        "read: `source` = 5: must be str | Path | list[str]": lambda: given.read(5),
        "LLM: `name` = PosixPath(": lambda: given.LLM(llm.path),
        "LLM: `name` = 5": lambda: given.LLM(5),
        "cut: `precision` = 'fp16'": lambda: given.cut(**cut, precision="fp16"),
        "cut: `seed` = -1: must be from 0": lambda: given.cut(**cut, seed=-1),
        "cut: `out` = 'a b': a block is called as its folder": lambda: given.cut(**cut | {"out": "a b"}),
        "cut: `name` = 'other': a block is called as its folder": lambda: given.cut(**cut, name="other"),
        "Run: `folder` = 5: must be str | Path": lambda: given.Run(5),
    }
    for message, call in says.items():
        with pytest.raises(lg.LegolmError) as caught:
            call()
        assert message in str(caught.value), message
        assert "\n" not in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize("use", [dtype_of, autocast])
def test_an_unknown_precision_is_no_other(use: Callable[[Any], object]) -> None:
    with pytest.raises(lg.LegolmError, match="precision = 'fp16': must be fp32 or bf16"):
        use("fp16")
