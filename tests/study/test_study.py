"""What a study's YAML asks for is what its variants get; what cannot be is refused, with the variant's name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml

from helpers import legolm
from legolm.config import RunConfig, load_study
from legolm.errors import LegolmError
from legolm.plan import Parts, read_parts
from legolm.runs import (
    CompareRow,
    Comparison,
    Held,
    Refusal,
    RoundRecord,
    RunDir,
    Score,
    Scores,
    dump_record,
    read_record,
    read_stages,
    rounds_of,
)
from legolm.study import compare
from legolm.study.compare import plans, tried

Write = Callable[..., Path]


@pytest.fixture
def raw(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    evaluate, federation = {"local_only": False}, {"engine": "local", "rounds": 1}
    return three_clients(tmp_path, ("dense", "wide", "wide"), rows=10, evaluate=evaluate) | {"federation": federation}


@pytest.fixture
def study(raw: dict[str, Any], tmp_path: Path) -> Write:
    def write(*variants: dict[str, Any], **run: Any) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({"run": raw | run, "variants": list(variants)}, allow_unicode=True))
        return path

    return write


def test_a_section_says_as_much_as_its_fields(study: Write) -> None:
    path = study(
        {"name": "plain"},
        {"name": "field", "set": {"evaluate.local_only": True}},
        {"name": "section", "set": {"evaluate": {"local_only": True}}},
        evaluate={"local_only": True},  # the run's own does not count
    )

    def alone(*changes: str) -> list[bool]:
        return [config.evaluate.local_only for config in load_study(path, changes)[1].values()]

    assert alone() == [False, True, True]
    assert alone("evaluate.local_only=true") == alone("evaluate={local_only: true}") == [True, True, True]
    rates = {"name": "a", "rates": [0.1, 0.2]}
    for changes in (["train.learning_rate=0.5"], ["train={learning_rate: 0.5}"]):
        with pytest.raises(LegolmError, match=r"--set train.learning_rate: variant a chooses of its `rates`"):
            load_study(study(rates), changes)
    with pytest.raises(LegolmError, match=r"variant a: give `rates` or train.learning_rate in `set`, not both"):
        load_study(study(rates | {"set": {"train": {"learning_rate": 0.5}}}))
    load_study(study(rates, train={"learning_rate": 0.5}))  # the run's own is what `rates` stand for


def test_a_value_comes_as_it_is_written(study: Write) -> None:
    values = {"data.system": "hi 😀", "data.validation": 0.00001}
    config = load_study(study({"name": "a", "set": values}))[1]["a"]
    assert (config.data.system, config.data.validation) == ("hi 😀", 0.00001)


@pytest.mark.parametrize(
    ("run", "changes", "settings", "says"),
    [
        ({}, [], {"evaluate": "hello"}, "variant a: `evaluate` = 'hello'"),
        ({}, [], {"evaluate": None}, "variant a: `evaluate` = None"),
        ({"evaluate": "hello"}, ["evaluate.batch_size=2"], {}, "--set 'evaluate.batch_size=2': evaluate is a value"),
        ({"aggregate": "fedavg"}, [], {"aggregate.scheme": "median"}, "set 'aggregate.scheme': aggregate is a value"),
        ({}, [], {"blocks.7.name": "b"}, "variant a: set 'blocks.7.name': '7' must be an index from 0 to"),
        ({}, [], {"evaluate": [], "evaluate.every": 2}, "'every' must be the name of a field; the list here is empty"),
    ],
)
def test_no_value_vanishes(
    study: Write, run: dict[str, Any], changes: list[str], settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(LegolmError) as found:
        load_study(study({"name": "a", "set": settings}, **run), changes)
    assert says in str(found.value)


def test_a_plan_that_cannot_be_names_its_variant(study: Write, tmp_path: Path) -> None:
    path = study(
        {"name": "a"}, {"name": "b", "block": "dense", "set": {"aggregate.scheme": "nearest", "lora.rank": 4000}}
    )
    with pytest.raises(LegolmError, match=r"variant b: "):
        compare(path, tmp_path / "out")


def test_variants_with_the_same_rows_read_them_once(study: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = study(
        {"name": "a"},
        {"name": "rate", "set": {"train.learning_rate": 0.5, "train.steps": 3}},
        {"name": "short", "set": {"train.max_length": 20, "train.long_examples": "truncate"}},
    )
    read = []

    def reading(config: RunConfig) -> Parts:
        read.append(config.train.max_length)
        return read_parts(config)

    monkeypatch.setattr(sys.modules[compare.__module__], "read_parts", reading)
    found = {name: plan for name, (_, plan) in plans(path).items()}
    assert read == [512, 20]
    a, rate, short = ([one.tokens_per_round for one in plan.clients] for plan in found.values())
    assert rate == [round(tokens * 3 / 2) for tokens in a]  # three steps instead of two
    assert max(short) == 20 * 4 * 2 < min(a)
    assert len({plan.data_fingerprint for plan in found.values()}) == 1


def test_the_dry_run_looks_at_the_place(study: Write, tmp_path: Path) -> None:
    path, out = study({"name": "a"}), tmp_path / "out"
    out.mkdir()
    (tmp_path / "file").write_text("mine")

    def refused(*options: object) -> str:
        done = legolm("compare", path, "--dry-run", *options)
        assert done.returncode == 2
        return done.stderr

    assert f"{tmp_path / 'file'} is a file; give another --out" in refused("--out", tmp_path / "file")
    assert f"{tmp_path / 'file'} is a file; give another --blocks" in refused(
        "--out", out, "--blocks", tmp_path / "file"
    )
    Comparison(name="other", rows=[]).write(out)
    assert "holds the comparison 'other', and this is 'study'; give another --out" in refused("--out", out)


def test_a_rate_at_which_nothing_is_learned_is_out_and_one_more_is_tried(study: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def rated(*rates: float) -> Path:
        return study({"name": "a", "rates": [*rates]})

    first, again = compare(rated(1e-6, 1e30), out, seeds=2, models=False).rows
    assert first.searched is not None and first.searched.keys() == {"1e-06", "1e+30"}
    assert first.searched["1e+30"] is None and first.searched["1e-06"] == first.llm_validation
    assert (first.folder, again.folder) == ("rates/1e-06/a", "seeds/1/1e-06/a")
    first, again = compare(rated(1e-6, 1e30, 0.01), out, seeds=2, models=False).rows
    assert (first.folder, again.folder, again.learning_rate) == ("rates/0.01/a", "seeds/1/0.01/a", 0.01)
    assert RunDir(out / "seeds" / "1" / "1e-06" / "a").rounds_done() == 1  # nothing is lost
    assert [one.folder for one in read_record(out / "compare.json", Comparison).rows] == [first.folder, again.folder]
    with pytest.raises(
        LegolmError, match=r"variant a: nothing could be learned at any of its rates \(1e\+29, 1e\+30\)"
    ):
        compare(rated(1e29, 1e30), tmp_path / "none", models=False)


def test_a_run_that_ends_names_its_variant(study: Write, tmp_path: Path) -> None:
    path = study({"name": "a", "set": {"train.learning_rate": 1e30}})
    with pytest.raises(LegolmError, match=r"^a \(1 of 1\): round 1: "):
        compare(path, tmp_path / "out")


def test_variants_of_another_precision_are_said(study: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = legolm("compare", study({"name": "a", "set": {"precision": "bf16"}}), "--no-models", "--out", out)
    assert (first.returncode, "precision" in first.stderr) == (0, False)
    both = study({"name": "a", "set": {"precision": "auto"}}, {"name": "b"})
    again = legolm("compare", both, "--no-models", "--out", out)
    assert again.returncode == 0
    assert "not all ran in one precision (a bf16, b fp32)" in " ".join(again.stderr.split())


def test_a_shared_block_is_of_the_text_as_it_is_now(
    study: Write, raw: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    out, text = tmp_path / "out", tmp_path / "corpus.txt"
    text.write_text(corpus.read_text())
    raw["blocks"][1]["calibration"]["text"] = str(text)
    compare(study({"name": "a"}), out, models=False)
    text.write_text("".join(reversed(corpus.read_text())))
    compare(study({"name": "b"}), out, models=False)
    compare(study({"name": "c"}), out, models=False)
    of_a, of_b, of_c = ((out / name / "blocks/wide/model.safetensors").read_bytes() for name in "abc")
    assert of_a != of_b == of_c


def test_tokens_are_those_of_the_rounds_whatever_is_trained_alone_beside(study: Write, tmp_path: Path) -> None:
    path = study({"name": "plain"}, {"name": "beside", "set": {"evaluate.local_only": True}})
    plain, beside = compare(path, tmp_path / "out", models=False).rows
    assert plain.llm == beside.llm
    assert plain.tokens == beside.tokens == beside.curve[-1].tokens and plain.flops == beside.flops


@pytest.mark.parametrize("ranks", [{}, {"up_proj": 4, "gate_proj": 2}], ids=str)
def test_matched_bytes_are_those_that_clients_send_in_the_run_itself(
    ranks: dict[str, int], study: Write, raw: dict[str, Any]
) -> None:
    raw["clients"][1]["layers"] = [1]
    matched, both = {"block": "dense", "match_bytes": True}, {"aggregate.form": "factor"}
    path = study(
        {"name": "run"},
        {"name": "one", **matched},
        {"name": "both", **matched, "set": both},
        {"name": "int8", **matched, "set": both | {"federation.codec": "int8"}},
        lora={"rank": 32, "ranks": ranks},
    )
    planned = plans(path)
    sent = {name: [one.bytes_up for one in plan.clients] for name, (_, plan) in planned.items()}
    assert len(set(sent["run"])) == 3
    assert sent["one"] == pytest.approx(sent["run"], rel=0.05)
    assert sent["both"] == pytest.approx(sent["run"], rel=0.05)
    # A rank row takes about a quarter of the bytes there: as many as there are.
    assert [client.rank for client in planned["int8"][0].clients] == [32, 32, 32]


def test_bytes_of_who_sends_none_are_not_matched(study: Write) -> None:
    path = study({"name": "a", "block": "dense", "match_bytes": True}, federation={"mode": "pooled"})
    with pytest.raises(LegolmError, match="variant a: match_bytes: client 'fr' sends nothing in the run itself"):
        plans(path)


def test_operations_and_memory_are_of_what_each_round_trains(study: Write, tmp_path: Path) -> None:
    turns = {"clients.0.block": None, "clients.0.blocks": ["dense", "wide"], "federation.rounds": 2}
    pooled = {"federation.mode": "pooled", "aggregate.form": "factor"}
    path = study({"name": "turns", "set": turns}, {"name": "pooled", "set": pooled})
    found = {row.name: row for row in compare(path, tmp_path / "out", models=False).rows}
    planned = plans(path)
    flops = {one.name: one.token_flops for one in planned["turns"][1].blocks}
    assert flops["wide"] < flops["dense"]
    one, two = (record.train for record in rounds_of(read_stages(tmp_path / "out/turns/metrics.jsonl"))[1:])
    wide = sum(record[id].tokens for record in (one, two) for id in ("de", "es")) + two["fr"].tokens
    assert found["turns"].flops == one["fr"].tokens * flops["dense"] + wide * flops["wide"]
    assert found["pooled"].flops == found["pooled"].tokens * flops["dense"] > 0
    assert found["pooled"].memory == planned["pooled"][1].llm_bytes >= planned["turns"][1].llm_bytes


def test_rates_are_compared_by_the_clients_that_have_scores_at_each(tmp_path: Path) -> None:
    """The higher rate is worse for every client, and lacks the one with the highest loss."""

    def round_of(number: int, losses: dict[str, float]) -> RoundRecord:
        of = {id: Scores({id: Score(loss=loss, exact_match=0, tokens=1, examples=1)}) for id, loss in losses.items()}
        held = [Held(clients=[id], scores=of[id], validation=loss) for id, loss in losses.items()]
        gone = [Refusal(client=id, reason="gone") for id in "abc" if id not in losses]
        mean, none = fmean(losses.values()), {"llm": None, "llm_validation": None}
        return RoundRecord(round=number, held=held, unscored=gone, validation=mean, seconds=0, **none)

    start = {"a": 3.0, "b": 3.0, "c": 9.0}
    ends = {"rates/0.1/x": {"a": 1.0, "b": 1.0, "c": 6.0}, "rates/0.2/x": {"a": 2.0, "b": 2.0}}
    for place, end in ends.items():
        (tmp_path / place).mkdir(parents=True)
        lines = (dump_record(one, indent=None) for one in (round_of(0, start), round_of(1, end)))
        (tmp_path / place / "metrics.jsonl").write_text("".join(lines))
    row = CompareRow.model_construct(mode="federated", llm_validation=None)
    assert tried(dict.fromkeys(ends, row), tmp_path) == {"rates/0.1/x": 1.0, "rates/0.2/x": 2.0}
