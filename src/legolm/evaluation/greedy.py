"""A model's own greedy answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from legolm.config import DataConfig, Precision, RowsConfig
from legolm.data import Reading, Tokens, render_whole, special_ids, unread
from legolm.errors import LegolmError
from legolm.evaluation.by_input import by_input
from legolm.models import autocast, choose_device, continued, load_config, load_model, load_tokenizer


def ends_of(examples: Iterable[Tokens], tokenizer: Any, model: Any = None) -> list[int]:
    """Tokens that end an answer: the end of text, the special one that each of these true answers ends with, and those
    of the model's generation settings."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    said = {own} if isinstance(own, int) else {*(own or ())}
    return sorted({one.ids[-1] for one in examples} & special_ids(tokenizer) | {tokenizer.eos_token_id} | said)


def generate(
    model: Any,
    examples: Sequence[Tokens],
    tokenizer: Any,
    batch_size: int,
    precision: Precision,
    most: int,
    cut: str = "",
) -> list[str]:
    """The answer to each prompt, at most `most` tokens, as far as the context reaches; one that had not ended has
    `cut` after it."""
    found = _generated(model, examples, tokenizer, batch_size, precision, most)
    return [text if ended else text + cut for text, ended in found]


def _generated(
    model: Any, examples: Sequence[Tokens], tokenizer: Any, batch_size: int, precision: Precision, most: int
) -> list[tuple[str, bool]]:
    """As `generate`: each answer, and whether it had ended. No answer depends on those beside it."""
    ends, context = ends_of(examples, tokenizer, model), model.config.max_position_embeddings
    found = [("", False)] * len(examples)
    for limit, places in _batches(examples, batch_size, most, context):
        prompts = [list(examples[place].ids[: examples[place].answer]) for place in places]
        padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        given, mask, pad = padded["input_ids"], padded["attention_mask"], tokenizer.pad_token_id
        with autocast(precision, model.device.type):
            output = continued(model, given, limit, mask, eos_token_id=ends, pad_token_id=pad)
        for place, ids in zip(places, output[:, given.shape[1] :].tolist(), strict=True):
            found[place] = tokenizer.decode(ids, skip_special_tokens=True), bool({*ends} & {*ids})
    return found


def _batches(examples: Sequence[Tokens], batch_size: int, most: int, context: int) -> Iterator[tuple[int, list[int]]]:
    """Places of examples that are asked together, and the tokens that each of them may get: within the context it has
    room for as many, whatever is beside it.
    """
    limits = [max(1, min(most, context - one.answer)) for one in examples]
    order = sorted(range(len(examples)), key=lambda place: examples[place].answer, reverse=True)
    for limit, group in groupby(order, key=lambda place: limits[place]):
        places = list(group)
        for start in range(0, len(places), batch_size):
            yield limit, places[start : start + batch_size]


def answer_rows(
    path: Path,
    data: str,
    answer: str,
    rows: RowsConfig,
    batch_size: int,
    precision: Precision,
    most: int,
    prompts: DataConfig | None = None,
    notes: list[str] | None = None,
) -> list[tuple[dict[str, Any], str]]:
    """The model's answer to each row of a file, which is read as a run's data, but that its answer may be missing.

    `prompts` says how prompts look; None: as the model's own. What there is to say of the rows is added to `notes`.

    Raises `LegolmError` for bad rows that are not skipped, for one that has the field `answer` already, which answers
    are to go into, and for a conversation that is longer than the model's context.
    """
    reading = Reading(rows, "generate", ask=True)
    found = list(reading.examples(data))
    for row, _ in found:
        if answer in row.values:
            raise LegolmError(
                f"{row.place}: has a field {answer!r} already, whose place the model's answer would take; name another "
                "(--answer)"
            )
    if notes is not None:
        notes += [*reading.notes, *unread("generate", reading.unused)]
    tokenizer, context = load_tokenizer(path, prompts), load_config(path).max_position_embeddings
    rendered = render_whole([example for _, example in found], tokenizer, context, "generate")
    answers, cut, full = [""] * len(found), 0, 0
    for folder, places in by_input(path, rendered).items():
        model = load_model(folder).to(choose_device("auto"))
        chosen = _generated(model, [rendered[at] for at in places], tokenizer, batch_size, precision, most)
        for at, (text, ended) in zip(places, chosen, strict=True):
            answers[at] = text
            room = context - rendered[at].answer
            cut, full = cut + (not ended and room >= most), full + (not ended and room < most)
        if folder != path and notes is not None:
            notes.append(
                f"{len(places)} of {len(found)} questions are not like the client's own: {folder} answers them"
            )
    if notes is not None:
        if cut:
            notes.append(f"generate: {cut} of {len(found)} answers were cut at {most} tokens; --max-tokens gives more.")
        if full:
            notes.append(
                f"generate: {full} of {len(found)} answers were cut where the model's context, {context}, ends."
            )
    return [(dict(row.values), text) for (row, _), text in zip(found, answers, strict=True)]
