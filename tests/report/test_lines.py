"""What others wrote is printed as it is: no markup of Rich's, no control codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from legolm.block import llm_block
from legolm.report import print_coverage


def test_a_blocks_details_are_neither_markup_nor_control_codes(
    tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    details = {"note": "[/] [red]of a stranger\x1b[31m"}
    print_coverage(replace(llm_block(tiny("llama"), "f" * 64), name="a\x1bb", details=details))
    said = capsys.readouterr().out
    assert "note [/] [red]of a stranger [31m" in said and "\x1b" not in said
