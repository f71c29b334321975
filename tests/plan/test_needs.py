"""The memory of a training: what backward keeps, counted, and the settings that a device's budget gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from legolm import config as configs
from legolm import pipeline
from legolm.adapter import adapter_keys, init_factors
from legolm.block import Coverage
from legolm.config import Precision, RunConfig, TrainConfig
from legolm.data import Tokens
from legolm.errors import LegolmError
from legolm.federate import wire
from legolm.federate.transport import Exchange, Reply, Request, run_local
from legolm.federate.transport.engine import Body
from legolm.finetune import lora
from legolm.models import Shape, dtype_of, hidden_states, layout_of, lean, load_model, pack, shape_of
from legolm.plan import PlannedClient, make_plan
from legolm.plan.assign import Fit, assign
from legolm.plan.needs import Settings, Trainee, leaner, training_bytes, worst_batch
from legolm.runs import RunDir

COUNT, LENGTH = 4, 40


def saved_bytes(model: Any, coverage: Coverage, trains: Coverage, precision: Precision, checkpointing: bool) -> int:
    """Bytes that a forward pass saves for backward, weights and factors left out."""
    found: dict[int, int] = {}
    factors = init_factors(coverage.shape, None, 8, 0)
    factors = {key: factors[key] for key in adapter_keys(trains, None)}
    rows = [Tokens(tuple(range(10, 10 + LENGTH)), LENGTH - 4)] * COUNT

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if LENGTH * COUNT in tensor.shape or tensor.shape[0] in (COUNT * coverage.shape.kv_groups,):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        lora(model, coverage, factors, 2.0, precision),
        lean(model, precision, checkpointing),
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
    ):
        states = hidden_states(model, pack(rows, torch.device("cpu")))
        assert states.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("layers", [(0, 1), (1,)], ids=str)
@pytest.mark.parametrize("variant", ["llama", "qwen3", "phi3", "gpt_neox", "gemma3_text"])
def test_what_backward_keeps_is_counted(variant: str, layers: tuple[int, ...], tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny(variant), dtype_of("bf16"))
    coverage = Coverage.full(shape_of(model.config))
    trainee = Trainee(coverage, coverage.within(layers), 0, 260, 4, None, 8, layout=layout_of(model.config))
    counted = sum(8 * coverage.shape.hidden + 2 * (entries + heads * LENGTH) for entries, heads in trainee.kept)
    assert len(trainee.kept) == len(layers)
    found = saved_bytes(model, coverage, trainee.trains, "bf16", False) / (COUNT * LENGTH)
    # The norms' inverses, rotations and the last norm's input are not counted, the first layer's input is.
    assert counted == pytest.approx(found, rel=0.15)


def test_settings_from_the_fastest_to_the_leanest() -> None:
    lengths = worst_batch([10, 30, 20], 4)
    assert lengths == [30, 30, 20, 20]
    found = [(one.micro_batch_tokens, one.gradient_checkpointing) for one in leaner(TrainConfig(), lengths)]
    assert found == [(2048, False), (50, False), (30, False), (2048, True), (50, True), (30, True)]
    always = TrainConfig(gradient_checkpointing=True, micro_batch_tokens=25)
    assert list(leaner(always, lengths)) == [Settings(25, True)]


COVERAGE = Coverage.full(Shape("llama", 6, 64, 96, 2, 2, 16))


def test_memory_grows_with_what_is_kept() -> None:
    coverage = COVERAGE
    whole = Trainee(coverage, coverage, 20_000, 50_000, 2, None, 8)
    settings = Settings(2048, False)

    def need(one: Trainee = whole, at: Settings = settings, lengths: int = 8, precision: Precision = "fp32") -> int:
        return training_bytes(one, [400] * lengths, at, precision)

    assert need(lengths=5) < need(lengths=6) == need(lengths=8)  # 2,000 tokens, and 2,048 at once
    assert need(at=Settings(400, False)) < need()
    assert need(at=Settings(2048, True)) < need()
    assert need(precision="bf16") < need()
    assert need(replace(whole, trains=coverage.within([1]))) < need()
    assert need(replace(whole, targets=["q_proj"])) < need()
    assert need() < need(replace(whole, masked=True)) < need(replace(whole, masked=True, folded=10**6))


@pytest.fixture
def raw(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    data = {"train": f"{tmp_path}/data/*.jsonl", "limit_test": 1, "limit_validation": 1}
    found = three_clients(tmp_path, ("dense", "dense", "wide"), rows=10, data=data, evaluate={"local_only": False})
    found["blocks"][1]["intermediate_size"] = 48
    for file in (tmp_path / "data").iterdir():  # long enough that training takes more than loading
        rows = [{"instruction": f"Say {i}", "output": "ab" * 110} for i in range(10)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found | {"precision": "fp32"}


def planned(raw: dict[str, Any], place: int, **client: Any) -> PlannedClient:
    """A client's plan where this of it is changed."""
    clients = [{**one, **(client if index == place else {})} for index, one in enumerate(raw["clients"])]
    return make_plan(configs.validate(RunConfig, raw | {"clients": clients}, "test")).clients[place]


def budget(memory: float) -> dict[str, float]:
    return {"memory_mb": memory / 1e6}


def test_a_budget_takes_the_fastest_settings_that_fit(raw: dict[str, Any]) -> None:
    trainee = Trainee(COVERAGE, COVERAGE, 20_000, 260, 2, None, 8)

    def fit(memory: float | None) -> Fit:
        clients = [{"id": "a", "block": "dense"} | ({"profile": budget(memory)} if memory else {})]
        config = configs.validate(RunConfig, raw | {"clients": clients}, "test")
        return assign(config, {"a": [400] * 8}, {"dense": 1}, lambda client, name: trainee)[1]["a"]

    found = [fit(None)]
    assert found[0].settings == Settings(2048, False)
    assert fit(found[0].memory) == found[0]
    with pytest.raises(LegolmError, match=r"'a' has .* MB"):
        while True:  # with a byte less each time
            found.append(fit(found[-1].memory - 1))
    settings = [(one.settings.micro_batch_tokens, one.settings.gradient_checkpointing) for one in found]
    assert settings == [(2048, False), (1600, False), (800, False), (400, False), (800, True), (400, True)]


def test_a_client_with_a_budget_is_told_its_settings(raw: dict[str, Any], tmp_path: Path) -> None:
    usual = planned(raw, 0)
    assert (usual.micro_batch_tokens, usual.gradient_checkpointing) == (2048, False)
    tight = planned(raw, 0, profile=budget(usual.training_bytes - 1))
    assert tight.micro_batch_tokens < 2048
    assert tight.training_bytes < usual.training_bytes
    raw["clients"][0]["profile"] = budget(tight.training_bytes)
    seen: dict[str, set[tuple[int, bool]]] = {}

    def engine(folder: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def watch(exchange: Exchange) -> Exchange:
            def watched(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                for one in requests:
                    if wire.kind_of(one.content) == "train":
                        asked = wire.unpack(one.content, wire.TrainRequest)[0]
                        train = asked.settings.train
                        own = train.micro_batch_tokens, train.gradient_checkpointing
                        seen.setdefault(asked.client, set()).add(own)
                    yield from exchange([one], deadline_s)

            return watched

        run_local(folder, config, actors, lambda exchange: body(watch(exchange)))

    raw["federation"]["rounds"] = 1
    raw["clients"] = raw["clients"][:2]
    raw["blocks"] = raw["blocks"][:1]
    pipeline.run(configs.validate(RunConfig, raw, "test"), tmp_path / "out", engine=engine, models=False)
    assert seen == {"fr": {(tight.micro_batch_tokens, tight.gradient_checkpointing)}, "de": {(2048, False)}}


@pytest.mark.parametrize("wanted", ["fp32", "auto"])
def test_a_budget_that_fits_nothing_says_what_would(
    raw: dict[str, Any], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "legolm.plan.assign.choose_precision", lambda asked, device: "fp32" if asked == "auto" else asked
    )
    raw["precision"] = wanted
    leanest = raw | {"train": raw["train"] | {"micro_batch_tokens": 1}}
    wide, dense = (planned(leanest, place).training_bytes for place in (2, 0))
    low = planned(leanest | {"precision": "bf16"}, 0).training_bytes
    assert low < wide < dense
    start = r"clients: 'fr' has [\d.,]+ MB \(profile.memory_mb\); block 'dense' needs \d+ MB even with one example"
    if wanted == "auto":  # takes bf16 for all before it gives up
        plan = make_plan(configs.validate(RunConfig, _first(raw, profile=budget(wide)), "test"))
        assert (plan.precision, plan.clients[0].block) == ("bf16", "dense")
    else:
        with pytest.raises(LegolmError, match=start + ".*fp32; block 'wide' fits or precision bf16 fits"):
            planned(raw, 0, profile=budget(wide))
    with pytest.raises(
        LegolmError, match=start + r".*; give it \d+ MB, or \d+ MB and block 'wide', add a smaller block"
    ):
        planned(raw, 0, profile=budget(1e6))
    # Without a block of its own it gets the largest that fits at all.
    assert planned(raw | {"precision": "fp32"}, 0, block=None, profile=budget(wide)).block == "wide"
    assert planned(raw | {"precision": "fp32"}, 0, block=None, profile=budget(dense)).block == "dense"


def _first(raw: dict[str, Any], **client: Any) -> dict[str, Any]:
    first, *rest = raw["clients"]
    return raw | {"clients": [first | client, *rest]}
