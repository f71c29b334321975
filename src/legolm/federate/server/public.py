"""Public questions, which a client's own ones are told from."""

from __future__ import annotations

from collections.abc import Callable

from legolm.block import Block
from legolm.config import RunConfig
from legolm.data import (
    Examples,
    Familiar,
    Seen,
    check_apart,
    client_data,
    is_starter,
    public_starter_text,
    read_examples,
    tokens_of,
    with_system,
)
from legolm.errors import LegolmError
from legolm.models import load_tokenizer


def public_examples(config: RunConfig, notes: list[str] | None = None) -> Examples:
    """Of `federation.public`, as clients' questions look. Raises `LegolmError` where there are none.

    What there is to say of them is added to `notes`.
    """
    source = config.federation.public
    starter = public_starter_text(source) if is_starter(source) else ()
    if not starter and not is_starter(config.data.train):
        check_apart(config.data.train, source, "federation.public", "nobody's own questions could be told from it")
    rows = starter or read_examples(source, config.data, "federation.public", notes)
    found = Examples.of(with_system(example, config.data.system) for example in rows)
    if not found:
        raise LegolmError(f"federation.public: {source!r} has no rows; name files with questions, or a starter set")
    return found


def seen_in_public(config: RunConfig, llm: Block) -> Seen:
    """Their tokens."""
    tokenizer = load_tokenizer(llm.path, config.data)
    return Seen.of(tokens_of(public_examples(config), tokenizer, config.train.max_length))


def familiar_of(config: RunConfig, llm: Block) -> Callable[[str, float], Familiar]:
    """What tells a client's own questions, by its id and the share that may go to the global update; only who has
    clients' rows, a simulation, can make it."""
    tokenizer, seen, data = load_tokenizer(llm.path, config.data), seen_in_public(config, llm), client_data(config)
    return lambda id, away: Familiar.of(tokens_of(data[id].train, tokenizer, config.train.max_length), seen, away)
