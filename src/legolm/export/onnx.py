"""ONNX by transformers' own exporter: one graph that both reads a prompt and goes on with its cache."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from legolm.errors import LegolmError, brief
from legolm.export.probe import LIKELIEST, Answer, Limits, Reference, measure
from legolm.export.source import Source
from legolm.export.target import exporter
from legolm.models import copy_side_files, shape_of

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
    copy_side_files(source.path, out)
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


class Session:
    """onnxruntime with what the graph gave as its cache: a text is read bit by bit."""

    def __init__(self, file: Path) -> None:
        import onnxruntime
        from transformers import AutoConfig

        shape = shape_of(AutoConfig.from_pretrained(file.parent, trust_remote_code=False))
        self._empty = (1, shape.kv_groups, 0, shape.head_dim)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._outputs = [one.name for one in self._session.get_outputs()]
        self.forget()

    def forget(self) -> None:
        """Begin a new text."""
        import numpy as np

        self.known = 0
        self._cache: dict[str, Any] = {
            one.name: np.zeros(self._empty, np.float32) for one in self._session.get_inputs() if CACHE in one.name
        }

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(vocabulary,) float32 after these ids, which come behind those before."""
        import numpy as np

        whole = self.known + len(ids)
        given = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, whole), np.int64),
            "position_ids": np.arange(self.known, whole)[None],
        }
        found = dict(zip(self._outputs, self._session.run(None, {**given, **self._cache}), strict=True))
        self._cache = {name: found[name.replace("input.", "output.", 1)] for name in self._cache}
        self.known = whole
        return torch.from_numpy(found["logits"][0, -1])


def _answer(file: Path) -> Answer:
    """The first prompt is read at once, the rest token by token."""
    session = Session(file)

    def answer(ids: Sequence[int], token: int) -> tuple[float, dict[int, float]]:
        logs = session.logits(ids[session.known :]).log_softmax(-1)
        top = logs.topk(min(LIKELIEST, len(logs))).indices.tolist()
        return float(logs[token]), {index: float(logs[index]) for index in top}

    return answer
