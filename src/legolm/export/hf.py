"""A plain Hugging Face checkpoint with a model card."""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from legolm.block import hide_places
from legolm.errors import LegolmError, brief
from legolm.export.card import model_card
from legolm.export.probe import Reference
from legolm.export.source import Source
from legolm.export.target import exporter
from legolm.models import copy_checkpoint, decoder_layers

READ, ASKED = 32, 16


def _check_token(source: Source, *, push_to_hub: str | None = None) -> None:
    """Raise `LegolmError` where there is to be a push and there can be none."""
    from huggingface_hub import get_token

    if push_to_hub is None:
        return
    if push_to_hub.count("/") != 1:
        raise LegolmError(f"--push-to-hub {push_to_hub}: must be owner/name")
    if get_token() is None:
        raise LegolmError(f"--push-to-hub {push_to_hub}: there is no token; run `hf auth login`, or set HF_TOKEN")


def _push(out: Path, *, push_to_hub: str | None = None) -> list[str]:
    """On the hub, private, where that is wanted."""
    from huggingface_hub import HfApi

    if push_to_hub is None:
        return []
    try:
        api = HfApi()
        url = api.create_repo(push_to_hub, private=True, exist_ok=True)
        api.upload_folder(repo_id=push_to_hub, folder_path=os.fspath(out))
    except Exception as error:  # the hub's client raises a dozen kinds
        raise LegolmError(
            f"--push-to-hub {push_to_hub}: the hub does not take it ({brief(error)}); {out} is written, and `hf upload "
            f"{push_to_hub} {quote(os.fspath(out))}` tries again"
        ) from None
    return [f"on the hub, private: {url}"]


@exporter("hf", check=_check_token, publish=_push)
def hf(source: Source, out: Path, *, push_to_hub: str | None = None) -> list[str]:
    """A folder for plain transformers, zeros kept, what it learned merged; with a card. If wanted on the hub too."""
    out.mkdir()
    copy_checkpoint(source.path, out)
    if push_to_hub is not None and source.is_block:
        hide_places(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=False)
    _check(source, out, model.eval())
    (out / "README.md").write_text(model_card(source, model), encoding="utf-8")
    return ["plain transformers loads it and computes the same"]


def _check(source: Source, out: Path, model: Any) -> None:
    """Raise `LegolmError` unless logits and tokens are the block's, and zero is what its masks say."""
    own = source.tokenizer
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    read = min(READ, source.config.max_position_embeddings - ASKED)
    wanted = Reference.of(source.load(), own, read, ASKED)
    found = Reference.of(model, tokenizer, read, ASKED)
    if found.ids != wanted.ids or not torch.equal(found.logits, wanted.logits):
        raise LegolmError(f"{source.name}: plain transformers computes something else: nothing was exported")
    places = {layer: j for j, layer in enumerate(source.coverage.layers)}
    for key, mask in source.coverage.masks.items():
        _, layer, module = key.split(".", 2)
        weight: Any = decoder_layers(model)[places[int(layer)]].get_submodule(module).weight
        if bool(weight[~mask].any()):
            raise LegolmError(f"{source.name}: {key} is not zero where its mask is: nothing was exported")
