"""Every option is run: pairwise on a tiny model, each run to its final models. It starts with bf16.

`PARAMETERS` are the options, each with its values; every two values that the config allows together are in some run.
`refusal` says which two it does not allow, and that is tested, too: an excluded pair ends in a `LegolmError`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import combinations, cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import no_figure, without_clocks
from legolm import config as configs
from legolm import pipeline
from legolm.adapter import tensors_hash
from legolm.config import CRITERIA, SCHEMES, TRAINERS, Registry, RunConfig
from legolm.errors import LegolmError
from legolm.federate import wire
from legolm.federate.transport import Exchange, Reply, Request, run_local
from legolm.federate.transport.engine import Body
from legolm.plan import make_plan
from legolm.runs import RunDir, Summary
from legolm.study import ablate
from legolm.system import Progress


def rounding(folder: RunDir, config: RunConfig, actors: int, body: Body) -> None:
    """The local engine over a line on which factors are rounded to bf16 by hand, both ways."""

    def wrap(exchange: Exchange) -> Exchange:
        def changed(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
            sent: list[str] = []  # hashes of what the server thinks it sent; of what is no training, ""

            def rounded() -> Iterator[Request]:
                for one in requests:
                    sent.append("")
                    if wire.kind_of(one.content) == "train":
                        header, tensors = wire.unpack(one.content, wire.TrainRequest)
                        sent[-1] = tensors_hash(tensors)
                        one = Request(one.client, wire.pack(header, to_bf16(tensors)))
                    yield one

            for reply in exchange(rounded(), deadline_s):
                if sent[reply.index]:
                    answer, delta = wire.unpack(reply.content, wire.UpdateReply)
                    answer = answer.model_copy(update={"received_hash": sent[reply.index]})
                    reply = Reply(reply.index, wire.pack(answer, to_bf16(delta)))
                yield reply

        return changed

    run_local(folder, config, actors, lambda exchange: body(wrap(exchange)))


def to_bf16(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.bfloat16().float() for name, tensor in tensors.items()}


def shipped(registry: Registry[Any]) -> list[str]:
    """Names of what comes with legolm, not with other tests."""
    return [name for name in registry if registry.entry(name).module.startswith("legolm.")]


Options = dict[str, Any]
BLOCKS: dict[str, Options] = {
    "dense": {"method": "dense"},
    "structured": {"method": "structured", "intermediate_size": 64, "num_hidden_layers": 1},
    "given": {},  # the path of a block that is there
} | {
    name: {"method": name} | ({"pattern": "2:4"} if name == "magnitude" else {"sparsity": 0.5})
    for name in shipped(CRITERIA)
}
MASKED = shipped(CRITERIA)
"""Blocks that are alike to everything but what cuts them: runs take one of them in turn."""

ONE = "clients.1."  # the second of two clients; the first holds the whole LLM
PARAMETERS: dict[str, dict[str, Options]] = {
    "scheme": {name: {"aggregate.scheme": name} for name in shipped(SCHEMES)},
    "form": {"-": {}} | {name: {"aggregate.form": name} for name in ("factor", "exact", "frozen_side")},
    "mask": {"-": {}, "saliency": {"aggregate.mask": "saliency"}},
    "residual": {"-": {}} | {name: {"aggregate.residual": name} for name in ("fold", "drop")},
    "redraw": {"-": {}, "1": {"aggregate.redraw": 1}, "2": {"aggregate.redraw": 2}},
    "denominator": {"-": {}, "global_fill": {"aggregate.denominator": "global_fill"}},
    "capable": {"no": {}, "yes": {"federation.capable": True}},
    "mode": {name: {"federation.mode": name} for name in ("federated", "alone", "pooled")},
    "block": {name: {ONE + "block": name} for name in BLOCKS if name not in MASKED[1:]},
    "rank": {"4": {}, "2": {ONE + "rank": 2}},
    "layers": {"all": {}, "1": {ONE + "layers": [1]}},
    "whiten": {"-": {}, "starter": {"aggregate.whiten": "starter"}},
    "optimizer": {n: {"aggregate.server_optimizer": n} for n in ("none", "fedavgm", "fedadam", "fedyogi")},
    "ranks": {"-": {}, "q 2": {"lora.ranks": {"q_proj": 2}}},
    "targets": {"all": {}, "q, v": {"lora.targets": ["q_proj", "v_proj"]}, "down": {"lora.targets": ["down_proj"]}},
    "scores": {
        "everyone": {},
        "own": {"evaluate.scores": "own"},
        "own and server": {"evaluate.scores": "own", "evaluate.server_data": "SERVER"},
    },
    "others": {"-": {}, "0": {"evaluate.others": 0}},
    "local": {"yes": {}, "no": {"evaluate.local_only": False}},
    "server_rate": {"1": {}, "0.5": {"aggregate.server_learning_rate": 0.5}},
    "weight": {name: {"aggregate.weight": name} for name in ("capped", "examples", "equal")},
    "outliers": {n: {"aggregate.outliers": {"action": n, "factor": 10}} for n in ("none", "clip", "refuse")},
    "codec": {name: {"federation.codec": name} for name in ("none", "bf16", "int8")},
    "feedback": {"on": {}, "off": {"federation.error_feedback": False}},
    "personal": {"0": {}, "1": {"federation.personal_steps": 1}},
    "ends": {
        "last": {},
        "mixture": {"federation.personal": "mixture"},
        "by_input": {"federation.personal": "by_input", "federation.public": "SERVER"},
    },
    "fraction": {"1": {}, "0.5": {"federation.fraction": 0.5}},
    "buffer": {"-": {}, "1": {"federation.buffer": 1}},
    "updates": {"gone": {}, "kept": {"federation.keep_updates": True}},
    "rslora": {"off": {}, "on": {"lora.rslora": True}},
    "dropout": {"0": {}, "0.2": {"lora.dropout": 0.2}},
    "trainer": {name: {"train.trainer": name} for name in shipped(TRAINERS)},
    "schedule": {name: {"train.schedule": name} for name in ("constant_linear", "cosine")},
    "width": {"no": {}, "yes": {"train.by_width": True}},
    "warmup": {"0": {}, "2": {"train.warmup_steps": 2}},
    "checkpointing": {"off": {}, "on": {"train.gradient_checkpointing": True}},
    "long": {
        "truncate": {"train.long_examples": "truncate", "train.max_length": 40},
        "refuse": {"train.long_examples": "refuse"},
    },
    "stop": {
        "steps": {},
        "epochs": {"train.epochs": 0.5},
        "tokens": {"train.tokens": 50},
        "seconds": {"train.seconds": 1000},
    },
    "precision": {name: {"precision": name} for name in ("fp32", "bf16")},
    "split": {
        "file": {},
        "column": {"data.split": {"by": "column", "column": "who"}},
        "iid": {"data.split": {"by": "iid"}},
        "dirichlet": {"data.split": {"by": "dirichlet", "column": "who", "alpha": 5.0}},
    },
    "layout": {
        "auto": {},
        "pairs": {"data.layout": "pairs", "data.fields": {"instruction": "instruction", "answer": "output"}},
        "text": {"data.layout": "text", "data.fields": {"text": "instruction"}},
    },
    "turns": {"last": {}, "all": {"train.turns": "all"}},
    "resumed": {"no": {}, "yes": {}},
}
Row = dict[str, str]
Home = Callable[[Row], tuple[RunConfig, Path]]
USUAL: Row = {name: next(iter(values)) for name, values in PARAMETERS.items()} | {"scheme": "heteagg"}
HETEAGG = {"form": "-", "residual": "-", "redraw": "-", "denominator": "-", "mask": "-", "whiten": "-"}


def traits(row: Row) -> Any:
    """The scheme of the row, which says itself what it takes."""
    return made(row["scheme"], row["form"], row["redraw"])


@cache
def made(scheme: str, form: str, redraw: str) -> Any:
    settings: Options = {"form": form} if scheme == "heteagg" and form != "-" else {}
    if redraw != "-" and form in ("-", "frozen_side"):
        settings["redraw"] = int(redraw)
    return SCHEMES.entry(scheme).make(**settings)


def refusal(row: Row) -> str | None:
    """What the error must say where the options of a row do not go together; None where they do."""
    for name, usual in HETEAGG.items():
        if row[name] != usual and name not in SCHEMES.entry(row["scheme"]).settings.model_fields:
            return f"unknown key `aggregate.{name}` of scheme"
    scheme, exact = traits(row), row["form"] == "exact"
    if row["whiten"] != "-" and (row["redraw"] != "-" or row["form"] not in ("-", "frozen_side")):
        return "is of a frozen side that stays"
    if exact and row["mask"] == "saliency":
        return "mask 'saliency' is on factors"
    if row["redraw"] != "-" and row["form"] not in ("-", "frozen_side"):
        return "is of form 'frozen_side'"
    if not exact and row["residual"] != "-":
        return "is of form 'exact'"
    if row["whiten"] != "-" and row["mode"] == "pooled":
        return "its factors come with blocks"
    if row["ranks"] != "-" and row["targets"] == "down":
        return "'q_proj' is not among the targets"
    if row["scores"] != "everyone" and row["others"] != "-":
        return "others: is for scores 'everyone'"
    if row["mode"] == "alone" and row["local"] == "no":
        return "is the stage evaluate.local_only; set that to true"
    if row["ends"] == "by_input" and (row["mode"] == "alone" or (row["local"], row["personal"]) == ("no", "0")):
        return "by_input chooses between the global update and what a client learned by itself"
    if row["mode"] == "pooled" and row["scores"] != "everyone":
        return "is for data that stay where they are"
    if row["optimizer"] != "none" and not scheme.optimizers:
        return "has its own step"
    if row["buffer"] != "-" and row["mode"] != "federated":
        return "buffer: is for rounds, and mode"
    if row["buffer"] != "-" and not scheme.takes_late:
        return "is added to today's factors"
    if row["ranks"] != "-" and not scheme.module_ranks:
        return "products of another rank in each module need sums of factors"
    if row["mode"] == "federated" and row["weight"] != "capped" and not scheme.weighs():
        return "weighs clients in its own way"
    if row["mode"] == "federated" and row["capable"] == "no":
        if scheme.dense and row["block"] != "dense":
            return "it works on the whole LLM"
        if scheme.unequal != "block" and row["block"] != "dense":
            return "it averages equal shapes"
    takes_part = row["block"] == "dense" or row["capable"] == "no"
    if row["mode"] == "federated" and row["layers"] == "1" and takes_part and scheme.unequal != "block":
        return "trains some layers, and it averages equal adapters"
    if row["mode"] == "federated" and scheme.unequal == "no" and row["rank"] != "4" and takes_part:
        return "it averages equal ranks"
    if row["whiten"] != "-" and row["targets"] == "down":
        return "makes factors that read the hidden state"
    if row["layers"] == "1" and row["block"] == "structured":
        return "keeps is chosen when it is cut"
    return None


Pair = tuple[tuple[str, str], tuple[str, str]]


def every_pair() -> Iterator[Pair]:
    for one, two in combinations(PARAMETERS, 2):
        yield from product(product([one], PARAMETERS[one]), product([two], PARAMETERS[two]))


def pairs(row: Row) -> set[Pair]:
    return set(combinations(((name, row[name]) for name in PARAMETERS), 2))


def with_pair(pair: Pair) -> Iterator[Row]:
    """Rows with these two values and else usual ones, but for what the two may need."""
    for form, capable in product(("-", "exact"), ("no", "yes")):
        yield USUAL | {"form": form, "capable": capable} | dict(pair)


def pairwise() -> list[Row]:
    """Rows such that two values which go together in some row do so in one of these; greedily, few."""
    left, rows = set(every_pair()), list[Row]()
    names = sorted(PARAMETERS, key=lambda name: -len(PARAMETERS[name]))
    for pair in every_pair():
        row = next((row for row in with_pair(pair) if refusal(row) is None), None)
        if pair not in left or row is None:
            continue
        chosen = list(pair)
        for name in (name for name in names if name not in dict(pair)):
            gains = {
                value: sum((one, (name, value)) in left or ((name, value), one) in left for one in chosen)
                for value in PARAMETERS[name]
                if refusal(row | {name: value}) is None
            }
            row[name] = max(gains, key=gains.__getitem__)
            chosen.append((name, row[name]))
        left -= pairs(row)
        rows.append(row)
    return rows


def in_turn(rows: list[Row]) -> Iterator[Row]:
    masked = cycle(MASKED)
    return (row | {"block": next(masked)} if row["block"] in MASKED else row for row in rows)


# Of the pairs some rows have a third value that makes little of them: kept updates beside redrawn sides are replayed.
ROWS = [*in_turn(pairwise()), USUAL | {"redraw": "1", "updates": "kept", "resumed": "yes", "block": "structured"}]


@pytest.fixture(scope="module")
def home(three_clients: Callable[..., Options], tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A row's config, and the store that all rows share. A first run cuts every block, and brings all imports."""
    folder = tmp_path_factory.mktemp("options")
    raw = three_clients(folder, ("dense", "wide", "sparse"), rows=10, precision="fp32")
    for path in (folder / "data").iterdir():
        rows = [json.loads(line) | {"who": path.stem} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data" / "es.jsonl").rename(folder / "server.jsonl")
    calibration = {"calibration": raw["blocks"][1]["calibration"]}
    raw["blocks"] = [{"name": name} | block | calibration for name, block in BLOCKS.items() if name != "given"]
    raw["clients"] = [{"id": "fr", "block": "dense"}, {"id": "de", "block": "dense"}]
    raw["data"] |= {"limit_test": 1, "limit_validation": 1}
    raw["train"] = {"steps": 1, "batch_size": 2}
    pipeline.run(configs.validate(RunConfig, raw, "first"), folder / "first", store=folder / "store")
    raw["blocks"].append({"name": "given", "path": str(folder / "first" / "blocks" / "structured")})

    def config(row: Row) -> tuple[RunConfig, Path]:
        own = copy.deepcopy(raw)
        put(own, ONE + "block", row["block"])
        for name, value in row.items():
            for field, setting in (PARAMETERS[name][value] if name != "block" else {}).items():
                put(own, field, str(folder / "server.jsonl") if setting == "SERVER" else setting)
        own["blocks"] = [one for one in own["blocks"] if one["name"] in ("dense", row["block"])]
        return configs.validate(RunConfig, own, "row"), folder / "store"

    return config


def put(raw: Any, field: str, value: Any) -> None:
    first, _, rest = field.partition(".")
    at = int(first) if isinstance(raw, list) else first
    if not rest:
        raw[at] = value
        return
    if isinstance(raw, dict):
        raw.setdefault(at, {})
    put(raw[at], rest, value)


def test_bf16_on_the_wire_is_rounding_by_hand_and_half_the_bytes(home: Home, tmp_path: Path) -> None:
    row = USUAL | {"block": "structured", "form": "factor", "feedback": "off", "local": "no"}
    found = {}
    for name, codec, engine in (("bf16", "bf16", None), ("hand", "none", rounding), ("fp32", "none", None)):
        config, store = home(row | {"codec": codec})
        found[name] = pipeline.run(config, tmp_path / name, engine=engine, store=store)
    states = {name: load_file(tmp_path / name / "rounds" / "0002" / "adapter.safetensors") for name in found}
    assert all(torch.equal(tensor, states["hand"][key]) for key, tensor in states["bf16"].items())
    assert not all(torch.equal(tensor, states["fp32"][key]) for key, tensor in states["bf16"].items())
    for way in ("bytes_up_per_round", "bytes_down_per_round"):
        assert 0.5 < getattr(found["bf16"], way) / getattr(found["fp32"], way) < 0.6  # headers do not shrink


def test_what_does_not_go_together_is_refused_and_nothing_else(home: Home) -> None:
    refused = 0
    for pair in every_pair():
        row = USUAL | dict(pair)
        says = refusal(row)
        if says is None:
            home(row)
            continue
        refused += 1
        with pytest.raises(LegolmError) as error:
            make_plan(home(row)[0])
        assert says in str(error.value), row
        assert "\n" not in str(error.value)
    assert refused > 100


def stages(out: Path) -> list[Path]:
    """Folders that appear one after the other, in this order."""
    start, *rounds = sorted((out / "rounds").iterdir())
    return [start, *out.glob("local/*"), *rounds, *out.glob("personal/*"), *(out / "final").iterdir()]


def contents(out: Path) -> dict[str, str]:
    """What a run leaves but for clocks: hashes of tensors, and the figures."""
    found = {
        # A kept update has a clock in its header.
        str(path.relative_to(out)): tensors_hash(load_file(path))
        if path.parent.name == "updates"
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("rounds", "local", "personal", "final")
        for path in sorted((out / folder).rglob("*.safetensors"))
    }
    return found | {"summary": json.dumps(without_clocks(json.loads((out / "summary.json").read_text())))}


@pytest.mark.parametrize("place", range(len(ROWS)))
def test_every_option_runs(home: Home, tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To final models that load plainly; a run that was killed anywhere ends bit for bit as if it had not been."""
    row, out = ROWS[place], tmp_path / "out"
    if place % 5:  # drawing is a fifth of a run
        monkeypatch.setattr("legolm.report.plots._svg", no_figure)
    print({name: value for name, value in row.items() if value != USUAL[name]})  # shown when it fails
    config, store = home(row)
    summary = pipeline.run(config, out, store=store)
    check_figures(summary, row)
    kept = {path.stem for path in out.glob("rounds/0001/updates/*")}
    sends = row["updates"] == "kept" and row["mode"] == "federated"
    assert kept == (set(summary.history[1].accepted) if sends else set())
    assert sorted(path.name for path in (out / "final").iterdir()) == ["de", "fr", "llm"]
    if row["resumed"] == "yes":
        before, made = contents(out), stages(out)
        for folder in made[1 + place % (len(made) - 1) :]:
            shutil.rmtree(folder)
        (out / "summary.json").unlink()
        pipeline.run(config, out, resume=True, store=store)
        assert contents(out) == before
    if sends and summary.best_round:
        found = ablate(out, tmp_path / "ablation", None, Progress())
        assert {one.name for one in found.without} == {"dense", row["block"], "fr", "de"}
        assert all(math.isfinite(one.blocks) for one in found.without)
    if place % 5 == 0:
        for path in (out / "final").iterdir():
            tokens = AutoTokenizer.from_pretrained(path)("Say 1", return_tensors="pt")
            assert bool(AutoModelForCausalLM.from_pretrained(path)(**tokens).logits.isfinite().all())


def check_figures(summary: Summary, row: Row) -> None:
    """All losses that the row's options give are there, and finite; the clients that they let take part do."""
    rounds = 0 if row["mode"] == "alone" else 2
    names = {"before"} | ({"global"} if rounds else set()) | ({"local"} if row["local"] == "yes" else set())
    mixes = row["local"] == "yes" and row["ends"] != "last"
    names |= {"personal"} if (row["personal"] == "1" or mixes) and rounds else set()
    assert summary.rounds == rounds
    asked = row["scores"] == "everyone" and row["others"] == "-"
    for client in summary.clients:
        assert set(client.own) == names
        assert set(client.others) == (names if asked else set())
        assert all(map(math.isfinite, (*client.own.values(), *client.others.values())))
    losses = (summary.llm.loss_before, summary.llm.loss_after)
    if row["scores"] == "own":
        assert losses == (None, None)
    else:
        assert all(loss is not None and math.isfinite(loss) for loss in losses)
    one = row["capable"] == "yes" and row["block"] != "dense"
    taking = 1 if one or row["fraction"] == "0.5" or row["buffer"] == "1" else 2
    for entry in summary.history[1:]:  # at one place the LLM alone trains
        assert (len(entry.accepted), entry.refused) == ((1 if row["mode"] == "pooled" else taking), [])
        assert (entry.bytes_up > 0) == (row["mode"] == "federated")
