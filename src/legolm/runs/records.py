"""What a run keeps of each finished stage, typed: read back from outside, so checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from legolm.errors import LegolmError
from legolm.system import read_bounded

SCHEMA = 2
"""Of run folders. 1 had no number in its files; it is named as too old."""
Criterion = Literal["validation", "llm_validation"]
HASH = "hash"
"""Key of a record's hash of the rest, in files that are checked."""
ANEW = "start the run again in a new folder"


class Record(BaseModel):
    """A mapping of known keys; a number that is none of JSON's (a loss that overflowed) stays what it is."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Score(Record):
    """Answers on one set of examples: mean loss per answer token (nats) and the share answered exactly.

    `stderr` is the loss's standard error over examples; None where one example says nothing of the spread.
    """

    loss: float
    stderr: float | None = None
    exact_match: float
    tokens: int
    examples: int


class Scores(RootModel[dict[str, Score]]):
    """One model's scores by the client whose test data were asked."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    @property
    def loss(self) -> float:
        """Mean over sets, each counting the same."""
        return fmean(score.loss for score in self.root.values())

    @property
    def exact_match(self) -> float:
        """Mean over sets, each counting the same."""
        return fmean(score.exact_match for score in self.root.values())

    def only(self, clients: Iterable[str]) -> Scores | None:
        """Those of these clients' data that are there; None without any."""
        found = {id: self.root[id] for id in clients if id in self.root}
        return Scores(found) if found else None


Amount = Annotated[float, Field(ge=0)]


class Training(Record):
    """What a client says of one training, and the size of its change (root mean square) where it was aggregated.

    Losses are nats per answer token, means over up to eight steps. A trainer may say more.
    """

    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="constants")

    loss_first: float
    loss_last: float
    steps: Amount
    tokens: Amount
    seconds: Amount
    truncated: Amount = 0.0
    micro_batch_tokens: Amount | None = None
    size: float | None = None
    sampling_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    """Of DP-SGD: the share of the client's examples in a batch, and the noise on each step."""
    state: str | None = None
    """Hash of the file that the client keeps for its next round, if it keeps any."""


class Traffic(Record):
    """Bytes of one client in a round, from it and to it; of round 0 what asking for sums to cut by took."""

    up: int
    down: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(up=self.up + other.up, down=self.down + other.down)


def added(parts: Iterable[Mapping[str, Traffic]]) -> dict[str, Traffic]:
    """What all of them have of each client."""
    found: dict[str, Traffic] = {}
    for part in parts:
        for id, one in part.items():
            found[id] = found[id] + one if id in found else one
    return found


class Traffics(Record):
    """Of several clients, by id."""

    schema_number: Literal[2] = 2
    bytes: dict[str, Traffic]


class Spent(Record):
    """What the rounds up to here cost together, (ε, δ), and the last one's noise multiplier, if one is everyone's."""

    epsilon: float
    delta: float
    noise_multiplier: float | None


class Refusal(Record):
    """A client whose update was not added, and why."""

    client: str
    reason: str


class Held(Record):
    """Clients that hold one and the same model, and its scores: once for all of them.

    `validation` is the loss on its own validation data, where it is one client's.
    """

    clients: list[str]
    scores: Scores
    validation: float | None = None


class Global(Record):
    """Scores of one global adapter: of the LLM (None: nobody may score it) and of every distinct block.

    `validation` is the mean loss of the clients' blocks on their own validation data, `llm_validation` the LLM's on all
    clients', or on the server's own. `unscored` are the clients whose scores were refused, and are in none of these.
    `quorum` is the share of the clients that must hold what the LLM has of the update (`federation.quorum`).
    `scoring` is what asking clients for scores took where each has its own data; in a simulation it is no one's.
    Nothing is there where nobody was asked (`evaluate.every`).
    """

    schema_number: Literal[2] = 2
    llm: Scores | None
    held: list[Held]
    unscored: list[Refusal] = []
    validation: float | None
    llm_validation: float | None
    quorum: float = 0.0
    scoring: dict[str, Traffic] = {}

    def by_client(self) -> dict[str, Scores]:
        """Each client's block's scores, by client."""
        return {id: one.scores for one in self.held for id in one.clients}


UNSCORED = Global(llm=None, held=[], validation=None, llm_validation=None)


class RoundRecord(Global):
    """A finished round; round 0 is before training. `adapter` is the hash of what the stage kept, as in all records.

    `shares` is what part of the aggregate each accepted client's update was, where the scheme weighs clients; `updates`
    are the hashes of kept updates. `privacy` is there where noise is accounted, `closed` with secure
    sums: the share of the entries with too few holders, or of whom too few came to the end. Of asynchronous rounds
    `tags` has the earlier round in which an accepted update was asked, `waiting` that of each client that had not
    answered when this one was over.
    """

    stage: Literal["round"] = "round"
    round: int
    accepted: list[str] = []
    refused: list[Refusal] = []
    train: dict[str, Training] = {}
    shares: dict[str, float] = {}
    bytes: dict[str, Traffic] = {}
    updates: dict[str, str] = {}
    tags: dict[str, int] = {}
    waiting: dict[str, int] = {}
    privacy: Spent | None = None
    closed: float | None = None
    adapter: str = ""
    seconds: float

    @property
    def sent(self) -> dict[str, Traffic]:
        """All that passed between the server and each client: `bytes`, which the scheme costs, and `scoring`."""
        return added([self.bytes, self.scoring])


Part = Literal["global", "personal", "local"]
"""Of a mixture in weight space: the best global update, the client's own steps after it, what it learned alone."""
Weights = dict[Part, float]


class Mixture(Record):
    """A mixture of what a client has, its loss on the client's own validation data (nats per answer token), and the
    loss's standard error, where there are examples enough for one.
    """

    weights: Weights
    validation: float
    stderr: float | None = None


class ClientRecord(Record):
    """What one client did outside the rounds: alone (`local`), or on from the best global update (`personal`).

    `train` is None where it made no step. `weights` are those that it chose among `mixtures`; without any it has what
    it trained last. `bytes` is what passed for it where each has its own data; in a simulation it is no one's.
    `seconds` counts from the stage's begin, which clients share.
    """

    schema_number: Literal[2] = 2
    stage: Literal["local", "personal"]
    client: str
    scores: Scores
    train: Training | None
    mixtures: list[Mixture] = []
    weights: Weights = {}
    validation: float
    bytes: Traffic | None = None
    adapter: str = ""
    seconds: float


class PassedRecord(Record):
    """A client whose training outside the rounds was refused, and why: it ends with what the rounds gave it.

    `bytes` as in the records of those who were not.
    """

    schema_number: Literal[2] = 2
    stage: Literal["passed"] = "passed"
    phase: Literal["local", "personal"]
    client: str
    reason: str
    bytes: Traffic | None = None
    adapter: str = ""
    seconds: float


StageRecord = RoundRecord | ClientRecord | PassedRecord


class AnyStage(RootModel[StageRecord]):
    """A stage's record of either kind, as a file has it."""

    root: Annotated[StageRecord, Field(discriminator="stage")]


class Machine(Record):
    """What a run ran on."""

    cpu: str
    cores: int | None
    memory_gb: float


class Change(Record):
    """A field of the config that a resumed run changed, and the rounds that were finished by then."""

    field: str
    old: Any
    new: Any
    rounds: int


class Identity(Record):
    """`run.json`: what a run stands on.

    `template` is the chat template where the config names one. `config` is what the run does now, for `config.yaml` is
    for people to read and edit; `changes` led there. `blocks` has the hashes of each block's weights, by file.
    """

    schema_number: Literal[2] = 2
    run: str
    base_fingerprint: str
    data_fingerprint: str
    template: str = ""
    machine: Machine
    versions: dict[str, str]
    config: dict[str, Any] = {}
    changes: list[Change] = []
    blocks: dict[str, dict[str, str]] = {}


R = TypeVar("R", bound=BaseModel)


def read_record(path: Path, kind: type[R], way_out: str = ANEW) -> R:
    """A record from a file of a run. Raises `LegolmError` when it is missing, broken or of another version."""
    try:
        return parse_record(read_bounded(path), kind, path, way_out)
    except OSError as error:
        raise LegolmError(f"{path}: cannot be read ({error.strerror}); {way_out}") from None


def parse_record(content: bytes | str, kind: type[R], path: Path, way_out: str = ANEW) -> R:
    """The same from what `path` holds."""
    version = _version(content)
    if version not in (None, SCHEMA):  # also where its fields happen to be those of today
        raise LegolmError(
            f"{path}: another version of legolm wrote it (schema {version}, this one reads {SCHEMA}); {way_out}"
        )
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "it"
        raise LegolmError(f"{path}: is broken ({where}: {problem['msg']}); {way_out}") from None


def dump_sealed(record: BaseModel) -> str:
    """The record as JSON with a hash of its content, which `read_sealed` checks."""
    value = json.loads(dump_record(record))
    return json.dumps(value | {HASH: _digest(value)}, indent=1) + "\n"


def read_sealed(path: Path, kind: type[R], way_out: str = ANEW) -> R:
    """A record with a hash of its content. Raises `LegolmError` as `read_record`, and when it is not what was written.

    Earlier versions wrote none: what they began would go on otherwise (schemes draw and fill other factors now).
    """
    try:
        content = read_bounded(path)
        value = json.loads(content)
    except OSError as error:
        raise LegolmError(f"{path}: cannot be read ({error.strerror}); {way_out}") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or _version(content) != SCHEMA:
        parse_record(content, kind, path, way_out)  # which says what is wrong
        raise LegolmError(f"{path}: is broken; {way_out}")
    if HASH not in value:
        raise LegolmError(
            f"{path}: another version of legolm wrote it (without a hash of itself), whose runs go on otherwise; "
            f"{way_out}"
        )
    if value.pop(HASH) != _digest(value):
        raise LegolmError(f"{path}: is not what the run wrote (its hash differs); restore it, or {way_out}")
    return parse_record(json.dumps(value), kind, path, way_out)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_stages(path: Path) -> list[StageRecord]:
    """The records in a `metrics.jsonl`, in order. Raises `LegolmError` as `read_record` does."""
    try:
        # Of bytes: texts may have signs that end lines elsewhere. What follows the last end is being written.
        lines = read_bounded(path, 1 << 31).split(b"\n")[:-1]
    except OSError as error:
        raise LegolmError(f"{path}: cannot be read ({error.strerror}); {ANEW}") from None
    return [parse_record(line, AnyStage, path).root for line in lines]


def dump_record(record: BaseModel, indent: int | None = 1) -> str:
    """The record as JSON with a line's end."""
    return record.model_dump_json(indent=indent, exclude_none=False) + "\n"


def rounds_of(records: Iterable[StageRecord]) -> list[RoundRecord]:
    """The rounds among a run's records, round 0 first."""
    return [record for record in records if isinstance(record, RoundRecord)]


def traffic_of(rounds: Sequence[RoundRecord], clients: Collection[str] | None = None) -> tuple[float, float]:
    """Bytes (from, to) a client, of these only if given, in a round in the mean.

    What came before the first round is spread over the rounds.
    """
    sent = [one for record in rounds for id, one in record.bytes.items() if clients is None or id in clients]
    times = sum(clients is None or id in clients for record in rounds if record.round for id in record.bytes)
    return sum(one.up for one in sent) / max(times, 1), sum(one.down for one in sent) / max(times, 1)


def traffic_alone(records: Iterable[StageRecord]) -> dict[str, Traffic]:
    """What passed for each client outside the rounds."""
    known = [one for one in records if not isinstance(one, RoundRecord)]
    return added({one.client: one.bytes} for one in known if one.bytes is not None)


def clients_of(records: Iterable[StageRecord], stage: Literal["local", "personal"]) -> list[ClientRecord]:
    """The records of one stage outside the rounds."""
    return [record for record in records if isinstance(record, ClientRecord) and record.stage == stage]


def passed_of(records: Iterable[StageRecord]) -> list[PassedRecord]:
    """The clients that a stage outside the rounds passed over."""
    return [record for record in records if isinstance(record, PassedRecord)]


def best_round(records: Sequence[StageRecord], by: Criterion) -> RoundRecord:
    """The round with the lowest loss on validation data of those that were scored, the earlier of equals.

    `validation` is the mean of the clients' blocks on their own data, `llm_validation` the LLM's on everyone's: where
    few clients train or blocks are far from the LLM, the two are best at different times. Where nobody scores the LLM
    its best round is the blocks'. A client whose scores some round lacks has no say: rounds are compared by the same
    clients.
    """
    rounds = [one for one in rounds_of(records) if one.validation is not None]
    if by == "llm_validation" and all(one.llm_validation is not None for one in rounds):
        return min(rounds, key=lambda one: (one.llm_validation, one.round))
    losses = validations(rounds, lacking(rounds))
    return min(rounds, key=lambda one: (losses[one.round], one.round))


def lacking(records: Iterable[StageRecord]) -> set[str]:
    """The clients that have no scores in some round of those that were scored."""
    return {refusal.client for one in rounds_of(records) for refusal in one.unscored}


def validations(records: Iterable[StageRecord], without: Collection[str]) -> dict[int, float]:
    """The blocks' loss on validation data by the rounds that were scored, without these clients' where any is left.

    Without those that are `lacking` it can be compared from round to round.
    """
    found = {}
    for one in rounds_of(records):
        left = [held.validation for held in one.held if held.validation is not None and held.clients[0] not in without]
        if one.validation is not None:
            found[one.round] = fmean(left) if without and left else one.validation
    return found


def _version(content: bytes | str) -> int | None:
    """The schema number of a JSON object, 1 where it has none; None where it is no object."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    number = value.get("schema_number", 1) if isinstance(value, Mapping) else None
    return number if isinstance(number, int) else None
