"""Blocks that are cut by what clients sum of their own text when the run begins."""

from __future__ import annotations

import json
import random
import string
import tempfile
from collections.abc import Callable, Iterable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import Devices
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file
from tap import found, secrets
from transformers import PreTrainedTokenizerFast

from legolm import config as configs
from legolm import pipeline
from legolm.block import read_block
from legolm.config import CalibrationConfig, RunConfig
from legolm.data import client_data, own_tokens
from legolm.errors import LegolmError
from legolm.federate.bridge import PIECE
from legolm.federate.server import summed
from legolm.federate.transport import Body, Exchange, Reply, Request, engine_for
from legolm.federate.wire import SUMS, CalibrateRequest, SumsReply, kind_of, pack, unpack
from legolm.models import fingerprint, load_config, load_tokenizer, shape_of
from legolm.plan import checks, make_plan
from legolm.prune import Statistics, collect, collected, cut_blocks, flat, flat_size, save_statistics, sketched
from legolm.prune.statistics import load_statistics
from legolm.runs import RunDir, read_stages, rounds_of
from legolm.runs.kept import HASH_BYTES
from legolm.system import Progress, derive_seed
from residents import Residents

NAMES = ("fr", "de", "es")
PATIENCE_S = 600
ASKED = {"statistics": "clients", "samples": 4, "length": 32}


@pytest.fixture
def raw(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """A run in this process whose one block is cut by the clients' sums."""
    raw = three_clients(tmp_path, ("sparse", "sparse", "sparse"), evaluate={"scores": "own", "local_only": False})
    raw["federation"]["rounds"] = 1
    raw["blocks"][0]["calibration"] = ASKED
    return raw


def deployed(raw: dict[str, Any], **superlink: Any) -> RunConfig:
    federation = {"engine": "deployment", "superlink": superlink or {"address": "127.0.0.1:1"}}
    data = {name: value for name, value in raw["data"].items() if name != "train"}
    return configs.validate(RunConfig, raw | {"federation": raw["federation"] | federation, "data": data}, "test")


class EnoughError(Exception):
    """Blocks are cut; the rounds are not what this tests."""


def until_blocks(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
    """The engine of devices, until somebody is asked for anything else."""

    def work(exchange: Exchange) -> None:
        def asks(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
            if run.sums.exists():
                raise EnoughError
            return exchange(requests, deadline_s)

        body(asks)

    engine_for(config)(run, config, actors, work)


def test_devices_sums_cut_the_block_that_simulated_clients_sums_cut(raw: dict[str, Any], tmp_path: Path) -> None:
    config = configs.validate(RunConfig, raw, "test")
    local, out = RunDir(tmp_path / "local"), RunDir(tmp_path / "out")
    pipeline.run(config, local.path, models=False)
    devices = Residents(tmp_path, NAMES)
    pipeline.run(deployed(raw), out.path, engine=devices, models=False)
    assert local.sums.read_bytes() == out.sums.read_bytes()
    made = [load_file(run.block("sparse") / "model.safetensors") for run in (local, out)]
    assert all(torch.equal(made[0][key], tensor) for key, tensor in made[1].items())
    # What it took counts: squares in float32 of each, before the first round.
    least = 4 * flat_size(shape_of(load_config(Path(raw["model"]))), "diagonal")
    sent = rounds_of(read_stages(local.path / "metrics.jsonl"))[0].bytes
    assert sent.keys() == set(NAMES) and all(least < one.up < least + 2000 for one in sent.values())
    for name in NAMES:
        assert sum(line.startswith("calibrate: answered") for line in devices.said[name]) == 1
        assert sum("block llm: " in line for line in devices.said[name]) == 1
    assert not out.block("llm").exists()

    # It is the block that files of `legolm calibrate`, one of each client's training rows, give.
    base, settings, files = Path(raw["model"]), CalibrationConfig(samples=4, length=32), []
    for name, one in client_data(config).items():
        tokens = own_tokens(one.train, settings, load_tokenizer(base), config.seed)
        assert tokens.shape == (4, 32)
        files.append(str(tmp_path / f"{name}.safetensors"))
        save_statistics(collect(base, fingerprint(base), tokens, "diagonal", "fp32", Progress()), Path(files[-1]))
    spec = config.blocks[0].model_copy(update={"calibration": CalibrationConfig(statistics=tuple(files))})
    (block,) = cut_blocks(base, fingerprint(base), [(spec, tmp_path / "block")], config.seed, "fp32", Progress())
    assert block.coverage.hash == read_block(out.block("sparse")).coverage.hash
    with pytest.raises(LegolmError, match="'clients' are asked by `legolm run`"):
        cut_blocks(base, fingerprint(base), [(config.blocks[0], tmp_path / "b")], 0, "fp32", Progress())

    # A run that goes on cuts by what it has, and asks nobody.
    was = (out.block("sparse") / "model.safetensors").read_bytes()
    (out.block("sparse") / "model.safetensors").write_bytes(was[:-1])
    again = Residents(tmp_path, NAMES)
    pipeline.run(deployed(raw), out.path, resume=True, engine=again, models=False)
    assert (out.block("sparse") / "model.safetensors").read_bytes() == was and not any(map(again.said.get, NAMES))


def test_devices_send_sketches_of_all_second_moments(raw: dict[str, Any], tmp_path: Path) -> None:
    """Eight columns for inputs of 64 and 96: the same sums from devices and here, and the same of each block's."""
    raw["federation"] |= {"regmean": True, "rounds": 2}
    raw["aggregate"] = {"scheme": "heteagg", "whiten": "clients"}
    raw["blocks"].append({"name": "dense", "method": "dense"})
    raw["clients"][2]["block"] = "dense"
    raw["blocks"][0] |= {"method": "structured", "sparsity": None, "intermediate_size": 64}
    raw["blocks"][0]["calibration"] = ASKED | {"sketch": 8}
    local, out = RunDir(tmp_path / "local"), RunDir(tmp_path / "out")
    pipeline.run(configs.validate(RunConfig, raw, "test"), local.path, models=False)
    pipeline.run(deployed(raw), out.path, engine=Residents(tmp_path, NAMES), models=False)
    assert local.sums.read_bytes() == out.sums.read_bytes()
    for name in ("sparse", "dense"):
        assert local.block_sums(name).read_bytes() == out.block_sums(name).read_bytes()
    fitted, same = (load_file(one.protection / "matrices.safetensors") for one in (local, out))
    ends = [(one.round(2) / "adapter.safetensors").read_bytes() for one in (local, out)]
    assert ends[0] == ends[1] and local.frozen.read_bytes() == out.frozen.read_bytes()
    assert len(fitted) == 2 and all(torch.equal(tensor, same[name]) for name, tensor in fitted.items())
    sent = rounds_of(read_stages(local.path / "metrics.jsonl"))[0].bytes
    least = 2 * (3 * 64 + 96) * (4 + 2 * 8)  # of two layers' q, o, gate and down: squares and eight columns
    assert sent.keys() == set(NAMES) and all(least < one.up < least + 2000 for one in sent.values())
    # They are what each client's own second moments are by its sketches, each with another random side.
    config, base = configs.validate(RunConfig, raw, "test"), Path(raw["model"])
    shape, model = shape_of(load_config(base)), fingerprint(base)
    wanted: list[Statistics] = []
    for name, one in client_data(config).items():
        tokens = own_tokens(one.train, config.blocks[0].calibration, load_tokenizer(base), config.seed)
        seed = derive_seed(config.seed, "sketch", name)
        squares, sketches = sketched(collected(base, tokens, "full", "fp32", Progress()), 8, seed)
        wanted.append(Statistics.restored(squares, sketches, tokens.numel(), shape, model, 8, seed))
    for other in wanted[1:]:
        wanted[0].absorb(other)
    kept = load_statistics([out.sums], shape, model)
    torch.testing.assert_close(flat(kept.sums.items()), flat(wanted[0].sums.items()))


def test_few_tokens_are_not_summed(raw: dict[str, Any], tmp_path: Path) -> None:
    """Fewer than the hidden size, 64: by whose config this is, the dry run; by whose rows, the client."""
    raw["blocks"][0]["calibration"] = ASKED | {"samples": 1}
    with pytest.raises(LegolmError, match="over 1 x 32 tokens, fewer than the hidden size, 64, would tell them"):
        make_plan(configs.validate(RunConfig, raw, "test"))
    raw["blocks"][0]["calibration"] = ASKED | {"length": 48}
    for name in NAMES[1:]:
        rows = [json.dumps({"instruction": f"{i}", "output": "b" * 30}) + "\n" for i in range(3)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(rows))
    said = StringIO()
    with pytest.raises(EnoughError):
        config, progress = configs.validate(RunConfig, raw, "test"), Progress(Console(file=said, width=300))
        pipeline.run(config, tmp_path / "out", engine=until_blocks, progress=progress)
    for name in NAMES[1:]:
        assert f"client {name}: blocks are cut without its text (its text has 48 tokens in whole" in said.getvalue()


def test_whose_sums_are_none_is_named_and_left_out(raw: dict[str, Any]) -> None:
    base = Path(raw["model"])
    shape, print_ = shape_of(load_config(base)), fingerprint(base)
    request = CalibrateRequest(
        run="", client="", block="llm", base_fingerprint=print_, samples=2, length=8, needs="diagonal",
        precision="fp32", seed=0,
    )  # fmt: skip
    one = flat(collected(base, torch.arange(16).view(2, 8), "diagonal", "fp32", Progress()))
    sums = {
        "good": pack(SumsReply(tokens=16), {SUMS: one}),
        "half": pack(SumsReply(tokens=8), {SUMS: one / 2}),
        "much": pack(SumsReply(tokens=17), {SUMS: one}),
        "short": pack(SumsReply(tokens=16), {SUMS: one[1:]}),
        "negative": pack(SumsReply(tokens=16), {SUMS: -one}),
        "infinite": pack(SumsReply(tokens=16), {SUMS: one / 0}),
        "huge": pack(SumsReply(tokens=16), {SUMS: torch.full_like(one, 3e38)}),
        "other": pack(SumsReply(tokens=16), {"a": one}),
        "broken": b"hello",
        "late": b"",
        "gone": b"",
        "last": pack(SumsReply(tokens=8), {SUMS: one}),
    }

    def asked(ids: list[str]) -> tuple[Statistics, str]:
        said = StringIO()

        def exchange(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
            made = list(requests)
            assert [unpack(one.content, CalibrateRequest)[0].client for one in made] == ids
            for index, one in reversed(list(enumerate(made))):
                if one.client == "gone":  # nobody answers for it, and others come after it
                    continue
                yield Reply(index, sums[one.client], "" if sums[one.client] else "late: not online")
                yield Reply(index, sums["good"])  # once more
            yield Reply(-1, sums["good"])

        progress = Progress(Console(file=said, width=300))
        return summed(request, dict.fromkeys(ids, ""), shape, exchange, progress, {})[""], said.getvalue()

    total, said = asked(list(sums))
    torch.testing.assert_close(flat(total.sums.items()), 2.5 * one)
    assert {moments.tokens for moments in total.sums.values()} == {32}
    for id, says in (
        ("much", "its sums are of 17 tokens; 2 x 8 were asked for"),
        ("short", "its sums do not fit: sums of shape"),
        ("negative", "its sums do not fit: a sum of squares is -"),
        ("infinite", "its sums do not fit: sums of shape"),
        ("huge", "its sums do not fit: a mean square is 1.875e+37, over 1e+24"),
        ("other", "its sums are of 16 tokens"),
        ("broken", "message is broken"),
        ("late", "late: not online"),
        ("gone", "no reply came"),
    ):
        assert f"client {id}: blocks are cut without its text ({says}" in said
    assert said.count("without its text") == 9
    with pytest.raises(LegolmError, match="no client has sent any"):
        asked(["late", "short"])
    with pytest.raises(ValidationError, match="a sketch is of all second moments"):
        CalibrateRequest.model_validate(request.model_dump() | {"sketch": 4})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"privacy": {"secure": {}}}, "in the open, without noise; take privacy.secure and privacy.dp out"),
        ({"privacy": {"dp": {"level": "client", "noise_multiplier": 1, "clip": 1}}}, "take privacy.secure and"),
        ({"more": {"samples": 5}}, "asks once for all blocks; give them the same samples, length and sketch"),
        ({"more": {"sketch": 5}}, "asks once for all blocks; give them the same samples, length and sketch"),
    ],
)
def test_what_clients_cannot_be_asked_for_is_refused(raw: dict[str, Any], changes: dict[str, Any], says: str) -> None:
    if more := changes.pop("more", None):
        raw["blocks"].append(raw["blocks"][0] | {"name": "other", "calibration": ASKED | more})
    raw["federation"] |= {"rounds": 2}
    raw["aggregate"] = {"weight": "equal"}
    with pytest.raises(LegolmError, match=rf"blocks: 'sparse': calibration.statistics 'clients' .*{says}"):
        configs.validate(RunConfig, raw | changes, "test")


def test_the_dry_run_says_what_is_asked_and_refuses_what_cannot_travel(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for config, more in ((configs.validate(RunConfig, raw, "test"), ""), (deployed(raw), ", for which a device fetch")):
        (note,) = [one for one in make_plan(config).notes if "own text" in one]
        assert note.startswith(f"Blocks are cut by sums of the clients' own text: 0.0 MB of each{more}")
    disk = [make_plan(deployed(raw)).disk_bytes]
    raw["blocks"][0]["method"] = "sparsegpt"
    disk.append(make_plan(deployed(raw)).disk_bytes)
    squares = 2 * (3 * 64 + 96)  # of two layers' q, o, gate and down
    whole = 2 * (3 * 64 * 65 + 96 * 97) // 2
    assert disk[1] - disk[0] == 4 * (whole - squares) * (1 + 3 * 3)
    monkeypatch.setattr(checks, "MAX_SUMS_BYTES", 10_000)
    raw["blocks"][0]["calibration"] = ASKED | {"sketch": None}
    with pytest.raises(
        LegolmError, match="all second moments of this LLM are 0 MB, a message holds 0; set calibration"
    ):
        make_plan(configs.validate(RunConfig, raw, "test"))
    raw["blocks"][0]["calibration"] = ASKED | {"sketch": 16}
    with pytest.raises(
        LegolmError, match=r"in sketches of 16 columns of this LLM are 0 MB, .*; lower calibration.sketch"
    ):
        make_plan(configs.validate(RunConfig, raw, "test"))
    raw["blocks"][0]["calibration"] = ASKED | {"sketch": 4}
    assert any("in sketches of 4 columns (whole: 0 MB)" in one for one in make_plan(deployed(raw)).notes)
    raw["blocks"][0]["method"] = "wanda"
    make_plan(configs.validate(RunConfig, raw, "test"))


def test_no_row_is_on_the_wire(
    raw: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device over Flower: what it sums cuts the local engine's block, and nothing else of its text is seen.

    Where `TMPDIR` is too long for the paths of sockets, as batch systems make it.
    """
    long = tmp_path / ("of_a_batch_job" * 8)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    draw, rows = random.Random(7), list[list[str]]()
    for _ in range(20):
        rows.append(["".join(draw.choices(string.ascii_letters, k=24)) for _ in range(2)])
    lines = [json.dumps({"instruction": asked, "output": said}) + "\n" for asked, said in rows]
    wanted = {one for row in rows for text in row for one in secrets(tokenizer.encode(text), text)}
    (tmp_path / "data" / "fr.jsonl").write_text("".join(lines))
    raw["clients"] = [one for one in raw["clients"] if one["id"] == "fr"]
    raw["data"]["train"] = str(tmp_path / "data" / "fr.jsonl")
    devices, out, local = Devices(tmp_path, ["fr"], sums=False), RunDir(tmp_path / "out"), RunDir(tmp_path / "local")
    try:
        devices.start("fr")
        config = deployed(raw, home=str(devices.home), host="127.0.0.1", port=devices.port)
        with pytest.raises(EnoughError):
            pipeline.run(config, out.path, engine=until_blocks)
    finally:
        devices.stop(PATIENCE_S)
    with pytest.raises(EnoughError):
        pipeline.run(configs.validate(RunConfig, raw, "test"), local.path, engine=until_blocks)
    assert out.sums.read_bytes() == local.sums.read_bytes()
    assert read_block(out.block("sparse")).coverage.hash == read_block(local.block("sparse")).coverage.hash
    (reply,) = [path.read_bytes()[HASH_BYTES:] for path in tmp_path.glob("devices/fr/runs/*/replies/[!.]*")]
    up, down = b"\0".join(devices.tap.up), b"\0".join(devices.tap.down)
    assert kind_of(reply) == "sums" and reply in up
    assert (Path(raw["model"]) / "model.safetensors").read_bytes()[:PIECE] in down
    kept = [path.read_bytes() for path in (*out.path.rglob("*"), *tmp_path.glob("*.log")) if path.is_file()]
    for content in (up, down, *kept):
        assert not found(content, wanted)
