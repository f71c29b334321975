"""Records of runs and studies: to JSON and back, as tables, and those of another version."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import assert_one_line, legolm
from legolm.errors import LegolmError
from legolm.report.compare import budget, page, shown
from legolm.runs import (
    UNSCORED,
    CompareRow,
    Comparison,
    Losses,
    RoundRecord,
    Summary,
    Traffic,
    dump_record,
    read_record,
    read_stages,
    traffic_of,
    write_csv,
)

OLD = {"run": "heteagg", "run_id": "8156433e4dffd6c1", "model": "starter", "seed": 0, "rounds": 2, "history": []}
"""How the first version's summary began: without a number of its schema."""


def variant(name: str, **changes: Any) -> CompareRow:
    figures: dict[str, Any] = {"llm": 1.5, "llm_before": 4.0, "own": 2.0, "others": 3.0, "validation": 2.5}
    figures |= {"llm_validation": 1.75, "bytes_down": 2e6, "bytes_up": 1e6, "replies": 6, "tokens": 1000.0}
    figures |= {"seed": 0, "learning_rate": 0.01, "llm_best_round": 2, "llm_exact_match": 0.5, "own_exact_match": 0.25}
    figures |= {"others_exact_match": 0.125, "curve": []}
    figures |= {"flops": 3e12, "memory": 4e8, "seconds": 12.0, "clients": 3, "rounds": 2, "best_round": 1}
    names = {"name": name, "scheme": "heteagg", "settings": {"form": "exact"}, "mode": "federated", "codec": "fp32"}
    return CompareRow.model_validate(names | figures | changes)


def test_what_came_before_the_rounds_is_spread_over_them() -> None:
    """Sums of 40 bytes from `a`, two rounds of 1 up and 2 down; `b` missed one."""
    one = Traffic(up=1, down=2)
    sent = ({"a": Traffic(up=40, down=4)}, {"a": one, "b": one}, {"a": one})
    rounds = [RoundRecord(round=at, bytes=each, seconds=0, **dict(UNSCORED)) for at, each in enumerate(sent)]
    assert traffic_of(rounds) == ((40 + 3) / 3, (4 + 6) / 3)
    assert traffic_of(rounds, {"a"}) == (21, 4) and traffic_of(rounds, {"b"}) == (1, 2)
    assert traffic_of(rounds[:1]) == (40, 4) and traffic_of([]) == (0, 0)


def test_a_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    rounds = [RoundRecord(round=at, seconds=0, **dict(UNSCORED)) for at in range(2)]
    lines = "".join(dump_record(one, indent=None) for one in rounds)
    for cut, count in ((0, 2), (1, 1), (40, 1)):
        (tmp_path / "metrics.jsonl").write_text(lines[: len(lines) - cut])
        assert read_stages(tmp_path / "metrics.jsonl") == rounds[:count]
    (tmp_path / "metrics.jsonl").write_text("{\n" + lines)
    with pytest.raises(LegolmError, match="is broken"):
        read_stages(tmp_path / "metrics.jsonl")


def test_a_comparison_is_the_same_in_json_csv_and_pandas(tmp_path: Path) -> None:
    found = Comparison(name="study", rows=[variant("a"), variant("b, c", others=None, llm=math.inf)])
    found.write(tmp_path)
    assert read_record(tmp_path / "compare.json", Comparison) == found
    first, second = (tmp_path / "compare.csv").read_text().splitlines()[1:]
    assert first.startswith(
        "a,0,heteagg,form=exact,federated,fp32,3,0.01,2,1,2,1.5,4.0,0.5,2.0,0.25,3.0,0.125,2.5,1.75,"
    )
    assert second.startswith('"b, c",0,heteagg,form=exact,federated,fp32,3,0.01,2,1,2,inf,4.0,0.5,2.0,0.25,,0.125,2.5')
    frame = found.to_frame()
    assert list(frame["name"]) == ["a", "b, c"]
    assert frame["others"][0] == 3.0 and math.isnan(frame["others"][1])


def test_columns_without_a_figure_are_left_out() -> None:
    nothing = dict.fromkeys(("llm", "llm_before", "llm_exact_match", "llm_validation", "others", "others_exact_match"))
    found = Comparison(name="study", rows=[variant("a", **nothing), variant("b", **nothing, own=2.5)])
    assert shown(found)[:5] == ["learning_rate", "own", "own_exact_match", "best_round", "validation"]
    text = page(found)
    assert "blocks, own data" in text and "LLM loss" not in text and text.count("<circle") == 2
    both = page(Comparison(name="study", rows=[variant("a"), variant("b", **nothing)]))
    assert both.count("<circle") == 3  # two of the blocks, one LLM


def test_without_pandas_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(LegolmError, match=r"pip install 'legolm\[data\]'"):
        Comparison(name="study", rows=[variant("a")]).to_frame()


def test_a_table_without_rows_is_an_empty_file(tmp_path: Path) -> None:
    write_csv([], tmp_path / "none.csv")
    assert (tmp_path / "none.csv").read_text().strip() == ""


def test_figures_with_names_of_their_own_come_back() -> None:
    found = Losses.model_validate({"blocks": 1.5, "by_client": {}, "llm": None, "stderr": {}, "three acc": 0.5})
    assert found.measures() == {"blocks": 1.5, "three acc": 0.5}
    assert json.loads(dump_record(found))["three acc"] == 0.5
    assert Losses.model_validate_json(dump_record(found)) == found


def test_what_an_earlier_version_wrote_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(OLD))
    assert_one_line(legolm("report", tmp_path), "summary.json: another version of legolm wrote it (schema 1, this one")
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(LegolmError, match=r"cannot be read \(No such file"):
        read_record(tmp_path / "gone" / "summary.json", Summary)
    lines = ['{"stage": "local", "client": "fr"}', '{"schema_number": 2, "stage": "personal"}', '{"stage": "dusk"}']
    for line, says in zip(lines, ("another version", "is broken", "another version"), strict=True):
        (tmp_path / "metrics.jsonl").write_text(line + "\n")
        with pytest.raises(LegolmError, match=rf"metrics\.jsonl: {says}"):
            read_stages(tmp_path / "metrics.jsonl")


def test_bytes_are_the_same_where_both_ways_are() -> None:
    one, two = variant("a"), variant("b", bytes_down=4e6)
    assert budget(Comparison(name="s", rows=[one, one])).endswith("; the same bytes passed, both ways (to 2 %).")
    assert budget(Comparison(name="s", rows=[one, two])).endswith(
        "differ: 3.00 to 5.00 MB a client and round, both ways."
    )


def test_an_axis_tells_its_losses_apart() -> None:
    points = [
        {"round": at, "tokens": 1250e3 * at, "bytes": 0, "blocks": 1.0, "llm": 0.1126 + 4e-4 * at} for at in (0, 1)
    ]
    drawn = page(Comparison(name="s", rows=[variant("a", curve=points)]))
    assert all(f">{text}</text>" in drawn for text in ("0.11260", "0.11280", "0.11300", "1,250"))
