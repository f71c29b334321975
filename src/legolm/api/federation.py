"""A federation in Python: clients with blocks and data in memory, which ends in the same `RunConfig` as a YAML file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

from legolm.api.models import LLM
from legolm.api.run import Run
from legolm.block import Block
from legolm.config import TRAINERS, Choice, Entry, RunConfig, validate
from legolm.data import Example, Message
from legolm.errors import LegolmError, nearest
from legolm.pipeline import run as run_pipeline
from legolm.plan import Plan, make_plan
from legolm.report import print_plan
from legolm.runs import DATA
from legolm.system import atomic_folder

Examples = Sequence[Example] | Sequence[tuple[str, str]]
"""Conversations, or pairs of instruction and answer."""
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Client:
    """What a client has: a block, or the whole LLM, and its data.

    `validation` and `test` are its own examples, or, if not given, shares held out of `data` (a section `data` of the
    federation says which). `rank` is its LoRA rank, `joins` and `leaves` are the first and last round it takes part in.
    """

    holds: Block | LLM
    data: Examples
    validation: Examples | None = None
    test: Examples | None = None
    rank: int | None = None
    joins: int = 1
    leaves: int | None = None


@dataclass(frozen=True)
class Planned:
    """A dry run: `plan` has blocks, clients, tokens, bytes (B), memory and disk; printed, it is the command's table."""

    plan: Plan
    config: RunConfig

    def __str__(self) -> str:
        text = StringIO()
        with redirect_stdout(text):
            print_plan(self.plan, self.config)
        return text.getvalue()


class Federation:
    """Clients that fine-tune their blocks for some rounds; `scheme` puts together what they learned.

    `scheme` and `trainer` are registered ones, called with their settings (`bounded_mean(bound=2.0)`), or a name.
    `sections` are those of a config file: `lora={"rank": 8}`, `train={"steps": 8}`, `federation={"engine": "local"}`,
    `evaluate`, `aggregate`, `data`, and `precision`, `device`, `plugins`. Raises `LegolmError`, when planned or run,
    for whatever a config file would be refused for.
    """

    def __init__(
        self,
        llm: LLM,
        clients: Mapping[str, Client],
        scheme: Choice | Entry[Any] | str = "heteagg",
        rounds: int = 3,
        trainer: Choice | Entry[Any] | str = "adamw",
        seed: int = 0,
        **sections: Any,
    ) -> None:
        self.llm, self.clients, self.rounds, self.seed = llm, dict(clients), rounds, seed
        self.scheme, self.trainer = _chosen("scheme", scheme), _chosen("trainer", trainer)
        self.sections = {name: _section(name, section) for name, section in sections.items()}

    def plan(self) -> Planned:
        """What a run would do and need; nothing is kept."""
        with tempfile.TemporaryDirectory() as folder:
            config = self.config(Path(folder))
            return Planned(make_plan(config), config)

    def run(self, out: str | Path, resume: bool = False, models: bool = True) -> Run:
        """Run it in the folder `out`; with `resume` go on with what is there, or start.

        The data are written into the folder first, by their fingerprint, so that a resumed run and other processes have
        them. Without `models` no final models are written.
        """
        folder = Path(out)
        run_pipeline(self.config(folder), folder, resume=resume, models=models)
        return Run(folder)

    def config(self, folder: Path) -> RunConfig:
        """The config of a run in this folder; writes the clients' data below it."""
        scheme, trainer = self.scheme, self.trainer
        blocks, block_of = _blocks(self.llm, self.clients)
        raw = dict(self.sections)
        for section, choice, named in (("aggregate", scheme, "scheme"), ("train", trainer, "trainer")):
            raw[section] = raw.get(section, {}) | {named: choice.name} | dict(choice.settings)
        raw["federation"] = raw.get("federation", {}) | {"rounds": self.rounds}
        plugins = [choice.plugin for choice in (scheme, trainer) if choice.plugin is not None]
        raw |= {
            "model": self.llm.name,
            "seed": self.seed,
            "plugins": list(dict.fromkeys([*raw.get("plugins", []), *plugins])),
            "data": raw.get("data", {}) | _write(self.clients, folder),
            "blocks": blocks,
            "clients": [
                {"id": id, "block": block_of[id], "rank": one.rank, "joins": one.joins, "leaves": one.leaves}
                for id, one in self.clients.items()
            ],
        }
        config = validate(RunConfig, raw, "federation")
        if config.federation.engine == "flower" and TRAINERS.entry(trainer.name).module == "__main__":
            raise LegolmError(
                f"trainer {trainer.name!r}: is defined in this script, and the engine 'flower' trains in other "
                "processes; put it into a module, or set federation={'engine': 'local'}"
            )
        return config


def _chosen(kind: str, given: Choice | Entry[Any] | str) -> Choice:
    found = given() if isinstance(given, Entry) else given
    if isinstance(found, str):
        return Choice(kind, found, {}, None)
    if not isinstance(found, Choice) or found.kind != kind:
        raise LegolmError(f"federation.{kind}: is {given!r}; give a registered {kind} with its settings, or its name")
    return found


def _section(name: str, section: Any) -> Any:
    """A section as a config file has it. Raises `LegolmError` for one that there is not."""
    known = [one for one in RunConfig.model_fields if one not in ("model", "seed", "blocks", "clients")]
    if name not in known:
        raise LegolmError(f"federation: no section {name!r};{nearest(name, known)}")
    return dict(section) if isinstance(section, Mapping) else section


def _blocks(llm: LLM, clients: Mapping[str, Client]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The section `blocks`, each block once, and each client's by name."""
    blocks: dict[str, dict[str, Any]] = {}
    block_of: dict[str, str] = {}
    for id, client in clients.items():
        if not isinstance(client, Client):
            raise LegolmError(f"clients: {id!r} is {type(client).__name__}; give a Client")
        if isinstance(client.holds, LLM):
            if client.holds.path != llm.path:
                raise LegolmError(
                    f"clients: {id!r} holds {client.holds.name!r}, and the federation's LLM is {llm.name!r}"
                )
            spec = {"name": "dense", "method": "dense"}
        elif isinstance(client.holds, Block):
            path = str(client.holds.path.resolve())
            name = client.holds.name
            while blocks.get(name, {}).get("path", path) != path or name in ("llm", "dense"):
                name += "-2"
            spec = {"name": name, "path": path}
        else:
            raise LegolmError(
                f"clients: {id!r} holds {client.holds!r}; give a Block (legolm.cut, read_block) or the LLM"
            )
        blocks[spec["name"]] = spec
        block_of[id] = spec["name"]
    return list(blocks.values()), block_of


def _write(clients: Mapping[str, Client], folder: Path) -> dict[str, Any]:
    """Write the data below `folder`, and give their part of the section `data`. Raises `LegolmError` for none."""
    held = {
        split: {id: _conversations(id, split, value) for id, one in clients.items() if (value := _of(one, split))}
        for split in SPLITS
    }
    for id, one in clients.items():
        if not one.data:
            raise LegolmError(f"clients: {id!r} has no examples; give it some")
    for split in SPLITS[1:]:
        lacking = sorted(set(clients) - set(held[split]))
        if held[split] and lacking:
            raise LegolmError(
                f"clients: {lacking[0]!r} has no {split} examples and others have; give them to all, or to nobody"
            )
    content = {
        f"{split}/{id}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for split, by_client in held.items()
        for id, rows in by_client.items()
    }
    fingerprint = sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    place = folder.resolve() / DATA / fingerprint
    if not place.exists():
        with atomic_folder(place) as partial:
            for name, text in content.items():
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_text(text, encoding="utf-8")
    section: dict[str, Any] = {split: f"{place / split}/*.jsonl" for split, by_client in held.items() if by_client}
    return section | {"layout": "auto", "fields": {}}


def _of(client: Client, split: str) -> Examples | None:
    value: Examples | None = client.data if split == "train" else getattr(client, split)
    return value


def _conversations(id: str, split: str, examples: Examples) -> list[dict[str, Any]]:
    """Each example as a row of a file."""
    found = []
    for place, one in enumerate(examples):
        if isinstance(one, tuple) and len(one) == 2 and all(isinstance(text, str) for text in one):
            one = Example((Message("user", one[0]), Message("assistant", one[1])))
        if not isinstance(one, Example):
            raise LegolmError(
                f"clients: {split} example {place} of {id!r} is {type(one).__name__}; give Examples (legolm.read) or "
                "pairs of instruction and answer"
            )
        found.append(_row(one))
    return found


def _row(example: Example) -> dict[str, Any]:
    """In the layout that gives this example again."""
    if not example.raw:
        tools = {"tools": example.tools} if example.tools else {}
        return {"messages": [message.turn for message in example.messages], **tools}
    texts = [message.content for message in example.messages]
    return {"text": texts[0]} if len(texts) == 1 else {"prompt": texts[0], "completion": texts[1]}
