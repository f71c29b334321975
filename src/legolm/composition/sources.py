"""What is composed: trained blocks from folders, checked against each other, and how much each counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from legolm.adapter import FACTORS, Tensors, check_factors, load_factors, merged, parse_key, read_adapter
from legolm.block import Block
from legolm.composition.target import checked_block
from legolm.config import RowsConfig
from legolm.data import read_examples, render_whole
from legolm.errors import LegolmError
from legolm.evaluation import score
from legolm.models import choose_device, load_config, load_model, load_tokenizer
from legolm.runs import RunDir
from legolm.system import Progress

BATCH = 8
MOST = 10**12
"""Of a weight: sums of them must have an end."""


@dataclass(frozen=True)
class Source:
    """A trained block: it changes its weights by B·A (`factors`, float32, in its slice).

    `start` tells which adapter training started from, None where nobody knows. `merged`: the block's own checkpoint
    has the factors in it.
    """

    name: str
    block: Block
    factors: Tensors
    start: str | None
    merged: bool

    @property
    def modules(self) -> list[str]:
        """Linear layers that the adapter is on, by the last part of their names."""
        return sorted({parse_key(key)[1].rpartition(".")[2] for key in self.factors})

    @property
    def rank(self) -> int:
        """The highest of its modules."""
        return max(tensor.shape[0] for key, tensor in self.factors.items() if key.endswith(".A"))

    @property
    def examples(self) -> int | None:
        """Training examples, where the run recorded them."""
        found = self.block.details.get("examples")
        return found if isinstance(found, int) and 0 < found <= MOST else None


def read_sources(names: Sequence[str]) -> list[Source]:
    """Read `RUN:CLIENT`, `FOLDER` of a run's final/ or `BLOCK:ADAPTER` with a PEFT adapter.

    Raises `LegolmError` for no sources, a missing or foreign adapter, the same source twice, other base models and
    other LoRA targets.
    """
    if not names:
        raise LegolmError("sources: none given; give RUN:CLIENT, folders of a run's final/, or BLOCK:ADAPTER")
    known: set[tuple[Path, ...]] = set()
    for name in names:
        folders = tuple(folder.resolve() for folder in _folders(name))
        if folders in known:
            raise LegolmError(f"{name}: is given twice; give it once, with more weight (--weights)")
        known.add(folders)
    sources = [_read(name) for name in names]
    first = sources[0]
    for other in sources[1:]:
        if other.block.base_fingerprint != first.block.base_fingerprint:
            raise LegolmError(
                f"{other.name}: was cut from another base model than {first.name} (base {_short(other)}, not "
                f"{_short(first)}); compose blocks of one LLM"
            )
        if other.modules != first.modules:
            raise LegolmError(
                f"{other.name}: adapts {', '.join(other.modules)}, and {first.name} {', '.join(first.modules)}; "
                "train them with the same lora.targets"
            )
    return sources


def given_weights(text: str, sources: Sequence[Source]) -> list[float]:
    """`1,2,1`: a number above zero a source. Raises `LegolmError`."""
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise LegolmError(f"--weights {text}: write numbers with commas between them, for instance 1,2,1") from None
    if len(weights) != len(sources) or not all(0 < weight <= MOST for weight in weights):
        raise LegolmError(
            f"--weights {text}: give a number above 0, at most {MOST:g}, for each of the {len(sources)} sources"
        )
    return weights


def weights_by_examples(sources: Sequence[Source]) -> list[float]:
    """Numbers of training examples. Raises `LegolmError` where one is not recorded."""
    for source in sources:
        if source.examples is None:
            raise LegolmError(
                f"{source.name}: no number of training examples is recorded; give --weights or --validate"
            )
    return [float(source.examples or 0) for source in sources]


def weights_by_loss(sources: Sequence[Source], data: str, progress: Progress, rows: RowsConfig) -> list[float]:
    """softmax(−loss) of the trained blocks on instructions and answers: the mean probability of an answer token.

    The mean is geometric, of the loss in nats a token. Each block is loaded once, alone.
    """
    said: list[str] = []
    examples = list(read_examples(data, rows, "--validate", said))
    losses = []
    with progress.stage("validate", len(sources)) as advance:
        for source in sources:
            block, tokenizer = source.block, load_tokenizer(source.block.path)
            length = load_config(block.path).max_position_embeddings
            asked = render_whole(examples, tokenizer, length, "--validate")
            with merged(load_model(block.path), block.coverage, {} if source.merged else source.factors, 1.0) as model:
                losses.append(score(model.to(choose_device("auto")), asked, BATCH, "fp32").loss)
            if not math.isfinite(losses[-1]):
                raise LegolmError(
                    f"{source.name}: its loss on {data} is {losses[-1]}; what it learned diverged, leave it out"
                )
            advance(1)
    for note in said:  # not before: bad input is one line
        progress.note(note)
    return torch.tensor(losses, dtype=torch.float64).neg().softmax(0).tolist()


def _folders(name: str) -> list[Path]:
    """Of `FOLDER` and `RUN:CLIENT` the folder, of `BLOCK:ADAPTER` both."""
    block, _, adapter = ("", "", "") if Path(name).is_dir() else name.rpartition(":")
    if block and not Path(block).is_dir():
        raise LegolmError(f"{name}: there is no folder {block}; give RUN:CLIENT, a folder, or BLOCK:ADAPTER")
    if block and RunDir(Path(block)).exists():
        return [RunDir(Path(block)).final_model(adapter)]
    return [Path(block), Path(adapter)] if block else [Path(name)]


def _read(name: str) -> Source:
    folder, *adapter = _folders(name)
    block = checked_block(folder)
    if adapter:
        if (folder / FACTORS).is_file():
            raise LegolmError(
                f"{name}: {folder} has what it learned merged already, and the adapter would hide it; give {folder} "
                "alone, or the block that the adapter was trained on"
            )
        factors, start = read_adapter(adapter[0], block.coverage, name), None
    else:
        factors, start = load_factors(block.path)
    check_factors(name, factors, block.coverage)
    return Source(name, block, factors, start, merged=not adapter)


def _short(source: Source) -> str:
    return source.block.base_fingerprint[:12]
