"""Benchmarks whose last line says more than they know: seconds side by side, a key's name, a run's folder."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from legolm.runs import RoundRecord, Training

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def loaded(name: str, patched: pytest.MonkeyPatch, *arguments: str) -> ModuleType:
    patched.syspath_prepend(str(BENCHMARKS))
    patched.setattr("sys.argv", [f"{name}.py", *arguments])
    return importlib.import_module(name)


def a_round(number: int, seconds: float, trained: float, scored: bool = True) -> RoundRecord:
    one = Training(loss_first=1, loss_last=1, steps=1, tokens=1, seconds=trained)
    train = {"a": one, "b": one} if trained else {}
    validation = 1.0 if scored else None
    return RoundRecord(
        round=number, llm=None, held=[], validation=validation, llm_validation=None, seconds=seconds, train=train
    )


@pytest.mark.parametrize(
    ("rounds", "parts"),
    [
        # Two clients at once, 12 s each, 8 s of scoring: that, nobody recorded.
        ([(20, 12, True)] * 3, {"training": 0, "scoring": 5, "undivided": 60}),
        # Unscored rounds show what the others took without.
        ([(12, 12, False), (12, 12, False), (20, 12, True)], {"training": 36, "scoring": 13, "undivided": 0}),
        # One after the other.
        ([(20, 6, True)] * 3, {"training": 36, "scoring": 29, "undivided": 0}),
    ],
)
def test_what_clients_took_side_by_side_is_no_scoring_of_zero(
    rounds: list[tuple[float, float, bool]], parts: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = loaded("run_time", monkeypatch)
    records = [a_round(0, 5, 0), *(a_round(place, *one) for place, one in enumerate(rounds, 1))]
    wall = sum(one.seconds for one in records)
    summary = SimpleNamespace(seconds={"blocks": 0.0}, wall_s=wall)
    monkeypatch.setattr(module, "Summary", SimpleNamespace(read=lambda folder: summary))
    monkeypatch.setattr(module, "read_stages", lambda path: records)
    monkeypatch.setattr(module, "RunDir", lambda folder: SimpleNamespace(known=lambda: SimpleNamespace(cuts=[])))
    found = module.times(Path("run"))
    assert {name: found[name] for name in parts} == parts and found["rest"] == 0


def test_a_quick_look_at_memory_names_the_clients_that_it_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = loaded("aggregate", monkeypatch, "--quick")
    figures = {"cpu_s": 1.0, "finish_s": 1.0, "rss_mb": 1.0, "rss_before_mb": 1.0}
    svd = {"full_svd_s": 1.0, "exact_s": 1.0, "excess_error": 0.0}
    monkeypatch.setattr(module, "child", lambda kind, *rest: svd if kind == "svd" else figures)
    module.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [name for name in found if name.startswith("rss")] == ["rss_64_over_8"]


def test_a_run_of_the_method_is_read_where_the_comparison_put_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first seed other than 0 has no folder below `seeds`."""
    module = loaded("method", monkeypatch, "--out", str(tmp_path), "--bench", "dates")
    rows = [SimpleNamespace(name="default", seed=seed, folder=folder) for seed, folder in ((3, "x"), (0, "y"))]
    read: list[Path] = []

    def figures(folder: Path) -> dict[str, float]:
        read.append(folder)
        return dict.fromkeys(("llm_loss", "llm_exact", "mb", "steps", "seconds"), float(len(read)))

    def compare(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(rows=rows)

    monkeypatch.setattr(module, "cut", lambda out: [])
    monkeypatch.setattr(module, "compare", compare)
    monkeypatch.setattr(module, "figures", figures)
    module.main()
    assert read == [tmp_path / "dates" / "x", tmp_path / "dates" / "y"]
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["dates"]["default"]
    assert (found["mb"], found["mb_se"]) == (1.5, 0.5)
