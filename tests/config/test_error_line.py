"""Whatever an error quotes, it is one line of bearable length, without control codes."""

from __future__ import annotations

from legolm.errors import LegolmError, brief


def test_an_error_is_one_short_line_with_its_begin_and_its_end() -> None:
    assert str(LegolmError("field 'a': é is not known")) == "field 'a': é is not known"
    assert str(LegolmError("a\n\x1b[31mb\x00")) == "a  [31mb "
    said = str(LegolmError(f"field: {'x' * 10**6}; do this"))
    assert len(said) < 2100
    assert said.startswith("field: x")
    assert said.endswith("x; do this")


def test_what_another_library_says_is_never_nothing() -> None:
    assert brief(OSError()) == "OSError"
    assert brief(ValueError("a\n  b\x1b")) == "a b "
    assert len(brief("x" * 10**6)) == 301
