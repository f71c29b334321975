"""Models side by side on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from legolm.api.door import door
from legolm.api.models import LLM
from legolm.block import Block
from legolm.config import RowsConfig, validate
from legolm.errors import LegolmError
from legolm.evaluation import Evaluation, Questions, Result, line_up, read_questions
from legolm.evaluation import evaluate as evaluate_all
from legolm.report import print_evaluation
from legolm.runs import Row, to_frame

if TYPE_CHECKING:
    import pandas

UNSAID = {"layout": "auto", "fields": {}}
"""How rows are read where nothing is said of it."""


class Results(list[Result]):
    """One entry a figure and model; printed, it is what the command prints. `found` has sizes and answers too."""

    def __init__(self, found: Evaluation) -> None:
        super().__init__(found.results)
        self.found = found

    def __str__(self) -> str:
        text = StringIO()
        with redirect_stdout(text):
            print_evaluation(self.found)
        return text.getvalue()

    def to_frame(self) -> pandas.DataFrame:
        """A row a figure and model. Raises `LegolmError` without pandas."""
        rows: list[Row] = []
        for one in self:
            found = one.comparison
            rows.append(
                {
                    "task": one.task,
                    "metric": one.metric,
                    "model": one.model,
                    "value": one.figure.value,
                    "stderr": one.figure.stderr,
                    "questions": one.figure.count,
                    "against": one.against,
                    "difference": found.difference if found else None,
                    "p": found.p if found else None,
                }
            )
        return to_frame(rows)


@door
def questions(
    tasks: Sequence[str] = (),
    *,
    include: str | Path | None = None,
    data: str | Path | None = None,
    layout: str = "auto",
    fields: dict[str, str] | None = None,
    text: str | Path | None = None,
    limit: int | None = None,
    rouge: bool = False,
    length: int | None = None,
    windows: int | None = None,
) -> Questions:
    """What to ask: tasks of lm-evaluation-harness (below `include`, or its own), conversations, running text.

    `layout` and `fields` (`instruction`, `input` and `answer`, or `messages`) are those of `data`; `limit` is so many
    questions of each task and of `data`; `rouge` also generates answers; `length` are tokens a window of the text,
    `windows` so many of them. Raises `LegolmError` for what is missing or broken.
    """
    rows = {"layout": layout, "fields": fields or {}}
    return read_questions(
        tasks,
        None if include is None else Path(include),
        None if data is None else str(data),
        validate(RowsConfig, rows, "questions") if data is not None or rows != UNSAID else None,
        None if text is None else Path(text),
        limit,
        rouge,
        length,
        windows,
    )


@door
def evaluate(
    models: Sequence[LLM | Block | str | Path | Any],
    questions: Questions,
    *,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Results:
    """Every figure of every model, with standard errors; a block beside its LLM, with a paired test.

    A model is an `LLM`, a `Block`, a folder or hub id, or a causal LM of transformers in memory, which is asked as it
    is and must have been loaded from a folder (its tokenizer is read there): each is a row of its own, `paris (in
    memory)`. Raises `LegolmError` for others.
    """
    names: list[str] = []
    loaded: dict[str, nn.Module] = {}
    for model in models:
        if isinstance(model, LLM | Block):
            names.append(model.name if isinstance(model, LLM) else str(model.path))
        elif isinstance(model, str | Path):
            names.append(str(model))
        elif isinstance(model, nn.Module) and getattr(model, "name_or_path", None):
            name = f"{Path(str(model.name_or_path)).name} (in memory)"
            names.append(name if name not in loaded else f"{name}-{len(loaded) + 1}")
            loaded[names[-1]] = model
        else:
            raise LegolmError(
                f"evaluate: {type(model).__name__} is no model; give an LLM, a Block, a folder or a model"
            )
    return Results(evaluate_all(line_up(names, loaded=loaded), questions, precision))
