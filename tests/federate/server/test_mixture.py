"""What clients end with: mixtures in weight space, by the loss on their own validation data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import assert_one_line, legolm
from legolm import config as configs
from legolm import pipeline
from legolm.adapter import Tensors, load_factors, merge, mixed, slice_factors
from legolm.block import read_block
from legolm.config import RunConfig
from legolm.data import client_data, render
from legolm.evaluation import score
from legolm.federate.server.mixture import POINTS, choose, choose_own, let_go, points
from legolm.models import load_model, load_tokenizer
from legolm.report import print_summary
from legolm.runs import Mixture, Part, clients_of, read_stages

KEYS = ("layers.0.q.A", "layers.0.q.B", "layers.0.down.A", "layers.0.down.B")


def adapter(seed: int, rank: int = 2) -> Tensors:
    made = torch.Generator().manual_seed(seed)
    shapes = ((rank, 5), (7, rank), (rank, 7), (5, rank))
    return {key: torch.randn(shape, generator=made) for key, shape in zip(KEYS, shapes, strict=True)}


def product(factors: Tensors, module: str) -> torch.Tensor:
    return factors[f"layers.0.{module}.B"].double() @ factors[f"layers.0.{module}.A"].double()


@pytest.mark.parametrize("frozen", [(), ("layers.0.q.A", "layers.0.down.B"), ("layers.0.q.A",)])
@pytest.mark.parametrize("weights", [(1.0,), (0.75, 0.25), (1 / 3, 1 / 3, 1 / 3)])
def test_a_mixture_of_factors_is_the_mixture_of_weights(frozen: tuple[str, ...], weights: tuple[float, ...]) -> None:
    parts = [adapter(place) for place in range(len(weights))]
    for one in parts[1:]:
        one.update({key: parts[0][key] for key in frozen})
    found = mixed(list(zip(weights, parts, strict=True)))
    for module in ("q", "down"):
        wanted = sum((w * product(one, module) for w, one in zip(weights, parts, strict=True)), torch.zeros(1))
        torch.testing.assert_close(product(found, module), wanted.double(), rtol=1e-5, atol=1e-6)
    # Averaged where each module has a factor that all share, else one after the other, all modules alike.
    rank = 2 if len(frozen) == 2 else 2 * len(weights)
    assert {found[key].shape[0] for key in found if key.endswith(".A")} == {rank}


def test_adapters_of_unequal_rank_mix() -> None:
    found = mixed([(0.5, adapter(0, 2)), (0.5, adapter(1, 3))])
    wanted = 0.5 * product(adapter(0, 2), "q") + 0.5 * product(adapter(1, 3), "q")
    torch.testing.assert_close(product(found, "q"), wanted, rtol=1e-5, atol=1e-6)


def curve(*losses: float, stderr: float | None, own: tuple[Part, ...] = ("personal", "local")) -> list[Mixture]:
    return [Mixture(weights=at, validation=loss, stderr=stderr) for at, loss in zip(points(own), losses, strict=True)]


def test_own_questions_are_let_go_as_far_as_it_costs_little() -> None:
    """Points of the global update, a quarter and half of what was learned alone, and all of it."""
    own: tuple[Part, ...] = ("local",)
    # 0.11 there for 0.01 alone: one question in a thousand costs 0.0001, a hundredth of 0.01.
    assert let_go(curve(0.11, 0.1, 0.1, 0.01, stderr=0.0, own=own)) == pytest.approx(0.001)
    assert let_go(curve(0.0101, 0.1, 0.1, 0.01, stderr=0.0, own=own)) == 0.02  # a hundredth of them would cost nothing
    assert let_go(curve(0.001, 0.1, 0.1, 0.01, stderr=0.0, own=own)) == 0.02  # the global update is the better one
    assert let_go(curve(0.11, 0.1, 0.1, 0.0, stderr=0.0, own=own)) == 0.0
    # Where chance may have made the global update better: what it has alone is chosen, and nothing is lost there.
    assert let_go(curve(0.009, 0.1, 0.1, 0.01, stderr=0.1, own=own)) == 0.02


def test_points_are_means_of_what_a_client_has() -> None:
    assert points(("personal", "local")) == list(POINTS) and len(POINTS) == 8
    assert points(("personal",)) == [{"global": 1}, {"global": 0.5, "personal": 0.5}, {"personal": 1}]
    assert [at.get("local", 0) for at in points(("local",))] == [0, 0.25, 0.5, 1]
    assert points(()) == [{"global": 1}]
    assert all(sum(at.values()) == pytest.approx(1) for at in POINTS)


def test_the_choice_by_hand() -> None:
    # The demo's own losses, with 3.48 for the thirds: 3.36 is the best, and 0.1 or 0.16 more may be chance.
    losses = (3.83, 3.58, 3.51, 3.45, 3.48, 3.55, 3.36, 3.65)
    assert choose(curve(*losses, stderr=0.1)).weights == {"global": 0.5, "local": 0.5}
    assert choose(curve(*losses, stderr=0.16)).weights == {"global": 0.5, "personal": 0.5}
    assert choose(curve(*losses, stderr=0.5)).weights == {"global": 1}
    # One row says nothing of chance; nor do rows that are all answered alike: what is best is taken.
    assert choose(curve(*losses, stderr=None)).weights == {"personal": 0.5, "local": 0.5}
    assert choose(curve(1.04, 1.03, 1.02, 1.01, 1.01, 1.02, 1.01, 1.0, stderr=0.0)).weights == {"local": 1}
    assert choose(curve(*[1.0] * 8, stderr=0.0)).weights == {"global": 1}
    assert choose(curve(1.04, 1.2, 1.0, stderr=0.05, own=("personal",))).weights == {"global": 1}
    # The best one's standard error counts, not that of the one that is taken.
    found = curve(1.5, 1.2, 1.0, stderr=0.1, own=("personal",))
    assert choose([found[0].model_copy(update={"stderr": 9.0}), *found[1:]]).weights == {"personal": 1}


def test_the_choice_of_a_model_for_own_questions_by_hand() -> None:
    # Alone 3.65, the best 3.36: 0.29 better, and the difference of two that are each ± 0.2 is ± 0.28.
    losses = (3.83, 3.58, 3.51, 3.45, 3.48, 3.55, 3.36, 3.65)
    assert choose_own(curve(*losses, stderr=0.2)).weights == {"personal": 0.5, "local": 0.5}
    assert choose_own(curve(*losses, stderr=0.21)).weights == {"local": 1}
    assert choose_own(curve(*[1.0] * 8, stderr=0.0)).weights == {"local": 1}
    assert choose_own(curve(1.04, 1.2, 1.0, stderr=0.5, own=("personal",))).weights == {"personal": 1}


@pytest.fixture
def raw(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """Two rounds and a personal step, everyone also trained alone; blocks of all kinds."""
    federation = {"engine": "local", "rounds": 2, "personal_steps": 2, "personal": "mixture"}
    data = {"train": f"{tmp_path}/data/*.jsonl", "limit_test": 1, "limit_validation": 2}
    found = three_clients(tmp_path, ("dense", "half", "sparse"), rows=10, data=data, federation=federation)
    found["evaluate"] = {"scores": "own"}
    return found


@pytest.mark.parametrize("form", ["frozen_side", "factor"])
def test_a_client_ends_with_the_point_that_its_validation_data_choose(
    form: str, raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw["aggregate"] = {"form": form}
    raw["lora"]["ranks"] = {"q_proj": 2}
    config, out = configs.validate(RunConfig, raw, "test"), tmp_path / "out"
    summary = pipeline.run(config, out)
    ended = {one.client: one for one in clients_of(read_stages(out / "metrics.jsonl"), "personal")}
    assert set(ended) == {"fr", "de", "es"}
    for id, record in ended.items():
        assert [one.weights for one in record.mixtures] == list(POINTS)
        assert record.weights == choose(record.mixtures).weights and record.train is not None
        assert record.validation == choose(record.mixtures).validation
        # As merged weights, in float64, of what the run kept.
        block = read_block(out / "blocks" / {"fr": "dense", "de": "half", "es": "sparse"}[id])
        known = load_file(out / "rounds" / f"{summary.best_round:04}" / "adapter.safetensors")
        parts = {"local": load_file(out / "local" / id / "adapter.safetensors")}
        parts["global"] = slice_factors(block.coverage, {k: t for k, t in known.items() if k.startswith("layers")}, 4)
        final = load_file(out / "personal" / id / "adapter.safetensors")
        if "personal" not in record.weights:
            key = f"layers.{block.coverage.layers[0]}.self_attn.q_proj"
            wanted = sum(
                w * parts[p][f"{key}.B"].double() @ parts[p][f"{key}.A"].double() for p, w in record.weights.items()
            )
            torch.testing.assert_close(
                final[f"{key}.B"].double() @ final[f"{key}.A"].double(), wanted, rtol=1e-4, atol=1e-6
            )
        kept, _ = load_factors(out / "final" / id)
        assert {key: t.shape for key, t in kept.items()} == {key: t.shape for key, t in final.items()}
        # The loss of a point is that of a block with that adapter merged.
        tokenizer = load_tokenizer(block.path)
        model = load_model(block.path)
        rows = [render(row, tokenizer, 512) for row in client_data(config)[id].validation]
        merge(model, block.coverage, parts["local"], config.lora.scaling)
        assert score(model, rows, 16, "fp32").loss == pytest.approx(record.mixtures[-1].validation, rel=1e-5)
    client = summary.clients[0]
    assert client.mixtures == ended["fr"].mixtures and client.weights == ended["fr"].weights
    capsys.readouterr()
    print_summary(summary, out)
    assert "personal model is a mixture of" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert "3/4 global update, 1/4 alone" in page and page.count("Personal models</h2>") == 1

    killed = tmp_path / "killed"
    shutil.copytree(out, killed)
    for gone in ("personal/de", "personal/es", "final/de"):
        shutil.rmtree(killed / gone)
    again = pipeline.run(config, killed, resume=True)
    assert [one.model_dump() for one in again.clients] == [one.model_dump() for one in summary.clients]
    for id in ended:
        for name in (f"personal/{id}/adapter", f"final/{id}/model", f"final/{id}/factors"):
            assert (out / f"{name}.safetensors").read_bytes() == (killed / f"{name}.safetensors").read_bytes()
    starts = {load_factors(out / "final" / id)[1] for id in ended}
    apart = {id for id, one in ended.items() if len(one.weights) > 1 or "local" in one.weights}
    assert len(starts) == (1 if form == "frozen_side" else len(apart) + (len(apart) < 3))


def test_without_own_steps_it_is_of_the_global_update_and_alone_and_last_leaves_it_out(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    raw["federation"] |= {"rounds": 1, "personal_steps": 0}
    config, out = configs.validate(RunConfig, raw, "test"), tmp_path / "out"
    summary = pipeline.run(config, out, models=False)
    for record in clients_of(read_stages(out / "metrics.jsonl"), "personal"):
        assert record.train is None and [one.weights for one in record.mixtures] == points(("local",))
    assert all("personal" in one.own for one in summary.clients)
    last = config.model_copy(update={"federation": config.federation.model_copy(update={"personal": "last"})})
    summary = pipeline.run(last, out, resume=True, models=False)
    assert not (out / "personal").exists() and summary.clients[0].mixtures == []
    assert all("personal" not in one.own for one in summary.clients)


def test_no_validation_data_is_one_line_of_the_dry_run(raw: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"instruction": "Say", "output": "a"}] * 3
    for id in ("fr", "de"):
        (tmp_path / f"{id}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw["data"] |= {"validation": [str(tmp_path / "fr.jsonl"), str(tmp_path / "de.jsonl")], "test": 0.2}
    (tmp_path / "run.yaml").write_text(json.dumps(raw))
    done = legolm("run", tmp_path / "run.yaml", "--dry-run", "--out", tmp_path / "out")
    assert_one_line(done, "client 'es' is left without validation examples")
