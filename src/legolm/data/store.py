"""Examples as bytes in one piece: millions of them are no objects until each is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, overload

import numpy as np

from legolm.data.examples import Example, Message
from legolm.errors import LegolmError

IN_MEMORY = 1 << 26
"""Bytes of a store that stay in memory; what is more goes into a file without a name, which ends with the process."""


class Store:
    """Examples in the order in which they came."""

    def __init__(self) -> None:
        self._tail = bytearray()  # what is not in the file
        self._file: BinaryIO | None = None
        self._stored = 0
        self._ends, self._tools = array("q"), bytearray()

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, example: Example) -> None:
        """Put it last."""
        turns = [[one.role, one.content, one.more] for one in example.messages]
        self._tail += json.dumps([turns, example.raw, example.tools], ensure_ascii=False).encode()
        self._ends.append(self._stored + len(self._tail))
        self._tools.append(bool(example.tools))
        if len(self._tail) > IN_MEMORY:
            self._to_file()

    def _to_file(self) -> None:
        try:
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the store)
            self._file.write(self._tail)
            self._file.flush()
        except OSError as error:
            where = tempfile.gettempdir()
            raise LegolmError(f"data: no room for the rows in {where} ({error.strerror}); set TMPDIR") from None
        self._stored += len(self._tail)
        self._tail = bytearray()

    def content(self, place: int) -> bytes:
        """What stands for the example of this place; equal for equal ones."""
        start, end = self._ends[place - 1] if place else 0, self._ends[place]
        if start >= self._stored:
            return bytes(self._tail[start - self._stored : end - self._stored])
        assert self._file is not None
        return os.pread(self._file.fileno(), end - start, start)

    def hashes(self, places: np.ndarray) -> np.ndarray:
        """(n,) int64 of the examples of these places: equal for equal ones, in this process."""
        found = (hash(self.content(int(place))) for place in places)
        return np.fromiter(found, dtype=np.int64, count=len(places))

    def has_tools(self, place: int) -> bool:
        """Whether the example of this place has tools."""
        return bool(self._tools[place])

    def get(self, place: int) -> Example:
        """The example of this place."""
        turns, raw, tools = json.loads(self.content(place).decode())
        return Example(tuple(Message(*turn) for turn in turns), raw, tools)


class Examples(Sequence[Example]):
    """Some of a store's examples, by `places` in it (n,), in this order."""

    def __init__(self, store: Store, places: Sequence[int] | np.ndarray) -> None:
        self._store, self.places = store, np.asarray(places, dtype=np.int64)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Examples:
        """All of these, in a store of their own."""
        store = Store()
        for example in examples:
            store.add(example)
        return cls(store, np.arange(len(store)))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all of them: equal for equal examples in the same order."""
        found = hashlib.sha256()
        for place in self.places:
            content = self._store.content(int(place))
            found.update(len(content).to_bytes(8, "little") + content)
        return found.hexdigest()

    @property
    def with_tools(self) -> int:
        """How many have tools."""
        return sum(self._store.has_tools(int(place)) for place in self.places)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self._store, self.places[index])
        return self._store.get(int(self.places[index]))

    def __iter__(self) -> Iterator[Example]:
        return (self._store.get(int(place)) for place in self.places)

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class ClientData:
    """What one client holds. It never leaves the client."""

    train: Examples
    validation: Examples
    test: Examples
