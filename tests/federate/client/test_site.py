"""A client that has only its own folder, and answers as the simulated one does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import ended, forked
from legolm import config as configs
from legolm import pipeline
from legolm.adapter import Tensors, init_factors, slice_factors
from legolm.block import Block, read_block
from legolm.config import RowsConfig, TrainConfig
from legolm.data import Examples, client_data, read_examples, tokens
from legolm.errors import LegolmError
from legolm.evaluation import score_each
from legolm.federate import wire
from legolm.federate.client import ClientRuntime, HeldSite, Profile, only, runtime, simulated
from legolm.federate.client.resident import SPLITS
from legolm.runs import RunDir, Score


def site(home: Path) -> HeldSite:
    """What is in the folder of `home`, rows by split."""
    data = {split: home / "data" / f"{split}.jsonl" for split in SPLITS}
    rows = {split: Examples.of(read_examples(str(path), RowsConfig(), "data")) for split, path in data.items()}
    return HeldSite(home / "block", home, rows, Profile("cpu"))


@pytest.fixture(scope="module")
def run(three_clients: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run of one round whose client `fr` holds the block `wide`."""
    folder = tmp_path_factory.mktemp("site")
    raw = three_clients(folder / "all", ("wide", "dense", "dense"), federation={"engine": "local", "rounds": 1})
    raw["evaluate"] = {"local_only": False}
    path = folder / "run.json"
    path.write_text(json.dumps(raw))
    pipeline.run(configs.load(path), folder / "all" / "run", models=False)
    return RunDir(folder / "all" / "run")


@pytest.fixture
def home(run: RunDir, tmp_path: Path) -> Path:
    """What the device of `fr` has: its block and its data."""
    home = tmp_path / "device"
    shutil.copytree(run.block("wide"), home / "block")
    (home / "data").mkdir()
    held = client_data(run.known())["fr"]
    for split in ("train", "validation", "test"):
        rows = [{"messages": [message.turn for message in one.messages]} for one in getattr(held, split)]
        (home / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def request(block: Block, client: str = "fr", **train: Any) -> bytes:
    coverage = block.coverage
    payload = slice_factors(coverage, init_factors(coverage.shape, None, 4, seed=0), 4)
    settings = wire.TrainSettings(
        targets=None, run_rank=4, ranks={}, dropout=0.0, train=TrainConfig(steps=3, batch_size=4, **train),
        precision="fp32", frozen_side=False, derived_seed=None, proximal=0.0, codec="int8", keep=1.0,
        error_feedback=True,
    )  # fmt: skip
    written = wire.write(settings, coverage, 4, payload, {})
    header = wire.TrainRequest(
        run="r", client=client, block="wide", base_fingerprint=block.base_fingerprint, coverage_hash=coverage.hash,
        rank=4, scale=2.0, phase="round", round=1, steps=3, done=0, total=3, seed=5, settings=written.settings,
    )  # fmt: skip
    return wire.pack(header, written.content)


def test_a_client_trains_where_nothing_but_its_folder_is(run: RunDir, home: Path, tmp_path: Path) -> None:
    asked = request(read_block(run.block("wide")))
    expected, expected_change = wire.unpack(ClientRuntime(simulated(run)).answer(asked), wire.UpdateReply)

    def alone() -> None:
        os.chdir(home)
        (tmp_path / "reply").write_bytes(ClientRuntime(only("fr", site(home))).answer(asked))

    everything = run.path.parent  # the run, its config, everyone's data: not there while the process works
    away = everything.rename(everything.with_name("away"))
    try:
        assert ended(forked(alone)) == 0
    finally:
        away.rename(everything)
    found, change = wire.unpack((tmp_path / "reply").read_bytes(), wire.UpdateReply)
    assert set(change) == set(expected_change)
    assert all(torch.equal(change[key], tensor) for key, tensor in expected_change.items())
    assert (found.received_hash, found.examples) == (expected.received_hash, 14)
    assert (found.metrics["loss_first"], found.metrics["tokens"]) == (
        expected.metrics["loss_first"],
        expected.metrics["tokens"],
    )
    assert [path.name for path in (home / "state").iterdir()] == ["0001.safetensors"]  # what int8 lost


def test_a_device_answers_for_itself_only(run: RunDir, home: Path) -> None:
    device, block = ClientRuntime(only("fr", site(home))), read_block(home / "block")
    with pytest.raises(LegolmError, match="client fr: has its own data only, and was asked for those of 'de'"):
        device.answer(request(block, client="de"))
    header = {"run": "r", "client": "fr", "block": "wide", "rank": 1, "scale": 2.0}
    header |= {"base_fingerprint": block.base_fingerprint, "coverage_hash": block.coverage.hash}
    header |= {"targets": None, "ranks": {}, "max_length": 99, "long_examples": "truncate", "precision": "fp32"}
    asked = wire.EvaluateRequest(**header, sets=[("fr", "test"), ("es", "test")], batch_size=4)
    with pytest.raises(LegolmError, match="asked for those of 'es'"):
        device.answer(
            wire.pack(
                asked,
                wire.encode(slice_factors(block.coverage, init_factors(block.coverage.shape, None, 1, 0), 1), "none"),
            )
        )


def test_what_is_kept_of_many_clients_is_bounded(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, held = tokens._Kept(), client_data(run.known())
    monkeypatch.setattr(tokens, "_kept", kept)
    block = read_block(run.block("wide"))
    header = {"run": "r", "client": "fr", "block": "wide", "rank": 1, "scale": 2.0}
    header |= {"base_fingerprint": block.base_fingerprint, "coverage_hash": block.coverage.hash}
    header |= {"targets": None, "ranks": {}, "max_length": 99, "long_examples": "truncate", "precision": "fp32"}
    asked = wire.EvaluateRequest(**header, sets=[(id, "test") for id in ("fr", "de", "es", "fr")], batch_size=4)
    content = wire.pack(
        asked, wire.encode(slice_factors(block.coverage, init_factors(block.coverage.shape, None, 1, 0), 1), "none")
    )
    expected = wire.unpack(ClientRuntime(simulated(run)).answer(content), wire.ScoreReply)[0]
    assert [key[0] for key in kept] == [held[id].test.digest for id in ("de", "es", "fr")]  # used last is last
    size = kept.count
    assert size == sum(map(len, (one.ids for rows in kept.values() for one in rows)))
    kept.clear()
    kept.count = 0
    monkeypatch.setattr(tokens, "KEPT_TOKENS", size - 1)
    assert wire.unpack(ClientRuntime(simulated(run)).answer(content), wire.ScoreReply)[0] == expected
    assert [key[0] for key in kept] == [held[id].test.digest for id in ("es", "fr")] and kept.count < size


def test_the_same_answers_are_not_made_twice(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[int]()

    def counted(model: Any, rows: Any, *how: Any) -> Any:
        made.append(len(rows))
        return score_each(model, rows, *how)

    monkeypatch.setattr(runtime, "score_each", counted)
    block = read_block(run.block("wide"))
    header = {"run": "r", "client": "fr", "block": "wide", "rank": 1, "scale": 2.0, "batch_size": 4}
    header |= {"base_fingerprint": block.base_fingerprint, "coverage_hash": block.coverage.hash}
    header |= {"targets": None, "ranks": {}, "max_length": 99, "long_examples": "truncate", "precision": "fp32"}
    start = slice_factors(block.coverage, init_factors(block.coverage.shape, None, 1, 0), 1)
    other = {key: tensor + 0.1 for key, tensor in start.items()}
    answers = ClientRuntime(simulated(run))

    def score(factors: Tensors, *clients: str) -> list[Score]:
        asked = wire.EvaluateRequest.model_validate(header | {"sets": [(id, "test") for id in clients]})
        return wire.unpack(answers.answer(wire.pack(asked, wire.encode(factors, "none"))), wire.ScoreReply)[0].scores

    first = score(start, "fr", "de")
    assert len(made) == 2
    assert score(start, "es", "de", "fr")[1:] == first[::-1]
    assert len(made) == 3
    assert score(other, "de") != first[1:]
    assert len(made) == 4
    monkeypatch.setattr(runtime, "SCORED", 1)
    assert score(start, "fr", "de") == first and len(made) == 4
    assert score(start, "fr", "de") == first and len(made) == 5  # of the two only the last was kept


def test_a_client_can_refuse_long_examples(home: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "x" * 9 * place}, {"role": "assistant", "content": "y"}]}
            for place in range(1, 12)]  # fmt: skip
    (home / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = read_block(home / "block")

    def answer(name: str) -> wire.UpdateReply:
        device = ClientRuntime(only("fr", site(home)))
        asked = request(block, max_length=80, long_examples=name, epochs=1.0)
        return wire.unpack(device.answer(asked), wire.UpdateReply)[0]

    assert 0 < answer("truncate").metrics["truncated"] < 11
    with pytest.raises(LegolmError, match=r"example \d+ of 'fr' is longer than 80 tokens"):
        answer("refuse")
