"""Figures as inline SVG strings: colour says the block, shape says the stage, everywhere on the page.

Matplotlib draws in stand-in colours that `_inline` turns into CSS variables of the page, so that one SVG
serves light and dark. All that belongs to one client carries the class `c{index}` and its name as a tooltip.
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, Literal

from legolm.errors import LegolmError
from legolm.report.page import number, short
from legolm.report.style import LIGHT
from legolm.runs import ClientSummary, Data, Stage, Summary

COLOURS = 6
"""Blocks beyond this many share the colours of the first ones (`--b0` to `--b5` of the page)."""

_INK, _GRID, _PAPER = "#a0a0f0", "#a0a0f1", "#a0a0f2"
_CSS = {_INK: "currentColor", _GRID: "var(--grid)", _PAPER: "var(--paper)"}
_CSS |= {f"#a0a0a{i}": f"var(--b{i})" for i in range(COLOURS)}
MOST_DRAWN = 48
"""Clients that figures show: of more, some stand for all, so that drawing and the page stay small."""
LETTERS = 10
_NAMED_LINES = 12  # with more clients than this the lines go without names
_WIDTH = 5.0  # inches: 360 units, shown 25rem wide at least: 10-unit letters are 11 px on a phone
_MARKS: dict[Stage, dict[str, Any]] = {
    "before": {"linestyle": "none", "marker": "o", "markersize": 3.8, "markerfacecolor": _PAPER},
    "local": {"linestyle": "none", "marker": "D", "markersize": 4.2, "markerfacecolor": _PAPER},
    "global": {"linestyle": "none", "marker": "o", "markersize": 5.0},
    "personal": {"linestyle": "none", "marker": "^", "markersize": 5.4},
}


def shade(summary: Summary, block: str) -> int | None:
    """The colour index of a block; the LLM has none and is drawn in ink."""
    names = [entry.name for entry in summary.blocks if entry.name != "llm"]
    return names.index(block) % COLOURS if block in names else None


def ordered(summary: Summary) -> list[ClientSummary]:
    """The clients, those of one block side by side; a client's place is its index everywhere on the page."""
    place = {block.name: i for i, block in enumerate(summary.blocks)}
    return sorted(summary.clients, key=lambda client: place.get(client.block, len(place)))


def drawn(summary: Summary) -> list[tuple[int, ClientSummary]]:
    """The clients that figures show, with their places: all, or `MOST_DRAWN` spread evenly over the blocks."""
    every = list(enumerate(ordered(summary)))
    if len(every) <= MOST_DRAWN:
        return every
    return [every[place * len(every) // MOST_DRAWN] for place in range(MOST_DRAWN)]


def curves(summary: Summary, data: Data) -> str:
    """Figure 3: loss by round, a thin line a client, a thick one for the LLM, then local only and personal."""
    return _svg(lambda axes: _curves(axes, summary, data), 3.9, f"Loss on {data} data by round", summary)


def overview(summary: Summary, data: Data) -> str:
    """A row a client: loss before, with local only, after the global update, as a personal model."""
    inches = 0.75 + 0.29 * len(drawn(summary))
    return _svg(lambda axes: _overview(axes, summary, data), inches, f"Loss on {data} data by client", summary)


def draw(summary: Summary, what: Literal["loss", "clients"], data: Data) -> str:
    """`curves` or `overview` as an SVG that stands by itself. Raises `LegolmError` for another name."""
    if what not in ("loss", "clients") or data not in ("own", "others"):
        raise LegolmError(f"plot: {what!r} on {data!r} data; draw 'loss' or 'clients' on 'own' or 'others'")
    svg = (curves if what == "loss" else overview)(summary, data)
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="720" ', 1).replace(
        ">", f"><style>svg{{{LIGHT};color:var(--ink)}}</style>", 1
    )


def _curves(axes: Any, summary: Summary, data: Data) -> None:
    history, (low, high) = [entry for entry in summary.history if entry.scored], _limits(summary)
    rounds = [entry.round for entry in history]
    kept, llm_kept = (rounds.index(best) for best in (summary.best_round, summary.llm.best_round))
    gap = max(0.7, 0.18 * rounds[-1])
    columns = {stage: rounds[-1] + i * gap for i, stage in enumerate(_after(summary, data), start=1)}
    end = max(columns.values(), default=rounds[-1])
    if columns:
        axes.axvspan(rounds[-1] + gap / 2, end + gap / 3, color=_GRID, alpha=0.45, linewidth=0)
    names: list[tuple[float, str, dict[str, Any]]] = []
    for place, client in drawn(summary):
        scored = [entry.clients.get(client.id) for entry in history]
        line = [_nan(None if one is None else one.own if data == "own" else one.others) for one in scored]
        values = {stage: _nan(client.loss(data).get(stage)) for stage in _MARKS}
        finish = line[kept] if math.isnan(values["personal"]) else values["personal"]
        style = _style(summary, place, client)
        axes.plot(rounds, line, linewidth=1.2, marker="o", markersize=2.2, **style)
        axes.plot([rounds[kept]], [line[kept]], **_MARKS["global"], **style)
        axes.plot([rounds[kept], end], [line[kept], finish], linewidth=0.9, linestyle=(0, (1, 2)), **style)
        for stage, x in columns.items():
            axes.plot([x], [values[stage]], **_MARKS[stage], **style)
        names.append((finish, short(client.id), style))
    llm = [_nan(entry.llm.loss if entry.llm else None) for entry in history]
    axes.plot(rounds, llm, linewidth=3, marker="o", markersize=4, color=_INK, zorder=4)
    axes.plot([rounds[llm_kept], end], [llm[llm_kept]] * 2, linewidth=0.9, linestyle=(0, (1, 2)), color=_INK)
    names.append((llm[llm_kept], "LLM", {"color": _INK}))
    names = sorted((name for name in names if not math.isnan(name[0])), key=lambda name: name[:2])
    if len(names) <= _NAMED_LINES + 1:
        heights = _spread([name[0] for name in names], 0.055 * (high - low), low, high)
        for y, (target, text, style) in zip(heights, names, strict=True):
            axes.plot([end + gap * share for share in (0.12, 0.3, 0.5)], [target, y, y], linewidth=0.5, **style)
            weight = "normal" if "gid" in style else "bold"
            axes.text(end + 0.55 * gap, y, text, va="center", fontsize=LETTERS, weight=weight, **style)
    step = math.ceil(len(rounds) / 6)
    shown = rounds[step::step]
    ticks = ["before", *(f"round {one}" if one == shown[0] else str(one) for one in shown)]
    ticks += [{"local": "local\nonly", "personal": "personal\nmodel"}[stage] for stage in columns]
    axes.set_xticks([rounds[0], *shown, *columns.values()], ticks)
    axes.set(xlim=(-0.15 * gap, end + gap / 2), ylim=(low, high), ylabel="loss (nats/token)")
    axes.grid(axis="y", color=_GRID, linewidth=0.7, clip_on=False)


def _overview(axes: Any, summary: Summary, data: Data) -> None:
    clients = drawn(summary)
    for i, (place, client) in enumerate(clients):
        style = _style(summary, place, client)
        values = {stage: _nan(client.loss(data).get(stage)) for stage in _MARKS}
        known = [value for value in values.values() if not math.isnan(value)]
        if known:
            axes.plot([min(known), max(known)], [i, i], linewidth=1, alpha=0.4, **style)
        for (stage, mark), shift in zip(_MARKS.items(), (0.0, -0.2, 0.0, 0.2), strict=True):
            axes.plot([values[stage]], [i + shift], **mark, **style)
    axes.locator_params(axis="x", nbins=6)
    axes.set_yticks(range(len(clients)), [short(client.id) for _, client in clients])
    axes.set(ylim=(len(clients) - 0.4, -0.6), xlim=_limits(summary), xlabel="loss (nats/token)")
    axes.grid(axis="x", color=_GRID, linewidth=0.7, clip_on=False)


def need_matplotlib() -> None:
    """Raises `LegolmError` when the extra is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise LegolmError("the report needs matplotlib; run: pip install 'legolm[report]'")


def _svg(paint: Callable[[Any], None], height: float, label: str, summary: Summary) -> str:
    need_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    look: dict[str, Any] = dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    look |= {"svg.fonttype": "none", "svg.hashsalt": label, "text.parse_math": False, "font.size": LETTERS}
    stream = io.StringIO()
    with matplotlib.rc_context(look), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has the letters that this font lacks
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot(frame_on=False)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        paint(axes)
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    tips = {place: f"{client.id} · {client.block}" for place, client in drawn(summary)}
    return _inline(stream.getvalue(), label, tips)


def _inline(svg: str, label: str, tips: Mapping[int, str]) -> str:
    """A matplotlib SVG made part of a page: own ids, the page's colours and font, tooltips, and no slack."""
    prefix = re.sub(r"\W+", "-", label.lower())

    def adapt(match: re.Match[str]) -> str:
        tag = re.sub(r"\s+", " ", match[0]).replace("xlink:href", "href")
        if client := re.search(r' id="client-(\d+)"', tag):
            i = int(client[1])
            return tag.replace(client[0], f' class="tip c{i}"') + f"<title>{escape(tips[i])}</title>"
        tag = re.sub(r'(?<=<g) id="[^"]*"| transform="rotate\(-0 [^)]*\)"| font-family: [^;"]+;', "", tag)
        tag = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", tag)
        tag = re.sub(r"(\.\d\d)\d+", r"\1", tag)
        tag = re.sub("#a0a0[af][0-9]", lambda colour: _CSS[colour[0]], tag)
        return "" if tag == "<g/>" else tag

    drawing = re.sub("<[^>]+>", adapt, svg[svg.index("</defs>") + len("</defs>") :])  # after its global style
    view = re.search('viewBox="[^"]*"', svg)
    head = f'<svg role="img" aria-label="{escape(label)}" {view[0] if view else ""}>'
    return head + re.sub(r">\s+<", "><", drawing).strip()


def _style(summary: Summary, index: int, client: ClientSummary) -> dict[str, Any]:
    i = shade(summary, client.block)
    return {"color": _INK if i is None else f"#a0a0a{i}", "gid": f"client-{index}", "clip_on": False}


def _after(summary: Summary, data: Data) -> list[Stage]:
    """The stages of this run beside its rounds."""
    tables, beside = [client.loss(data) for client in summary.clients], ("local", "personal")
    return [stage for stage in _MARKS if stage in beside and any(number(one.get(stage)) is not None for one in tables)]


def _limits(summary: Summary) -> tuple[float, float]:
    """One scale for all figures, so that own and others' data can be compared by eye."""
    shown = [client for _, client in drawn(summary)]
    values: list[float | None] = [
        value for client in shown for table in (client.own, client.others) for value in table.values()
    ]
    for entry in summary.history:
        there = [entry.clients[client.id] for client in shown if client.id in entry.clients]
        values += [value for one in there for value in (one.own, one.others)]
        values.append(entry.llm.loss if entry.llm else None)
    known = [loss for value in values if (loss := number(value)) is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Sorted heights at least `gap` apart and as near to where they were as that allows, from `low` to `high`."""
    groups: list[list[float]] = []  # of labels that touch: each height as if all gaps were already taken out
    for i, y in enumerate(heights):
        groups.append([y - i * gap])
        while len(groups) > 1 and _mean(groups[-2]) > _mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = [i * gap + y for i, y in enumerate(_mean(group) for group in groups for _ in group)]
    moved = [min(y, high - (len(moved) - i - 0.5) * gap) for i, y in enumerate(moved)]
    return [max(y, low + (i + 0.5) * gap) for i, y in enumerate(moved)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _nan(value: float | None) -> float:
    return math.nan if (known := number(value)) is None else known
