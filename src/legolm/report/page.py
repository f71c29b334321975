"""What all pages are made of: elements, tables, numbers in words, and a document that loads nothing.

Everything reaches a page through `tag`, which escapes whatever is not `Raw` already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from legolm.report.style import STYLE


class Raw(str):
    """HTML made here: `tag` leaves it as it is."""


def tag(name: str, *children: object, **attributes: object) -> Raw:
    """An element; `class_` is the attribute class, `text_anchor` text-anchor; one that is None or empty is left out."""
    names = {key: key.strip("_").replace("_", "-") for key in attributes}
    marks = "".join(f' {names[key]}="{escape(str(value))}"' for key, value in attributes.items() if value)
    inside = "".join(child if isinstance(child, Raw) else escape(str(child)) for child in children)
    return Raw(f"<{name}{marks}>{inside}</{name}>")


def document(title: str, *body: object, style: str = "") -> str:
    """A whole page; `style` is further CSS."""
    head = (
        Raw('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Raw(STYLE + style)),
    )
    return f'<!doctype html>\n<html lang="en">{tag("head", *head)}{tag("body", tag("main", *body))}</html>\n'


def section(title: str, *children: object) -> Raw:
    """A part of a page under its title."""
    return tag("section", tag("h2", title), *children)


def soft(text: str) -> Raw:
    """A paragraph of small print."""
    return tag("p", text, class_="soft")


def table(caption: str, names: Iterable[str], rows: Iterable[Raw], text: int, top: Raw | None = None) -> Raw:
    """A table whose first `text` columns (2 or 3; 0: all) hold words and the others numbers."""
    head = tag("thead", top or Raw(""), tag("tr", *(tag("th", name, scope="col") for name in names)))
    return scroll(
        caption,
        tag("table", tag("caption", caption), head, tag("tbody", *rows), class_=f"text{text}" if text else "words"),
    )


def figure(caption: str, svg: Raw) -> Raw:
    """A figure under its caption."""
    return tag("figure", tag("figcaption", caption), scroll(caption, svg))


def scroll(label: str, content: Raw) -> Raw:
    """What is wider than a phone: it scrolls by itself, by touch and by keyboard."""
    return tag("div", content, class_="scroll", tabindex="0", role="region", aria_label=label)


def drawing(label: str, width: float, height: float, *marks: Raw, class_: str) -> Raw:
    """An SVG whose letters are never smaller than the style says, however narrow the page."""
    size = f"min-width:{width:.0f}px;max-width:{1.6 * width:.0f}px"
    return tag(
        "svg", *marks, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label, class_=class_, style=size
    )


def numeral(value: float | None, digits: int, unit: float = 1.0) -> Raw:
    """A table's cell with a number, in units of `unit`."""
    known = number(value)
    return tag("td", "–" if known is None else f"{known / unit:,.{digits}f}")


def number(value: float | None) -> float | None:
    """The value if it is finite."""
    return value if value is not None and math.isfinite(value) else None


def loss(value: float | None) -> str:
    """A loss in words."""
    return "–" if (known := number(value)) is None else f"{known:.3f}"


def short(name: str, most: int = 14) -> str:
    """A name of `most` letters: of a longer one the middle goes, for names that begin alike often end otherwise."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[len(name) - (most - 1 - half) :]}"


def percent(share: float | None) -> str:
    """A share in words."""
    return "–" if (known := number(share)) is None else f"{100 * known:.1f} %"


def clock(seconds: float) -> str:
    """A time in words."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def change(new: float, old: float, than: str = "") -> str:
    """How much lower or higher a loss is, in words."""
    share = 100 * abs(new - old) / (old or 1.0)
    if share < 0.05:
        return f"no better and no worse than {than}" if than else "unchanged"
    return f"{share:.1f} % {'better' if new < old else 'worse'}" + (f" than {than}" if than else "")
