"""A comparison's table and page: every variant's losses and answers against what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console

from legolm.report.fit import print_lines, print_table
from legolm.report.page import Raw, document, drawing, figure, section, tag
from legolm.report.page import table as html_table
from legolm.report.plots import COLOURS
from legolm.runs import CompareRow, Comparison, on_all_data
from legolm.system import atomic_write

COLUMNS = {
    "learning_rate": "learning rate",
    "llm": "LLM loss",
    "llm_exact_match": "LLM exact %",
    "llm_best_round": "LLM's round",
    "own": "own loss",
    "own_exact_match": "own exact %",
    "others": "others' loss",
    "others_exact_match": "others' exact %",
    "best_round": "blocks' round",
    "llm_validation": "LLM valid.",
    "validation": "valid.",
    "bytes_down": "MB down",
    "bytes_up": "MB up",
    "tokens": "tokens",
    "flops": "TFLOP",
    "memory": "memory",
    "seconds": "s",
}
ROUNDS, EXACT = ("llm_best_round", "best_round"), ("llm_exact_match", "own_exact_match", "others_exact_match")
LOSSES = ("llm", "own", "others", "llm_validation", "validation")
LEGEND = (
    "Losses: nats per answer token on test data, of the LLM, and of the clients' blocks on their own and others' data, "
    "each after the round beside it (the LLM's best, the blocks' best; trained alone: 0, no round); exact %: answers "
    "right to the letter. valid.: losses on validation data, the LLM's on all, blocks' on their own. MB: a client and "
    "round, without scoring. Tokens, TFLOP: training of all clients, each row read by itself. Memory: MB that training "
    "needs, mean of those who train."
)
Runs = Sequence[CompareRow]
"""One variant's, a seed each."""
Line = Sequence[tuple[float, float]]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 360, 250, 46, 40, 26


def write_comparison(found: Comparison, path: Path) -> None:
    """Write the page to `path`, all or nothing."""
    atomic_write(path, page(found))


def print_comparison(found: Comparison, out: Path) -> None:
    """The table, and where the page is."""
    columns = shown(found)
    rows = [(name, *(_text(one, runs) for one in columns)) for name, runs in variants(found).items()]
    print_table(("variant", *(f">{COLUMNS[name]}" for name in columns)), rows)
    console = Console()
    console.print(f"\n{LEGEND}{seeds(found)}\n", highlight=False, markup=False)
    console.print(budget(found), highlight=False, markup=False)
    print_lines([f"table {out / 'compare.html'}"])


def variants(found: Comparison) -> dict[str, list[CompareRow]]:
    """The runs of each variant, a seed each."""
    runs: dict[str, list[CompareRow]] = {}
    for one in found.rows:
        runs.setdefault(one.name, []).append(one)
    return runs


def shown(found: Comparison) -> list[str]:
    """The columns in which some variant has a figure."""
    return [name for name in COLUMNS if any(_text(name, runs) for runs in variants(found).values())]


def seeds(found: Comparison) -> str:
    """How many there are, where there are several."""
    count = max(map(len, variants(found).values()))
    return "" if count == 1 else f" Means over {count} seeds ± standard error."


def budget(found: Comparison) -> str:
    """Whether all variants had the same tokens and bytes, in words."""
    every = variants(found).values()
    tokens = {fmean(one.tokens for one in runs) for runs in every}
    sent = [mean for runs in every if (mean := fmean(one.bytes_up + one.bytes_down for one in runs))]
    words = (
        "All variants trained on the same tokens"
        if len(tokens) == 1
        else (f"Tokens differ: {min(tokens):,.0f} to {max(tokens):,.0f}")
    )
    if not sent:
        return words + "."
    if max(sent) <= 1.02 * min(sent):
        return words + "; the same bytes passed, both ways (to 2 %)."
    least, most = min(sent) / 1e6, max(sent) / 1e6
    return words + f"; bytes differ: {least:.2f} to {most:.2f} MB a client and round, both ways."


def page(found: Comparison) -> str:
    """One self-contained HTML page: losses against bytes, learning curves, and the table."""
    columns = shown(found)
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            tag("td", runs[0].scheme),
            *(tag("td", _text(column, runs) or "–") for column in columns),
        )
        for name, runs in variants(found).items()
    ]
    names = ("variant", "scheme", *(COLUMNS[name] for name in columns))
    body = (
        tag("h1", f"{found.name}: schemes compared"),
        tag("p", budget(found) + seeds(found)),
        section("Loss by bytes", tag("div", *dots(found), class_="pair")),
        section("Learning curves", _key(found), tag("div", *curves(found), class_="pair")),
        section("All figures", html_table("Every variant’s figures", names, rows, 2), tag("p", LEGEND, class_="soft")),
    )
    return document(found.name, *body)


def dots(found: Comparison) -> list[Raw]:
    """Panels of a dot a variant: the LLM's loss and the blocks' by bytes, on a logarithmic axis.

    Where nobody scored the LLM its panel is left out. What sends nothing stands at the left edge. Whiskers: one
    standard error over the seeds.
    """
    every = variants(found)
    sent = {name: fmean(one.bytes_down + one.bytes_up for one in runs) for name, runs in every.items()}
    there = [value for value in sent.values() if value > 0] or [1.0]
    low, high = math.log10(min(there)) - 0.3, math.log10(max(there)) + 0.3
    steps = [step * 10.0**power for power in range(math.floor(low), math.ceil(high)) for step in (1, 2, 5)]
    inside = [step for step in steps if low <= math.log10(step) <= high]
    decades = [step for step in inside if math.log10(step) % 1 == 0]
    chosen = decades if len(decades) > 2 else inside
    ticks = {(math.log10(step) - low) / (high - low): f"{step / 1e6:g} MB" for step in chosen}
    panels = []
    for label, loss in _measures(found).items():
        values = {name: known for name, runs in every.items() if (known := _known(loss(one) for one in runs))}
        at, marks = _axes([mean + way * spread for mean, spread in values.values() for way in (-1, 1)], ticks)
        for name, (mean, spread) in values.items():
            x, y = at((math.log10(sent[name]) - low) / (high - low) if sent[name] else 0.0, mean)
            if spread:
                marks.append(
                    tag("line", x1=x, x2=x, y1=at(0, mean - spread)[1], y2=at(0, mean + spread)[1], class_="spread")
                )
            marks.append(tag("circle", tag("title", f"{name}: {mean:.4f}"), cx=x, cy=y, r=4))
            end = x > (LEFT + WIDTH) / 2  # a name goes to where there is room
            marks.append(tag("text", name, x=x - 7 if end else x + 7, y=y + 4, text_anchor="end" if end else None))
        title = f"Loss of {label} by bytes, a client and round, both ways"
        panels.append(figure(title, drawing(title, WIDTH, HEIGHT, *marks, class_="dots")))
    return panels


def curves(found: Comparison) -> list[Raw]:
    """Panels of a line a variant, the mean of its seeds: losses by tokens trained and by bytes sent."""
    panels = []
    for label, _ in _measures(found).items():
        part = "llm" if label == "the LLM" else "blocks"
        for what, unit, name in (("tokens", 1e3, "thousand tokens trained"), ("bytes", 1e6, "MB sent, both ways")):
            lines = {
                one: line for one, runs in variants(found).items() if len(line := _line(runs, part, what, unit)) > 1
            }
            if not lines:
                continue
            most = max(x for line in lines.values() for x, _ in line) or 1.0
            digits = 0 if most >= 100 else 2 - math.floor(math.log10(most))
            ticks = {share: f"{share * most:,.{digits}f}" for share in (0.0, 0.5, 1.0)}
            at, marks = _axes([y for line in lines.values() for _, y in line], ticks, name)
            for place, variant in enumerate(variants(found)):
                if variant in lines:
                    points = " ".join("{:g},{:g}".format(*at(x / most, y)) for x, y in lines[variant])
                    marks.append(tag("polyline", tag("title", variant), points=points, style=_stroke(place)))
            title = f"Loss of {label} by {name}, all clients"
            panels.append(figure(title, drawing(title, WIDTH, HEIGHT, *marks, class_="lines")))
    return panels


def _measures(found: Comparison) -> dict[str, Callable[[CompareRow], float | None]]:
    """Whose losses there are. Where nobody scored others' data blocks are on their own."""
    data = "all" if any(one.others is not None for one in found.rows) else "own"
    llm: dict[str, Callable[[CompareRow], float | None]] = {"the LLM": lambda one: one.llm}
    some = any(one.llm is not None for one in found.rows)
    return (llm if some else {}) | {f"blocks, {data} data": lambda one: on_all_data(one.own, one.others, one.clients)}


def _axes(
    values: Sequence[float], ticks: Mapping[float, str], name: str = ""
) -> tuple[Callable[[float, float], tuple[float, float]], list[Raw]]:
    """(share of the width, loss) to a place, and the marks of both axes."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    least, span = min(finite), (max(finite) - min(finite)) or 1.0
    right = WIDTH - 20
    digits = max(2, 1 - math.floor(math.log10(span)))

    def at(share: float, value: float) -> tuple[float, float]:
        height = (value - least) / span if math.isfinite(value) else 1.0
        return round(LEFT + share * (right - LEFT), 1), round(HEIGHT - BOTTOM - height * (HEIGHT - BOTTOM - TOP), 1)

    marks = []
    for share in (0.0, 0.5, 1.0):
        x, y = at(0, least + share * span)
        marks.append(tag("text", f"{least + share * span:.{digits}f}", x=x - 6, y=y + 4, text_anchor="end"))
        marks.append(tag("line", x1=x, x2=WIDTH, y1=y, y2=y, class_="grid"))
    for share, text in ticks.items():
        marks.append(tag("text", text, x=at(share, least)[0], y=HEIGHT - BOTTOM + 18, text_anchor="middle"))
    if name:
        marks.append(tag("text", name, x=(LEFT + right) / 2, y=HEIGHT - 4, text_anchor="middle"))
    return at, marks


def _line(runs: Runs, part: str, what: str, unit: float) -> Line:
    """(x, mean loss) of the points that all seeds have."""
    found = []
    for points in zip(*(one.curve for one in runs), strict=False):
        values = [value for one in points if (value := getattr(one, part)) is not None]
        if len(values) == len(points):
            found.append((fmean(getattr(one, what) for one in points) / unit, fmean(values)))
    return found if len({x for x, _ in found}) > 1 else []  # what sends nothing has no curve by bytes


def _stroke(place: int) -> str:
    """Colours first, then dashes."""
    dash = ("none", "7 3", "2 3")[place // COLOURS % 3]
    return f"stroke:var(--b{place % COLOURS});stroke-dasharray:{dash}"


def _key(found: Comparison) -> Raw:
    lines = [
        tag("span", tag("svg", tag("line", x1=0, x2=24, y1=5, y2=5, style=_stroke(place)), viewBox="0 0 24 10"), name)
        for place, name in enumerate(variants(found))
    ]
    return tag("p", *lines, class_="key lines")


def _known(values: Any) -> tuple[float, float] | None:
    """Mean and standard error over seeds, 0 of one; None where some have none."""
    known = list(values)
    if any(value is None for value in known):
        return None
    return fmean(known), stdev(known) / math.sqrt(len(known)) if len(known) > 1 else 0.0


def _text(column: str, runs: Runs) -> str:
    found = _known(getattr(one, column) for one in runs)
    if found is None:
        return ""
    mean, spread = found
    if column == "llm_best_round" and all(one.llm is None for one in runs):
        return ""
    if column in ROUNDS:
        return "–".join(
            str(number) for number in sorted({pick(getattr(one, column) for one in runs) for pick in (min, max)})
        )
    if column == "learning_rate":
        return f"{mean:g}"
    if column in (*EXACT, *LOSSES):
        unit, digits = (100, 1) if column in EXACT else (1, 3)
        return f"{unit * mean:.{digits}f}" + (f" ±{unit * spread:.{digits}f}" if len(runs) > 1 else "")
    if column.startswith("bytes"):
        return f"{mean / 1e6:.2f}"
    if column in ("flops", "memory"):
        return f"{mean / (1e12 if column == 'flops' else 1e6):,.1f}"
    return f"{mean:,.0f}"
