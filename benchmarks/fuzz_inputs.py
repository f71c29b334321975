"""The inputs of benchmarks/fuzz.py: valid ones of every kind, and the readers that they are for.

Each reader is the product's own, called as the product calls it.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fuzz_sums import messages as of_sums
from legolm import adapter, data, runs
from legolm.block import Coverage, Manifest, read_block, write_block
from legolm.config import Fields, RowsConfig, TrainConfig, load, load_study
from legolm.errors import LegolmError
from legolm.federate import wire
from legolm.federate.server.calibrating import read_sums
from legolm.models import (
    Shape,
    count_parameters,
    fingerprint,
    load_config,
    load_tokenizer,
    shape_of,
)
from legolm.prune import collect, collected, save_statistics, sketched
from legolm.prune.statistics import load_statistics
from legolm.system import Progress

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = """model: starter
seed: 3
data:
  train: [a.jsonl, b.jsonl]
  test: 0.2
  split: {by: dirichlet, column: topic, alpha: 0.5}
blocks:
  - name: half
    method: wanda
    sparsity: 0.5
    calibration: &text {text: pydoc, samples: 4}
  - {name: small, method: structured, params: 70M, calibration: *text, recover: {minutes: 1.5}}
  - {name: whole, method: dense}
clients:
  - {id: fr, block: half, rank: 4}
  - {id: de, profile: {memory_mb: 800}, joins: 2}
lora: {rank: 8, scale: 2.0, targets: [q_proj, v_proj], ranks: {q_proj: 4}}
train: {steps: 4, learning_rate: 0.002, epochs: 1.5}
aggregate: {scheme: heteagg, form: factor, outliers: {action: clip, factor: 3}}
federation: {rounds: 2, codec: int8, deadline_s: 60}
"""


@dataclass(frozen=True)
class Kind:
    """Inputs of one kind: valid ones, what they are made of (`json`, `tensors`, `text`), who reads them, how often."""

    name: str
    form: str
    seeds: list[bytes]
    read: Callable[[bytes, Path], object]
    weight: int


# Readers.

TIMES = itertools.count(1)


def put(path: Path, content: bytes) -> None:
    """A new file with a time of its own: what is known of a file goes by that, and clocks are coarse."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(0, next(TIMES)))


def in_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    """`read` of a file with the content."""

    def call(content: bytes, folder: Path) -> object:
        put(folder / name, content)
        return read(folder / name)

    return call


def in_place_of(valid: Path, name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    """`read` of a folder with the valid one's files, of which one has the content."""

    def call(content: bytes, folder: Path) -> object:
        if not (folder / name).exists():
            for file in valid.iterdir():
                if file.name != name:
                    (folder / file.name).symlink_to(file)
        put(folder / name, content)
        return read(folder)

    return call


def rows(path: Path, config: RowsConfig) -> int:
    return sum(len(data.to_example(row, config).messages) for row in data.read_rows(str(path), "data.train"))


def config(path: Path) -> object:
    found = load(path)
    return found.cuts, [block.recover.most_steps for block in found.cuts], found.lora.scaling


def checkpoint(path: Path) -> object:
    return load_config(path), count_parameters(path), fingerprint(path)


PAIR = data.Example((data.Message("user", "Capital of Italy?"), data.Message("assistant", "Rome")))


def tokenized(path: Path) -> object:
    tokenizer = load_tokenizer(path)
    return data.render(PAIR, tokenizer, 64)


def factors(path: Path) -> object:
    return adapter.load_factors(path)


def refuses(content: bytes, folder: Path, request: wire.TrainRequest, given: wire.Broadcast, block: Coverage) -> object:
    """What both ends do with bytes that came in."""
    if wire.kind_of(content) == "update":
        return wire.accept(content, request, given)
    if wire.kind_of(content) == "train":
        header, tensors = wire.unpack(content, wire.TrainRequest)
        # A server names factors of this size at most; a client's own bounds are another matter.
        if header.rank > 64 or header.settings.run_rank > 64 or header.settings.fold_rank > 64:
            raise LegolmError("larger than what this script opens")
        return wire.open_(header, block, tensors)
    if wire.kind_of(content) == "scores":
        return wire.unpack(content, wire.ScoreReply)
    return wire.unpack(content, wire.EvaluateRequest)


def offer(content: bytes, folder: Path, devices: wire.DeviceReply, offered: wire.OfferRequest) -> object:
    """The block that a device takes, by what its server says or by what it says of itself."""
    if wire.kind_of(content) == "offer":
        return wire.largest(wire.unpack(content, wire.OfferRequest)[0], devices)
    return wire.largest(offered, wire.unpack(content, wire.DeviceReply)[0])


def calibration(content: bytes, folder: Path, asked: wire.CalibrateRequest, shape: Shape) -> object:
    """What a client is asked to sum, or what it sums."""
    if wire.kind_of(content) == "calibrate":
        return wire.unpack(content, wire.CalibrateRequest)
    return read_sums(content, asked, shape)


def welcomed(content: bytes) -> object:
    told = wire.read_welcome(content.decode("utf-8", "replace"))
    return told.block_id, told.bytes, told.data.config


# Valid inputs.


def tiny(folder: Path) -> tuple[Path, PreTrainedTokenizerFast]:
    """A Llama of one layer, hidden 16, that knows a token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHATML,
    )
    settings = AutoConfig.for_model(
        "llama", hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


def kinds(home: Path) -> list[Kind]:
    """All of them; what their readers need beside an input lies in `home`."""
    model, tokenizer = tiny(home / "model")
    shape = shape_of(load_config(model))
    whole = Coverage.full(shape)
    part = Coverage(shape, (0,), ((1,),), (tuple(range(4, 20)),), {"layers.0.self_attn.o_proj": torch.eye(16, 8) > 0})
    files = _blocks(home, model, part) | _adapters(home, whole) | _statistics(home, model)
    index = home / "sharded"
    shutil.copytree(model, index)
    (index / "model.safetensors").rename(index / "a.safetensors")
    names = json.loads(_header(model / "model.safetensors"))
    names.pop("__metadata__", None)
    files["index"] = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")}).encode()
    templates = home / "templates"
    shutil.copytree(model, templates)
    own = (model / "chat_template.jinja").read_bytes()
    (templates / "chat_template.jinja").unlink()
    request, given, messages = _messages(part)
    sums, of_sum = of_sums(part)
    offers, devices, offered = _offers()
    sums_sent, sums_asked, shape = _calibration(model)
    pairs = b"".join(
        json.dumps({"instruction": f"Say {i}", "output": "a, \u2028b", "n": i}).encode() + b"\n" for i in range(4)
    )
    turns = [{"role": role, "content": "hi"} for role in ("system", "user", "assistant")]
    chats = json.dumps({"messages": turns, "topic": "x"}).encode() + b"\n"
    table = b'instruction,output,topic\nSay 1,"a ""b"", c",x\n"Say\n2",b,y\n'
    stage, summary, identity = _records()
    study: dict[str, Any] = {
        "run": {"blocks": [{"name": "a", "method": "dense"}], "clients": [{"id": "fr", "block": "a"}]}
    }
    study |= {
        "variants": [{"name": "x", "set": {"train.steps": 3}}, {"name": "y", "block": "dense", "match_bytes": True}]
    }

    def of_model(name: str, read: Callable[[Path], object] = checkpoint) -> Callable[[bytes, Path], object]:
        return in_place_of(model, name, read)

    def record(kind: Any) -> Callable[[bytes, Path], object]:
        return in_file("record.json", lambda path: runs.read_record(path, kind))

    def template(content: bytes, folder: Path) -> object:
        tokenizer.chat_template = content.decode("utf-8", "replace")
        return data.render(PAIR, tokenizer, 64)

    lines = RowsConfig(fields=Fields(messages="messages"))
    adapted = partial(adapter.read_adapter, coverage=whole, where="lora.start")
    return [
        Kind("config YAML", "text", [CONFIG.encode()], in_file("run.yaml", config), 3),
        Kind("config values", "json", [_plain(home, CONFIG)], in_file("run.yaml", config), 2),
        Kind("study", "json", [json.dumps(study).encode()], in_file("study.yaml", load_study), 2),
        Kind("rows JSONL", "lines", [pairs], in_file("a.jsonl", lambda path: rows(path, RowsConfig())), 14),
        Kind("rows CSV", "text", [table], in_file("a.csv", lambda path: rows(path, RowsConfig())), 8),
        Kind("rows messages", "lines", [chats * 2], in_file("a.jsonl", lambda path: rows(path, lines)), 10),
        Kind("weights", "tensors", [(model / "model.safetensors").read_bytes()], of_model("model.safetensors"), 3),
        Kind("weights index", "json", [files["index"]],
             in_place_of(index, "model.safetensors.index.json", checkpoint), 2),
        Kind("model config", "json", [(model / "config.json").read_bytes()], of_model("config.json"), 3),
        Kind("generation config", "json", [(model / "generation_config.json").read_bytes()],
             of_model("generation_config.json"), 1),
        Kind("tokenizer", "json", [(model / "tokenizer.json").read_bytes()], of_model("tokenizer.json", tokenized), 2),
        Kind("tokenizer config", "json", [(model / "tokenizer_config.json").read_bytes()],
             of_model("tokenizer_config.json", tokenized), 1),
        Kind("chat template", "text", [own, CHATML.encode()], template, 2),
        Kind("manifest", "json", [files["manifest"]], in_place_of(home / "block", "manifest.json", read_block), 4),
        Kind("coverage", "tensors", [files["coverage"]],
             in_place_of(home / "block", "coverage.safetensors", read_block), 8),
        Kind("adapter", "tensors", [files["adapter"]],
             in_place_of(home / "adapter", "adapter_model.safetensors", adapted), 8),
        Kind("adapter config", "json", [files["adapter config"]],
             in_place_of(home / "adapter", "adapter_config.json", adapted), 6),
        Kind("factors", "tensors", [files["factors"]],
             in_place_of(home / "factors", "factors.safetensors", factors), 6),
        Kind("statistics", "tensors", [files["statistics"]],
             in_file("s.safetensors", lambda path: load_statistics([path], shape, "f")), 6),
        Kind("messages", "tensors", messages,
             partial(refuses, request=request, given=given, block=part), 20),
        Kind("secure sums", "tensors", sums, of_sum, 16),
        Kind("offers", "tensors", offers, partial(offer, devices=devices, offered=offered), 6),
        Kind("calibration", "tensors", sums_sent, partial(calibration, asked=sums_asked, shape=shape), 6),
        Kind("welcome", "json", [_welcome(home)], lambda content, _: welcomed(content), 4),
        Kind("stage records", "json", stage, in_file("metrics.jsonl", runs.read_stages), 10),
        Kind("run identity", "json", [identity], record(runs.Identity), 4),
        Kind("summary", "json", [summary], record(runs.Summary), 4),
        Kind("run state", "tensors", [save({"layers.0.mlp.up_proj.A": torch.ones(2, 4)})],
             in_file("adapter.safetensors", lambda path: runs.load_adapter_state(path.parent)), 6),
    ]  # fmt: skip


def _plain(home: Path, text: str) -> bytes:
    path = home / "plain.yaml"
    path.write_text(text)
    return load(path).model_dump_json(exclude_unset=True).encode()


def _header(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def _blocks(home: Path, model: Path, coverage: Coverage) -> dict[str, bytes]:
    folder = home / "block"
    folder.mkdir()
    manifest = Manifest(
        name="half", method="wanda", base_fingerprint="f", coverage_hash=coverage.hash, parameters=9, sparsity=0.5,
        details={"examples": 8, "model": "starter"},
    )  # fmt: skip
    write_block(manifest, coverage, folder)
    return {name: (folder / file).read_bytes() for name, file in FILES["block"].items()}


def _adapters(home: Path, whole: Coverage) -> dict[str, bytes]:
    learned = adapter.init_factors(whole.shape, ["up_proj", "q_proj"], 2, seed=0)
    adapter.save_adapter(whole, learned, 2.0, "starter", home / "adapter")
    (home / "factors").mkdir()
    adapter.save_factors(learned, 2.0, "start", home / "factors")
    return {
        name: (home / folder / file).read_bytes()
        for folder in ("adapter", "factors")
        for name, file in FILES[folder].items()
    }


FILES = {
    "block": {"manifest": "manifest.json", "coverage": "coverage.safetensors"},
    "adapter": {"adapter": "adapter_model.safetensors", "adapter config": "adapter_config.json"},
    "factors": {"factors": "factors.safetensors"},
}


def _statistics(home: Path, model: Path) -> dict[str, bytes]:
    tokens = torch.arange(32).reshape(2, 16)
    save_statistics(collect(model, "f", tokens, "diagonal", "fp32", Progress()), home / "statistics.safetensors")
    return {"statistics": (home / "statistics.safetensors").read_bytes()}


def _messages(part: Coverage) -> tuple[wire.TrainRequest, wire.Broadcast, list[bytes]]:
    sent = adapter.slice_factors(part, adapter.init_factors(part.shape, ["up_proj"], 2, seed=0), 2)
    settings = wire.TrainSettings(
        targets=["up_proj"], run_rank=2, ranks={}, dropout=0.0, train=TrainConfig(), precision="fp32",
        frozen_side=False, derived_seed=None, proximal=0.0, codec="int8", keep=0.5, error_feedback=True,
    )  # fmt: skip
    given = wire.write(settings, part, 2, sent, {})
    request = wire.TrainRequest(
        run="r", client="fr", block="b", base_fingerprint="f", coverage_hash="c", rank=2, scale=2.0, phase="round",
        round=3, steps=4, done=8, total=12, seed=5, settings=given.settings,
    )  # fmt: skip
    told = {"loss_first": 2.0, "loss_last": 1.0, "steps": 4.0, "tokens": 90.0, "seconds": 0.5}
    reply, _ = wire.answer(request, given.content, {key: torch.ones_like(t) for key, t in sent.items()}, 7, told, {})
    asked = wire.EvaluateRequest(
        run="r", client="fr", block="b", base_fingerprint="f", coverage_hash="c", rank=2, scale=2.0,
        sets=[("fr", "test")], targets=["up_proj"], ranks={}, max_length=64, long_examples="truncate", precision="fp32",
        batch_size=4,
    )  # fmt: skip
    scores = wire.ScoreReply(scores=[runs.Score(loss=1.0, exact_match=0.5, tokens=4, examples=2)])
    return (
        request,
        given,
        [reply, reply, wire.pack(request, given.content), wire.pack(asked, sent), wire.pack(scores, {})],
    )


def _offers() -> tuple[list[bytes], wire.DeviceReply, wire.OfferRequest]:
    offers = [
        wire.Offer(name=name, id=2 * id, parameters=9, bytes=90, memory=memory, operations=1e9, tokens=100)
        for name, id, memory in (("a", "0123456789abcdef", 10**9), ("b", "123456789abcdef0", 10**6))
    ]
    request = wire.OfferRequest(run="r", client="fr", precision="fp32", deadline_s=60.0, offers=offers)
    device = wire.DeviceReply(memory=1e8, disk=1e9, speed=1e9, held=[offers[0].id])
    return [wire.pack(request, {}), wire.pack(device, {})], device, request


def _calibration(model: Path) -> tuple[list[bytes], wire.CalibrateRequest, Shape]:
    tokens = torch.arange(32).reshape(2, 16)
    asked = wire.CalibrateRequest(
        run="r", client="fr", block="llm", base_fingerprint="f", samples=2, length=16, needs="full",
        sketch=4, precision="fp32", seed=3,
    )  # fmt: skip
    squares, sketches = sketched(collected(model, tokens, "full", "fp32", Progress()), 4, asked.sketch_seed)
    sent = wire.pack(wire.SumsReply(tokens=32), {wire.SUMS: squares, wire.SKETCHES: sketches})
    return [wire.pack(asked, {}), sent, sent], asked, shape_of(load_config(model))


def _welcome(home: Path) -> bytes:
    told = wire.OwnData(
        rows=RowsConfig(), validation=0.1, test=0.2, limits=(40, None, 8), system="Be short.", part="fr", seed=3
    )
    files = wire.block_files(home / "block")
    return wire.Welcome(run="0" * 16, client="fr", block="b", files=files, data=told).model_dump_json().encode()


def _records() -> tuple[list[bytes], bytes, bytes]:
    score = runs.Score(loss=1.0, exact_match=0.5, tokens=4, examples=2)
    scores = runs.Scores({"fr": score})
    training = runs.Training(loss_first=2.0, loss_last=1.0, steps=4, tokens=9, seconds=0.1)
    held = [runs.Held(clients=["fr"], scores=scores)]
    stages: list[Any] = [
        runs.RoundRecord(
            llm=scores, held=held, validation=1.0, llm_validation=None, round=1, accepted=["fr"],
            train={"fr": training}, refused=[runs.Refusal(client="de", reason="late")],
            bytes={"fr": runs.Traffic(up=1, down=2)}, seconds=0.5,
        ),
        runs.ClientRecord(stage="local", client="fr", scores=scores, train=training, validation=1.0, seconds=0.5),
        runs.PassedRecord(phase="local", client="fr", reason="late", seconds=0.5),
    ]  # fmt: skip
    machine = runs.Machine(cpu="x", cores=2, memory_gb=8.0)
    identity = runs.Identity(
        run="r", base_fingerprint="f", data_fingerprint="d", machine=machine, versions={"torch": "2"}
    )
    summary = runs.Summary(
        run="r", run_id="i", model="starter", seed=0, engine="local", base_fingerprint="f", machine=machine,
        versions={}, wall_s=1.0, seconds={}, scores="everyone", others=runs.Others(asked=1, there=1), rounds=1,
        best_round=1, blocks=[], clients=[], bytes_up_per_round=1.0, bytes_down_per_round=1.0, history=[],
        llm=runs.LlmSummary(best_round=1, loss_before=1, loss_after=1, exact_match_before=0, exact_match_after=0),
    )  # fmt: skip
    lines = [runs.dump_record(stage, indent=None).encode() for stage in stages]
    return lines, runs.dump_record(summary).encode(), runs.dump_record(identity).encode()
