"""The page of a run: the verdict in words, figure 3, tables and costs in one HTML file that loads nothing.

Everything that a summary holds reaches the page through `tag`, which escapes whatever is not `Raw` already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from legolm.report.plots import Data, curves, number, ordered, overview, shade
from legolm.system import atomic_write

Summary = Mapping[str, Any]
STAGES = {"before": "before", "local": "local only", "global": "global update", "personal": "personal step"}
_MARKS = dict(zip(STAGES, "○◇●▲", strict=True))
_DATA: dict[Data, str] = {"own": "own data", "others": "others’ data"}
_TIMES = {"blocks": "making blocks", "before": "test before", "local": "local only", "rounds": "rounds"}
_TIMES |= {"personal": "personal step", "final": "final models"}


class Raw(str):
    """HTML made here: `tag` leaves it as it is."""


def tag(name: str, *children: object, **attributes: object) -> Raw:
    """An element; `class_` is the attribute class, `text_anchor` text-anchor; one that is None or empty is left out."""
    names = {key: key.strip("_").replace("_", "-") for key in attributes}
    marks = "".join(f' {names[key]}="{escape(str(value))}"' for key, value in attributes.items() if value)
    inside = "".join(child if isinstance(child, Raw) else escape(str(child)) for child in children)
    return Raw(f"<{name}{marks}>{inside}</{name}>")


def write_report(summary: Summary, path: Path) -> None:
    """Write the page of a run's summary to `path`, all or nothing. Raises `LegolmError` without matplotlib."""
    atomic_write(path, render(summary))


def render(summary: Summary) -> str:
    """The page as a string; the same summary gives the same page."""
    sections = (_verdict, _figure3, _overview, _clients, _blocks, _rounds, _time, _footer)
    main = tag("main", _title(summary), *(section(summary) for section in sections))
    follow = "".join(
        f"main:has(.c{i}:hover) svg .tip:not(.c{i}){{opacity:.13}}" for i, _ in enumerate(summary["clients"])
    )
    head = (
        Raw('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", f"{summary['run']} · LEGO report"),
        tag("style", Raw(_STYLE + follow)),
    )
    return f'<!doctype html>\n<html lang="en">{tag("head", *head)}{tag("body", main)}</html>\n'


def verdict(summary: Summary) -> list[tuple[str, str]]:
    """What the run showed, as (the numbers, a sentence), also when it is bad news."""
    clients, llm = summary["clients"], summary["llm"]
    before, after = number(llm["loss_before"]), number(llm["loss_after"])
    text = f"The LLM’s loss on all clients’ held-out answers went from {_loss(before)} to {_loss(after)}"
    text += f" ({_change(after, before)})" if before and after is not None else ""
    text += f", its exact answers from {_percent(llm.get('exact_match_before'))} to "
    text += f"{_percent(llm.get('exact_match_after'))}."
    if llm["best_round"] == 0:
        text += " No round beat the start on the validation data, so the start is kept."
    found = [(f"{_loss(before)} → {_loss(after)}", text)]

    rival, against = "local", "local-only training"
    if "local" not in _stages(summary):
        rival, against = "before", "before the rounds"
    count, wins, mean, other = _compare(clients, "others", "global", rival)
    if count:
        text = f"On other clients’ data, blocks after the global update are better than {against} for "
        text += f"{wins} of {count} clients (mean {mean:.2f} against {other:.2f}: {_change(mean, other)})."
        later, _, moved, _ = _compare(clients, "others", "personal", rival)
        text += f" The personal step moves the mean to {moved:.2f}." if later else ""
        text += " This run has no local-only baseline." if rival == "before" else ""
        found.append((f"{mean:.2f} vs {other:.2f}", text))

    alone, last = (_compare(clients, "own", stage, rival) for stage in ("global", "personal"))
    count, wins, mean, other = last if last[0] else alone
    if count:
        step = "personal step" if last[0] else "global update (this run has no personal step)"
        text = f"On their own data after the {step} they are {_change(mean, other, against)} "
        text += f"(mean {mean:.2f} against {other:.2f}; better for {wins} of {count} clients)."
        text += f" With the global update alone: {_change(*alone[2:])}." if last[0] and alone[0] else ""
        found.append((f"{mean:.2f} vs {other:.2f}", text))
    return found


def _title(summary: Summary) -> Raw:
    machine = summary["machine"]
    blocks = sum(block["name"] != "llm" for block in summary["blocks"])
    facts = (
        f"model {summary['model']}",
        f"{len(summary['clients'])} clients, {blocks} blocks, {summary['rounds']} rounds ({summary['engine']})",
        f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gb')} GB",
        _clock(summary["wall_s"]),
    )
    kicker = tag("p", "LEGO: language model building blocks", class_="kicker")
    return tag("header", kicker, tag("h1", summary["run"]), tag("p", " · ".join(facts), class_="soft"))


def _verdict(summary: Summary) -> Raw:
    names = ("LLM, all clients’ data", "Blocks, others’ data", "Blocks, own data")
    tiles = (
        tag("div", tag("span", name), tag("strong", numbers), tag("p", text))
        for name, (numbers, text) in zip(names, verdict(summary), strict=False)
    )
    return tag("section", *tiles, class_="tiles")


def _figure3(summary: Summary) -> Raw:
    if not summary["history"]:
        return Raw("")
    stages = _stages(summary)
    note = "Thin lines are clients’ blocks, the thick line is the LLM on all clients’ data. The large dot is the round "
    note += "that is kept" + ("; a dotted line leads from it to the personal step. " if "personal" in stages else ". ")
    note += "Diamonds are the same blocks trained alone for as many steps. " if "local" in stages else ""
    note += "Point at a client to follow it through all figures."
    return _section("Loss by round", _key(summary), _pair(curves, summary), tag("p", note, class_="soft"))


def _overview(summary: Summary) -> Raw:
    return _section("Loss by client", _key(summary), _pair(overview, summary))


def _clients(summary: Summary) -> Raw:
    clients, stages = ordered(summary), _stages(summary)
    rows = []
    for i, client in enumerate(clients):
        block = tag("td", _dot(summary, client["block"]), client["block"])
        cells = [cell for data in _DATA for cell in _scores(client, data, stages)]
        name = tag("th", client["id"], scope="row")
        rows.append(tag("tr", name, block, *cells, class_=f"c{i}"))
    mean = {key: _mean(clients, key, stages) for data in _DATA for key in (data, f"{data}_exact_match")}
    cells = [cell for data in _DATA for cell in _scores(mean, data, stages)]
    rows.append(tag("tr", tag("th", "mean", scope="row"), tag("td"), *cells, class_="sum"))
    names = ("client", "block", *(STAGES[stage] for stage in stages * 2))
    groups = [tag("th", name, colspan=len(stages), class_="group") for name in _DATA.values()]
    note = "Loss in nats/token, below it the share of answers that match exactly. Bold: the best of "
    note += "local only, global update and personal step."
    table = _table(names, rows, 2, tag("tr", tag("th", colspan=2), *groups))
    return _section("Clients", table, tag("p", note, class_="soft"))


def _scores(client: Mapping[str, Any], data: str, stages: Iterable[str]) -> list[Raw]:
    losses, exact = client[data], client.get(f"{data}_exact_match", {})
    low, high = _best(losses, 2, min), _best(exact, 3, max)
    return [
        tag(
            "td",
            tag("b" if stage in low else "span", _loss(losses.get(stage))),
            tag("small", tag("b" if stage in high else "span", _percent(exact.get(stage)))),
        )
        for stage in stages
    ]


def _blocks(summary: Summary) -> Raw:
    rows = []
    for block in summary["blocks"]:
        kept = block.get("coverage", {})
        cells = (
            tag("th", _dot(summary, block["name"]), block["name"], scope="row"),
            tag("td", block["method"]),
            tag("td", ", ".join(map(str, block["clients"])) or "–", class_="wrap"),
            tag("td", _percent(block.get("sparsity"))),
            _n(block.get("params"), 1, 1e6),
            _n(block.get("file_bytes"), 1, 1e6),
            *(_n(kept.get(key), 0) for key in ("layers", "kv_groups", "neurons")),
            *(_n(block.get(f"bytes_{way}_per_round"), 2, 1e6) for way in ("up", "down")),
            _n(block.get("train_s_per_round"), 1),
        )
        rows.append(tag("tr", *cells))
    total = (_n(summary.get(f"bytes_{way}_per_round"), 2, 1e6) for way in ("up", "down"))
    rows.append(tag("tr", tag("th", "all clients", scope="row"), *[tag("td")] * 8, *total, tag("td"), class_="sum"))
    counts = ("sparsity", "parameters (M)", "on disk (MB)", "layers", "KV groups", "neurons")
    costs = ("up (MB/round)", "down (MB/round)", "training a client (s/round)")
    return _section("Blocks", _table(("block", "method", "clients", *counts, *costs), rows, 3))


def _rounds(summary: Summary) -> Raw:
    rows = []
    for entry in summary["history"]:
        accepted = entry["accepted"]
        why = [tag("div", tag("b", one["client"]), f": {one['reason']}") for one in entry["refused"]]
        validation = [
            tag("td", tag("b", "★ ", _loss(loss)) if entry["round"] == best else _loss(loss))
            for loss, best in (
                (entry["validation"], summary["best_round"]),
                (entry["llm_validation"], summary["llm"]["best_round"]),
            )
        ]
        cells = (
            tag("th", entry["round"] or "0 (before)", scope="row"),
            tag("td", f"{len(accepted)}: {', '.join(map(str, accepted))}" if accepted else "–", class_="wrap"),
            tag("td", *why or "–", class_="wrap bad" if why else None),
            *validation,
            tag("td", _loss(entry["llm"]["loss"])),
            tag("td", _percent(entry["llm"].get("exact_match"))),
            *(_n(entry.get(f"bytes_{way}"), 2, 1e6) for way in ("up", "down")),
            _n(entry.get("seconds"), 1),
        )
        rows.append(tag("tr", *cells))
    names = [
        "round",
        "accepted",
        "refused",
        "blocks, validation loss (nats/token)",
        "LLM, validation loss (nats/token)",
    ]
    names += ["LLM loss (nats/token)", "LLM exact match", "up (MB)", "down (MB)", "time (s)"]
    text = "★ the lowest validation loss: the round that is kept, for the blocks and for the LLM."
    return _section("Rounds", _table(names, rows, 3), tag("p", text, class_="soft"))


def _time(summary: Summary) -> Raw:
    spent = summary["seconds"]
    names = [name for name in _TIMES if name in spent] + [name for name in spent if name not in _TIMES]
    seconds = {_TIMES.get(name, name): number(spent[name]) or 0.0 for name in names}
    total = max(sum(seconds.values()), number(summary["wall_s"]) or 0.0) or 1.0
    seconds["all else"] = total - sum(seconds.values())
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            tag("td", tag("div", class_="bar", style=f"width:{100 * value / total:.1f}%"), class_="bars"),
            tag("td", _clock(value)),
            tag("td", f"{100 * value / total:.0f} %"),
        )
        for name, value in seconds.items()
        if value / total > 0.001
    ]
    return _section("Where the time went", tag("table", tag("tbody", *rows), class_="times"))


def _footer(summary: Summary) -> Raw:
    guide = "How to read: loss is nats per answer token on held-out test data; lower is better, and exp(loss) is "
    guide += "the perplexity. Own data are the client’s tests, others’ data the mean over all other clients’ tests. "
    guide += "Local only is the same block trained on the client’s data alone for as many steps; the global update "
    guide += "is what all clients learned, applied to every block; the personal step is a last training on own "
    guide += "data. Sparsity is the removed share of the decoder’s linear weights. MB is a million bytes."
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    facts = f"Seed {summary['seed']} · base model {summary['base_fingerprint']} · {versions}"
    return tag("footer", tag("p", guide), tag("p", facts), tag("p", "LEGO: arXiv 2410.18287. Made by legolm."))


def _section(title: str, *children: object) -> Raw:
    return tag("section", tag("h2", title), *children)


def _pair(figure: Callable[[Summary, Data], str], summary: Summary) -> Raw:
    panels: tuple[tuple[Data, str], ...] = (("others", "(a) on others’ data"), ("own", "(b) on own data"))
    shown = (tag("figure", tag("figcaption", name), Raw(figure(summary, data))) for data, name in panels)
    return tag("div", *shown, class_="pair")


def _key(summary: Summary) -> Raw:
    blocks = (tag("span", _dot(summary, block["name"]), block["name"]) for block in summary["blocks"])
    marks = (tag("span", tag("i", _MARKS[stage]), STAGES[stage]) for stage in _stages(summary))
    return tag("p", *blocks, *marks, class_="key")


def _table(names: Iterable[str], rows: Iterable[Raw], text: int, top: Raw | None = None) -> Raw:
    """A table whose first `text` columns hold words and the others numbers."""
    head = tag("thead", top or Raw(""), tag("tr", *(tag("th", name, scope="col") for name in names)))
    return tag("div", tag("table", head, tag("tbody", *rows), class_=f"text{text}"), class_="scroll")


def _dot(summary: Summary, block: str) -> Raw:
    index = shade(summary, block)
    return tag("i", class_="dot", style=None if index is None else f"background:var(--b{index})")


def _n(value: Any, digits: int, unit: float = 1.0) -> Raw:
    known = number(value)
    return tag("td", "–" if known is None else f"{known / unit:,.{digits}f}")


def _loss(value: Any) -> str:
    return "–" if (known := number(value)) is None else f"{known:.2f}"


def _percent(share: Any) -> str:
    return "–" if (known := number(share)) is None else f"{100 * known:.1f} %"


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _change(new: float, old: float, than: str = "") -> str:
    share = 100 * abs(new - old) / (old or 1.0)
    if share < 0.05:
        return f"no better and no worse than {than}" if than else "unchanged"
    return f"{share:.1f} % {'better' if new < old else 'worse'}" + (f" than {than}" if than else "")


def _stages(summary: Summary) -> list[str]:
    """The stages that this run has."""
    tables = [client[data] for client in summary["clients"] for data in _DATA]
    return [stage for stage in STAGES if any(number(table.get(stage)) is not None for table in tables)]


def _best(values: Mapping[str, Any], digits: int, pick: Callable[[Iterable[float]], float]) -> set[str]:
    """The best of the stages that train, as shown; none where there is nothing to choose."""
    shown = {stage: round(known, digits) for stage in STAGES if (known := number(values.get(stage))) is not None}
    shown.pop("before", None)
    return {s for s, value in shown.items() if value == pick(shown.values())} if len(set(shown.values())) > 1 else set()


def _mean(clients: Sequence[Summary], key: str, stages: Iterable[str]) -> dict[str, float]:
    """The mean of the stages that every client has."""
    columns = {stage: [number(client.get(key, {}).get(stage)) for client in clients] for stage in stages}
    known = {stage: [value for value in column if value is not None] for stage, column in columns.items()}
    return {stage: sum(column) / len(column) for stage, column in known.items() if len(column) == len(clients) > 0}


def _compare(clients: Iterable[Summary], data: Data, stage: str, rival: str) -> tuple[int, int, float, float]:
    """How many clients have both losses, for how many `stage` has the lower one, and the two means."""
    both = [(number(client[data].get(stage)), number(client[data].get(rival))) for client in clients]
    pairs = [(new, old) for new, old in both if new is not None and old is not None]
    new, old = (sum(pair[side] for pair in pairs) / max(1, len(pairs)) for side in (0, 1))
    return len(pairs), sum(new < old for new, old in pairs), new, old


_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1e23;--soft:#5d6570;--grid:#dfe3e8;--wash:#f5f6f8;--bad:#b3401a;
--b0:#0072b2;--b1:#d55e00;--b2:#008f68;--b3:#b85c93;--b4:#b07d00;--b5:#3a9bd0}
@media(prefers-color-scheme:dark){:root{--paper:#14171c;--ink:#e8eaed;--soft:#9aa3af;--grid:#333a44;--wash:#1d2128;
--bad:#ff9a70;--b0:#4aa8e8;--b1:#ff8a3d;--b2:#2fc79c;--b3:#e69ac4;--b4:#e6b422;--b5:#8fd3f7}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,"Segoe UI",Roboto,Inter,sans-serif}
main{max-width:72rem;margin:auto;padding:2.5rem 1.25rem}
h1,h2,.tiles strong{font-family:"Iowan Old Style",Palatino,"Palatino Linotype","Source Serif 4",Georgia,serif}
h1{font-size:2.4rem;line-height:1.15;margin:.1rem 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.4rem;margin:2.8rem 0 .6rem}
p{margin:.4rem 0}
.kicker,.tiles span{font-size:.78rem;letter-spacing:.04em;text-transform:uppercase;color:var(--soft)}
.soft,footer,figcaption{color:var(--soft);font-size:.88rem;overflow-wrap:anywhere}
section p.soft,footer p{max-width:52rem}
.tiles,.pair{display:grid;gap:1rem 1.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,17rem),1fr))}
.tiles{margin-top:1.6rem}
.tiles div{background:var(--wash);border-radius:.5rem;padding:1rem 1.2rem}
.tiles span,.tiles strong{display:block}
.tiles strong{font-size:1.9rem;line-height:1.3}
.tiles p{font-size:.92rem}
.pair{grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}
figure{margin:.4rem 0}
figcaption{color:var(--ink);font-weight:600}
svg{display:block;width:100%;height:auto;overflow:visible;stroke-linejoin:round}
.tip{transition:opacity .15s}
.key{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;font-size:.88rem}
.key i{font-style:normal;margin-right:.35em}
.dot{display:inline-block;width:.65em;height:.65em;border-radius:50%;background:var(--ink);margin-right:.45em}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.38rem .55rem;text-align:right;vertical-align:top;white-space:nowrap;font-weight:400}
thead th{color:var(--soft);vertical-align:bottom;white-space:normal;line-height:1.25;max-width:7.5rem}
thead tr:last-child th{border-bottom:1px solid var(--ink)}
tbody tr+tr>*{border-top:1px solid var(--grid)}
tbody tr:hover{background:var(--wash)}
tbody th{font-weight:600}
tbody th,.text2 :is(th,td):nth-child(-n+2),.text3 :is(th,td):nth-child(-n+3){text-align:left}
thead th.group.group.group{text-align:center;color:var(--ink);font-weight:600;border-bottom:1px solid var(--grid)}
td small{display:block;color:var(--soft);line-height:1.2}
td small b{color:var(--ink)}
tbody .sum.sum>*{border-top:1px solid var(--ink)}
td.wrap{white-space:normal;min-width:6rem}
.bad{color:var(--bad);overflow-wrap:anywhere}
.times{max-width:44rem}
.times .bars{width:60%}
.bar{height:.8em;margin-top:.35em;background:var(--b0);border-radius:.15em}
footer{margin-top:3rem;padding-top:.8rem;border-top:1px solid var(--grid)}
@media(max-width:40rem){main{padding:1.4rem .9rem}h1{font-size:1.9rem}
.scroll tbody th,.scroll thead tr:last-child th:first-child{position:sticky;left:0;background:var(--paper)}}
"""
