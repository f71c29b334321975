"""Open registries: things that a config names and a plug-in may bring, their settings checked by their own signature.

A scheme, a criterion or a trainer registers itself under a name when its file is imported. What ships with legolm, what
an installed package declares as an entry point, and what a config lists under `plugins` are treated the same: loaded by
name, when a config first asks.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from legolm.errors import LegolmError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """A registered thing with its settings: what a config writes of it. `plugin` (module:name) loads it elsewhere."""

    kind: str
    name: str
    settings: Mapping[str, Any]
    plugin: str | None


@dataclass(frozen=True)
class Entry(Generic[T]):
    """What is registered: `make` takes the settings by keyword. Calling the entry chooses it with these settings."""

    kind: str
    name: str
    make: Callable[..., T]
    settings: type[BaseModel]
    module: str
    attribute: str

    def __call__(self, **settings: Any) -> Choice:
        """Choose it. Raises `LegolmError` for settings that it does not have or take."""
        try:
            checked = self.check(settings)
        except ValueError as error:
            raise LegolmError(f"{self.kind} {self.name!r}: {error}") from None
        plugin = None if self.module.partition(".")[0] in ("legolm", "__main__") else f"{self.module}:{self.attribute}"
        return Choice(self.kind, self.name, checked, plugin)

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All settings, defaults filled in. Raises `ValueError` in one line."""
        known = list(self.settings.model_fields)
        for key in given:
            if key not in known:
                raise ValueError(f"unknown key `{key}` of {self.kind} {self.name!r};{nearest(key, known)}")
        try:
            checked = self.settings.model_validate(dict(given)).model_dump()
            self.make(**checked)  # settings that do not go together
            return checked
        except ValidationError as error:
            problem = error.errors()[0]
            field, text = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
            raise ValueError(f"`{field}` = {problem['input']!r}: {text[0].lower()}{text[1:]}") from None


class Registry(Generic[T]):
    """Entries of one kind by name. `home` is the package whose import registers those that ship with legolm."""

    def __init__(self, kind: str, home: str, group: str) -> None:
        self.kind, self._home, self._group = kind, home, group
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, function: Any, make: Callable[..., T], positional: Sequence[str] = ()) -> Entry[T]:
        """Add what `function` defines, whose keyword-only parameters are the settings.

        `positional` are the parameters that it must begin with. Defining the same function anew (a notebook's cell that
        runs again) replaces it. Raises `LegolmError` for a name that is taken and a signature that cannot be checked.
        """
        known = self._entries.get(name)
        if known is not None and (known.module, known.attribute) != (function.__module__, function.__qualname__):
            raise LegolmError(f"{self.kind} {name!r}: is registered already by {known.module}; choose another name")
        settings = _settings_of(f"{self.kind} {name!r}", function, positional)
        entry = Entry(self.kind, name, make, settings, function.__module__, function.__qualname__)
        self._entries[name] = entry
        return entry

    def entry(self, name: str, others: Sequence[str] = ()) -> Entry[T]:
        """The entry of this name. Raises `ValueError`, with the nearest name, when there is none.

        `others` are names that could stand there and are no entries.
        """
        importlib.import_module(self._home)
        if name not in self._entries:
            for point in entry_points(group=self._group):
                _load(f"{point.module}:{point.attr}")
        if name not in self._entries:
            raise ValueError(f"{self.kind} {name!r} is not known;{nearest(name, [*others, *sorted(self._entries)])}")
        return self._entries[name]

    def check(
        self, name: str, given: Mapping[str, Any], beside: Sequence[str], others: Sequence[str]
    ) -> dict[str, Any]:
        """All settings of the entry of this name. Raises `ValueError`; `beside` are keys that stand with them."""
        entry = self.entry(name, others)
        for key in given:
            if key not in entry.settings.model_fields:
                owners = sorted(one.name for one in self._entries.values() if key in one.settings.model_fields)
                known = [*entry.settings.model_fields, *beside]
                hint = f" it is {' and '.join(owners)}'s" if owners else nearest(key, known)
                raise ValueError(f"unknown key `{key}` of {self.kind} {name!r};{hint}")
        return entry.check(given)

    def __iter__(self) -> Iterator[str]:
        importlib.import_module(self._home)
        return iter(sorted(self._entries))


SCHEMES: Registry[Any] = Registry("scheme", "legolm.aggregate", "legolm.schemes")
CRITERIA: Registry[Any] = Registry("criterion", "legolm.prune", "legolm.criteria")
TRAINERS: Registry[Any] = Registry("trainer", "legolm.finetune", "legolm.trainers")


def load_plugins(plugins: Sequence[str]) -> None:
    """Import each `module:name`, which registers itself. Raises `LegolmError` for one that does not."""
    for plugin in plugins:
        _load(plugin)


def _load(plugin: str) -> None:
    where = f"plugins: {plugin!r}"
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", plugin):
        raise LegolmError(f"{where}: write it as module:name")
    module, _, name = plugin.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # the command's own path is where it is installed, not where the user stands
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except LegolmError:
        raise
    except AttributeError:
        raise LegolmError(f"{where}: {module} has no {name}") from None
    except Exception as error:  # whatever the module's own code raises
        raise LegolmError(
            f"{where}: does not import ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from None
    if not isinstance(found, Entry):
        raise LegolmError(f"{where}: registers nothing; put @legolm.scheme, .criterion or .trainer before it")


def _settings_of(where: str, function: Any, positional: Sequence[str]) -> type[BaseModel]:
    """A model of the function's keyword-only parameters; each needs a type and a default."""
    parameters = list(inspect.signature(function).parameters.values())
    first, rest = parameters[: len(positional)], parameters[len(positional) :]
    if [one.name for one in first] != list(positional) or any(one.kind is not one.KEYWORD_ONLY for one in rest):
        wanted = ", ".join([*positional, "*", "own_setting: type = default"])
        raise LegolmError(f"{where}: its signature is {inspect.signature(function)}; it must be ({wanted}, ...)")
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise LegolmError(f"{where}: a type in its signature is unknown ({error})") from None
    fields: dict[str, Any] = {}
    for one in rest:
        if one.name not in hints or one.default is one.empty:
            raise LegolmError(f"{where}: its setting `{one.name}` needs a type and a default")
        fields[one.name] = (hints[one.name], one.default)
    return create_model("Settings", __config__=ConfigDict(extra="forbid", validate_default=True), **fields)
