"""Records of JSON, JSON lines, CSV and Parquet files, one after the other, each with its place."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from legolm.errors import LegolmError, MissingDataError, brief
from legolm.system import reading, strict_decoder

MAX_BYTES = 4 * 10**9
"""Of a file, unpacked."""
MAX_ROW = 1 << 26
"""Bytes of one row."""
CHUNK = 1 << 20
MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
DELIMITERS = ",;\t|"


class Written(float):
    """A number that is not whole, and how it is written: an answer of 1.50 is not 1.5."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


DECODER = strict_decoder(parse_float=Written)
HALF = re.compile("[\ud800-\udfff]")
"""Of a character: no file can hold it, JSON only by its number."""


def written(row: Any) -> str:
    """What a row holds, as JSON in one line: numbers as they are written in it, null for NaN and infinity, which JSON
    does not have.
    """
    if isinstance(row, dict):
        pairs = zip(map(written, map(str, row)), map(written, row.values()), strict=True)
        return "{" + ", ".join(map(": ".join, pairs)) + "}"
    if isinstance(row, list | tuple):
        return "[" + ", ".join(map(written, row)) + "]"
    if isinstance(row, Written):
        return row.text
    if isinstance(row, float) and not math.isfinite(row):
        return "null"
    text = json.dumps(row, ensure_ascii=False, default=str)
    return HALF.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class BadRow(LegolmError):
    """A row that cannot be trained on: its place, why (both in `short`), and what helps."""

    def __init__(self, place: str, fault: str, way_out: str = "") -> None:
        self.fault, self.short = fault, f"{place}: {fault}"
        super().__init__(f"{self.short}; {way_out}" if way_out else self.short)


Record = tuple[str, Any]
"""Place as errors cite it; the values, or the `BadRow` in their place."""


def kind_of(path: Path) -> str:
    """The ending that says what is in it, without `.gz` and in small letters."""
    name = path.name.lower().removesuffix(".gz")
    return name[name.rfind(".") :] if "." in name else ""


def stem_of(path: Path) -> str:
    """The file's name without its endings."""
    return Path(path.name[:-3]).stem if path.name.lower().endswith(".gz") else path.stem


def records(path: Path, field: str) -> Iterator[Record]:
    """All of the file. Raises `LegolmError` for what is no such file at all; of one row it is a record."""
    check_file(path, field)
    if kind_of(path) not in READERS:
        raise LegolmError(f"{field}: {path} is of no known kind; known: {', '.join(READERS)}, and .gz of them")
    with reading(f"{field}: {path}"):
        try:
            yield from READERS[kind_of(path)](path, field)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise LegolmError(f"{field}: {path} is not valid gzip ({first_line(error)})") from None


def check_file(path: Path, field: str) -> None:
    """Raise `LegolmError` unless this is a file of bearable size that can be opened."""
    with reading(f"{field}: {path}"):
        if path.is_dir():
            raise LegolmError(f"{field}: {path} is a folder; name its files, for instance {path}/*.jsonl")
        if not path.is_file():
            raise MissingDataError(f"{field}: no file {path}")
        if path.stat().st_size > MAX_BYTES:
            raise _too_large(path, field)
        path.open("rb").close()


NOT_UTF8 = "not UTF-8; save the file in UTF-8"


def first_line(error: Exception) -> str:
    """What another library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _too_large(path: Path, field: str) -> LegolmError:
    return LegolmError(f"{field}: {path} has more than {MAX_BYTES / 1e9:g} GB; cut it into several files")


class _Bounded(io.RawIOBase):
    """A file's bytes, unpacked; what they end in says the kind of text. Raises `LegolmError` past `MAX_BYTES`."""

    def __init__(self, path: Path, field: str) -> None:
        self._path, self._field, self._count = path, field, 0
        packed = path.name.lower().endswith(".gz")
        self._file: BinaryIO = gzip.open(path) if packed else path.open("rb")  # type: ignore[assignment]  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self._file.read(len(buffer))
        self._count += len(read)
        if self._count > MAX_BYTES:
            raise _too_large(self._path, self._field)
        buffer[: len(read)] = read
        return len(read)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(path: Path, field: str) -> tuple[io.BufferedReader[_Bounded], str]:
    """The file after its byte order mark, and its encoding, which that tells."""
    file = io.BufferedReader(_Bounded(path, field), CHUNK)
    start = file.peek(3)[:3]
    for mark, encoding in MARKS.items():
        if start.startswith(mark):
            file.read(len(mark))
            return file, encoding
    return file, "utf-8"


def _read_json(path: Path, field: str) -> Iterator[Record]:
    """A list of rows, or a row a line: both are called .json and .jsonl."""
    file, encoding = _open(path, field)
    with file:
        start = file.peek(CHUNK).decode(encoding, "ignore").lstrip()
        if start.startswith("["):
            yield from _array(io.TextIOWrapper(file, encoding), path)
        elif encoding == "utf-8":
            yield from _lines(iter(lambda: file.readline(MAX_ROW), b""), path, field)
        else:
            text = io.TextIOWrapper(file, encoding, newline="\n")
            try:
                yield from _lines(iter(lambda: text.readline(MAX_ROW), ""), path, field)
            except UnicodeDecodeError:  # where the next line begins is not known
                raise LegolmError(f"{path}: {NOT_UTF8}") from None


def _lines(lines: Iterator[str | bytes], path: Path, field: str) -> Iterator[Record]:
    """Not `splitlines()`: that also cuts at U+2028, which JSON allows inside a string."""
    empty = True
    for number, line in enumerate(lines, 1):
        place = f"{path}:{number}"
        if len(line) >= MAX_ROW:
            raise LegolmError(f"{place}: a line of more than {MAX_ROW >> 20} MB; write a row a line")
        if not line.strip():
            continue
        try:
            found = DECODER.decode(line if isinstance(line, str) else line.decode())
        except (ValueError, RecursionError) as error:
            if empty and kind_of(path) == ".json" and line.lstrip()[:1] in ("{", b"{"):
                raise LegolmError(
                    f"{field}: {path} must be a list of objects, or JSON lines: {place} is {_fault(error)}"
                ) from None
            found = BadRow(place, _fault(error))
        empty = False
        yield place, found


def _fault(error: Exception) -> str:
    """Why a row is none."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg})"
    if isinstance(error, UnicodeDecodeError):
        return NOT_UTF8
    # A key twice, a number of thousands of digits, lists in lists without end.
    why = "it is nested too deep" if isinstance(error, RecursionError) else first_line(error)
    return f"cannot be read ({why})"


class _Unread:
    """A text of which only what is not read yet is in memory."""

    def __init__(self, file: io.TextIOWrapper, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def sign(self) -> str:
        """The next one that is no space, not taken yet; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, signs: str) -> str:
        """The next sign, which must be one of these."""
        found = self.sign()
        if not found or found not in signs:
            raise self.error(f"not valid JSON (Expecting {' or '.join(map(repr, signs))})", self._at)
        self._at += 1
        return found

    def value(self) -> Any:
        """The JSON value that begins here."""
        while True:
            try:
                found, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._more():
                    raise self.error(_fault(error), error.pos) from None
                continue
            except (ValueError, RecursionError) as error:
                raise self.error(_fault(error), self._at) from None
            if end < len(self._text) or not self._more():  # a number may go on
                self._at = end
                return found

    def error(self, fault: str, at: int) -> LegolmError:
        """What is wrong at this place of the text."""
        return LegolmError(f"{self._path}:{self._line + self._text.count(chr(10), 0, at)}: {fault}")

    def _more(self) -> bool:
        """Forget what was taken, and read as much again as is left; whether there was more."""
        if self._ended:
            return False
        left = len(self._text) - self._at
        if left > MAX_ROW:
            raise self.error(f"a row of more than {MAX_ROW >> 20} MB; cut it into rows", self._at)
        self._line += self._text.count("\n", 0, self._at)
        try:
            read = self._file.read(max(CHUNK, left))
        except UnicodeDecodeError:
            raise LegolmError(f"{self._path}: {NOT_UTF8}") from None
        self._text, self._at, self._ended = self._text[self._at :] + read, 0, not read
        return bool(read)


def _array(file: io.TextIOWrapper, path: Path) -> Iterator[Record]:
    """The items of a list, without all of it in memory."""
    text, number = _Unread(file, path), 0
    text.take("[")
    if text.sign() == "]":
        text.take("]")
        return
    while not number or text.take(",]") == ",":
        number += 1
        text.sign()
        yield f"{path} row {number}", text.value()
    if text.sign():
        raise text.error("not valid JSON (Extra data)", 0)


def _read_csv(path: Path, field: str) -> Iterator[Record]:
    """With the delimiter of the header; spreadsheets write semicolons or tabs where commas are decimal."""
    file, encoding = _open(path, field)
    csv.field_size_limit(MAX_ROW)  # of all readers: a cell may be as long as a book's chapter
    with io.TextIOWrapper(file, encoding, newline="") as text:
        header: list[str] = []
        start = 1  # of the record: one with line breaks in its cells has many lines
        try:
            first = text.readline(MAX_ROW)
            lines = _from(first, text) if not first.lower().startswith("sep=") else text
            said = first[4:5] if first.lower().startswith("sep=") else ""
            delimiter = said or _delimiter(first, "\t" if kind_of(path) == ".tsv" else "")
            start += lines is text
            spaced = 0 < first.count(delimiter) == first.count(f"{delimiter} ")  # `a, b`
            reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=spaced, strict=True)
            before = start - 1
            for cells in reader:
                place, start = f"{path}:{start}", before + reader.line_num + 1
                if not header or not cells:
                    header = header or _each_once(cells, place)
                elif len(cells) != len(header):
                    quote = f"quote cells with {'commas' if delimiter == ',' else repr(delimiter)}"
                    yield place, BadRow(place, f"{len(cells)} cells but {len(header)} in the header", quote)
                else:
                    yield place, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise LegolmError(
                f"{path}:{start}: not valid CSV ({error}); a quote in a quoted cell is written twice"
            ) from None
        except UnicodeDecodeError:
            raise LegolmError(f"{path}:{start}: {NOT_UTF8}") from None


def _from(first: str, text: io.TextIOWrapper) -> Iterator[str]:
    yield first
    yield from text


def _delimiter(header: str, usual: str) -> str:
    """What tells most columns apart in the first line; of several, the usual one."""
    try:
        found = {sign: len(next(csv.reader([header], delimiter=sign), [])) for sign in usual + DELIMITERS}
    except csv.Error:
        return ","
    return max(found, key=found.__getitem__)


def _each_once(columns: list[str], place: str) -> list[str]:
    """The columns. Raises `LegolmError` for a name that two have; those without one are nobody's."""
    for name, count in Counter(columns).items():
        if name and count > 1:
            raise LegolmError(f"{place}: column {brief(name)} is there twice; rename one or take it out")
    return columns


def _read_parquet(path: Path, field: str) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise LegolmError(f"{field}: {path} needs pyarrow; run: pip install 'legolm[data]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (ArrowException, OSError, ValueError, ArithmeticError) as error:  # a date of the year 10000
        raise LegolmError(f"{field}: {path} is not valid Parquet ({first_line(error)})") from None


READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
"""By the endings of files that hold rows; any other file is plain text."""
