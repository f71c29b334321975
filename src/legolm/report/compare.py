"""A comparison's table and page: every variant's losses against what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from legolm.report.page import Raw, document, tag
from legolm.report.page import table as html_table
from legolm.report.terminal import wide_enough
from legolm.runs import CompareRow, Comparison, Row
from legolm.system import atomic_write

COLUMNS = {
    "llm": "LLM",
    "own": "own",
    "others": "others'",
    "llm_validation": "LLM valid.",
    "validation": "valid.",
    "bytes_down": "MB down",
    "bytes_up": "MB up",
    "tokens": "tokens",
    "flops": "TFLOP",
    "memory": "memory",
    "seconds": "s",
}
LEGEND = (
    "Losses: nats per answer token on test data, of the LLM, and of the clients' blocks on their own and others' data; "
    "valid.: the LLM on all validation data, blocks on their own. MB: a client and round. Tokens, TFLOP: training of "
    "all clients. Memory: MB that training needs, mean of those who train."
)


def write_comparison(found: Comparison, path: Path) -> None:
    """Write the page to `path`, all or nothing."""
    atomic_write(path, page(found))


def print_comparison(found: Comparison, out: Path) -> None:
    """The table, and where the page is."""
    rows, columns = [one.row() for one in found.rows], shown(found)
    table = Table(box=None, pad_edge=False)
    for column in ("variant", *(COLUMNS[name] for name in columns)):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for one in rows:
        table.add_row(str(one["name"]), *(_text(name, one) for name in columns))
    console = wide_enough(table)
    console.print(table, LEGEND, sep="\n\n")
    console.print(f"{budget(found.rows)}\ntable {out / 'compare.html'}", highlight=False, soft_wrap=True)


def shown(found: Comparison) -> list[str]:
    """The columns in which some variant has a figure."""
    rows = [one.row() for one in found.rows]
    return [name for name in COLUMNS if any(one[name] is not None for one in rows)]


def budget(found: Sequence[CompareRow]) -> str:
    """Whether all variants had the same tokens and bytes, in words."""
    tokens = {one.tokens for one in found}
    up = [one.bytes_up for one in found if one.bytes_up]
    words = (
        "All variants trained on the same tokens"
        if len(tokens) == 1
        else (f"Tokens differ: {min(tokens):,.0f} to {max(tokens):,.0f}")
    )
    if not up:
        return words + "."
    if max(up) <= 1.02 * min(up):
        return words + "; all sent the same bytes (to 2 %)."
    return words + f"; bytes sent differ: {min(up) / 1e6:.2f} to {max(up) / 1e6:.2f} MB a client and round."


def page(found: Comparison) -> str:
    """One self-contained HTML page: a plot of loss against bytes, and the table."""
    columns = shown(found)
    rows = [
        tag(
            "tr",
            tag("th", one.name, scope="row"),
            tag("td", one.scheme),
            *(tag("td", _text(c, one.row())) for c in columns),
        )
        for one in found.rows
    ]
    body = (
        tag("h1", f"{found.name}: schemes compared"),
        tag("p", "Loss per answer token (nats) on test data against bytes a client and round, both ways."),
        plot(found.rows),
        html_table(("variant", "scheme", *(COLUMNS[name] for name in columns)), rows, 2),
        tag("p", LEGEND),
        tag("p", budget(found.rows)),
    )
    return document(found.name, *body)


def plot(found: Sequence[CompareRow]) -> Raw:
    """Panels of dots, the LLM's loss and the clients' on all data; bytes on a logarithmic axis.

    Where nobody scored the LLM its panel is left out; where nobody scored others' data blocks are on their own.
    """
    width, height, left, bottom = 420, 260, 46, 34
    bytes_of = {one.name: one.bytes_down + one.bytes_up for one in found}
    sent = [value for value in bytes_of.values() if value > 0] or [1.0]
    low, high = math.log10(min(sent)) - 0.3, math.log10(max(sent)) + 0.3
    data = "all" if any(one.others is not None for one in found) else "own"
    llm = {one.name: one.llm for one in found if one.llm is not None}
    losses: dict[str, Mapping[str, float]] = {"LLM": llm} if llm else {}
    losses[f"blocks, {data} data"] = {one.name: _everyone(one) for one in found}
    panels = []
    for shift, (label, values) in enumerate(losses.items()):
        least, most = min(values.values()), max(values.values())
        span = (most - least) or 1.0
        marks = [tag("text", label, x=left, y=14, class_="name")]
        for share in (0.0, 0.5, 1.0):
            y = height - bottom - share * (height - bottom - 30)
            marks.append(tag("text", f"{least + share * span:.2f}", x=left - 6, y=y + 4, text_anchor="end"))
            marks.append(tag("line", x1=left, x2=width, y1=y, y2=y, class_="grid"))
        for name, value in values.items():
            amount = bytes_of[name]
            # What sends nothing stands at the left edge.
            place = (math.log10(amount) - low) / (high - low) if amount else 0.0
            x, y = left + place * (width - left - 90), height - bottom - (value - least) / span * (height - bottom - 30)
            marks.append(tag("circle", cx=round(x, 1), cy=round(y, 1), r=4))
            marks.append(tag("text", name, x=round(x + 7, 1), y=round(y + 4, 1)))
        for power in range(math.ceil(low), math.floor(high) + 1):
            x = left + (power - low) / (high - low) * (width - left - 90)
            marks.append(tag("text", f"{10**power / 1e6:g} MB", x=round(x, 1), y=height - 10, text_anchor="middle"))
        panels.append(tag("g", *marks, transform=f"translate({shift * (width + 20)} 0)"))
    wide = len(panels) * (width + 20) - 20
    return tag("svg", *panels, viewBox=f"0 0 {wide} {height}", role="img", class_="dots")


def _everyone(one: CompareRow) -> float:
    """Mean over all (client, data set) pairs: own data is one of as many as there are clients."""
    others = one.others if one.others is not None else one.own
    return (one.own + (one.clients - 1) * others) / one.clients


def _text(column: str, row: Row) -> str:
    value = row[column]
    if not isinstance(value, int | float):
        return ""
    if column.startswith("bytes"):
        return f"{value / 1e6:.2f}"
    if column in ("flops", "memory"):
        return f"{value / (1e12 if column == 'flops' else 1e6):,.1f}"
    return f"{value:.3f}" if column in ("llm", "own", "others", "validation", "llm_validation") else f"{value:,.0f}"
