"""Open registries: what an entry says of itself, and that nobody else knows its name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from legolm.config import CRITERIA, SCHEMES, TRAINERS, AggregateConfig, Choice, Registry
from legolm.errors import LegolmError

SRC = Path(__file__).parents[2] / "src" / "legolm"
HOMES = {"aggregate": SCHEMES, "prune": CRITERIA, "finetune": TRAINERS}
COMMON = {"median"}
"""Names that are words of the language, too: in a sentence they may stand."""
DEFAULTS = {
    ("config/aggregation.py", "heteagg"),
    ("config/sections.py", "adamw"),
    ("api/federation.py", "heteagg"),
    ("api/federation.py", "adamw"),
}
COMPOSE = {(file, "heteagg") for file in ("composition/methods.py", "cli/compose.py", "api/studies.py")}
"""Composing has methods of its own, and calls one of them like the scheme that it follows."""


def strings(tree: ast.AST) -> Iterator[str]:
    """All strings in code; no docstrings, no descriptions of fields and options."""
    told: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            told.add(id(node.value))
        elif isinstance(node, ast.keyword) and node.arg in ("description", "help"):
            told |= {id(part) for part in ast.walk(node.value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.value


@pytest.mark.parametrize("home", HOMES)
def test_no_other_room_knows_a_name(home: str, shipped: None) -> None:
    names = set(HOMES[home])
    assert {"aggregate": "fedavg", "prune": "wanda", "finetune": "adamw"}[home] in names
    found = set()
    for path in sorted(SRC.rglob("*.py")):
        where = path.relative_to(SRC).as_posix()
        if where.startswith(f"{home}/"):
            continue
        for text in strings(ast.parse(path.read_text())):
            words = {text} | set(re.findall(r"\w+", text)) - COMMON
            found |= {(where, name) for name in words & names}
    assert found - DEFAULTS - COMPOSE == set()


@pytest.fixture
def registry() -> Registry[Any]:
    """Empty, of things that are what `make` gives; its home is a package that is there."""
    return Registry("thing", "legolm.aggregate", "legolm.things")


def test_calling_an_entry_chooses_it(registry: Registry[Any]) -> None:
    def thing(*, size: Annotated[int, Field(ge=1)] = 2, of: str = "wood") -> str:
        return size * of

    entry = registry.register("thing", thing, thing)
    here = f"{__name__}:test_calling_an_entry_chooses_it.<locals>.thing"
    assert entry(size=3) == Choice("thing", "thing", {"size": 3, "of": "wood"}, here)
    assert entry.make(**entry(size=3).settings) == "woodwoodwood"
    assert SCHEMES.entry("median")() == Choice("scheme", "median", {}, None)
    for settings, says in (
        ({"size": 0}, "thing 'thing': `size` = 0: input should be greater than or equal to 1"),
        ({"sise": 1}, "thing 'thing': unknown key `sise` of thing 'thing'; did you mean `size`?"),
    ):
        with pytest.raises(LegolmError) as caught:
            entry(**settings)
        assert str(caught.value) == says


def test_settings_of_a_class_are_those_of_its_constructor(registry: Registry[Any]) -> None:
    class Thing:
        size: str = "not this one"

        def __init__(self, *, size: int = 2) -> None:
            self.made = size

    entry = registry.register("thing", Thing, Thing)
    assert entry.check({}) == {"size": 2}
    assert entry.make(**entry.check({"size": "5"})).made == 5


def test_a_cell_that_runs_again_replaces_and_another_function_is_refused(registry: Registry[Any]) -> None:
    def once(size: int) -> Any:
        def thing(*, a: int = 1) -> int:
            return size

        return registry.register("thing", thing, thing)

    once(1)
    second = once(2)
    assert registry.entry("thing") is second
    assert second.make() == 2

    def other() -> None: ...

    with pytest.raises(LegolmError, match=rf"thing 'thing': is registered already by {__name__}; choose another name"):
        registry.register("thing", other, other)


def test_messages_name_what_would_do(shipped: None) -> None:
    assert SCHEMES.having("unequal", "block") == "heteagg, median, multi_krum, nearest_mixing, trimmed_mean"
    assert SCHEMES.having("fresh") == "flora"


def test_a_section_dumps_what_it_was_given_and_all_defaults() -> None:
    section = AggregateConfig(scheme="trimmed_mean", trim=0.1)  # type: ignore[call-arg]
    assert section.settings == {"trim": 0.1}
    assert AggregateConfig.model_validate(section.model_dump()) == section
    assert AggregateConfig(scheme="trimmed_mean").settings == {"trim": 0.2}
