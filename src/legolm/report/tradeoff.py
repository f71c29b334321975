"""What smaller models cost: loss over speed, the ones that nothing beats joined by a line."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from legolm.report.fit import print_lines, print_table
from legolm.report.plots import need_matplotlib

if TYPE_CHECKING:
    from legolm.export import Candidate


def front(found: Sequence[Candidate]) -> list[Candidate]:
    """Those than which no other is both faster and better, by speed."""
    ordered = sorted(found, key=lambda one: (one.speed.decode, -one.loss))
    return [one for place, one in enumerate(ordered) if all(one.loss < faster.loss for faster in ordered[place + 1 :])]


def print_picked(found: Sequence[Candidate], best: Candidate, memory: float, least: float) -> None:
    """All candidates, those that fit marked, and which is best."""
    rows = []
    for one in found:
        mark = "best" if one is best else "fits" if one.fits(memory, least) else ""
        figures = (f"{one.speed.decode:,.1f}", f"{one.speed.memory / 1e6:,.0f} MB", f"{one.speed.bytes / 1e6:,.1f} MB")
        rows.append((one.speed.model, mark, *figures, f"{one.loss:.3f}", f"{one.score.exact_match:.0%}"))
    print_table(("model", "", ">tokens/s", ">peak memory", ">bytes", ">nats/answer", ">exact"), rows)
    if len({one.score.tokens for one in found}) > 1:
        print_lines(["the models make other numbers of tokens of the same answers: losses are by answer, not by token"])
    print_lines([f"best of those that fit, in {best.speed.runtime}: {best.speed.model}"])


def draw_tradeoff(found: Sequence[Candidate], best: Candidate, memory: float, least: float) -> str:
    """SVG: loss (nats an answer) over tokens a second; those that do not fit are hollow."""
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    line = front(found)
    axes.plot([one.speed.decode for one in line], [one.loss for one in line], color="0.6", zorder=1)
    for one in found:
        fill = "tab:blue" if one.fits(memory, least) else "none"
        size = 120 if one is best else 40
        place = one.speed.decode, one.loss
        axes.scatter(*place, s=size, facecolors=fill, edgecolors="tab:blue", zorder=2)
        axes.annotate(one.speed.model.rsplit("/", 1)[-1], place, xytext=(6, 4), textcoords="offset points", fontsize=8)
    if least:
        axes.axvline(least, color="0.8", linestyle=":")
    axes.set_xlabel(f"tokens a second ({best.speed.runtime})")
    axes.set_ylabel("loss (nats an answer)")
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()
