"""A model's own greedy answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from legolm.config import DataConfig, Precision, RowsConfig
from legolm.data import Reading, Tokens, render_whole, special_ids, unread
from legolm.errors import LegolmError
from legolm.evaluation.by_input import by_input
from legolm.models import autocast, choose_device, load_config, load_model, load_tokenizer


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
    ends, context = ends_of(examples, tokenizer, model), model.config.max_position_embeddings
    order = sorted(range(len(examples)), key=lambda place: examples[place].answer, reverse=True)
    texts = [""] * len(examples)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        prompts = [list(examples[place].ids[: examples[place].answer]) for place in places]
        padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        with torch.no_grad(), autocast(precision, model.device.type):
            output = model.generate(
                **padded,
                max_new_tokens=max(1, min(most, context - padded["input_ids"].shape[1])),
                do_sample=False,
                num_beams=1,
                use_cache=True,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
            )
        for place, ids in zip(places, output[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
            texts[place] = tokenizer.decode(ids, skip_special_tokens=True)
            if not {*ends} & {*ids}:
                texts[place] += cut
    return texts


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
    answers = [""] * len(found)
    for folder, places in by_input(path, rendered).items():
        model = load_model(folder).to(choose_device("auto"))
        chosen = generate(model, [rendered[at] for at in places], tokenizer, batch_size, precision, most)
        for at, text in zip(places, chosen, strict=True):
            answers[at] = text
        if folder != path and notes is not None:
            notes.append(
                f"{len(places)} of {len(found)} questions are not like the client's own: {folder} answers them"
            )
    return [(dict(row.values), text) for (row, _), text in zip(found, answers, strict=True)]
