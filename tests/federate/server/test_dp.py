"""Differential privacy in whole runs on a tiny model: noise, account, budget, and what does not go together."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[2] / "aggregate"))
from rounds import FULL, RANK, new

from legolm import config as configs
from legolm import pipeline
from legolm.adapter import Change
from legolm.aggregate import Weighing
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.federate import wire
from legolm.federate.server.account import Account
from legolm.federate.server.members import Members
from legolm.federate.transport import Engine, Exchange, Reply, Request, run_local
from legolm.federate.transport.engine import Body
from legolm.federate.wire.broadcast import _check_noise as check_noise
from legolm.plan import make_plan
from legolm.privacy import gaussian_epsilon, sampled_epsilon
from legolm.report.status import read_status
from legolm.runs import RoundRecord, RunDir, Summary, Training, read_stage


@pytest.fixture
def raw(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """Two dense clients, one with a narrower MLP (`wide`); one step each in three rounds."""
    data = {"train": f"{tmp_path}/data/*.jsonl", "limit_test": 1, "limit_validation": 1}
    evaluate = {"local_only": False, "every": 3}
    found = three_clients(tmp_path, ("dense", "dense", "wide"), rows=10, data=data, evaluate=evaluate)
    found["blocks"][1]["intermediate_size"] = 48
    found["train"]["steps"] = 1
    found["federation"] |= {"engine": "local", "rounds": 3}
    found["aggregate"] = {"weight": "equal"}
    return found


def load(raw: dict[str, Any], tmp_path: Path, *overrides: str, **dp: Any) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(raw | {"privacy": {"dp": {"level": "client"} | dp}}))
    return configs.load(path, list(overrides))


def state(folder: Path, number: int) -> dict[str, torch.Tensor]:
    return load_file(RunDir(folder).round(number) / "adapter.safetensors")


def test_a_run_has_its_noise_and_its_account_everywhere_and_stops_at_its_budget(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    """The clipping norm is so small that all that moves is noise: N has z C an entry, N / D a third where all hold."""
    spent = [gaussian_epsilon([4.0] * rounds, 1e-5) for rounds in (1, 2, 3)]
    config = load(raw, tmp_path, noise_multiplier=4.0, clip=1e-3, epsilon=(spent[1] + spent[2]) / 2)
    said = make_plan(config).notes[-1]
    assert "after 2 rounds" in said
    assert "round 3 of 3 would pass the budget" in said
    out = tmp_path / "out"
    for resume in (False, True):
        summary = pipeline.run(config, out, resume=resume, models=False)
        assert summary.rounds == 2
        assert summary.privacy is not None
        assert (summary.privacy.epsilon, summary.privacy.stopped) == (pytest.approx(spent[1]), True)
        assert summary.history[-1].validation is not None  # the last round is scored, whenever it is
    assert not RunDir(out).round(3).exists()
    one, two = (state(out, number) for number in (0, 1))
    moved = {key: two[key] - one[key] for key in one}
    query = torch.cat([step.flatten() for key, step in moved.items() if "q_proj.B" in key])  # held by all three
    assert float(query.square().mean().sqrt()) == pytest.approx(4e-3 / 3, rel=0.15)
    gate = next(step for key, step in moved.items() if "gate_proj.B" in key).square().mean(1).sqrt()
    assert float(gate.max()) > 1.3 * 4e-3 / 3  # neurons that two hold
    records = [read_stage(RunDir(out).round(number)) for number in range(3)]
    assert records[0].privacy is None  # type: ignore[union-attr]
    assert [one.privacy.epsilon for one in records[1:]] == pytest.approx(spent[:2])  # type: ignore[union-attr]
    assert records[1].train["fr"].size < 1e-3  # type: ignore[union-attr]
    assert [one.epsilon for one in summary.history[1:]] == pytest.approx(spent[:2])
    assert Summary.read(out).privacy == summary.privacy
    assert read_status(out)["privacy"]["epsilon"] == pytest.approx(spent[1])
    page = (out / "report.html").read_text()
    assert f"epsilon {spent[1]:.3g} at delta 1e-05 after 2 rounds" in page
    assert "would have passed its budget" in page
    assert "epsilon so far" in page


def test_a_client_that_fails_counts_as_one_that_learned_nothing(raw: dict[str, Any], tmp_path: Path) -> None:
    """D is of those that were asked: else whether a client answers would show in the others' share."""
    config = load(raw, tmp_path, noise_multiplier=1e-9)
    ids = [one.id for one in config.clients]
    members = Members(tuple(ids), {}, dict.fromkeys(ids, RANK), dict.fromkeys(ids, FULL), {})
    scheme = new(config.aggregate)
    weighing, sent = Weighing(config.aggregate, scheme), scheme.payload(FULL, RANK)
    weighing.add(ids[0], Change({key: torch.ones_like(one) for key, one in sent.items()}, sent, 7, RANK), FULL)
    Account(config, members).disturb([], scheme, weighing, ids[1:])
    weighing.finish()
    for key, tensor in scheme.payload(FULL, RANK).items():
        torch.testing.assert_close(tensor - sent[key], torch.full_like(tensor, 1 / 3), atol=1e-6, rtol=0)


def without(client: str) -> Engine:
    """The local engine, and this client's updates do not arrive."""

    def engine(folder: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def wrap(exchange: Exchange) -> Exchange:
            def losing(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                sent = list(requests)
                for reply in exchange(iter(sent), deadline_s):
                    one = sent[reply.index]
                    if one.client != client or wire.kind_of(one.content) != "train":
                        yield reply

            return losing

        run_local(folder, config, actors, lambda exchange: body(wrap(exchange)))

    return engine


def test_clients_add_their_parts_and_the_sum_has_enough(raw: dict[str, Any], tmp_path: Path) -> None:
    """Of three parts one may drop out: two have the whole variance. Without that allowance there is no round."""
    settings = {"noise": "distributed", "noise_multiplier": 4.0, "clip": 1e-3}
    config = load(raw, tmp_path, "federation.rounds=1", dropouts=1, **settings)
    plain = load(raw, tmp_path, "federation.rounds=1", noise_multiplier=4.0)
    assert make_plan(config).clients[0].bytes_down == 1.25 * make_plan(plain).clients[0].bytes_down
    summary = pipeline.run(config, tmp_path / "out", engine=without("es"), models=False, store=tmp_path / "store")
    assert summary.privacy is not None
    assert summary.privacy.epsilon == pytest.approx(gaussian_epsilon([4.0], 1e-5))
    one, two = (state(tmp_path / "out", number) for number in (0, 1))
    query = torch.cat([(two[key] - one[key]).flatten() for key in one if "q_proj.B" in key])
    assert float(query.square().mean().sqrt()) == pytest.approx(4e-3 / 3, rel=0.15)
    strict = load(raw, tmp_path, "federation.rounds=1", **settings)
    with pytest.raises(LegolmError, match=r"2 updates accepted, privacy\.dp\.dropouts is 0 of 3"):
        pipeline.run(strict, tmp_path / "strict", engine=without("es"), models=False, store=tmp_path / "store")


def test_examples_are_hidden_at_their_clients_and_the_dearest_client_counts(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    raw["aggregate"], raw["train"]["batch_size"] = {}, 2
    free = load(raw, tmp_path, level="example", noise_multiplier=1.0)
    rows = min(one.examples or 0 for one in make_plan(free).clients)
    cost = [sampled_epsilon([(1.0, 2 / rows, steps)], 1e-5) for steps in (1, 2, 3)]
    config = load(raw, tmp_path, level="example", noise_multiplier=1.0, epsilon=(cost[1] + cost[2]) / 2)
    assert f"epsilon {cost[2]:.3g} at delta 1e-05 after 3 steps" in make_plan(config).notes[-1]
    summary = pipeline.run(config, tmp_path / "out", models=False, store=tmp_path / "store")
    assert summary.privacy is not None
    assert (summary.rounds, summary.privacy.stopped) == (2, True)
    assert [one.epsilon for one in summary.history[1:]] == pytest.approx(cost[:2])


def test_a_delta_that_shows_an_example_whole_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["aggregate"] = {}
    free = load(raw, tmp_path, level="example", noise_multiplier=1.0)
    rows = max(one.examples or 0 for one in make_plan(free).clients)
    with pytest.raises(LegolmError, match=rf"privacy.dp.delta {1 / rows:g}: may show one of the {rows} examples of"):
        make_plan(load(raw, tmp_path, level="example", noise_multiplier=1.0, delta=1 / rows))
    make_plan(load(raw, tmp_path, level="example", noise_multiplier=1.0, delta=0.9 / rows))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sampling_rate": None}, "no sampling_rate and noise_multiplier, by which privacy.dp is accounted"),
        ({"noise_multiplier": None}, "no sampling_rate and noise_multiplier, by which privacy.dp is accounted"),
        ({"noise_multiplier": 0.5}, r"metrics.noise_multiplier is 0\.5; asked for 1"),
        ({"noise_multiplier": 1e12}, r"metrics.noise_multiplier is 1e\+12; asked for 1"),
        ({"sampling_rate": 1e-9}, r"metrics.sampling_rate is 1e-09; a batch of \d+ examples is 0\.\d+ of them"),
    ],
)
def test_an_update_that_does_not_say_what_it_cost_is_refused(
    changes: dict[str, float | None], says: str, raw: dict[str, Any], tmp_path: Path
) -> None:
    """With none counted its ε would be 0."""
    raw["aggregate"] = {}
    config = load(raw, tmp_path, "federation.rounds=1", level="example", noise_multiplier=1.0)

    def quiet(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def wrap(exchange: Exchange) -> Exchange:
            def changed(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                asked = list(requests)
                for reply in exchange(asked, deadline_s):
                    if wire.kind_of(asked[reply.index].content) != "train":
                        yield reply
                        continue
                    header, tensors = wire.unpack(reply.content, wire.UpdateReply)
                    told = {name: value for name, value in (header.metrics | changes).items() if value is not None}
                    yield Reply(reply.index, wire.pack(header.model_copy(update={"metrics": told}), tensors))

            return changed

        run_local(run, config, actors, lambda exchange: body(wrap(exchange)))

    with pytest.raises(LegolmError, match=f"0 updates accepted.*{says}"):
        pipeline.run(config, tmp_path / "out", engine=quiet, models=False)


def test_what_a_device_says_of_its_noise_is_within_what_a_budget_asks_for(raw: dict[str, Any], tmp_path: Path) -> None:
    """An ε that is 0, or none at all, of a noise that no training has."""
    settings = wire.TrainSettings.model_construct(
        dp=load(raw, tmp_path, level="example", epsilon=8.0).privacy.dp, train=load(raw, tmp_path, epsilon=8.0).train
    )
    said = {"loss_first": 1, "loss_last": 1, "steps": 1, "tokens": 1, "seconds": 1, "sampling_rate": 1.0}
    for noise in (1e-300, 1e-3, 1e9):
        with pytest.raises(LegolmError, match=r"metrics.noise_multiplier is .*; asked for 0.01 to 1e\+08"):
            check_noise(settings, 8, Training.model_validate(said | {"noise_multiplier": noise}))
    check_noise(settings, 2, Training.model_validate(said | {"noise_multiplier": 1.0}))


@pytest.mark.parametrize(
    ("overrides", "dp", "says"),
    [
        ((), {}, "needs noise_multiplier, or epsilon"),
        ((), {"level": "none", "epsilon": 1}, "level none adds no noise"),
        ((), {"epsilon": 1, "noise": "distributed", "level": "example"}, "of level client"),
        ((), {"epsilon": 1, "dropouts": 1}, "dropouts is of noise distributed"),
        ((), {"epsilon": 1, "delta": 0.5}, "take a far smaller delta"),
        (("aggregate.weight=capped",), {"epsilon": 1}, "set aggregate.weight to equal"),
        (("aggregate.scheme=median", "aggregate.weight=capped"), {"epsilon": 1}, "take one of"),
        (("aggregate.outliers.action=clip",), {"epsilon": 1}, "set its action to none"),
        (("federation.keep_updates=true",), {"epsilon": 1}, "set federation.keep_updates to false"),
        (("federation.codec=int8",), {"epsilon": 1, "noise": "distributed"}, "would be changed by codec int8"),
        (("evaluate.local_only=true",), {"epsilon": 1, "noise": "distributed"}, "evaluate.local_only to false"),
        (("evaluate.local_only=true",), {"epsilon": 1, "level": "example"}, "evaluate.local_only to false"),
        (("federation.mode=pooled",), {"epsilon": 1}, "take mode federated"),
        (("federation.codec=int8",), {"epsilon": -1}, "greater than 0"),
        (
            (),
            {"noise_multiplier": 1e-300},
            "noise_multiplier. = .1e-300.: input should be greater than or equal to 0.000000001",
        ),
    ],
)
def test_what_would_make_the_account_wrong_is_refused(
    raw: dict[str, Any], tmp_path: Path, overrides: tuple[str, ...], dp: dict[str, Any], says: str
) -> None:
    with pytest.raises(LegolmError, match=says) as error:
        load(raw, tmp_path, *overrides, **dp)
    assert "\n" not in str(error.value)


def test_the_dry_run_says_what_is_left_to_learn(raw: dict[str, Any], tmp_path: Path) -> None:
    """Three clients and thousands of entries: hopeless at any noise that hides one, and it says so."""
    said = make_plan(load(raw, tmp_path, epsilon=2.0)).notes[-1]
    assert "epsilon 2 at delta 1e-05 after 3 rounds" in said
    assert "hopeless" in said
    assert "hopeless" not in make_plan(load(raw, tmp_path, noise_multiplier=0.01)).notes[-1]
    with pytest.raises(LegolmError, match=r"one round with noise_multiplier 0\.1 costs"):
        make_plan(load(raw, tmp_path, noise_multiplier=0.1, epsilon=2.0))


def test_what_was_asked_stays_asked_whoever_is_drawn_now() -> None:
    """With fewer replies at least fewer are drawn, in rounds to come."""
    ids = [f"c{i}" for i in range(8)]

    def drawing(least: int) -> RunConfig:
        raw = {
            "model": "starter",
            "blocks": [{"name": "d", "method": "dense"}],
            "clients": [{"id": id, "block": "d", "data": "fr"} for id in ids],
            "federation": {"engine": "local", "rounds": 8, "fraction": 0.1, "min_replies": least},
            "aggregate": {"weight": "equal"},
            "evaluate": {"local_only": False},
            "privacy": {"dp": {"level": "client", "noise_multiplier": 4.0, "epsilon": 4.0, "delta": 1e-5}},
        }
        return configs.validate(RunConfig, raw, "test")

    members = Members(tuple(ids), {}, dict.fromkeys(ids, RANK), dict.fromkeys(ids, FULL), {})
    done: list[RoundRecord] = []
    for number in range(1, 6):
        config = drawing(8 if number < 5 else 1)
        drawn = list(members.draw(config, number))
        record = RoundRecord(
            round=number, accepted=drawn, seconds=0, llm=None, held=[], validation=None, llm_validation=None
        )
        done.append(Account(config, members).charged(done, record))
    assert len(done[3].accepted) == 8 and len(done[4].accepted) == 1
    assert done[4].privacy is not None
    assert done[4].privacy.epsilon == pytest.approx(gaussian_epsilon([4.0] * 5, 1e-5))
