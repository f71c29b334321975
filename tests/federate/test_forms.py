"""Rounds in other forms, codecs and blocks: what is sent, scored, written and carried on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from helpers import assert_one_line, legolm, load, validation_loss
from legolm import composition
from legolm.block import picture, read_block
from legolm.errors import LegolmError
from legolm.federate import wire
from legolm.federate.server import is_dense
from legolm.models import fingerprint, load_model
from legolm.plan import make_plan
from legolm.runs import Summary, read_stages, rounds_of
from legolm.system import Progress

INT8 = ("federation.codec=int8",)


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
