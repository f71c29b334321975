"""Open registries: things that a config names and a plug-in may bring, their settings checked by their own signature.

A scheme, a criterion or a trainer registers itself under a name when its file is imported. What ships with legolm, what
an installed package declares as an entry point, and what a config lists under `plugins` are treated the same: loaded by
name, when a config first asks.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from legolm.errors import LegolmError, nearest

T = TypeVar("T")
R = TypeVar("R")


def check_numbers(kind: type[BaseModel], given: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a field that takes a number is given yes or no, which pydantic takes for one."""
    for name, value in given.items():
        if isinstance(value, bool) and name in _number_fields(kind):
            raise ValueError(f"`{name}` is {value}, and takes a number; write one")


@cache
def _number_fields(kind: type[BaseModel]) -> frozenset[str]:

    def kinds(annotation: Any) -> Iterator[Any]:
        parts = get_args(annotation)
        yield from (one for part in parts for one in kinds(part)) if parts else (annotation,)

    found = {name: set(kinds(field.annotation)) for name, field in kind.model_fields.items()}
    return frozenset(name for name, of in found.items() if of & {int, float} and bool not in of)


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
    source: str
    """SHA-256 of the code that defines it, as it was then; empty of what ships with legolm, and of code in no file."""

    def __call__(self, **settings: Any) -> Choice:
        """Choose it. Raises `LegolmError` for settings that it does not have or take."""
        try:
            checked = self.check(settings)
        except ValueError as error:
            raise LegolmError(f"{self.kind} {self.name!r}: {error}") from None
        plugin = None if self.module == "__main__" or _is_ours(self.module) else f"{self.module}:{self.attribute}"
        return Choice(self.kind, self.name, checked, plugin)

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All settings, defaults filled in. Raises `ValueError` in one line."""
        known = list(self.settings.model_fields)
        for key in given:
            if key not in known:
                raise ValueError(f"unknown key `{key}` of {self.kind} {self.name!r};{nearest(str(key), known)}")
        check_numbers(self.settings, given)
        try:
            checked = self.settings.model_validate(dict(given)).model_dump()
            with foreign(f"{self.kind} {self.name!r}", self.module, passing=ValueError):
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
        module, attribute = function.__module__, function.__qualname__
        entry = Entry(self.kind, name, make, settings, module, attribute, _source_hash(function))
        self._entries[name] = entry
        return entry

    def entry(self, name: str, others: Sequence[str] = ()) -> Entry[T]:
        """The entry of this name. Raises `ValueError`, with the nearest name, when there is none.

        `others` are names that could stand there and are no entries.
        """
        importlib.import_module(self._home)
        if name not in self._entries:
            points = {point.name: point for point in entry_points(group=self._group)}
            if name not in points:
                known = [*others, *sorted({*self._entries, *points})]
                raise ValueError(f"{self.kind} {name!r} is not known;{nearest(name, known)}")
            where = f"entry point {name!r} of {self._group}"
            found = _load(f"{points[name].module}:{points[name].attr}", where)
            if found.name != name:
                raise LegolmError(f"{where}: is {found.kind} {found.name!r}; call both alike")
        return self._entries[name]

    def of_script(self, name: str) -> bool:
        """Whether the entry of this name is the user's script's or notebook's: other processes have none."""
        return name in self._entries and self._entries[name].module == "__main__"

    def check(
        self, name: str, given: Mapping[str, Any], beside: Sequence[str], others: Sequence[str]
    ) -> dict[str, Any]:
        """All settings of the entry of this name. Raises `ValueError`; `beside` are keys that stand with them."""
        entry = self.entry(name, others)
        for key in entry.settings.model_fields:
            if key in beside:
                raise ValueError(f"{self.kind} {name!r}: its setting `{key}` is taken here already; rename it")
        for key in given:
            if key not in entry.settings.model_fields:
                owners = sorted(one.name for one in self._entries.values() if key in one.settings.model_fields)
                known = [*entry.settings.model_fields, *beside]
                hint = f" it is {' and '.join(owners)}'s" if owners else nearest(str(key), known)
                raise ValueError(f"unknown key `{key}` of {self.kind} {name!r};{hint}")
        return entry.check(given)

    def having(self, trait: str, value: object = True) -> str:
        """For a message: names of entries whose things, with their default settings, have this attribute at `value`."""
        return ", ".join(name for name in self if getattr(self._entries[name].make(), trait) == value)

    def __iter__(self) -> Iterator[str]:
        importlib.import_module(self._home)
        return iter(sorted(self._entries))


SCHEMES: Registry[Any] = Registry("scheme", "legolm.aggregate", "legolm.schemes")
CRITERIA: Registry[Any] = Registry("criterion", "legolm.prune", "legolm.criteria")
TRAINERS: Registry[Any] = Registry("trainer", "legolm.finetune", "legolm.trainers")
EXPORTERS: Registry[Any] = Registry("target", "legolm.export", "legolm.exporters")


def load_plugins(plugins: Sequence[str]) -> None:
    """Import each `module:name`, which registers itself. Raises `LegolmError` for one that does not."""
    for plugin in plugins:
        _load(plugin, f"plugins: {plugin!r}")


@contextmanager
def foreign(where: str, module: str, passing: type[Exception] = LegolmError) -> Iterator[None]:
    """Make one line (`LegolmError`) of what code of `module` raises, with its place in that module.

    `passing` is raised as it is, and so is what legolm's own code raises: that is a mistake of ours.
    """
    try:
        yield
    except (LegolmError, passing):
        raise
    except Exception as error:
        if _is_ours(module):
            raise
        file = getattr(sys.modules.get(module), "__file__", None)
        frames = traceback.extract_tb(error.__traceback__)
        at = next((frame for frame in reversed(frames) if frame.filename == file), frames[-1])
        raise LegolmError(f"{where}: raised {_in_words(error)} at {Path(at.filename).name}:{at.lineno}") from error


def guarded(where: str, function: Callable[..., R], module: str | None = None) -> Callable[..., R]:
    """The function with its exceptions as `foreign` makes them; `module` is its own, if not given."""

    @wraps(function)
    def call(*arguments: Any, **settings: Any) -> R:
        with foreign(where, module or function.__module__):
            return function(*arguments, **settings)

    return call


def _load(plugin: str, where: str) -> Entry[Any]:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", plugin):
        raise LegolmError(f"{where}: write it as module:name")
    module, _, name = plugin.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # the command's own path is where it is installed, not where the user stands
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
    except LegolmError as error:
        raise LegolmError(f"{where}: {error}") from None
    except (Exception, SystemExit) as error:  # whatever the module's own code raises
        raise LegolmError(f"{where}: does not import ({_in_words(error)})") from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise LegolmError(f"{where}: {module} has no {name}")
    if not isinstance(found, Entry):
        raise LegolmError(
            f"{where}: registers nothing; put @scheme, @criterion, @trainer or @exporter with a name before it"
        )
    return found


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "legolm"


def _source_hash(function: Any) -> str:
    """Of a plugin's module, for the helpers in it; of a script or a notebook, where more changes, of itself alone."""
    module = function.__module__
    if _is_ours(module):
        return ""
    try:
        source = inspect.getsource(function if module == "__main__" else sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""
    return hashlib.sha256(source.encode()).hexdigest()


def _settings_of(where: str, function: Any, positional: Sequence[str]) -> type[BaseModel]:
    """A model of the function's keyword-only parameters; each needs a type and a default."""
    parameters = list(inspect.signature(function).parameters.values())
    first, rest = parameters[: len(positional)], parameters[len(positional) :]
    by_place = all(one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in first)
    named = [one.name for one in first] == list(positional) and all(one.kind is one.KEYWORD_ONLY for one in rest)
    if not (by_place and named):
        wanted = ", ".join([*positional, "*", "own_setting: type = default"])
        raise LegolmError(f"{where}: its signature is {inspect.signature(function)}; it must be ({wanted}, ...)")
    try:
        hints = get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    except NameError as error:
        raise LegolmError(f"{where}: a type in its signature is unknown ({error})") from None
    fields: dict[str, Any] = {}
    for one in rest:
        if one.name not in hints or one.default is one.empty:
            raise LegolmError(f"{where}: its setting `{one.name}` needs a type and a default")
        fields[one.name] = (hints[one.name], one.default)
    return create_model(
        "Settings", __config__=ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False), **fields
    )
