"""Leave one out (the paper's figure 5): its table and its page."""

from __future__ import annotations

from pathlib import Path

from legolm.report.fit import print_lines, print_table
from legolm.report.page import Raw, document, drawing, figure, section, short, soft, tag
from legolm.report.shown import sampled
from legolm.runs import Ablation, LeftOut, Losses
from legolm.system import atomic_write


def write_ablation(found: Ablation, path: Path) -> None:
    """Write the page to `path`, all or nothing."""
    atomic_write(path, page(found))


def print_ablation(found: Ablation, out: Path) -> None:
    """The table, and where the page is."""
    measures = list(found.all.measures())
    columns = ("left out", "", *(f">{_name(measure)}" for measure in measures))
    rows = []
    for one in found.without:
        values = one.measures()
        rows.append((one.kind, one.name, *(f"{values[m]:.3f} ({_more(one, found.all, m)})" for m in measures)))
    for name, losses in _lines(found).items():
        values = losses.measures()
        rows.append(("", name, *(f"{values[m]:.3f}" if m in values else "" for m in measures)))
    title = (
        "Loss per answer token (nats) on all clients' test data without one block, without\none client, and (how much "
        f"more that is){'; each trained again' if found.retrained else ''}"
    )
    print_table(columns, rows, 2, title)
    page = (out / Ablation.file(found.retrained)).with_suffix(".html")
    print_lines((*sampled(found.others), verdict(found), f"page {page}"))


def verdict(found: Ablation) -> str:
    """Gain and dearest block in words; the dearest client where no block was left out."""
    kind, costs = ("block", found.cost) if found.cost else ("client", found.cost_clients)
    name, most = max(costs.items(), key=lambda one: one[1])
    words = f"The dearest {kind} to leave out is {name}: {most:+.3f} nats for the clients' blocks on all data."
    if found.gain is None:
        return words + " This run has no local-only baseline."
    gained = "less" if found.gain >= 0 else "more"
    return words + f" With the global update they have {abs(found.gain):.3f} {gained} than with local-only training."


def page(found: Ablation) -> str:
    """One self-contained HTML page: figure 5 for the blocks, for the LLM and for its perplexity."""
    body = (
        tag("h1", f"{found.name}: one left out"),
        tag("p", verdict(found)),
        *(
            section(_name(measure), figure(f"{_name(measure)} with one left out", plot(found, measure)))
            for measure in found.all.measures()
        ),
        tag(
            "p",
            f"{_how(found)} Losses are nats per answer token, the mean over all clients’ test data; of blocks, the "
            "mean over all clients’ blocks, the left-out ones too. Whiskers: one standard error. A bar under the "
            "pointer shows the difference to all together, with the p of the paired test on the same questions.",
        ),
        *map(soft, sampled(found.others)),
    )
    return document(found.name, *body)


def plot(found: Ablation, measure: str) -> Raw:
    """A bar for each left-out block and client from zero, and lines for local-only training and the global update."""
    bars = found.without
    # Not the one from before training: it would be far above all others.
    drawn = {name: losses.measures() for name, losses in _lines(found).items() if losses is not found.before}
    lines = {name: measures[measure] for name, measures in drawn.items() if measure in measures}
    wide, tall, left, step = 52 * len(bars) + 190, 250, 44, 52
    spreads = [one.stderr.get(measure) or 0.0 for one in bars]
    values = [one.measures()[measure] for one in bars]
    most = max(0.0, *lines.values(), *(v + spread for v, spread in zip(values, spreads, strict=True))) or 1.0
    least = min(0.0, *(v - spread for v, spread in zip(values, spreads, strict=True)))

    def y(value: float) -> float:
        return round(float(tall - 70 - (tall - 100) * (value - least) / (most - least)), 1)

    marks = []
    for i, (one, value, spread) in enumerate(zip(bars, values, spreads, strict=True)):
        x = left + i * step
        middle = x + (step - 14) / 2
        said = f"{value:.4f} ± {spread:.4f}" if spread else f"{value:.4f}"
        title = tag("title", f"without {one.kind} {one.name}: {said} ({_more(one, found.all, measure)})")
        size = {"width": step - 14, "height": round(abs(y(0) - y(value)), 1)}
        marks += [
            tag("rect", title, x=x, y=min(y(0), y(value)), class_=one.kind, **size),
            tag("text", f"{value:.4g}", x=middle, y=y(value + spread) - 4, text_anchor="middle"),
            tag("text", short(one.name), x=x + 8, y=tall - 56, transform=f"rotate(30 {x + 8} {tall - 56})"),
        ]
        if spread:
            ends = {"y1": y(value - spread), "y2": y(value + spread)}
            marks.append(tag("line", x1=middle, x2=middle, class_="spread", **ends))
    end, free = left + len(bars) * step, tall - 10.0
    for name, value in sorted(lines.items(), key=lambda line: line[1]):
        free = min(y(value) + 4, free - 13)  # names of lines that are close go above each other
        marks += [
            tag("line", x1=left - 6, x2=end, y1=y(value), y2=y(value), class_="line"),
            tag("text", f"{name} {value:.4g}", x=end + 6, y=free),
        ]
    marks.append(tag("line", x1=left - 6, x2=end, y1=y(0), y2=y(0), class_="axis"))
    return drawing(_name(measure), wide, tall, *marks, class_="bars")


def _lines(found: Ablation) -> dict[str, Losses]:
    """What the left-out ones are beside."""
    local = {}
    if found.local:
        there, asked = len(found.local.by_client), len(found.all.by_client)
        local = {"local only" + (f", {there} of {asked} clients" if there < asked else ""): found.local}
    return {"before": found.before, **local, "global update": found.all}


def _more(one: LeftOut, shared: Losses, measure: str) -> str:
    """How much more than with all, and the paired test's p where there is one."""
    paired = one.paired.get(measure)
    more = one.measures()[measure] - shared.measures()[measure]
    return f"{more:+.3f}" + (f", p {paired.p:.2g}" if paired else "")


def _how(found: Ablation) -> str:
    if not found.retrained:
        return (
            f"Updates of rounds 1 to {found.round} as the run kept them, added again without those of the left-out "
            "clients; the others’ are what they were while these still took part."
        )
    return (
        "Each a run of its own from the start, in which the left-out clients are scored and train in no round, after "
        "the round that is best for all clients’ blocks; blocks that clients’ sums cut are cut by the others’."
    )


def _name(measure: str) -> str:
    return {"blocks": "blocks' loss", "llm": "the LLM's loss"}.get(measure, f"the LLM's {measure}")
