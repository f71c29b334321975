"""A run's figures, typed: the content of `summary.json`, `rounds.csv` and `clients.csv`.

Losses are nats per answer token on test data, means over clients' data sets that count the same; exact matches are
shares of answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import Field

from legolm.errors import LegolmError
from legolm.runs.records import Change, Machine, Mixture, Record, Refusal, Weights, dump_record, read_record
from legolm.runs.repair import check_sealed, seal
from legolm.runs.tables import Row, to_frame, write_csv
from legolm.system import atomic_write

if TYPE_CHECKING:
    import pandas

Stage = Literal["before", "local", "global", "personal"]
Data = Literal["own", "others"]
STAGES: tuple[Stage, ...] = get_args(Stage)
SUMMARY = "summary.json"


class KeptSummary(Record):
    """What a block kept: layers, KV groups and neurons (of its first layer), and its share of the linear weights."""

    layers: int
    kv_groups: int
    neurons: int
    weights: float
    hash: str


class BlockSummary(Record):
    """A block or the LLM. Bytes are what training takes all its clients in a round, with what it was cut by spread over
    the rounds; seconds are those of one client's training.
    """

    name: str
    method: str
    sparsity: float
    params: int
    file_bytes: int
    coverage: KeptSummary
    clients: list[str]
    bytes_up_per_round: float
    bytes_down_per_round: float
    train_s_per_round: float


class ClientSummary(Record):
    """A client's block by stage, on its own and on the others' data; a stage that is not there was not scored."""

    id: str
    block: str
    own: dict[Stage, float]
    others: dict[Stage, float]
    own_exact_match: dict[Stage, float]
    others_exact_match: dict[Stage, float]
    refused: dict[Literal["local", "personal"], str]
    """Why a training outside the rounds was passed over."""
    mixtures: list[Mixture] = Field([])
    """What it could end with (stage `personal`), from the most global on; of these it chose that with `weights`."""
    weights: Weights = Field({})

    def loss(self, data: Data) -> dict[Stage, float]:
        """By stage."""
        return self.own if data == "own" else self.others

    def exact_match(self, data: Data) -> dict[Stage, float]:
        """By stage."""
        return self.own_exact_match if data == "own" else self.others_exact_match

    def row(self) -> Row:
        """A line of `clients.csv`."""
        cells: Row = {"id": self.id, "block": self.block}
        for name, values in (
            ("own", self.own),
            ("others", self.others),
            ("own_exact_match", self.own_exact_match),
            ("others_exact_match", self.others_exact_match),
        ):
            cells |= {f"{name}_{stage}": values.get(stage) for stage in STAGES}
        return cells


class LlmSummary(Record):
    """The LLM before the rounds and after the round that is best for it. None: nobody may score it."""

    best_round: int
    loss_before: float | None
    loss_after: float | None
    exact_match_before: float | None
    exact_match_after: float | None


class LlmScore(Record):
    """The LLM after one round."""

    loss: float
    exact_match: float


class BlockLoss(Record):
    """A client's block after one round; `others` is None where the others' data were not asked."""

    own: float
    others: float | None


class RoundSummary(Record):
    """A round, 0 is before training. Bytes are all that passed, of all clients. Of `unscored` ones scores were refused.

    A round in which nobody was asked (`evaluate.every`) has no losses.
    """

    round: int
    llm: LlmScore | None
    clients: dict[str, BlockLoss]
    validation: float | None
    llm_validation: float | None
    accepted: list[str]
    refused: list[Refusal]
    unscored: list[Refusal] = Field([])
    bytes_up: int
    bytes_down: int
    epsilon: float | None = Field(None, description="of all rounds so far, where noise is accounted")
    seconds: float

    @property
    def scored(self) -> bool:
        """Whether anybody was asked."""
        return self.validation is not None

    def row(self) -> Row:
        """A line of `rounds.csv`; accepted and refused are numbers of clients."""
        return {
            "round": self.round,
            "validation": self.validation,
            "llm_validation": self.llm_validation,
            "llm_loss": self.llm.loss if self.llm else None,
            "llm_exact_match": self.llm.exact_match if self.llm else None,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "accepted": len(self.accepted),
            "refused": len(self.refused),
            "epsilon": self.epsilon,
            "seconds": self.seconds,
        }


class PrivacySummary(Record):
    """What the rounds guarantee, and with which noise: (ε, δ) of one client, or of one example of a client.

    Where one `noise_multiplier` is not everyone's, it is None. `stopped`: the next round would have passed `budget`.
    """

    level: Literal["client", "example"]
    noise: Literal["central", "distributed"]
    clip: float
    noise_multiplier: float | None
    epsilon: float
    delta: float
    budget: float | None
    stopped: bool


class Others(Record):
    """On the data of how many other clients (`asked`), of how many there are, each client's block was scored."""

    asked: int
    there: int

    @property
    def sampled(self) -> bool:
        """Some were asked and some were not."""
        return 0 < self.asked < self.there


Speaker = Literal["before", "local", "final", "llm"]


class Sample(Record):
    """A client's test question, the wanted answer, and what models say: the client's block before training, trained
    alone and as it ends, and the LLM as it ends. A stage that the run has not is not there.
    """

    client: str
    block: str
    question: str
    wanted: str
    answers: dict[Speaker, str]


class Samples(Record):
    """`answers.json`: asked once. `of` is a hash of the finished stages that the answers come from."""

    schema_number: Literal[2] = 2
    of: str
    samples: list[Sample]


def finished(folder: Path) -> bool:
    """Whether the run in this folder has its summary, which it gets last."""
    return (folder / SUMMARY).is_file()


class Summary(Record):
    """What people look for in a run. `global` losses are those of `best_round`, the LLM's of `llm.best_round`.

    `changes` are what a resumed run changed of its config on the way. `scores` is who may score whose data
    (`evaluate.scores`); where it is `own`, the LLM's data are the server's.
    """

    schema_number: Literal[2] = 2
    run: str
    run_id: str
    model: str
    seed: int
    engine: str
    base_fingerprint: str
    machine: Machine
    versions: dict[str, str]
    wall_s: float
    seconds: dict[str, float]
    scores: Literal["everyone", "own"]
    others: Others
    rounds: int
    changes: list[Change] = Field([])
    best_round: int
    by_input: bool = Field(False)
    """Personal models are scored on questions like the client's own, the global update on others."""
    privacy: PrivacySummary | None = Field(None)
    """None without differential privacy."""
    blocks: list[BlockSummary]
    clients: list[ClientSummary]
    llm: LlmSummary
    bytes_up_per_round: float
    bytes_down_per_round: float
    bytes_scoring: int = Field(0)
    """What asking clients for their scores took in all rounds, both ways; a simulation's costs nobody anything."""
    bytes_alone: int = Field(0)
    """What training outside the rounds took, with the scores of what it gave, both ways; likewise."""
    history: list[RoundSummary]
    samples: list[Sample] = Field([])
    """A few test questions with answers; none where clients' data are their own, or no final models are written."""

    def to_frame(self, of: Literal["rounds", "clients"] = "rounds") -> pandas.DataFrame:
        """A row a round or a client, as in the CSV files. Raises `LegolmError` without pandas."""
        return to_frame(self._rows(of))

    def write(self, folder: Path) -> None:
        """Write `summary.json`, `rounds.csv` and `clients.csv`, each whole or not at all."""
        atomic_write(folder / SUMMARY, dump_record(self, indent=2))
        seal(folder, SUMMARY)
        write_csv(self._rows("rounds"), folder / "rounds.csv")
        write_csv(self._rows("clients"), folder / "clients.csv")

    @staticmethod
    def read(folder: Path) -> Summary:
        """That of a finished run. Raises `LegolmError` for a run that is not, and for a file that it did not write."""
        if not finished(folder):
            raise LegolmError(
                f"run folder {folder}: no {SUMMARY}; finish the run first (`legolm run --resume`, or resume=True)"
            )
        found = read_record(folder / SUMMARY, Summary, "write it anew: legolm run --resume")
        check_sealed(folder)
        return found

    def _rows(self, of: Literal["rounds", "clients"]) -> list[Row]:
        return [one.row() for one in (self.history if of == "rounds" else self.clients)]
