"""ONNX by transformers' own exporter: one graph that both reads a prompt and goes on with its cache."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from legolm.errors import LegolmError, brief
from legolm.export.probe import LIKELIEST, Answer, Limits, Reference, measure
from legolm.export.source import Source
from legolm.export.target import exporter
from legolm.models import side_files

LIMITS = Limits(2e-3)
"""Both are float32."""
READ, ASKED, RUN_OVER = 32, 16, 8
CACHE = "past_key_values"


@exporter("onnx", packages=("onnx", "onnxscript", "onnxruntime"), extra="onnx")
def onnx(source: Source, out: Path) -> list[str]:
    """A folder with `model.onnx`, its weights beside it in float32: for onnxruntime, and transformers again."""
    model = source.load()
    model.config.use_cache = True
    window, context = getattr(source.config, "sliding_window", None) or 0, source.config.max_position_embeddings
    read = min(max(READ, window + RUN_OVER if window < context else 0), context - ASKED)
    reference = Reference.of(model, source.tokenizer, read, ASKED)
    out.mkdir()
    for file in side_files(source.path):
        shutil.copy2(file, out / file.name)
    _write(model, out, source.name)
    del model
    found = measure(reference, _answer(out / "model.onnx"))
    LIMITS.check(found, f"{source.name}: onnxruntime")
    return [f"onnxruntime, float32: {found.said()}"]


def _write(model: Any, out: Path, name: str) -> None:
    """Trace it with two texts, twelve tokens in the cache and three more, all of which may be other numbers."""
    from transformers import DynamicCache
    from transformers.exporters import OnnxConfig, OnnxExporter

    # Of no config: it keeps all tokens, and masks see to windows.
    cache, ids = DynamicCache(), torch.arange(24).view(2, 12) % model.config.vocab_size
    try:
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        inputs = {
            "input_ids": ids[:, :3],
            "attention_mask": torch.ones(2, 15, dtype=torch.int64),
            "position_ids": torch.arange(12, 15).expand(2, 3).contiguous(),
            CACHE: cache,
            "use_cache": True,
        }
        level = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True)).save_pretrained(out)
        finally:
            logging.disable(level)
    except Exception as error:  # the exporter, torch's and onnx's raise a dozen kinds
        raise LegolmError(
            f"{name}: transformers' exporter does not take it ({brief(error)}); export to hf or gguf"
        ) from None


def _answer(file: Path) -> Answer:
    """onnxruntime: the first prompt is read at once, the rest token by token, with what the graph gave as its cache."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    inputs = {one.name: one.shape for one in session.get_inputs()}
    outputs = [one.name for one in session.get_outputs()]
    cache: dict[str, Any] = {
        name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in inputs.items() if CACHE in name
    }
    known = 0

    def answer(ids: Sequence[int], token: int) -> tuple[float, dict[int, float]]:
        nonlocal known
        given = {
            "input_ids": np.array([ids[known:]]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(known, len(ids))[None],
        }
        found = dict(zip(outputs, session.run(None, {**given, **cache}), strict=True))
        for name in cache:
            cache[name] = found[name.replace("input.", "output.", 1)]
        known = len(ids)
        logs = torch.from_numpy(found["logits"][0, -1]).log_softmax(-1)
        top = logs.topk(min(LIKELIEST, len(logs))).indices.tolist()
        return float(logs[token]), {index: float(logs[index]) for index in top}

    return answer
