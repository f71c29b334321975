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

from legolm.api.door import door, is_list
from legolm.api.models import LLM
from legolm.api.run import Run
from legolm.block import Block
from legolm.config import TRAINERS, Choice, Entry, RunConfig, validate
from legolm.data import Example, Message
from legolm.errors import LegolmError, brief, nearest
from legolm.pipeline import run as run_pipeline
from legolm.plan import Plan, make_plan
from legolm.report import print_plan
from legolm.runs import RunDir
from legolm.system import atomic_folder

Examples = Sequence[Example] | Sequence[tuple[str, str]]
"""Conversations, or pairs of instruction and answer."""
SPLITS = {"train": "data", "validation": "validation", "test": "test"}
"""The field of a client that has them."""
SECTIONS = ("aggregate", "data", "federation", "train")
"""To which the arguments add."""


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

    def __post_init__(self) -> None:
        for field in SPLITS.values():
            if (given := getattr(self, field)) is not None and not is_list(given):
                raise LegolmError(
                    f"Client: `{field}` is {type(given).__name__}; give a list of Examples (legolm.read) or of pairs"
                )


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
    for whatever a config file would be refused for, and for a section that says otherwise what an argument says.
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
        if not isinstance(llm, LLM) or not isinstance(clients, Mapping):
            raise LegolmError(
                f"federation: `llm` is {type(llm).__name__} and `clients` {type(clients).__name__}; give an LLM, and "
                "each Client by its name"
            )
        self.llm, self.clients, self.rounds, self.seed = llm, dict(clients), rounds, seed
        self.scheme, self.trainer = _chosen("scheme", scheme), _chosen("trainer", trainer)
        self.sections = {name: _section(name, section) for name, section in sections.items()}

    def plan(self) -> Planned:
        """What a run would do and need; nothing is kept."""
        with tempfile.TemporaryDirectory() as folder:
            config = self.config(Path(folder))
            return Planned(make_plan(config), config)

    @door
    def run(self, out: str | Path, resume: bool = False, models: bool = True) -> Run:
        """Run it in the folder `out`; with `resume` go on with what is there, or start.

        The data are written into the folder first, by their fingerprint, so that a resumed run and other processes have
        them. Without `models` no final models are written.
        """
        folder = RunDir(Path(out))
        config, rows = self._made(folder)
        folder.check(folder.settled(config), resume)  # before the clients' rows lie in a folder that is another's
        rows.write(folder)
        run_pipeline(config, folder.path, resume=resume, models=models)
        return Run(folder.path)

    def config(self, folder: Path) -> RunConfig:
        """The config of a run in this folder; writes the clients' data below it."""
        config, rows = self._made(RunDir(folder))
        rows.write(RunDir(folder))
        return config

    def _made(self, folder: RunDir) -> tuple[RunConfig, _Rows]:
        scheme, trainer = self.scheme, self.trainer
        blocks, block_of = _blocks(self.llm, self.clients)
        rows = _Rows.of(self.clients)
        raw = dict(self.sections)
        for argument, section, own in (
            ("scheme", "aggregate", {"scheme": scheme.name, **scheme.settings}),
            ("trainer", "train", {"trainer": trainer.name, **trainer.settings}),
            ("rounds", "federation", {"rounds": self.rounds}),
            ("clients", "data", rows.section(folder)),
        ):
            given = raw.get(section, {})
            for field, value in own.items():
                if given.get(field, value) != value:
                    raise LegolmError(
                        f"federation: `{section}.{field}` = {brief(repr(given[field]))} in the section, and "
                        f"{value!r} by the argument `{argument}`; take it out of the section"
                    )
            raw[section] = given | own
        plugins = [choice.plugin for choice in (scheme, trainer) if choice.plugin is not None]
        raw |= {
            "model": self.llm.name,
            "seed": self.seed,
            "plugins": list(dict.fromkeys([*raw.get("plugins", []), *plugins])),
            "blocks": blocks,
            "clients": [
                {"id": id, "block": block_of[id], "rank": one.rank, "joins": one.joins, "leaves": one.leaves}
                for id, one in self.clients.items()
            ],
        }
        config = validate(RunConfig, raw, "federation")
        if config.federation.engine == "flower" and TRAINERS.of_script(trainer.name):
            raise LegolmError(
                f"trainer {trainer.name!r}: is defined in this script, and the engine 'flower' trains in other "
                "processes; put it into a module, or set federation={'engine': 'local'}"
            )
        return config, rows


@dataclass(frozen=True)
class _Rows:
    """The clients' rows by file, `SPLIT/CLIENT.jsonl`, as they will lie in a run's folder."""

    files: dict[str, str]
    fingerprint: str

    @staticmethod
    def of(clients: Mapping[str, Client]) -> _Rows:
        """Raises `LegolmError` for a client without examples, or without what others have."""
        held = {
            split: {id: _lines(id, split, value) for id, one in clients.items() if (value := getattr(one, field))}
            for split, field in SPLITS.items()
        }
        for split, by_client in held.items():
            lacking = sorted(set(clients) - set(by_client))
            if lacking and split == "train":
                raise LegolmError(f"clients: {lacking[0]!r} has no examples; give it some")
            if lacking and by_client:
                raise LegolmError(
                    f"clients: {lacking[0]!r} has no {split} examples and others have; give them to all, or to nobody"
                )
        files = {f"{split}/{id}.jsonl": text for split, by_client in held.items() for id, text in by_client.items()}
        return _Rows(files, sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16])

    def section(self, folder: RunDir) -> dict[str, Any]:
        """What the section `data` says of them."""
        splits = dict.fromkeys(name.partition("/")[0] for name in self.files)
        files = {split: folder.given_files(self.fingerprint, split) for split in splits}
        return {**files, "layout": "auto", "fields": {}, "split": {"by": "file"}}

    def write(self, folder: RunDir) -> None:
        """Write them, unless they are there."""
        place = folder.given(self.fingerprint)
        if not place.exists():
            with atomic_folder(place) as partial:
                for name, text in self.files.items():
                    (partial / name).parent.mkdir(exist_ok=True)
                    (partial / name).write_text(text, encoding="utf-8")


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
    if name == "data" and isinstance(section, str):
        section = {"train": section}  # as in a config file
    if name in SECTIONS and not isinstance(section, Mapping):
        raise LegolmError(f"federation: section {name} is {section!r}; give a mapping of its fields")
    if name == "plugins" and not is_list(section):
        raise LegolmError(f"federation: plugins is {section!r}; give a list")
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


def _lines(id: str, split: str, examples: Examples) -> str:
    """Each example as a row of a file."""
    found = []
    for place, one in enumerate(examples):
        where = f"clients: {split} example {place} of {id!r}"
        if isinstance(one, tuple) and len(one) == 2 and all(isinstance(text, str) for text in one):
            one = Example((Message("user", one[0]), Message("assistant", one[1])))
        if not isinstance(one, Example):
            raise LegolmError(
                f"{where} is {type(one).__name__}; give Examples (legolm.read) or pairs of instruction and answer"
            )
        found.append(line := json.dumps(_row(one), ensure_ascii=False) + "\n")
        try:
            line.encode()
        except UnicodeEncodeError as error:
            raise LegolmError(f"{where} has half a character ({line[error.start]!a}); take it out") from None
    return "".join(found)


def _row(example: Example) -> dict[str, Any]:
    """In the layout that gives this example again."""
    if not example.raw:
        tools = {"tools": example.tools} if example.tools else {}
        return {"messages": [message.turn for message in example.messages], **tools}
    texts = [message.content for message in example.messages]
    return {"text": texts[0]} if len(texts) == 1 else {"prompt": texts[0], "completion": texts[1]}
