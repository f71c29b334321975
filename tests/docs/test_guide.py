"""`benchmarks/guide.py` follows the guide: each block of it is a step on a host, and nothing of it is passed over."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from legolm.config import RunConfig, validate

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from guide import DEVICES, PAGE, RUN, SERVER, TITLE, steps

GUIDE = PAGE.read_text()


def test_each_block_of_the_guide_is_a_step() -> None:
    section = GUIDE.partition(f"\n## {TITLE}\n")[2].partition("\n## ")[0]
    found = steps(GUIDE)
    assert len(found) == section.count("\n```") // 2 > 5
    assert all(f"\n{one.content}```\n" in section for one in found)
    assert {one.hosts for one in found} == {(SERVER,), DEVICES}


def test_what_stays_is_the_run_and_each_device() -> None:
    found = steps(GUIDE)
    assert [one.hosts for one in found if one.stays] == [(SERVER,), DEVICES]
    assert f"--out {RUN}\n" in next(one.content for one in found if one.stays)
    (written,) = [one for one in found if one.file]
    assert written.file == "run.yaml"
    assert [one.id for one in validate(RunConfig, yaml.safe_load(written.content), "guide").clients] == list(DEVICES)


def test_a_block_that_is_nowhere_is_refused() -> None:
    for told in ("Then run:", "**On a laptop**, run:"):
        with pytest.raises(ValueError, match="says not on which"):
            steps(f"\n## {TITLE}\n\n{told}\n\n```\nlegolm status runs/first\n```\n")
    with pytest.raises(ValueError, match="says not as which file"):
        steps(f"\n## {TITLE}\n\n**On the server**, a config:\n\n```yaml\nmodel: starter\n```\n")
