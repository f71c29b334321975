"""Rounds with other schemes, codecs and clients that come and go: whole runs on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from helpers import assert_one_line, legolm
from legolm import composition, pipeline
from legolm import config as configs
from legolm.block import picture, read_block
from legolm.config import RunConfig, load_study
from legolm.data import client_data, render
from legolm.errors import LegolmError
from legolm.evaluation import score
from legolm.federate import wire
from legolm.federate.server import is_dense, steps_of
from legolm.federate.server.gate import usual_size
from legolm.federate.transport import Exchange, Reply, Request, run_local
from legolm.federate.transport.engine import Body
from legolm.models import fingerprint, load_model, load_tokenizer
from legolm.plan import make_plan
from legolm.runs import RoundRecord, RunDir, Summary, dump_sealed, read_stage, read_stages, rounds_of
from legolm.study import compare, plans
from legolm.system import Progress

INT8 = ("federation.codec=int8",)


@pytest.fixture
def raw(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """Two dense clients, one with a narrower MLP (`wide`)."""
    holds = ("dense", "dense", "wide")
    data = {"train": f"{tmp_path}/data/*.jsonl", "limit_test": 1, "limit_validation": 1}
    found = three_clients(tmp_path, holds, rows=10, data=data, evaluate={"local_only": False})
    found["blocks"][1]["intermediate_size"] = 48
    return found


def load(raw: dict[str, Any], tmp_path: Path, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(raw))
    return configs.load(path, list(overrides))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Summary]:
    """Run a config in a folder of this name; blocks are cut once a test, final models written for who asks."""

    def go(config: RunConfig, name: str = "out", models: bool = False, **options: Any) -> Summary:
        return pipeline.run(config, tmp_path / name, store=tmp_path / "store", models=models, **options)

    return go


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
    assert rows["hetlora"].bytes_up == pytest.approx(rows["heteagg"].bytes_up, rel=0.1)
    assert rows["alone"].own < (rows["alone"].llm_before or 0.0)
    # To choose alone's settings by: each client's own validation data, on the block that it ends with.
    alone = tmp_path / "out" / "alone"
    config = RunDir(alone).config()
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


def validation_loss(model: Path, config: RunConfig, client: str) -> float:
    """Of a finished model on a client's validation data."""
    tokenizer = load_tokenizer(model)
    rows = [render(row, tokenizer, 512) for row in client_data(config)[client].validation]
    return score(load_model(model, torch.float32), rows, 8, "fp32").loss


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


@pytest.mark.parametrize("setting", ["scheme=flexlora", "form=exact"])
def test_the_llm_is_scored_and_written_with_more_than_is_sent(
    raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path, setting: str
) -> None:
    raw["clients"][2]["block"], raw["lora"]["rank"] = "dense", 2
    out = tmp_path / "out"
    config = load(raw, tmp_path, f"aggregate.{setting}", "federation.rounds=1")
    run(config, models=True)
    record = json.loads((out / "rounds" / "0001" / "metrics.json").read_text())
    losses = [validation_loss(out / "final" / "llm", config, client.id) for client in config.clients]
    assert record["llm_validation"] == pytest.approx(fmean(losses), rel=1e-4)
    ranks = {
        id: load_file(out / "final" / id / "factors.safetensors")["layers.0.mlp.up_proj.A"].shape[0]
        for id in ("llm", "fr")
    }
    assert ranks["fr"] == 2
    assert ranks["llm"] > 2
    # Those who hold the whole LLM have what they are sent, and are scored apart.
    assert [held["clients"] for held in record["held"]] == [["fr", "de", "es"]]
    assert record["held"][0]["scores"] != record["llm"]


def test_folded_bases_end_in_the_final_models(raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path) -> None:
    raw["clients"][2]["block"] = "dense"
    summary = run(load(raw, tmp_path, "aggregate.scheme=flora", "federation.personal_steps=1"), models=True)
    own = [client.own["personal"] for client in summary.clients]
    assert all(loss < client.own["before"] for loss, client in zip(own, summary.clients, strict=True))
    states = sorted((tmp_path / "out" / "clients" / "fr").iterdir())
    assert [path.name for path in states] == ["0002.safetensors"]  # round 1 folded nothing
    fold = load_file(states[0])["fold.layers.0.mlp.up_proj.A"]
    assert fold.shape[0] == 12
    # Four rows each, drawn by client: two steps of training leave them where they began.
    rows = torch.nn.functional.normalize(fold, dim=1).view(3, 4, -1)
    assert all(float((rows[i] * rows[j]).sum(1).abs().max()) < 0.9 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_frozen_side_in_int8_sends_an_eighth_and_resumes_exactly(
    raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path
) -> None:
    for client in raw["clients"]:
        client["block"] = "wide"
    raw["lora"]["rank"] = 16
    lr = "train.learning_rate=0.003"
    small = load(raw, tmp_path, "aggregate.form=frozen_side", "federation.codec=int8", "federation.rounds=3", lr)
    full = load(raw, tmp_path, "aggregate.scheme=fedavg", "federation.rounds=3", lr)
    straight, whole = run(small, "straight"), run(full, "full")
    assert straight.bytes_up_per_round < 0.3 * whole.bytes_up_per_round  # headers weigh more on a tiny model
    assert straight.bytes_down_per_round < 0.3 * whole.bytes_down_per_round
    assert (straight.llm.loss_after or 9.0) < (straight.llm.loss_before or 0.0)
    # As after a kill in round 3, when the clients had already written their states.
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "rounds" / "0003")
    (tmp_path / "killed" / "summary.json").unlink()
    run(small, "killed", resume=True)
    one, two = (
        load_file(tmp_path / name / "rounds" / "0003" / "adapter.safetensors") for name in ("straight", "killed")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_saliency_sends_less_where_bits_mask_and_structure_is_cut_once(
    three_clients: Callable[..., dict[str, Any]], run: Callable[..., Summary], tmp_path: Path
) -> None:
    data = {"train": f"{tmp_path}/data/*.jsonl", "limit_test": 1, "limit_validation": 1}
    raw = three_clients(tmp_path, ("dense", "wide", "sparse"), rows=10, data=data, evaluate={"local_only": False})
    out, planned = {}, {}
    for mask in ("structure", "saliency"):
        run(load(raw, tmp_path, f"aggregate.mask={mask}", "federation.rounds=1"), mask)
        metrics = json.loads((tmp_path / mask / "rounds" / "0001" / "metrics.json").read_text())
        out[mask] = {id: count["up"] for id, count in metrics["bytes"].items()}
        plan = make_plan(load(raw, tmp_path, f"aggregate.mask={mask}"))
        planned[mask] = {client.id: client.bytes_up for client in plan.clients}
    for found in (out, planned):
        for id in ("fr", "de"):  # a dense block has nothing to leave out, a structured one nothing more
            assert found["saliency"][id] == found["structure"][id]
    # Half of the float32 entries, and a bit for each.
    assert planned["saliency"]["es"] == pytest.approx((0.5 + 1 / 32) * planned["structure"]["es"], rel=0.001)
    assert out["saliency"]["es"] < 0.75 * out["structure"]["es"]  # with its header


def test_where_factors_are_others_each_round_nothing_of_the_last_is_fed_back(
    raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path
) -> None:
    raw["clients"][2]["block"] = "dense"
    for setting in ("form=exact", "scheme=raflora", "scheme=flora", "scheme=flexlora"):
        overrides = [f"aggregate.{setting}", "federation.codec=int8"]
        config = load(raw, tmp_path, *overrides)
        assert any("int8 is without error feedback" in note for note in make_plan(config).notes)
        assert make_plan(load(raw, tmp_path, *overrides, "federation.error_feedback=false")).notes == ()
    assert make_plan(load(raw, tmp_path, "federation.codec=int8")).notes == ()
    run(config)
    for path in (tmp_path / "out" / "clients").glob("*/*.safetensors"):
        assert not [key for key in load_file(path) if key.startswith("residual.")]


def test_a_redrawn_side_costs_the_bytes_of_one_and_whoever_comes_late_has_the_same_base(
    raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path
) -> None:
    raw["clients"][1]["joins"] = 3
    raw["federation"] |= {"rounds": 3, "personal_steps": 1}
    fixed, planned = load(raw, tmp_path), {}
    redrawn = load(raw, tmp_path, "aggregate.redraw=1")
    run(fixed, "fixed"), run(redrawn, "redrawn", models=True)
    for name, config in (("fixed", fixed), ("redrawn", redrawn)):
        planned[name] = {client.id: (client.bytes_down, client.bytes_up) for client in make_plan(config).clients}
    assert planned["redrawn"] == planned["fixed"]
    for number in (1, 2, 3):
        one, two = (
            json.loads((tmp_path / name / "rounds" / f"{number:04d}" / "metrics.json").read_text())["bytes"]
            for name in planned
        )
        for id, way in ((id, way) for id in one for way in ("up", "down")):
            late = 2 if (id, number, way) == ("de", 3, "down") else 1  # it gets what two rounds folded
            sent = planned["fixed"][id][way == "up"]
            assert abs(two[id][way] - one[id][way] - (late - 1) * sent) < 100  # in headers
    states = {id: load_file(tmp_path / "redrawn" / "clients" / id / "0003.safetensors") for id in ("fr", "de", "es")}
    assert states["fr"]["fold.layers.0.mlp.up_proj.A"].shape[0] == 8
    assert all(torch.equal(states["fr"][key], states["de"][key]) for key in states["fr"])
    rows = read_block(tmp_path / "redrawn" / "blocks" / "wide").coverage.rows(0, "mlp.up_proj")
    key = "fold.layers.0.mlp.up_proj.B"
    assert torch.equal(states["es"][key], states["fr"][key][rows])

    final, plain = tmp_path / "redrawn" / "final", load_model(Path(raw["model"]), torch.float32)
    peft, merged = PeftModel.from_pretrained(plain, final / "llm" / "adapter"), load_model(final / "llm", torch.float32)
    tokens = torch.arange(12)[None]
    best = json.loads((tmp_path / "redrawn" / "summary.json").read_text())["best_round"]
    assert peft.peft_config["default"].r % 4 == 0
    torch.testing.assert_close(peft(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-4)
    # What is folded, and a last side of the personal step, the same for both: the mean of factors is that of products.
    assert load_file(final / "fr" / "factors.safetensors")["layers.0.mlp.up_proj.A"].shape[0] == 4 * best + 4
    for form in ("factor", "exact"):
        method = composition.choose_method("heteagg", form, None, None)
        wanted = composition.plan([str(final / "fr"), str(final / "es")], "llm", None, method, None, None, Progress())
        composition.compose(wanted, tmp_path / form, Progress())
    one, two = (load_model(tmp_path / form, torch.float32)(tokens).logits for form in ("factor", "exact"))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_what_a_codec_lost_beside_a_side_that_is_gone_is_not_added(
    raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path
) -> None:
    added: list[bool] = []

    def spied(request: Any, content: Any, delta: Any, examples: int, metrics: Any, lost: Any, keep: Any) -> Any:
        added.append(bool(lost))
        return wire.answer(request, content, delta, examples, metrics, lost, keep)

    raw["clients"] = raw["clients"][:1]
    config = load(raw, tmp_path, "aggregate.redraw=2", "federation.codec=int8", "federation.rounds=4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("legolm.federate.client.runtime.answer", spied)
        run(config)
    assert added == [False, True, False, True]
    assert "int8 is without error feedback" in make_plan(load(raw, tmp_path, "aggregate.redraw=1", *INT8)).notes[0]
    masked = make_plan(load(raw, tmp_path, "aggregate.redraw=1", "aggregate.mask=saliency")).notes
    assert "The saliency mask is without error feedback" in masked[0]


def test_clients_join_leave_and_are_drawn(raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path) -> None:
    raw["clients"][0]["leaves"] = 1
    raw["clients"][1]["joins"] = 2
    summary = run(load(raw, tmp_path))
    assert [entry.accepted for entry in summary.history] == [[], ["fr", "es"], ["de", "es"]]
    raw["clients"][0].pop("leaves"), raw["clients"][1].pop("joins")
    drawn = [run(load(raw, tmp_path, "federation.fraction=0.5"), f"half{i}").history for i in range(2)]
    accepted = [[entry.accepted for entry in history] for history in drawn]
    assert accepted[0] == accepted[1]
    assert [len(found) for found in accepted[0]] == [0, 2, 2]
    only = run(load(raw, tmp_path, "federation.capable=true"), "capable")
    assert [entry.accepted for entry in only.history] == [[], ["fr", "de"], ["fr", "de"]]


def test_a_round_with_nobody_is_refused_before_anything_is_cut(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["clients"][0]["leaves"], raw["clients"][1]["joins"], raw["clients"][2]["leaves"] = 1, 3, 2
    make_plan(load(raw, tmp_path, "federation.rounds=3"))
    with pytest.raises(LegolmError, match="round 2: no client takes part"):  # `es` has a block
        make_plan(load(raw, tmp_path, "federation.rounds=3", "federation.capable=true"))


def test_the_plan_says_what_a_robust_scheme_can_promise_under_this_coverage(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    raw["lora"]["targets"] = ["up_proj"]
    said = make_plan(load(raw, tmp_path, "aggregate.scheme=median")).notes
    # A is held by all three; of B's 96 rows `wide` holds 48, and the other 48 are held by two: 48 of 64 + 96.
    assert len(said) == 1
    assert "no liar in 30 % of the entries (held by 2), 1 liar in 70 % of the entries (held by 3)" in said[0]
    assert "a liar among two cannot be outvoted" in said[0]
    assert make_plan(load(raw, tmp_path)).notes == ()


def test_late_replies_are_dropped_by_name(raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path) -> None:
    with pytest.raises(LegolmError, match=r"0 updates accepted.*fr: late: no answer within federation.deadline_s"):
        run(load(raw, tmp_path, "federation.deadline_s=0.000001"))


def swelling(client: str, number: int, factor: float) -> Callable[..., None]:
    """The local engine over a line on which one client's update of one round arrives much larger."""

    def engine(folder: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def wrap(exchange: Exchange) -> Exchange:
            def changed(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                asked: list[Request] = []
                for reply in exchange((asked.append(one) or one for one in requests), deadline_s):
                    request = asked[reply.index]
                    if request.client == client and wire.kind_of(reply.content) == "update":
                        header, delta = wire.unpack(reply.content, wire.UpdateReply)
                        if header.round == number:
                            delta = {key: factor * tensor for key, tensor in delta.items()}
                        reply = Reply(reply.index, wire.pack(header, delta))
                    yield reply

            return changed

        run_local(folder, config, actors, lambda exchange: body(wrap(exchange)))

    return engine


def test_outliers_are_clipped_or_refused(raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path) -> None:
    engine = swelling("de", 2, 1000.0)
    found = {}
    for action in ("none", "clip", "refuse"):
        run(load(raw, tmp_path, f"aggregate.outliers.action={action}"), action, engine=engine)
        records = [json.loads(line) for line in (tmp_path / action / "metrics.jsonl").read_text().splitlines()]
        found[action] = records[-1]
        usual = usual_size([RoundRecord.model_validate(one) for one in records[:2]])
    assert usual is not None
    assert found["none"]["train"]["de"]["size"] > 100 * usual
    assert found["clip"]["train"]["de"]["size"] == pytest.approx(3 * usual, rel=1e-4)
    assert found["refuse"]["accepted"] == ["fr", "es"]
    assert "times the median of earlier rounds" in found["refuse"]["refused"][0]["reason"]


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


@pytest.mark.parametrize("form", ["factor", "frozen_side"])
def test_a_client_that_trains_some_layers_changes_and_sends_no_others(
    raw: dict[str, Any], run: Callable[..., Any], tmp_path: Path, form: str
) -> None:
    raw["clients"][1]["layers"] = [1]  # Fed-HeLLo: the whole LLM, LoRA in its last layer
    raw["clients"] = raw["clients"][:2]
    overrides = ("federation.rounds=1", "federation.keep_updates=true", f"aggregate.form={form}")
    config = load(raw, tmp_path, *overrides, "aggregate.weight=equal")
    one, two = (client.id for client in config.clients)
    folder = RunDir(run_folder(run, config, tmp_path))
    record = read_stage(folder.round(1))
    assert isinstance(record, RoundRecord)
    assert record.accepted == [one, two]
    everything, some = (wire.unpack(folder.update(1, id).read_bytes(), wire.UpdateReply)[1] for id in (one, two))
    sizes = [sum(tensor.numel() for tensor in update.values()) for update in (everything, some)]
    assert sizes[1] * 2 == sizes[0]  # one of two equal layers
    planned = {client.id: client for client in make_plan(config).clients}
    assert planned[two].bytes_up * 2 == planned[one].bytes_up
    assert planned[two].bytes_down == planned[one].bytes_down  # its forward needs all layers' adapters

    # Layer 0 is the first client's alone, as in a run without the second; layer 1 is the mean of both.
    raw["clients"][1]["joins"] = 2
    alone = RunDir(run_folder(run, load(raw, tmp_path, *overrides), tmp_path, "alone"))
    start, both, single = (
        load_file(path / "adapter.safetensors") for path in (folder.round(0), folder.round(1), alone.round(1))
    )
    for key, tensor in both.items():
        stays = torch.equal(tensor, start[key])  # the frozen side
        assert torch.allclose(tensor, single[key], atol=1e-6) == ("layers.0." in key or stays), key


def run_folder(run: Callable[..., Any], config: RunConfig, tmp_path: Path, name: str = "out") -> Path:
    run(config, name)
    return tmp_path / name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"clients.1.layers": [2]}, "layers: layer 2 is not in the block, which has 0, 1"),
        ({"clients.1.layers": []}, "clients.1.layers"),
        ({"clients.1.layers": [0], "aggregate.scheme": "fedavg", "clients.2.block": "dense"}, "trains some layers"),
        ({"clients.1.layers": [0], "clients.1.block": None, "clients.1.profile": {"memory_mb": 9e9}}, "with `block`"),
        (
            {"clients.2.layers": [1], "blocks.1.num_hidden_layers": 1},
            "which its block 'wide' keeps is chosen when it is cut",
        ),
    ],
)
def test_layers_that_a_client_cannot_train(raw: dict[str, Any], tmp_path: Path, change: dict, says: str) -> None:
    with pytest.raises(LegolmError, match=says):
        make_plan(load(raw, tmp_path, *(f"{key}={json.dumps(value)}" for key, value in change.items())))


def test_a_window_that_rolls_trains_what_it_covers_in_the_round(
    raw: dict[str, Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    """FedRolex: one client, half of the neurons in round 1, the other half in round 2, the first again in round 3."""
    neurons = 96
    raw["blocks"] = [
        {"name": f"at-{offset}", "method": "window", "intermediate_size": neurons // 2, "offset": offset}
        for offset in (0, neurons // 2)
    ]
    raw["clients"] = [{"id": raw["clients"][0]["id"], "blocks": ["at-0", "at-48"]}]
    config = load(raw, tmp_path, "federation.rounds=3", "federation.keep_updates=true", "federation.personal_steps=1")
    folder = RunDir(run_folder(run, config, tmp_path))
    after = [load_file(folder.round(number) / "adapter.safetensors")["layers.1.mlp.up_proj.B"] for number in range(4)]
    first = torch.arange(neurons) < neurons // 2
    for (old, new), window in zip(pairwise(after), (first, ~first, first), strict=True):
        assert torch.equal((new != old).any(1), window)
    sent = [wire.unpack(folder.update(n, config.clients[0].id).read_bytes(), wire.UpdateReply)[0] for n in (1, 2, 3)]
    assert [one.block for one in sent] == ["at-0", "at-48", "at-0"]
    run(config, "out", models=True, resume=True)
    assert read_block(folder.final(config.clients[0].id)).name == "at-0"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"clients.0.blocks": ["dense", "wide"]}, "give one of `block`, `blocks` and `profile`"),
        ({"clients.0.block": None, "clients.0.blocks": ["dense", "wild"]}, "wants block 'wild'; did you mean `wide`"),
        (
            {"clients.0.block": None, "clients.0.blocks": ["dense", "wide"], "aggregate.scheme": "hetlora"},
            "trains another block in each round",
        ),
        (
            {"clients.0.block": None, "clients.0.blocks": ["dense", "wide"], "federation.codec": "int8"},
            "federation.error_feedback: client .* trains another block in each round",
        ),
    ],
)
def test_blocks_that_cannot_take_turns(raw: dict[str, Any], tmp_path: Path, change: dict, says: str) -> None:
    with pytest.raises(LegolmError, match=says):
        make_plan(load(raw, tmp_path, *(f"{key}={json.dumps(value)}" for key, value in change.items())))


def test_rounds_do_not_depend_on_what_clients_do_after_them(
    raw: dict[str, Any], run: Callable[..., Summary], tmp_path: Path
) -> None:
    """The rate falls to zero with the rounds: own steps begin where those of training alone are by then."""
    for name, steps in (("none", 0), ("own", 5)):
        run(load(raw, tmp_path, f"federation.personal_steps={steps}"), name)
    one, two = (load_file(tmp_path / name / "rounds" / "0002" / "adapter.safetensors") for name in ("none", "own"))
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    config = load(raw, tmp_path, "train.steps=4", "federation.personal_steps=5")
    assert [steps_of(config, "round", number) for number in (1, 2)] == [(4, 0, 8), (4, 4, 8)]
    assert steps_of(config, "local", 0) == (13, 0, 13) and steps_of(config, "personal", 0) == (5, 8, 13)


def test_lora_beside_the_zeros(
    three_clients: Callable[..., dict[str, Any]], run: Callable[..., Summary], tmp_path: Path
) -> None:
    """A plain adapter of a sparse block: the block has its zeros, PEFT computes the final model, which has none."""
    raw = three_clients(tmp_path, ("dense", "sparse", "sparse"), evaluate={"local_only": False})
    raw["blocks"][1]["adapter"] = "plain"
    config = load(raw, tmp_path)
    plan = make_plan(config)
    alone = load(raw, tmp_path, "federation.mode=alone", "evaluate.local_only=true")
    for one in (plan, make_plan(alone)):  # which writes merged models, too
        assert any("LoRA stands beside the zeros of sparse (adapter: plain)" in note for note in one.notes)
    summary = run(config, models=True)
    block = read_block(tmp_path / "out" / "blocks" / "sparse")
    assert not block.coverage.masks and block.sparsity == pytest.approx(0.5, abs=0.01) and not is_dense(block)
    assert next(one.sparsity for one in summary.blocks if one.name == "sparse") == block.sparsity
    bare, final = load_model(block.path), load_model(tmp_path / "out" / "final" / "de")
    weight = bare.model.layers[0].mlp.up_proj.weight
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float((final.model.layers[0].mlp.up_proj.weight == 0).float().mean()) < 0.01
    assert read_block(tmp_path / "out" / "final" / "de").sparsity == 0
    adapted = PeftModel.from_pretrained(bare, tmp_path / "out" / "final" / "de" / "adapter")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, final(ids).logits, rtol=1e-3, atol=1e-3)
    # Exported, it is for that block, wherever final models are, and never for the LLM that has the same entries.
    elsewhere = tmp_path / "elsewhere"
    run(load(raw, tmp_path, f"final={elsewhere}"), "apart", models=True)
    for number, name in enumerate((f"{tmp_path}/out:de", elsewhere / "de")):
        done = legolm("export", name, "--to", "adapter", "--out", tmp_path / f"adapter-{number}")
        assert done.returncode == 0, done.stderr
        base = json.loads((tmp_path / f"adapter-{number}" / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        assert fingerprint(Path(base)) == fingerprint(block.path)
    shutil.rmtree(tmp_path / "apart" / "blocks")
    assert_one_line(legolm("export", elsewhere / "de", "--to", "adapter", "--out", tmp_path / "gone"), "any more")
    assert "50.0% of the decoder's linear weights are kept" in picture(block.coverage, block.sparsity)
    # It is scored as itself, too.
    records = rounds_of(read_stages(tmp_path / "out" / "metrics.jsonl"))
    assert [one.clients for one in records[-1].held] == [["fr"], ["de", "es"]]


def test_only_bit_masks_have_zeros_to_stand_beside(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["blocks"][1]["adapter"] = "plain"
    with pytest.raises(LegolmError, match=r"`adapter: plain` is for a criterion's cut, and structured has no bit"):
        load(raw, tmp_path)
