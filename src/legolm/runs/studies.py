"""What studies over runs find, typed: the contents of `compare.json`, `compare.csv` and `ablation.json`.

Losses are nats per answer token on test data.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict

from legolm.runs.records import Record, dump_record
from legolm.runs.summary import Others
from legolm.runs.tables import Row, to_frame, write_csv
from legolm.system import atomic_write

if TYPE_CHECKING:
    import pandas


class Point(Record):
    """A variant after a round (alone: before training and after it). Tokens and bytes, both ways, are all clients' so
    far; `blocks` is the mean loss of the clients' blocks on all test data that they were scored on.
    """

    round: int
    tokens: float
    bytes: int
    llm: float | None
    blocks: float


class CompareRow(Record):
    """A variant's figures with one seed: the LLM's after the round that is best for it, the blocks' after the one that
    is best for them (alone: after local training).

    `own` and `others` are means over the clients' blocks; exact matches are shares of answers. To choose settings by:
    `llm_validation`, the LLM's on all clients' validation data, and `validation`, the blocks' on their own clients'.
    What is None was not scored. Costs are a client's in a round: `bytes_down`, `bytes_up`. `tokens` are all that
    clients trained on in the rounds, `flops` the decoder's operations for them, `memory` the mean of what the plan
    reckons that those who trained need (bytes); data at one place has no clients, and neither. `folder` is the run's,
    below the comparison's; `searched` the validation losses of the learning rates that it was chosen from, None of one
    at which nothing could be learned.
    """

    name: str
    folder: str | None = None
    seed: int
    scheme: str
    settings: dict[str, Any]
    mode: str
    codec: str
    clients: int
    learning_rate: float
    searched: dict[str, float | None] | None = None
    rounds: int
    best_round: int
    llm_best_round: int
    llm: float | None
    llm_before: float | None
    llm_exact_match: float | None
    own: float
    own_exact_match: float
    others: float | None
    others_exact_match: float | None
    validation: float
    llm_validation: float | None
    bytes_down: float
    bytes_up: float
    replies: int
    tokens: float
    flops: float
    memory: float | None
    seconds: float
    curve: list[Point]

    def row(self) -> Row:
        """A line of `compare.csv`, which has no curves."""
        return self.model_dump(exclude={"curve", "folder", "searched"}) | {
            "settings": "; ".join(f"{name}={value}" for name, value in self.settings.items())
        }


def on_all_data(own: float, others: float | None, clients: int) -> float:
    """A block's loss on all clients' data, of which its own is one; on its own where others' were not asked."""
    return own if others is None else (own + (clients - 1) * others) / clients


class Comparison(Record):
    """The variants of one study, in its order; with several seeds all of the first seed, then all of the next."""

    schema_number: Literal[2] = 2
    name: str
    rows: list[CompareRow]

    def to_frame(self) -> pandas.DataFrame:
        """A row a variant and seed, as in the CSV file. Raises `LegolmError` without pandas."""
        return to_frame([one.row() for one in self.rows])

    def write(self, folder: Path) -> None:
        """Write `compare.json` and `compare.csv`, each whole or not at all."""
        atomic_write(folder / "compare.json", dump_record(self))
        write_csv([one.row() for one in self.rows], folder / "compare.csv")


class Losses(Record):
    """One global update (or each client alone): mean loss of each client's block, of all blocks, and of the LLM.

    A block's is over its own and the others' data, each set counting the same. The LLM's other figures, of tasks and
    text, are further keys, and in `stderr` their standard errors. `llm` is None where nobody may score it.
    """

    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="constants")
    __pydantic_extra__: dict[str, float]

    blocks: float
    by_client: dict[str, float]
    llm: float | None
    stderr: dict[str, float | None]

    def measures(self) -> dict[str, float]:
        """Every figure by name, `blocks` first."""
        return {"blocks": self.blocks, **({} if self.llm is None else {"llm": self.llm}), **self.__pydantic_extra__}


class Paired(Record):
    """A figure minus that of the global update on the same questions; `p` is two-sided."""

    difference: float
    stderr: float | None
    p: float
    test: str


class LeftOut(Losses):
    """The losses without the updates of some clients: those of a block, or one. `paired` is by figure."""

    kind: Literal["block", "client"]
    name: str
    clients: list[str]
    paired: dict[str, Paired | None]


class Ablation(Record):
    """What leaving out each block and each client costs a run, by replay or `retrained`.

    `gain` is the mean loss of the clients' blocks trained alone minus that of the same blocks with the global update
    (None where the run did not train alone); `cost` of a block is their mean loss without its clients' updates minus
    that with all, `cost_clients` the same of each client, `cost_llm` of a block for the LLM.
    """

    schema_number: Literal[2] = 2
    run: str
    round: int
    questions: str | None
    name: str
    retrained: bool = False
    others: Others
    before: Losses
    local: Losses | None
    all: Losses
    without: list[LeftOut]
    gain: float | None
    cost: dict[str, float]
    cost_clients: dict[str, float]
    cost_llm: dict[str, float]

    @staticmethod
    def file(retrained: bool) -> str:
        """Its name; that of its page ends in html."""
        return "retrained.json" if retrained else "ablation.json"
