"""What tests of the Python face share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import legolm as lg


@pytest.fixture(scope="session")
def llm(tiny: Callable[[str], Path]) -> lg.LLM:
    return lg.LLM(str(tiny("llama")))
