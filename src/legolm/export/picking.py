"""Which of several models is the best that a device can run: measured there, on the user's own questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from legolm.config import DataConfig, RowsConfig
from legolm.data import read_examples, render_whole
from legolm.errors import LegolmError
from legolm.evaluation import score
from legolm.export.speed import PROMPT, TOKENS, Runtime, Speed, bench, check_bench
from legolm.models import choose_device, find_model, load_config, load_model, load_tokenizer
from legolm.runs import RunDir, Score

BATCH = 8


@dataclass(frozen=True)
class Candidate:
    """A model in the runtime that is to be used, and how it answers (in float32, by transformers)."""

    speed: Speed
    score: Score

    @property
    def loss(self) -> float:
        """Nats an answer, whose tokens are others in each tokenizer: a loss a token is for models of one tokenizer."""
        return self.score.loss * self.score.tokens / self.score.examples

    def fits(self, memory: float, least: float) -> bool:
        """Whether it keeps within so many bytes of memory, and generates so many tokens a second."""
        return self.speed.memory <= memory and self.speed.decode >= least


def candidates(
    names: Sequence[str],
    data: str,
    rows: RowsConfig,
    runtime: Runtime,
    quant: str,
    limit: int | None = None,
    prompts: DataConfig | None = None,
    notes: list[str] | None = None,
) -> list[Candidate]:
    """Measure each model; a run's folder stands for all of its final models. `data` is a file of questions and answers.

    `prompts` says how prompts look; None: as each model's own. What there is to say of the rows is added to `notes`.

    Raises `LegolmError` for a model that cannot be had or exported, and data that cannot be read.
    """
    models = list(dict.fromkeys(one for name in names for one in _models(name)))
    check_bench(models, [runtime], quant, PROMPT, TOKENS)
    examples = list(read_examples(data, rows, "--data", notes))[:limit]
    if not examples:
        raise LegolmError(f"--data {data}: has no questions")
    scores = []
    for name in models:
        path = find_model(name)
        tokenizer, length = load_tokenizer(path, prompts), load_config(path).max_position_embeddings
        asked = render_whole(examples, tokenizer, length, "--data")
        scores.append(score(load_model(path).to(choose_device("auto")), asked, BATCH, "fp32"))
        if not math.isfinite(scores[-1].loss):
            raise LegolmError(f"{name}: its loss on {data} is {scores[-1].loss}; leave it out")
    speeds = bench(models, [runtime], quant)
    return [Candidate(speed, found) for speed, found in zip(speeds, scores, strict=True)]


def pick(found: Sequence[Candidate], memory: float, least: float) -> Candidate:
    """The one of the lowest loss an answer that fits. Raises `LegolmError` where none does, with what comes nearest."""
    fitting = [one for one in found if one.fits(memory, least)]
    if fitting:
        return min(fitting, key=lambda one: one.loss)
    smallest, fastest = (min(one.speed.memory for one in found), max(one.speed.decode for one in found))
    raise LegolmError(
        f"pick: none of {len(found)} models has at most {memory / 1e6:,.0f} MB and at least {least:g} tokens a second; "
        f"the smallest takes {smallest / 1e6:,.0f} MB, the fastest makes {fastest:,.1f}"
    )


def _models(name: str) -> list[str]:
    """The name, or of a run's folder those of its final models."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists() and RunDir(path).exists():
        found = [one.name for one in RunDir(path).models()]
        if not found:
            raise LegolmError(f"run folder {path}: has no final models yet")
        return [f"{path}:{one}" for one in found]
    return [name]
