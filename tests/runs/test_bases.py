"""Final adapters find their block: from any folder, after the run has moved, and on another disk once it was read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from helpers import legolm
from legolm import config as configs
from legolm import pipeline
from legolm.runs import RunDir, check_sealed, lasting_base, point_adapters

TEXT = torch.arange(1, 21)[None]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "legolm" / "bases"


def assert_found(run: Path, client: str) -> None:
    """What PEFT alone makes of the adapter is the checkpoint in which it is merged."""
    final = run / "final" / client
    merged = AutoModelForCausalLM.from_pretrained(final)
    found = AutoPeftModelForCausalLM.from_pretrained(str(final / "adapter"))
    torch.testing.assert_close(found(TEXT).logits, merged(TEXT).logits, rtol=1e-4, atol=1e-4)


def test_peft_finds_the_block_from_anywhere(
    three_clients: Callable[..., dict[str, Any]], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = three_clients(tmp_path, ("wide", "half", "dense"), federation={"engine": "local", "rounds": 1})
    (tmp_path / "run.yaml").write_text(json.dumps(raw))
    monkeypatch.chdir(tmp_path)
    pipeline.run(configs.load(tmp_path / "run.yaml"), Path("run"))
    links = list(cache.glob("*/model.safetensors"))
    assert len(links) == 3
    assert all(file.stat().st_nlink > 1 for file in links)  # no room of their own

    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "run"
    shutil.move("run", moved)
    monkeypatch.chdir("/")
    for client in ("fr", "de", "es", "llm"):
        assert_found(moved, client)

    # Another disk: other files, and no second names.
    shutil.copytree(moved, tmp_path / "copied")
    shutil.rmtree(moved)
    shutil.rmtree(cache)
    with pytest.raises(OSError, match="bases"):
        assert_found(tmp_path / "copied", "fr")
    said = legolm("report", tmp_path / "copied")
    assert said.returncode == 0
    assert "copied/final/fr/adapter" in said.stdout.replace("\n", "")
    for client in ("fr", "de", "es", "llm"):
        assert_found(tmp_path / "copied", client)
        check_sealed(tmp_path / "copied" / "final" / client)
    assert point_adapters(RunDir(tmp_path / "copied")) == []


def test_second_names_go_with_their_runs(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    one, two = (lasting_base(tmp_path / name) for name in ("one", "two"))
    assert one != two
    assert one == lasting_base(tmp_path / "one")
    assert (one / "model.safetensors").read_text() == "one"
    shutil.rmtree(tmp_path / "one")
    assert one.is_dir()
    three = lasting_base(tmp_path / "three")
    assert set(cache.iterdir()) == {two, three}

    def other_disk(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    (tmp_path / "four").mkdir()
    (tmp_path / "four" / "model.safetensors").write_text("four")
    monkeypatch.setattr(os, "link", other_disk)
    assert lasting_base(tmp_path / "four") == tmp_path / "four"
    assert set(cache.iterdir()) == {two, three}
