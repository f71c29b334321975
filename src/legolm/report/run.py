"""The page of a run: the verdict in words, figure 3, tables and costs in one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from legolm.report.page import (
    Raw,
    change,
    clock,
    document,
    figure,
    loss,
    number,
    numeral,
    percent,
    section,
    soft,
    table,
    tag,
)
from legolm.report.plots import curves, drawn, ordered, overview, shade
from legolm.report.shown import SPEAKERS, notes, points_of, scored, stages_of
from legolm.runs import STAGES, Data, Part, Stage, Summary
from legolm.system import atomic_write

_NAMES: dict[Stage, str] = {
    "before": "before",
    "local": "local only",
    "global": "global update",
    "personal": "personal model",
}
_PARTS: dict[Part, str] = {"global": "global update", "personal": "own steps after it", "local": "alone"}
_MARKS: dict[Stage, str] = dict(zip(STAGES, "○◇●▲", strict=True))
_DATA: dict[Data, str] = {"own": "own data", "others": "others’ data"}
_TIMES = {"blocks": "making blocks", "before": "test before", "local": "local only", "rounds": "rounds"}
_TIMES |= {"personal": "personal models", "final": "final models"}


LONGEST = 300
"""Letters of a question or an answer on the page."""


class Finding(NamedTuple):
    """What a run showed: of whom on what data, the numbers, a sentence."""

    name: str
    numbers: str
    text: str


def write_report(summary: Summary, path: Path) -> None:
    """Write the page of a run's summary to `path`, all or nothing. Raises `LegolmError` without matplotlib."""
    atomic_write(path, render(summary))


def render(summary: Summary) -> str:
    """The page as a string; the same summary gives the same page."""
    sections = (_verdict, _answers, _figure3, _overview, _clients, _mixtures, _blocks, _rounds, _time, _footer)
    follow = "".join(f"main:has(.c{i}:hover) svg .tip:not(.c{i}){{opacity:.13}}" for i, _ in drawn(summary))
    body = (_title(summary), *(part(summary) for part in sections))
    return document(f"{summary.run} · LEGO report", *body, style=follow)


def verdict(summary: Summary) -> list[Finding]:
    """What the run showed, also when it is bad news; nothing of what nobody scored, or of rounds that there are not."""
    found, llm = [], summary.llm
    if llm.loss_before is not None and summary.rounds:
        before, after = number(llm.loss_before), number(llm.loss_after)
        data = "all clients’ held-out answers" if summary.scores == "everyone" else "the server’s own held-out answers"
        text = f"The LLM’s loss on {data} went from {loss(before)} to {loss(after)}"
        text += f" ({change(after, before)})" if before and after is not None else ""
        text += f", its exact answers from {percent(llm.exact_match_before)} to {percent(llm.exact_match_after)}."
        if llm.best_round == 0:
            text += " No round beat the start on the validation data, so the start is kept."
        found.append(Finding(f"LLM, {_llm_data(summary)}", f"{loss(before)} → {loss(after)}", text))

    rival: Stage = "local" if "local" in stages_of(summary) else "before"
    against = "local-only training" if rival == "local" else "before the rounds"
    count, wins, mean, other = _compare(summary, "others", "global", rival)
    if count:
        text = f"On other clients’ data, blocks after the global update are better than {against} for "
        text += f"{wins} of {count} clients (mean {loss(mean)} against {loss(other)}: {change(mean, other)})."
        later, _, moved, _ = _compare(summary, "others", "personal", rival)
        text += f" Personal models have {loss(moved)}." if later else ""
        text += " This run has no local-only baseline." if rival == "before" else ""
        found.append(Finding("Blocks, others’ data", f"{loss(mean)} vs {loss(other)}", text))

    alone, last = (_compare(summary, "own", stage, rival) for stage in (STAGES[2], STAGES[3]))
    count, wins, mean, other = last if last[0] else alone
    if count:
        step = "as personal models" if last[0] else "after the global update (this run has no personal models)"
        text = f"On their own data {step} they are {change(mean, other, against)} "
        text += f"(mean {loss(mean)} against {loss(other)}; better for {wins} of {count} clients)."
        text += f" With the global update alone: {change(*alone[2:])}." if last[0] and alone[0] else ""
        found.append(Finding("Blocks, own data", f"{loss(mean)} vs {loss(other)}", text))
    if not summary.rounds:
        for data in scored(summary):
            count, wins, mean, other = _compare(summary, data, "local", "before")
            text = f"Each block was trained alone. On {_DATA[data]} they are {change(mean, other, 'before')} "
            text += f"(mean {loss(mean)} against {loss(other)}; better for {wins} of {count} clients)."
            found.append(Finding(f"Blocks, {_DATA[data]}", f"{loss(mean)} vs {loss(other)}", text))
    return found


def _title(summary: Summary) -> Raw:
    machine = summary.machine
    blocks = sum(block.name != "llm" for block in summary.blocks)
    facts = (
        f"model {summary.model}",
        f"{len(summary.clients)} clients, {blocks} blocks, {summary.rounds} rounds ({summary.engine})",
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_gb} GB",
        clock(summary.wall_s),
    )
    kicker = tag("p", "LEGO: language model building blocks", class_="kicker")
    return tag("header", kicker, tag("h1", summary.run), soft(" · ".join(facts)))


def _verdict(summary: Summary) -> Raw:
    tiles = (
        tag("div", tag("span", one.name), tag("strong", one.numbers), tag("p", one.text)) for one in verdict(summary)
    )
    return tag("section", tag("div", *tiles, class_="tiles"), *map(soft, notes(summary)))


def _figure3(summary: Summary) -> Raw:
    if not summary.history:
        return Raw("")
    stages = stages_of(summary)
    note = "Thin lines are clients’ blocks"
    note += f", the thick line is the LLM on {_llm_data(summary)}. " if _has_llm(summary) else ". "
    note += "The large dot is the round "
    note += "that is kept" + ("; a dotted line leads from it to the personal model. " if "personal" in stages else ". ")
    note += "Diamonds are the same blocks trained alone for as many steps. " if "local" in stages else ""
    note += "Point at a client to follow it through all figures."
    if (shown := len(drawn(summary))) < len(summary.clients):
        note += f" Figures show {shown} of the {len(summary.clients)} clients, spread evenly over the blocks; "
        note += "the table has all."
    return section("Loss by round", _key(summary), _panels("Loss by round", curves, summary), soft(note))


def _overview(summary: Summary) -> Raw:
    return section("Loss by client", _key(summary), _panels("Loss by client", overview, summary))


def _answers(summary: Summary) -> Raw:
    """The sample answers; those that are right to the letter are marked."""
    if not summary.samples:
        return Raw("")
    speakers = [one for one in SPEAKERS if any(one in sample.answers for sample in summary.samples)]
    rows = []
    for sample in summary.samples:
        said = [sample.answers.get(speaker, "–") for speaker in speakers]
        cells = [tag("td", tag("b", "✓ ", one) if one == sample.wanted.strip() else one) for one in map(_cut, said)]
        asked = (
            tag("th", sample.client, scope="row"),
            tag("td", _cut(sample.question)),
            tag("td", _cut(sample.wanted)),
        )
        rows.append(tag("tr", *asked, *cells))
    note = "Greedy answers, generated once. ✓: right to the letter. The block before is the client’s, untrained; after "
    note += "the federation it is the client’s final model, and nobody trained the LLM. … ends what was cut off."
    names = ("client", "question", "wanted", *(SPEAKERS[speaker] for speaker in speakers))
    return section("Answers", table("Test questions of the clients, and who answers what", names, rows, 0), soft(note))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _clients(summary: Summary) -> Raw:
    clients, data = ordered(summary), scored(summary)
    stages = stages_of(summary)
    rows = []
    for i, client in enumerate(clients):
        block = tag("td", _dot(summary, client.block), client.block)
        cells = [cell for one in data for cell in _scores(client.loss(one), client.exact_match(one), stages)]
        rows.append(tag("tr", tag("th", client.id, scope="row"), block, *cells, class_=f"c{i}"))
    cells = []
    for one in data:
        losses, exact = [client.loss(one) for client in clients], [client.exact_match(one) for client in clients]
        cells += _scores(_mean(losses, stages), _mean(exact, stages), stages)
    rows.append(tag("tr", tag("th", "mean", scope="row"), tag("td"), *cells, class_="sum"))
    names = ("client", "block", *(_NAMES[stage] for stage in stages * len(data)))
    caption = "Loss and exact match of each client’s block on test data"
    groups = [tag("th", _DATA[one], colspan=len(stages), class_="group") for one in data]
    note = "Loss in nats/token, below it the share of answers that match exactly. Bold: the best of "
    note += "local only, global update and personal model."
    return section("Clients", table(caption, names, rows, 2, tag("tr", tag("td", colspan=2), *groups)), soft(note))


def _mixtures(summary: Summary) -> Raw:
    """Each client's loss by what its final model is mixed of; its choice is bold."""
    points = points_of(summary)
    if not points:
        return Raw("")
    rows = []
    for i, client in enumerate(ordered(summary)):
        at = {tuple(one.weights.items()): one.validation for one in client.mixtures}
        cells = [
            tag("td", tag("b" if one == client.weights else "span", loss(at.get(tuple(one.items()))))) for one in points
        ]
        block = tag("td", _dot(summary, client.block), client.block)
        rows.append(tag("tr", tag("th", client.id, scope="row"), block, *cells, class_=f"c{i}"))
    names = (", ".join(f"{_share(weight)}{_PARTS[part]}" for part, weight in one.items()) for one in points)
    note = "Loss in nats/token on the client’s own validation data, of means in weight space of what it has; from left "
    note += "to right they are less and less everyone’s. Bold: its final model, "
    if summary.by_input:
        note += "alone unless another is better by more than chance; questions that are not like its own ones, and so "
        note += "most of the others’ data, have the global update."
    else:
        note += "the first nearly as good as the best."
    caption = "Loss of each client’s block by what it is a mixture of"
    return section("Personal models", table(caption, ("client", "block", *names), rows, 2), soft(note))


def _share(weight: float) -> str:
    return "" if weight == 1 else f"{Fraction(weight).limit_denominator(100)} "


def _scores(losses: Mapping[Stage, float], exact: Mapping[Stage, float], stages: Iterable[Stage]) -> list[Raw]:
    low, high = _best(losses, 3, min), _best(exact, 3, max)
    return [
        tag(
            "td",
            tag("b" if stage in low else "span", loss(losses.get(stage))),
            tag("small", tag("b" if stage in high else "span", percent(exact.get(stage)))),
        )
        for stage in stages
    ]


def _blocks(summary: Summary) -> Raw:
    rows = []
    for block in summary.blocks:
        kept = block.coverage
        cells = (
            tag("th", _dot(summary, block.name), block.name, scope="row"),
            tag("td", block.method),
            tag("td", ", ".join(block.clients) or "–", class_="wrap"),
            tag("td", percent(block.sparsity)),
            numeral(block.params, 1, 1e6),
            numeral(block.file_bytes, 1, 1e6),
            *(numeral(count, 0) for count in (kept.layers, kept.kv_groups, kept.neurons)),
            *(numeral(sent, 2, 1e6) for sent in (block.bytes_up_per_round, block.bytes_down_per_round)),
            numeral(block.train_s_per_round, 1),
        )
        rows.append(tag("tr", *cells))
    total = (numeral(sent, 2, 1e6) for sent in (summary.bytes_up_per_round, summary.bytes_down_per_round))
    rows.append(tag("tr", tag("th", "all clients", scope="row"), *[tag("td")] * 8, *total, tag("td"), class_="sum"))
    counts = ("sparsity", "parameters (M)", "on disk (MB)", "layers", "KV groups", "neurons")
    costs = ("up (MB/round)", "down (MB/round)", "training a client (s/round)")
    caption = "What each block keeps and costs"
    return section("Blocks", table(caption, ("block", "method", "clients", *counts, *costs), rows, 3))


def _rounds(summary: Summary) -> Raw:
    rows, llm_too = [], _has_llm(summary)
    for entry in summary.history:
        why = [tag("div", tag("b", one.client), f": {one.reason}") for one in entry.refused]
        ours: list[tuple[float | None, int]] = [(entry.validation, summary.best_round)]
        ours += [(entry.llm_validation, summary.llm.best_round)] if llm_too else []
        validation = [
            tag("td", tag("b", "★ ", loss(value)) if summary.rounds and entry.round == best else loss(value))
            for value, best in ours
        ]
        llm = (entry.llm.loss, entry.llm.exact_match) if entry.llm else (None, None)
        cells = (
            tag("th", entry.round or "0 (before)", scope="row"),
            tag("td", f"{len(entry.accepted)}: {', '.join(entry.accepted)}" if entry.accepted else "–", class_="wrap"),
            tag("td", *why or "–", class_="wrap bad" if why else None),
            *validation,
            *((tag("td", loss(llm[0])), tag("td", percent(llm[1]))) if llm_too else ()),
            *(numeral(sent, 2, 1e6) for sent in (entry.bytes_up, entry.bytes_down)),
            numeral(entry.seconds, 1),
            *((tag("td", loss(entry.epsilon)),) if summary.privacy else ()),
        )
        rows.append(tag("tr", *cells))
    names = ["round", "accepted", "refused", "blocks, validation loss (nats/token)"]
    if llm_too:
        names += ["LLM, validation loss (nats/token)", "LLM loss (nats/token)", "LLM exact match"]
    names += ["up (MB)", "down (MB)", "time (s)", *(["epsilon so far"] if summary.privacy else ())]
    text = "★ the lowest validation loss: the round that is kept, for the blocks and for the LLM."
    told = [soft(text)] if summary.rounds else []
    return section("Rounds", table("What each round took in, cost and reached", names, rows, 3), *told)


def _time(summary: Summary) -> Raw:
    spent = summary.seconds
    names = [name for name in _TIMES if name in spent] + [name for name in spent if name not in _TIMES]
    seconds = {_TIMES.get(name, name): number(spent[name]) or 0.0 for name in names}
    total = max(sum(seconds.values()), number(summary.wall_s) or 0.0) or 1.0
    seconds["all else"] = total - sum(seconds.values())
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            tag("td", tag("div", class_="bar", style=f"width:{100 * value / total:.1f}%"), class_="bars"),
            tag("td", clock(value)),
            tag("td", f"{100 * value / total:.0f} %"),
        )
        for name, value in seconds.items()
        if value / total > 0.001
    ]
    return section("Where the time went", tag("table", tag("caption", "By stage"), tag("tbody", *rows), class_="times"))


def _footer(summary: Summary) -> Raw:
    guide = "How to read: loss is nats per answer token on held-out test data; lower is better, and exp(loss) is "
    guide += "the perplexity. Own data are the client’s tests, others’ data the mean over all other clients’ tests. "
    if summary.others.sampled:
        guide = guide.replace("all other clients’", "the drawn other clients’")
    guide += "Local only is the same block trained on the client’s data alone for as many steps; the global update "
    guide += "is what all clients learned, applied to every block; the personal model is "
    guide += "what a client ends with: a mixture of these and of own steps after the last round, or those steps alone. "
    guide += "Sparsity is the removed share of the decoder’s linear weights. MB is a million bytes."
    versions = ", ".join(f"{name} {version}" for name, version in summary.versions.items())
    facts = f"Seed {summary.seed} · base model {summary.base_fingerprint} · {versions}"
    return tag("footer", tag("p", guide), tag("p", facts), tag("p", "LEGO: arXiv 2410.18287. Made by legolm."))


def _panels(name: str, draw: Callable[[Summary, Data], str], summary: Summary) -> Raw:
    """The figure for each kind of data that somebody scored."""
    data: list[Data] = [one for one in ("others", "own") if one in scored(summary)]
    letters = [f"({letter}) " for letter in "ab"] if len(data) > 1 else [""]
    shown = (
        figure(f"{letter}{name}, on {_DATA[one]}", Raw(draw(summary, one)))
        for letter, one in zip(letters, data, strict=True)
    )
    return tag("div", *shown, class_="pair")


def _key(summary: Summary) -> Raw:
    blocks = (tag("span", _dot(summary, block.name), block.name) for block in summary.blocks)
    marks = (tag("span", tag("i", _MARKS[stage]), _NAMES[stage]) for stage in stages_of(summary))
    return tag("p", *blocks, *marks, class_="key")


def _dot(summary: Summary, block: str) -> Raw:
    index = shade(summary, block)
    return tag("i", class_="dot", style=None if index is None else f"background:var(--b{index})")


def _has_llm(summary: Summary) -> bool:
    return any(entry.llm for entry in summary.history)


def _llm_data(summary: Summary) -> str:
    return "all clients’ data" if summary.scores == "everyone" else "the server’s own data"


def _best(values: Mapping[Stage, float], digits: int, pick: Callable[[Iterable[float]], float]) -> set[Stage]:
    """The best of the stages that train, as shown; none where there is nothing to choose."""
    shown = {stage: round(known, digits) for stage in STAGES[1:] if (known := number(values.get(stage))) is not None}
    return {s for s, value in shown.items() if value == pick(shown.values())} if len(set(shown.values())) > 1 else set()


def _mean(tables: Sequence[Mapping[Stage, float]], stages: Iterable[Stage]) -> dict[Stage, float]:
    """The mean of the stages that every client has."""
    columns = {stage: [number(one.get(stage)) for one in tables] for stage in stages}
    known = {stage: [value for value in column if value is not None] for stage, column in columns.items()}
    return {stage: sum(column) / len(column) for stage, column in known.items() if len(column) == len(tables) > 0}


def _compare(summary: Summary, data: Data, stage: Stage, rival: Stage) -> tuple[int, int, float, float]:
    """How many clients have both losses, for how many `stage` has the lower one, and the two means."""
    tables = [client.loss(data) for client in summary.clients]
    both = [(number(one.get(stage)), number(one.get(rival))) for one in tables]
    pairs = [(new, old) for new, old in both if new is not None and old is not None]
    new, old = (sum(pair[side] for pair in pairs) / max(1, len(pairs)) for side in (0, 1))
    return len(pairs), sum(new < old for new, old in pairs), new, old
