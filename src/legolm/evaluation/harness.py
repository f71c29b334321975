"""Benchmark tasks through lm-evaluation-harness, on a model in memory."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from jinja2 import TemplateError

from legolm.config import Precision
from legolm.data import begin, begun, encode
from legolm.errors import LegolmError
from legolm.evaluation.figure import Figure, digest, ratio_figure
from legolm.evaluation.tasks import Tasks, line, quiet
from legolm.models import scales_by_length

BATCH = 8
BOOTSTRAPS = 200
"""Resamples for the standard error (to about 5 %) of the few figures that are no mean over questions: F1, Matthews."""

TaskFigures = dict[str, dict[str, Figure]]
"""By task, and group of tasks, and metric."""


def run_tasks(
    model: Any, tokenizer: Any, tasks: Tasks, limit: int | None = None, precision: Precision = "fp32"
) -> TaskFigures:
    """Figures of a causal LM, or of one with a PEFT adapter, on the first `limit` questions of each task.

    Means over questions, perplexities and bits per byte hold every question's part and can be compared pairwise; other
    figures, and those of groups, are the harness's with its own standard error. Raises `LegolmError` where a question
    lacks a field that the task's templates name.
    """
    from lm_eval.evaluator import evaluate

    names = ", ".join(tasks.loaded["tasks"])
    with quiet():
        wrapped = _harness_model()(
            pretrained=model,
            tokenizer=tokenizer,
            # Padded to one length, sequences would have the frequencies of the longest.
            batch_size=1 if scales_by_length(model) else BATCH,
            mixed_precision_dtype="bfloat16" if precision == "bf16" else None,
        )
        try:
            results = evaluate(wrapped, tasks.loaded, limit=limit, bootstrap_iters=BOOTSTRAPS)
        except TemplateError as error:
            raise LegolmError(f"task {names}: a question has not what its templates name ({error})") from None
        except (LookupError, TypeError, ValueError, AttributeError, NameError, ArithmeticError) as error:
            raise LegolmError(f"task {names}: {type(error).__name__}: {line(error)}") from error
    found: TaskFigures = {}
    for name, figures in results["results"].items():
        samples = results["samples"].get(name, [])
        task = tasks.loaded["tasks"].get(name)
        aggregations = task.aggregation() if task else {}
        found[name] = {}
        for key, value in figures.items():
            metric, _, pipeline = key.partition(",")
            if not pipeline or metric.endswith("_stderr"):
                continue
            answered = [one for one in samples if one["filter"] == pipeline and metric in one]
            label = metric if pipeline == "none" else f"{metric} ({pipeline})"
            stderr = figures.get(f"{metric}_stderr,{pipeline}")
            found[name][label] = _figure(
                [one[metric] for one in answered],
                getattr(aggregations.get(metric), "__name__", ""),
                digest(one["doc_hash"] for one in answered),
                Figure(float(value), stderr if isinstance(stderr, float) else None, figures["sample_len"]),
            )
    return {name: figures for name, figures in found.items() if figures}


@cache
def _harness_model() -> Any:
    """The harness's model, whose sequences begin as everywhere else and keep it where they are too long."""
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):  # type: ignore[misc]
        _rolling = False

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
        ) -> list[int]:
            ids, first = encode(string, self.tokenizer), begin(self.tokenizer)
            if add_special_tokens is not False and not self._rolling:
                ids = begun(ids, first)
            return _last(ids, first, left_truncate_len or len(ids))

        def tok_batch_encode(
            self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
        ) -> tuple[Any, Any]:
            ids = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
            padded = self.tokenizer.pad({"input_ids": ids}, padding_side=padding_side, return_tensors="pt")
            return padded["input_ids"], padded["attention_mask"]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            self._rolling = True  # the harness puts BOS before the first window itself
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm)
            finally:
                self._rolling = False

        def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
            first = begin(self.tokenizer)
            fitting = [
                (text, _last(context, first, max(1, self.max_length + 1 - len(wanted))), wanted)
                for text, context, wanted in requests
            ]
            return super()._loglikelihood_tokens(fitting, *args, **kwargs)

    return Model


def _last(ids: list[int], first: list[int], most: int) -> list[int]:
    """At most so many of the tokens: what they begin with and the last ones."""
    kept = first[:most] if ids[: len(first)] == first and len(ids) > most else []
    return kept + ids[max(0, len(ids) - most + len(kept)) :] if len(ids) > most else ids


def _figure(values: list[Any], aggregation: str, questions: str, harness: Figure) -> Figure:
    """The harness's figure, with each question's part where its aggregation is a ratio of sums."""
    if not values:
        return harness
    if aggregation == "mean":
        return ratio_figure([float(value) for value in values], None, questions)
    if aggregation == "perplexity":
        return ratio_figure([-float(value) for value in values], None, questions, exponential=True)
    if aggregation in ("weighted_perplexity", "bits_per_byte"):
        exponential = aggregation == "weighted_perplexity"
        unit = 1.0 if exponential else math.log(2)
        return ratio_figure([-loss / unit for loss, _ in values], [size for _, size in values], questions, exponential)
    return harness
