"""What a configuration cannot do although it was asked for, and how far its promises go: one sentence each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from legolm.adapter import adapter_keys
from legolm.aggregate import Scheme, capped, holders, make_scheme
from legolm.block import Coverage
from legolm.config import RunConfig
from legolm.data import DATE, TokenRows, begin, left_out, unused_tools


def notes(config: RunConfig, members: Sequence[tuple[Coverage, int]], examples: Mapping[str, int]) -> tuple[str, ...]:
    """Of a run whose rounds, if any, have these clients (coverage, rank), with so many examples, if anybody knows."""
    said = [_plain(config)]
    if config.federation.mode == "federated":
        scheme = make_scheme(config.aggregate)
        said += [
            _unfitted(config),
            _turns(config),
            _waits(config),
            _robust(config, scheme, members),
            _without_feedback(config, scheme),
            _capped(config, scheme, examples),
        ]
    return tuple(note for note in said if note)


def _plain(config: RunConfig) -> str:
    names = [block.name for block in config.blocks if block.adapter]
    if not names:
        return ""
    return (
        f"LoRA stands beside the zeros of {', '.join(names)} (adapter: plain): final models of it, merged, have none; "
        "final/CLIENT/adapter is what fits the block with zeros."
    )


def _unfitted(config: RunConfig) -> str:
    late = [client.id for client in config.clients if not client.there(1)]
    if not (config.federation.regmean and late):
        return ""
    return f"What the LLM takes is fitted to the text of those who are there in round 1, not of {', '.join(late)}."


def prompt_notes(tokenizer: Any, learned: Sequence[TokenRows], chats: bool, tools: int) -> tuple[str, ...]:
    """How the conversations to learn from look, where that is not what everybody would expect.

    `chats`: some are; `tools`: so many have tools.
    """
    first, said = begin(tokenizer), list[str]()
    if unused := unused_tools(tokenizer.chat_template, tools):
        said.append(unused)
    if tokenizer.chat_template is None and chats:
        said.append(
            "The model has no chat template: a prompt is its messages, each on a line of its own. data.template has "
            "alpaca, chatml or a file's."
        )
    elif first and any(list(one.ids[: len(first)]) != first for rows in learned for one in rows):
        begins = "".join(tokenizer.convert_ids_to_tokens(first))
        said.append(
            f"The tokenizer begins a text with {begins}, and the chat template writes none: conversations are without."
        )
    changed = sum(rows.rewritten for rows in learned)
    if changed:
        said.append(
            f"The chat template would change {changed} of {sum(map(len, learned))} answers to learn (it takes out "
            "reasoning, or whitespace around them): they are learned as they stand."
        )
    said += left_out(learned)
    if unopened := sum(rows.unopened for rows in learned):
        said.append(
            f"The chat template's prompt begins the answer (as with <think>), and {unopened} of "
            f"{sum(map(len, learned))} answers to learn are without: legolm chat, and who serves the model, ask in "
            "another way than it learned; data.template may name one that asks as it writes."
        )
    if DATE in tokenizer.init_kwargs:
        said.append(f"The chat template writes the day: {tokenizer.init_kwargs[DATE]} throughout (data.date).")
    return tuple(said)


def _turns(config: RunConfig) -> str:
    """Who trains another block in each round, of which the table has one."""
    count = sum(bool(one.blocks) for one in config.clients)
    said = f"{count} of {len(config.clients)} clients train another block in each round (clients[].blocks)"
    return f"{said}: the table has the first, with which they end, and the most bytes." if count else ""


def _waits(config: RunConfig) -> str:
    """What of asynchronous rounds is none on devices."""
    federation, every = config.federation, config.evaluate.every
    if federation.buffer is None or federation.engine != "deployment" or every >= federation.rounds:
        return ""
    when = "each round" if every == 1 else f"every {every} rounds"
    return (
        f"Scoring waits for every device, after {when}: with federation.buffer set evaluate.every to more rounds, or "
        "the slowest device is waited for there."
    )


def _without_feedback(config: RunConfig, scheme: Scheme) -> str:
    """Where error feedback was asked for and cannot be."""
    federation, salient = config.federation, scheme.keep(0.5) < 1
    if scheme.basis_stays or not federation.error_feedback or (federation.codec == "none" and not salient):
        return ""
    losing = "The saliency mask" if federation.codec == "none" else f"Codec {federation.codec}"
    return (
        f"{losing} is without error feedback: {config.aggregate.scheme} makes other factors each "
        "round, and what was lost of the last ones does not fit them."
    )


def _capped(config: RunConfig, scheme: Scheme, examples: Mapping[str, int]) -> str:
    """Who counts less than its examples, where all reply."""
    if config.aggregate.weight != "capped" or not scheme.weighs() or not examples:
        return ""
    cap, weights = config.aggregate.weight_cap, capped(examples, config.aggregate.weight_cap)
    if len(examples) * cap <= 1:
        alike = len(set(examples.values())) == 1
        few = f"All {len(examples)} clients count the same, whatever their examples: more are needed for shares of at "
        return "" if alike else f"{few}most {_percent(cap)} that differ (aggregate.weight_cap)."
    total = sum(examples.values())
    said = [f"{id} ({_percent(examples[id] / total)} of the examples)" for id in weights if weights[id] < examples[id]]
    if not said:
        return ""
    return f"If all reply, {' and '.join(said)} count as {_percent(cap)} of a round each (aggregate.weight_cap)."


def _robust(config: RunConfig, scheme: Scheme, members: Sequence[tuple[Coverage, int]]) -> str:
    """How many liars a robust scheme outvotes in which share of the entries; coverage decides it."""
    if scheme.outvoted(1) is None:
        return ""
    keys = adapter_keys(Coverage.full(members[0][0].shape), config.lora.targets, trained=scheme.frozen_side)
    found = holders(keys, members)
    by_liars: dict[int, list[int]] = {}
    for count in found:
        by_liars.setdefault(scheme.outvoted(count) or 0, []).append(count)
    said = [
        f"{liars or 'no'} liar{'s' * (liars > 1)} in {_percent(sum(found[n] for n in counts) / sum(found.values()))} "
        f"of the entries (held by {' or '.join(map(str, counts))})"
        for liars, counts in sorted(by_liars.items())
    ]
    end = ": a liar among two cannot be outvoted." if 2 in by_liars.get(0, []) else "."
    there = range(1, config.federation.rounds + 1)
    everyone = config.federation.fraction == 1 and all(one.there(n) for one in config.clients for n in there)
    when = "If" if everyone else "Fewer in a round without some of the clients: if"
    return f"{when} all reply and blocks overlap as planned, {config.aggregate.scheme} outvotes {', '.join(said)}{end}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if 0.005 <= share < 0.995 or share in (0, 1) else f"{100 * share:.2g} %"
