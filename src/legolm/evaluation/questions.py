"""What models are evaluated on, read once, and a model's figures on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from legolm.config import Precision, RowsConfig
from legolm.data import Example, begin, read_examples, read_text, render_whole, text_tokens
from legolm.errors import LegolmError
from legolm.evaluation.answers import score_each
from legolm.evaluation.figure import Figure, RatioFigure, digest, ratio_figure
from legolm.evaluation.greedy import generate
from legolm.evaluation.harness import TaskFigures, run_tasks
from legolm.evaluation.kept import Kept
from legolm.evaluation.perplexity import text_windows, window_losses
from legolm.evaluation.rouge import need_rouge, rouge_l
from legolm.evaluation.tasks import Tasks, load_tasks

NOWHERE = Kept()
BATCH = 8
LONGEST_TOKEN = 256
"""Bytes a token of running text has at most, on average."""
MAX_NEW_TOKENS = 128
"""For ROUGE-L: an answer that has not ended by then is scored as it is."""
DATA, TEXT = "answers", "text"
"""Names of the figures on conversations and on running text, beside those of tasks."""
LOSS, EXACT = "answer loss", "exact match"
SAMPLES, SPARE, MOST = 3, 8, 64
"""Answers shown, and their tokens: as many as the longest wanted one has and some to spare, at most so many."""


@dataclass(frozen=True)
class Questions:
    """Harness tasks, conversations, running text; what is None or empty is not asked.

    `limit`: only so many questions of each task and so many conversations. `rouge`: answers are also generated, for
    ROUGE-L. `length`, `windows`: tokens a window of the text, and only so many windows.
    `notes` say how the conversations were read.
    """

    tasks: Tasks | None = None
    examples: tuple[Example, ...] = ()
    text: str | None = None
    limit: int | None = None
    rouge: bool = False
    length: int = 1024
    windows: int | None = None
    notes: tuple[str, ...] = ()

    def asked(self) -> str:
        """Digest of all that is asked, and how."""
        tasks = self.tasks.asked(self.limit) if self.tasks else None
        return digest([tasks, self.examples, self.text, self.limit, self.rouge, self.length, self.windows])


def read_questions(
    tasks: Sequence[str],
    include: Path | None,
    data: str | None,
    rows: RowsConfig | None,
    text: Path | None,
    limit: int | None = None,
    rouge: bool = False,
    length: int | None = None,
    windows: int | None = None,
) -> Questions:
    """Read all inputs before any model is loaded.

    Raises `LegolmError` for what is missing or broken, and for a setting of what is not asked.
    """
    for option, given, wants, there in (
        ("--include", include, "--tasks", tasks),
        ("--limit", limit, "--tasks or --data", tasks or data is not None),
        ("--rouge", rouge or None, "--data", data is not None),
        ("--layout, --instruction, --input, --answer, --messages, --bad-rows", rows, "--data", data is not None),
        ("--length", length, "--text", text is not None),
        ("--windows", windows, "--text", text is not None),
    ):
        if given is not None and not there:
            raise LegolmError(f"{option}: only with {wants}; give that too, or leave it out")
    for option, number, least in (("--limit", limit, 1), ("--length", length, 2), ("--windows", windows, 1)):
        if number is not None and number < least:
            raise LegolmError(f"{option} {number}: must be at least {least}")
    if not tasks and data is None and text is None:
        raise LegolmError("nothing to evaluate on; give --tasks, --data or --text, or several")
    if rouge:
        need_rouge()
    said: list[str] = []
    examples = () if data is None else tuple(read_examples(data, rows or RowsConfig(), "--data", said))
    return Questions(
        tasks=load_tasks(tasks, include, limit) if tasks else None,
        examples=examples[:limit],
        text=None if text is None else read_text(text, "--text", _bytes(length or Questions.length, windows)),
        limit=limit,
        rouge=rouge,
        length=length or Questions.length,
        windows=windows,
        notes=tuple(said),
    )


def measure(
    model: Any, tokenizer: Any, questions: Questions, precision: Precision = "fp32", kept: Kept = NOWHERE
) -> TaskFigures:
    """All figures of a causal LM in memory, by task (`answers` and `text` besides) and metric.

    Losses are nats a token; exact match, ROUGE-L and accuracies are shares of 1. Raises `LegolmError`, before anything
    is measured, for a text or a model that is too short for a window, and for a conversation too long for the model.
    Each task, the conversations and the text are measured once for all that have `kept`.
    """
    found: TaskFigures = {}
    most = model.config.max_position_embeddings
    windows = None if questions.text is None else _windows(most, tokenizer, questions)
    examples = render_whole(questions.examples, tokenizer, most, "--data")
    for tasks in questions.tasks.each() if questions.tasks else ():
        what = f"tasks {questions.limit} {tasks.asked(questions.limit) if kept.folder else ''}"
        found |= kept.figures(what, partial(run_tasks, model, tokenizer, tasks, questions.limit, precision))
    if examples:
        asked = digest(questions.examples)
        answered = partial(_answer_figures, model, tokenizer, questions, examples, asked, precision)
        found |= kept.figures(f"answers {questions.rouge} {asked}", answered)
    if windows is not None:
        asked = digest(windows.flatten().tolist())
        found |= kept.figures(
            f"text {tuple(windows.shape)} {asked}", partial(_text_figures, model, windows, asked, precision)
        )
    return found


def _answer_figures(
    model: Any, tokenizer: Any, questions: Questions, examples: Sequence[Any], asked: str, precision: Precision
) -> TaskFigures:
    answers = score_each(model, examples, BATCH, precision)
    found: dict[str, Figure] = {
        LOSS: ratio_figure(answers.losses, answers.tokens, asked),
        EXACT: ratio_figure(answers.exact, None, asked),
    }
    if questions.rouge:
        texts = generate(model, examples, tokenizer, BATCH, precision, MAX_NEW_TOKENS)
        references = [example.messages[-1].content for example in questions.examples]
        found["ROUGE-L"] = ratio_figure(rouge_l(texts, references), None, asked)
    return {DATA: found}


def _text_figures(model: Any, windows: Tensor, asked: str, precision: Precision) -> TaskFigures:
    losses = window_losses(model, windows, precision)
    predicted = [float(windows.shape[1] - 1)] * len(losses)
    return {TEXT: {"perplexity": ratio_figure(losses, predicted, asked, exponential=True)}}


def sample(model: Any, tokenizer: Any, questions: Questions, precision: Precision = "fp32") -> list[str]:
    """The model's answers to `sampled` conversations, one that had not ended with an ellipsis."""
    asked = render_whole(sampled(questions), tokenizer, model.config.max_position_embeddings, "--data")
    most = min(MOST, SPARE + max((len(one.ids) - one.answer for one in asked), default=0))
    return [text.strip() for text in generate(model, asked, tokenizer, BATCH, precision, most, "…")]


def sampled(questions: Questions) -> list[Example]:
    """A few conversations of all, the same ones for every model."""
    places = sorted({turn * len(questions.examples) // SAMPLES for turn in range(SAMPLES)})
    return [questions.examples[place] for place in places] if questions.examples else []


def check_finite(found: TaskFigures, whose: str) -> None:
    """Raise `LegolmError` for a loss that overflowed: it has no error and no test.

    The harness's own figures may be undefined.
    """
    for task, metrics in found.items():
        for metric, figure in metrics.items():
            if isinstance(figure, RatioFigure) and not math.isfinite(figure.value):
                raise LegolmError(f"{whose}: {task} {metric} is {figure.value}; compute in fp32, or mend the model")


def _windows(most: int, tokenizer: Any, questions: Questions) -> Tensor:
    """Token ids (windows, length) of the text. Raises `LegolmError` when it, or the model, is too short for one."""
    if questions.length > most:
        raise LegolmError(f"--length {questions.length}: the model takes {most} tokens; give a smaller one")
    wanted = None if questions.windows is None else questions.windows * questions.length
    tokens = text_tokens(str(questions.text), tokenizer, wanted)
    return text_windows(tokens, questions.length, questions.windows, begin(tokenizer))


def _bytes(length: int, windows: int | None) -> int | None:
    """Of a text, as many as the windows may have."""
    return None if windows is None else LONGEST_TOKEN * length * windows
