"""Data that are not there: whoever has the config is told the command that brings them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from legolm import config as configs
from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.plan import make_plan


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": {"train": "absent/*.jsonl"}}, "data.train: 'absent/*.jsonl' matches no file"),
        ({"data": {"test": "absent.jsonl"}}, "data.test: no file absent.jsonl"),
        ({"evaluate": {"scores": "own", "server_data": "absent.csv"}}, "evaluate.server_data: no file absent.csv"),
        (
            {"blocks": [{"name": "half", "method": "wanda", "sparsity": 0.5, "calibration": {"text": "absent.txt"}}]},
            "block half: calibration.text: no file absent.txt",
        ),
    ],
)
def test_the_command_is_in_the_error(
    change: dict[str, Any], says: str, three_clients: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    raw = three_clients(tmp_path, ("half", "half", "half"))
    for section, fields in change.items():
        raw[section] = {**raw.get(section, {}), **fields} if isinstance(fields, dict) else fields

    def error() -> str:
        with pytest.raises(LegolmError) as caught:
            make_plan(configs.validate(RunConfig, raw, "test"))
        return str(caught.value)

    assert error() == says
    raw["data"]["fetch"] = "git clone rows"
    assert error() == f"{says}; bring it: git clone rows"
