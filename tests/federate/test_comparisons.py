"""`legolm compare` on a tiny model: variants, what they share, and what is refused before the first one runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from helpers import load, validation_loss
from legolm import pipeline
from legolm.config import RunConfig, load_study
from legolm.errors import LegolmError
from legolm.federate import wire
from legolm.federate.transport import Exchange, Reply, Request, run_local
from legolm.federate.transport.engine import Body
from legolm.plan import make_plan
from legolm.runs import RunDir, Summary
from legolm.study import compare, plans


def test_a_comparison_runs_each_variant_and_the_table_has_them_all(raw: dict[str, Any], tmp_path: Path) -> None:
    dense = ("fedavg", "hetlora", "flora", "fedex_lora")
    mixed = ("heteagg", "median")
    modes = ("alone", "pooled")
    variants: list[dict[str, Any]] = [
        {"name": name, "set": {"aggregate.scheme": name}, "block": "dense"} for name in dense
    ]
    variants += [{"name": name, "set": {"aggregate.scheme": name}} for name in mixed]
    variants += [{"name": name, "set": {"federation.mode": name, "aggregate.form": "factor"}} for name in modes]
    variants[4]["set"]["aggregate.form"] = "factor"  # sends as much of an adapter as the others
    variants[1]["match_bytes"] = True
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({"run": raw, "variants": variants}))
    found = compare(path, tmp_path / "out", store=tmp_path / "shared")
    rows = {row.name: row for row in found.rows}
    assert list(rows) == [*dense, *mixed, *modes]
    for name, row in rows.items():
        if name != "alone":
            assert row.llm is not None and row.llm_before is not None
            assert row.llm < row.llm_before, name
        assert (row.bytes_up > 0) == (name not in modes)
    # FLoRA's download is all clients' stack, of three times the rank; in the first of two rounds nothing.
    assert rows["flora"].bytes_down == pytest.approx(1.5 * rows["fedavg"].bytes_down, rel=0.1)
    assert rows["fedavg"].bytes_up == pytest.approx(rows["flora"].bytes_up, rel=0.01)
    assert rows["heteagg"].bytes_up < rows["fedavg"].bytes_up
    config, plan = plans(path)["hetlora"]
    for client, one, wanted in zip(config.clients, plan.clients, make_plan(load(raw, tmp_path)).clients, strict=True):
        assert abs(one.bytes_up - wanted.bytes_up) <= one.bytes_up / (client.rank or 1) / 2  # to half a rank
    assert rows["alone"].own < (rows["alone"].llm_before or 0.0)
    # To choose alone's settings by: each client's own validation data, on the block that it ends with.
    alone = tmp_path / "out" / "alone"
    config = RunDir(alone).known()
    losses = [validation_loss(alone / "final" / client.id, config, client.id) for client in config.clients]
    assert rows["alone"].validation == pytest.approx(fmean(losses), rel=1e-3)
    # Both blocks are cut once; before training, what all hold scores once for every way of holding it.
    assert len(list((tmp_path / "shared").glob("*/manifest.json"))) == 2
    assert len(list((tmp_path / "shared" / "before").glob("*.json"))) == 3
    # A variant with one block for all does not wait for the others.
    assert [path.name for path in (tmp_path / "out" / "fedavg" / "blocks").iterdir()] == ["dense"]
    html = (tmp_path / "out" / "compare.html").read_text()
    assert "<svg" in html
    assert all(name in html for name in rows)
    again = compare(path, tmp_path / "out")  # all finished: nothing is trained anew
    assert [one.llm for one in again.rows] == [one.llm for one in found.rows]


def test_runs_of_one_store_score_what_is_untrained_once(
    raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path
) -> None:
    asked: list[str] = []

    def engine(folder: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def counted(exchange: Exchange) -> Exchange:
            def ask(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                yield from exchange((asked.append(wire.kind_of(one.content)) or one for one in requests), deadline_s)

            return ask

        run_local(folder, config, actors, lambda exchange: body(counted(exchange)))

    def before(name: str) -> dict[str, Any]:
        record = json.loads((tmp_path / name / "rounds" / "0000" / "metrics.json").read_text())
        return {key: record[key] for key in ("llm", "held", "validation", "llm_validation")}

    for name, overrides in (("first", ()), ("second", ("aggregate.scheme=median",))):
        asked.clear()
        run(load(raw, tmp_path, "federation.rounds=1", *overrides), name, engine=engine)
        assert asked.count("evaluate") == (4 if name == "first" else 2)  # the LLM, which two clients hold, and `wide`
    run(load(raw, tmp_path, "train.max_length=48"), "other")
    pipeline.run(load(raw, tmp_path, "aggregate.scheme=median"), tmp_path / "alone", models=False)
    assert before("first") == before("second") == before("alone")
    assert len(list((tmp_path / "store" / "before").glob("*.json"))) == 2


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "examples" / "compare").glob("*.yaml")))
def test_every_comparison_of_the_examples_loads(path: Path) -> None:
    study, found = load_study(path, ["seed=7", "train.clip_norm=0.5"])
    assert list(found) == [variant.name for variant in study.variants]
    for variant in study.variants:
        assert found[variant.name].seed == 7
        # What a variant says itself stands.
        assert found[variant.name].train.clip_norm == 0.5


def test_a_variant_trains_alone_if_that_is_its_mode_or_if_it_says_so(raw: dict[str, Any], tmp_path: Path) -> None:
    sets: dict[str, dict[str, Any]] = {
        "plain": {},
        "alone": {"federation.mode": "alone"},
        "mixture": {"evaluate.local_only": True, "federation.personal": "mixture"},
    }
    variants = [{"name": name, "set": one} for name, one in sets.items()]
    (tmp_path / "study.yaml").write_text(json.dumps({"run": raw, "variants": variants}))
    found = load_study(tmp_path / "study.yaml")[1]
    assert {name: one.evaluate.local_only for name, one in found.items()} == {
        "plain": False,
        "alone": True,
        "mixture": True,
    }


def test_a_folder_of_another_run_is_found_before_the_first_variant_runs(raw: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({"run": raw, "variants": [{"name": "a"}, {"name": "b"}]}))
    (tmp_path / "out" / "b").mkdir(parents=True)
    (tmp_path / "out" / "b" / "notes.txt").write_text("mine")
    with pytest.raises(LegolmError, match=r"out/b: is not empty and not a run"):
        compare(path, tmp_path / "out")
    assert not (tmp_path / "out" / "a").exists()


def test_a_variant_may_change_who_takes_part(raw: dict[str, Any], tmp_path: Path) -> None:
    path, fewer = tmp_path / "study.yaml", raw["clients"][:2]
    variants = [{"name": "two", "set": {"clients": fewer}}, {"name": "three"}]
    data = raw["data"] | {"split": {"by": "iid"}}
    path.write_text(json.dumps({"run": raw | {"data": data}, "variants": variants}))
    for name, (config, plan) in plans(path).items():
        assert [client.examples for client in plan.clients] == [client.examples for client in make_plan(config).clients]
        assert len(plan.clients) == {"two": 2, "three": 3}[name]


def test_a_broken_comparison_says_where(raw: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    for variants, says in (
        ([{"name": "a", "set": {"aggregate.shceme": "median"}}], "variant a: unknown key `aggregate.shceme`"),
        ([{"name": "a"}, {"name": "a"}], "'a' is there twice"),
        ([{"name": "a", "block": "small"}], "block 'small' is not one of dense, wide"),
        ([{"name": "a", "sett": {}}], "unknown key `variants.0.sett`"),
    ):
        path.write_text(json.dumps({"run": raw, "variants": variants}))
        with pytest.raises(LegolmError, match=says):
            compare(path, tmp_path / "out")
