"""Whole rounds on a tiny model: the best round, a warm start, and what does not go together."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import load, validation_loss
from legolm.block import read_block
from legolm.errors import LegolmError
from legolm.federate.server import steps_of
from legolm.plan import make_plan
from legolm.runs import Summary, clients_of, dump_sealed, read_stage, read_stages, rounds_of


def test_settings_can_be_chosen_by_the_llm_on_everyones_validation_data(
    raw: dict[str, Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    config = load(raw, tmp_path, "federation.rounds=1")
    run(config, "out")
    assert not (tmp_path / "out" / "final").exists()
    run(config, "out", models=True, resume=True)
    path = tmp_path / "out" / "final" / "llm"
    record = json.loads((tmp_path / "out" / "rounds" / "0001" / "metrics.json").read_text())
    losses = [validation_loss(path, config, client.id) for client in config.clients]
    assert record["llm_validation"] == pytest.approx(fmean(losses), rel=1e-4)


def test_the_llm_and_the_blocks_each_end_with_their_own_best_round(
    raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path
) -> None:
    config, out = load(raw, tmp_path, "aggregate.form=factor"), tmp_path / "out"
    run(config)
    for number, losses in (
        (1, {"validation": 0.2, "llm_validation": 0.1}),
        (2, {"validation": 0.1, "llm_validation": 0.2}),
    ):
        path = out / "rounds" / f"000{number}" / "metrics.json"
        record = read_stage(path.parent).model_copy(update=losses)
        path.write_text(dump_sealed(record))
    summary = run(config, models=True, resume=True)
    rounds = summary.history
    assert (summary.best_round, summary.llm.best_round) == (2, 1)
    assert rounds[1].llm is not None
    assert summary.llm.loss_after == rounds[1].llm.loss
    assert rounds[1].llm != rounds[2].llm
    assert summary.clients[0].own["global"] == rounds[2].clients["fr"].own
    for id, number in (("llm", 1), ("fr", 2)):  # both dense: their adapters are the global one
        ended = load_file(out / "final" / id / "factors.safetensors")
        known = load_file(out / "rounds" / f"000{number}" / "adapter.safetensors")
        assert all(torch.equal(ended[key], known[key]) for key in ended)
        assert read_block(out / "final" / id).details["round"] == number


def test_a_warm_start_goes_on_from_another_run(
    raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path
) -> None:
    def form(name: str) -> str:
        return f"aggregate.form={name}"

    frozen = run(load(raw, tmp_path, "federation.rounds=1"), "frozen")
    first = run(load(raw, tmp_path, form("factor")), "first")
    warm = f"aggregate.start={tmp_path / 'first'}"
    for name, start, before in (
        ("factor", "first", first),
        ("exact", "first", first),
        ("frozen_side", "frozen", frozen),
    ):
        second = run(load(raw, tmp_path, f"aggregate.start={tmp_path / start}", form(name)), f"second {name}")
        assert second.llm.loss_before == pytest.approx(before.llm.loss_after, rel=1e-5)
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "first", broken)
    (broken / "metrics.jsonl").write_text("{}\n")
    infinite = tmp_path / "infinite"
    shutil.copytree(tmp_path / "first", infinite)
    for adapter in infinite.glob("rounds/*/adapter.safetensors"):
        save_file({key: tensor / 0 for key, tensor in load_file(adapter).items()}, adapter)
    for override, says in (
        ("lora.rank=2", "lora.rank and lora.targets must be this run's"),
        ("lora.scale=1", "has lora.scale 2.0; this run has 1.0"),
        ("aggregate.form=frozen_side", "its frozen factors are not this run's"),
        (f"aggregate.start={tmp_path}", "is no run folder"),
        (f"aggregate.start={broken}", "is no run folder"),
    ):
        with pytest.raises(LegolmError, match=says):
            make_plan(load(raw, tmp_path, warm, override))
    with pytest.raises(LegolmError, match=r"adapter.safetensors: is not what the run wrote"):
        make_plan(load(raw, tmp_path, f"aggregate.start={infinite}", form("factor")))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ("aggregate.scheme=fedavg",),
            "client 'es' holds block 'wide' and 'fr' block 'dense', and it averages equal",
        ),
        (("aggregate.scheme=flexlora",), "client 'es' holds block 'wide', and it works on the whole LLM"),
        (("aggregate.scheme=fedavg", "clients.1.rank=2", "federation.capable=true"), "averages equal ranks"),
        (("federation.capable=true", "clients.0.block=wide", "clients.1.block=wide"), "no client holds a dense"),
        (("aggregate.form=exact", "aggregate.server_optimizer=fedadam"), "has its own step"),
        (("aggregate.form=exact", "aggregate.mask=saliency"), "mask 'saliency' is on factors"),
        (("aggregate.scheme=flora", "aggregate.form=exact"), "`aggregate.form` of scheme 'flora'; it is heteagg's"),
        (("aggregate.proximal=0.1",), "`aggregate.proximal` of scheme 'heteagg'; it is fedprox's"),
        (
            ("aggregate.scheme=median", "aggregate.trim=0.1"),
            "`aggregate.trim` of scheme 'median'; it is trimmed_mean's",
        ),
        (("aggregate.residual=fold",), "residual 'fold' is of form 'exact'"),
        (
            ("aggregate.redraw=2", "aggregate.form=factor"),
            "redraw 2 is of form 'frozen_side'; form 'factor' freezes no",
        ),
        (("aggregate.redraw=1", "aggregate.form=exact"), "redraw 1 is of form 'frozen_side'; form 'exact' freezes no"),
        (("aggregate.scheme=fedavg", "aggregate.redraw=1"), "`aggregate.redraw` of scheme 'fedavg'; it is heteagg's"),
        (("aggregate.redraw=-1",), "`redraw` = -1"),
        (("aggregate.redraw=1", "aggregate.server_optimizer=fedavgm"), "or redraws them: take server_optimizer none"),
        (("aggregate.scheme=median", "aggregate.server_optimizer=fedavgm"), "has its own step"),
        (("federation.mode=alone",), "set that to true"),
        (("lora.start=adapter", "aggregate.form=frozen_side"), "keeps random factors, and that adapter has others"),
        (("lora.start=adapter", "aggregate.scheme=flora"), "lora.start: scheme 'flora' begins with a fresh adapter"),
        (("aggregate.start=run", "aggregate.scheme=flora"), "aggregate.start: scheme 'flora' begins"),
        (("clients.0.joins=3", "clients.0.leaves=2"), "leaves after round 2, before it joins"),
    ],
)
def test_what_does_not_go_together(raw: dict[str, Any], tmp_path: Path, overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(LegolmError, match=says):
        make_plan(load(raw, tmp_path, *overrides))


@pytest.mark.parametrize("limit", ["epochs=0.5", "tokens=150"])
def test_trained_alone_and_pooled_make_as_many_steps_as_the_rounds_whatever_limits_them(
    raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path, limit: str
) -> None:
    sets = ("federation.rounds=2", "train.steps=50", "train.batch_size=2", f"train.{limit}", "aggregate.form=factor")
    planned = {one.id: one.tokens_per_round for one in make_plan(load(raw, tmp_path, *sets)).clients}
    run(load(raw, tmp_path, *sets, "evaluate.local_only=true", "federation.personal_steps=1"))
    records = read_stages(tmp_path / "out" / "metrics.jsonl")
    rounds = [record.train for record in rounds_of(records)[1:]]
    assert all(2 <= one.steps < 50 for trained in rounds for one in trained.values())
    assert {id: one.tokens for id, one in rounds[0].items()} == pytest.approx(planned, rel=0.1)
    alone = {one.client: one.train.steps for one in clients_of(records, "local") if one.train}
    assert alone == {id: sum(trained[id].steps for trained in rounds) + 1 for id in ("fr", "de", "es")}
    run(load(raw, tmp_path, *sets, "federation.mode=pooled"), "pooled")
    pooled = rounds_of(read_stages(tmp_path / "pooled" / "metrics.jsonl"))[1:]
    for one, trained in zip(pooled, rounds, strict=True):
        assert one.train["llm"].steps == sum(each.steps for each in trained.values())


def test_trained_alone_and_pooled_make_the_steps_of_those_whom_rounds_draw(
    raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path
) -> None:
    raw["clients"][0]["leaves"] = 1
    sets = ("federation.rounds=3", "federation.fraction=0.5", "aggregate.form=factor", "seed=3")

    def trained(name: str, *more: str) -> tuple[Counter[str], dict[str, int]]:
        run(load(raw, tmp_path, *sets, *more), name)
        records = read_stages(tmp_path / name / "metrics.jsonl")
        found: Counter[str] = Counter()
        for record in rounds_of(records)[1:]:
            found.update({id: int(one.steps) for id, one in record.train.items()})
        return found, {one.client: int(one.train.steps) if one.train else 0 for one in clients_of(records, "local")}

    made, alone = trained("out", "evaluate.local_only=true")
    assert alone == {id: made[id] for id in ("fr", "de", "es")}
    assert min(alone.values()) == 0 < max(alone.values()) < 6  # whom no round draws ends where all began
    assert trained("alone", "evaluate.local_only=true", "federation.mode=alone")[1] == alone
    assert trained("pooled", "federation.mode=pooled")[0] == {"llm": made.total()}
    # Who may not take part has the steps that it would make.
    made, alone = trained("capable", "evaluate.local_only=true", "federation.capable=true", "federation.fraction=1")
    assert (made, alone) == ({"fr": 2, "de": 6}, {"fr": 2, "de": 6, "es": 6})


def test_rounds_do_not_depend_on_what_clients_do_after_them(
    raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path
) -> None:
    """The rate falls to zero with the rounds: own steps begin where those of training alone are by then."""
    for name, steps in (("none", 0), ("own", 5)):
        run(load(raw, tmp_path, f"federation.personal_steps={steps}"), name)
    one, two = (load_file(tmp_path / name / "rounds" / "0002" / "adapter.safetensors") for name in ("none", "own"))
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    config = load(raw, tmp_path, "train.steps=4", "federation.personal_steps=5")
    assert [steps_of(config, "round", number) for number in (1, 2)] == [([4], 0, 8), ([4], 4, 8)]
    assert steps_of(config, "local", 0, 2) == ([4, 4, 5], 0, 13) and steps_of(config, "personal", 0, 2) == ([5], 8, 13)
