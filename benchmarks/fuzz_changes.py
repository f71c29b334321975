"""How benchmarks/fuzz.py changes valid inputs: values, structure, headers, tokens, bytes."""

from __future__ import annotations

import json
import random
from typing import Any

DEEP = 600


def nasty(rng: random.Random) -> Any:
    """A value that nobody expects."""
    return rng.choice(
        [
            None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 2**64, -(2**63), 10**18, 10**400, 0.5, -0.0, 1e308,
            float("inf"), float("-inf"), float("nan"), "", " ", "x", "x" * 5000, "\0", "\x1b[31m", "\ud800", "é" * 9,
            "../../etc/passwd", "/dev/zero", "1e999", "nan", "0x10", "F64", "U8", "I8", "llama", "gpt_neox",
            "{{ 1/0 }}",
            [], {}, [None], [[]], [0, 0], [-1], [2**40, 2**40], {"a": 1}, [1] * 3000, "2026-01-01", ":", "a\nb",
            "a.b.c", 1e-320,
        ]
    )  # fmt: skip


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with a few of its parts replaced, taken out, doubled, swapped or put deeper."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = [(None, None), *_places(value)]
        parent, key = rng.choice(places)
        if parent is None:
            if rng.random() < 0.1:
                value = nasty(rng)
            continue
        found, how = parent[key], rng.randrange(9)
        if how < 4:
            parent[key] = nasty(rng)
        elif how == 4:
            del parent[key]
        elif how == 5:
            other, place = rng.choice(places[1:])
            parent[key] = json.loads(json.dumps(other[place])) if place in other or isinstance(other, list) else None
        elif how == 6 and isinstance(found, int | float) and not isinstance(found, bool):
            parent[key] = rng.choice((found + 1, found - 1, -found, found * 1000, f"{found}.0"))
        elif how == 7 and isinstance(parent, dict):
            parent[str(nasty(rng))[:60]] = found
        elif isinstance(found, list):
            parent[key] = found * rng.choice((2, 50))
        else:
            parent[key] = [found]
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *_places(value[key])]]


def changed_text(text: str, rng: random.Random) -> str:
    """JSON with what no JSON value can have: a key twice, endless nesting, huge numbers, its end missing."""
    how = rng.randrange(6)
    if how == 0 and "{" in text:
        at = text.index("{") + 1
        return f'{text[:at]}"{rng.choice(("name", "a", "scale", "model_type"))}": 1, {text[at:]}'
    if how == 1:
        return text.replace(rng.choice(("1", "0", '"')), rng.choice(("[" * DEEP, '{"a":' * DEEP, "9" * 5000, "-")), 1)
    if how == 2:
        return text[: rng.randrange(len(text) + 1)]
    return text


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, taken out, doubled, cut off, or replaced by tokens that mean something somewhere."""
    result = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 30))):
        at, how = rng.randrange(len(result) + 1), rng.randrange(7)
        end = min(len(result), at + rng.choice((1, 1, 4, 30, 400)))
        if how < 2 and at < len(result):
            result[at] = rng.randrange(256)
        elif how == 2:
            del result[at:end]
        elif how == 3:
            result[at:at] = result[at:end]
        elif how == 4:
            result[at:end] = rng.choice(TOKENS)
        elif how == 5:
            result[at:at] = rng.choice(TOKENS)
        elif rng.random() < 0.2:
            del result[at:]
    return bytes(result)


TOKENS = [
    b"\0", b"\xff\xfe", b"\xed\xa0\x80", b'"', b"\n", b"\r", b"'", b"{", b"}", b"[", b"]", b"&a ", b"*a", b"<<: *a",
    b"- ", b": ",
    b"!!python/object:os.system ", b"!!int ", b"!!float .inf", b"!!timestamp 2026-99-99", b"---\n",
    b"? ", b"|", b">", b"\t",
    b"{% for i in range(9) %}", b"{% endfor %}", b"{% if ", b"{{ 1/0 }}", b"{% include 'a' %}",
    b"{% macro f() %}{{ f() }}",
    b"{{ 'x' * 9 }}", b"|tojson", b"|length", b".__class__", b"loop", b"messages", b"raise_exception('no')", b"9" * 30,
    b"1e999", b"-", b"null", b"true", b"[" * DEEP, b"{a: " * DEEP, b"[" * 40 + b"]" * 40, b",,", b'","',
    b"\xe2\x80\xa8",
]  # fmt: skip


def changed_tensors(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header, the metadata in it, its length or its data are others."""
    size = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    how = rng.randrange(8)
    if how < 2 and "__metadata__" in header:
        name = rng.choice(sorted(header["__metadata__"]))
        told = header["__metadata__"][name]
        inner = json.dumps(changed(json.loads(told) if told.startswith("{") else told, rng))
        header["__metadata__"][name] = changed_text(inner, rng) if how else inner
    elif how < 5:
        header = changed(header, rng)
    elif how == 5:
        body = changed_bytes(body, rng) if rng.random() < 0.7 else body[: rng.randrange(len(body) + 1)]
    text = json.dumps(header).encode()
    if how == 6:
        text = changed_text(text.decode(), rng).encode()
    length = len(text) if how < 7 else rng.choice((0, 1, len(text) - 1, len(text) + 1, 2**24, 10**8, 2**40, 2**64 - 1))
    return length.to_bytes(8, "little") + text + body


def mutated(form: str, content: bytes, rng: random.Random) -> bytes:
    """The valid input, which is of this form (`json`, `lines` of JSON, `tensors`, `text`), with changes."""
    if form == "text" or rng.random() < 0.3:
        return changed_bytes(content, rng)
    if form == "tensors":
        return changed_tensors(content, rng)
    if form == "lines":
        lines = content.decode().splitlines()
        at = rng.randrange(len(lines))
        lines[at] = changed_text(json.dumps(changed(json.loads(lines[at]), rng)), rng)
        return "\n".join(lines).encode("utf-8", "replace")
    return changed_text(json.dumps(changed(json.loads(content), rng)), rng).encode()
