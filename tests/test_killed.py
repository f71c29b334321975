"""Commands that are killed at any point go on when they are given again: nothing twice, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import assert_one_line, ended, forked, legolm, without_clocks
from legolm.evaluation import side_by_side
from legolm.federate.server import Rounds
from legolm.prune import build
from legolm.system import scratch_folder


def killed(action: Callable[[], object]) -> None:
    """Do it in a process that ends itself by SIGKILL on the way."""
    assert ended(forked(action)) == -signal.SIGKILL


def at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    """SIGKILL in place of so many a call of a function."""
    real, calls = getattr(module, name), iter(range(1, 100))

    def changed(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    monkeypatch.setattr(module, name, changed)


def test_prune_goes_on_with_what_is_missing(
    tiny: Callable[[str], Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path(shutil.copy(corpus, tmp_path / "text.txt"))
    cut = ("prune", tiny("llama"), "--method", "wanda", "--calibration", text, "--samples", 2, "--length", 32)
    several, out = (*cut, "--sparsity", "0.25,0.5", "--recover", 1), tmp_path / "blocks"
    with monkeypatch.context() as patched:
        at(patched, build, "recover", 2)
        killed(lambda: legolm(*several, "--out", out))
    assert len(list(out.glob(".wanda-0.5.*.partial"))) == 1
    first = {file: file.stat().st_mtime_ns for file in (out / "wanda-0.25").iterdir()}
    done = legolm(*several, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "wanda-0.25: is there already" in done.stderr and "done: cut wanda-0.5" in done.stderr
    assert {file: file.stat().st_mtime_ns for file in (out / "wanda-0.25").iterdir()} == first
    assert sorted(path.name for path in out.iterdir()) == ["wanda-0.25", "wanda-0.5"]
    assert legolm(*several, "--out", tmp_path / "begun").returncode == 0
    for name in ("wanda-0.25", "wanda-0.5"):
        one, two = (load_file(folder / name / "model.safetensors") for folder in (out, tmp_path / "begun"))
        assert all(torch.equal(one[key], two[key]) for key in one)
    again = legolm(*several, "--out", out)
    assert again.returncode == 0 and "done:" not in again.stderr
    assert again.stdout.count("wanda-0.") == done.stdout.count("wanda-0.")
    for change, says in (
        (("--seed", 1), "seed was 0 and is 1"),
        (("--precision", "bf16"), 'precision was "fp32" and is "bf16"'),
        (("--samples", 3), 'holds another block: target was {"calibration": {'),
    ):
        assert_one_line(legolm(*several, "--out", out, *change), says)
    text.write_text(text.read_text() + "More.")
    assert_one_line(legolm(*several, "--out", out), "files was")
    (out / "wanda-0.5" / "manifest.json").unlink()
    assert_one_line(legolm(*several[:-4], "--sparsity", "0.5,0.75", "--out", out), "wanda-0.5: no manifest.json")


def test_compare_goes_on_where_it_was(
    three_clients: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"limit_test": 1, "limit_validation": 1, "train": f"{tmp_path}/data/*.jsonl"}
    only = {"local_only": False, "others": 1}
    raw = three_clients(tmp_path, ("dense", "dense", "dense"), rows=10, data=small, evaluate=only)
    variants = [{"name": name, "set": {"aggregate.scheme": name}} for name in ("fedavg", "median")]
    (tmp_path / "study.yaml").write_text(json.dumps({"run": raw, "variants": variants}))
    command, out = ("compare", tmp_path / "study.yaml", "--no-models", "--out"), tmp_path / "out"
    with monkeypatch.context() as patched:
        at(patched, Rounds, "_train_round", 4)  # the last round of the second
        killed(lambda: legolm(*command, out))
    assert not (out / "compare.json").exists() and (out / "median" / "rounds" / "0001").exists()
    stay = [*(out / "fedavg" / "rounds").rglob("*.*"), *(out / "median" / "rounds" / "0001").iterdir()]
    stamps = {path: path.stat().st_mtime_ns for path in stay}
    for folder in (out, tmp_path / "begun"):
        done = legolm(*command, folder)
        assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in stay} == stamps
    one, two = (json.loads((folder / "compare.json").read_text()) for folder in (out, tmp_path / "begun"))
    assert without_clocks(one) == without_clocks(two)


def test_what_a_killed_process_left_goes_and_what_another_works_on_stays(tmp_path: Path) -> None:
    left = tmp_path / ".out.00000000.partial"
    left.mkdir()
    with scratch_folder(tmp_path / "out") as held:
        assert not left.exists()
        with scratch_folder(tmp_path / "out"):
            assert held.exists()
    assert list(tmp_path.iterdir()) == []


def test_eval_goes_on_where_it_was(
    tiny: Callable[[str], Path],
    tasks: Callable[..., Path],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{"instruction": f"Say {i}", "output": "ab" * (i + 1)} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = ("--text", corpus, "--length", 64, "--windows", 2)
    asked = ("--data", tmp_path / "data.jsonl", *text, "--tasks", "three", "--include", tasks())
    command, out = ("eval", tiny("llama"), tiny("qwen3"), *asked, "--out"), tmp_path / "found.json"
    parts = tmp_path / "found.json.parts"
    with monkeypatch.context() as patched:
        at(patched, side_by_side, "tokens_per_second", 2)
        killed(lambda: legolm(*command, out))
    assert not out.exists()
    assert (
        len(list(parts.glob("*.json"))) == 3 + 1 + 3
    )  # of each model task, answers and text, and the first as a whole
    half = shutil.copytree(parts, tmp_path / "half")
    with monkeypatch.context() as patched:
        for name in ("run_tasks", "score_each", "window_losses"):
            patched.setattr(f"legolm.evaluation.questions.{name}", lambda *arguments: 1 / 0)
        done = legolm(*command, out)
    assert done.returncode == 0, done.stderr
    assert not parts.exists()
    assert legolm(*command, tmp_path / "begun.json").returncode == 0
    one, two = (json.loads(path.read_text()) for path in (out, tmp_path / "begun.json"))
    for found in (one, two):
        for size in found["models"]:
            size.pop("tokens_per_s")
    assert one == two

    # What is not what was written is measured again, and so is what is asked otherwise.
    out.unlink()
    shutil.copytree(half, parts)
    for file in parts.glob("*.json"):
        file.write_text(file.read_text()[:-1])
    assert legolm(*command, out).returncode == 0
    again = json.loads(out.read_text())
    assert again["results"] == two["results"]
    out.unlink()
    shutil.copytree(half, parts)
    other = legolm(*command, out, "--precision", "bf16")
    assert other.returncode == 0, other.stderr
    assert json.loads(out.read_text())["results"] != two["results"]
