"""llama.cpp, as xllamacpp brings it, in a process of its own: what it says of a GGUF file, and how fast."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import torch

from legolm.errors import LegolmError, brief

PROGRAM = Path(__file__).with_name("llama_process.py")
SURE = 1000.0
"""Added to a token's logit it makes the token certain; what is reported of it is from before."""
PATIENCE_S = 600.0


@dataclass(frozen=True)
class Next:
    """Log-probabilities (nats) of a next token: of the one that was asked for, and of the likeliest, by id."""

    asked: float
    likeliest: dict[int, float]


class LlamaCpp:
    """A model that llama.cpp has loaded."""

    def __init__(self, address: str, process: subprocess.Popen[str]) -> None:
        self.address, self.process = address, process

    def next(self, ids: Sequence[int], token: int, most: int) -> Next:
        """Log-probability of `token` after `ids`, and of the `most` likeliest; what was read before is known."""
        asked = {
            "prompt": list(ids),
            "n_predict": 1,
            "n_probs": most,
            "logit_bias": [[token, SURE]],
            "samplers": ["top_k"],
            "top_k": 1,
            "cache_prompt": True,
        }
        (found,) = self.post("/completion", asked)["completion_probabilities"]
        if found["id"] != token:
            raise LegolmError(f"llama.cpp: answered token {found['id']} where {token} was asked for")
        return Next(found["logprob"], {one["id"]: one["logprob"] for one in found["top_logprobs"]})

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text; `special`: with the token that begins texts, if the model has one."""
        ids: list[int] = self.post("/tokenize", {"content": text, "add_special": special, "parse_special": True})[
            "tokens"
        ]
        return ids

    def template(self, messages: Sequence[dict[str, str]]) -> str:
        """What the chat template makes of a conversation that the model is to go on with."""
        return str(self.post("/apply-template", {"messages": list(messages)})["prompt"])

    def post(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        """What the server answers. Raises `LegolmError` where it does not."""
        request = urllib.request.Request(
            self.address + path, json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
                found: dict[str, Any] = json.loads(reply.read())
                return found
        except HTTPError as error:
            raise LegolmError(f"llama.cpp: refuses {path} ({brief(error.read().decode(errors='replace'))})") from None
        except (OSError, ValueError) as error:
            raise LegolmError(f"llama.cpp: ended, or does not answer ({brief(error)})") from None


@contextmanager
def llama_cpp(
    model: Path,
    context: int,
    adapters: Sequence[tuple[Path, float]] = (),
    parallel: int = 1,
    host: str = "127.0.0.1",
    port: int = 0,
    alias: str = "legolm",
    threads: int | None = None,
) -> Iterator[LlamaCpp]:
    """Load a GGUF file with LoRA files and their scales. Raises `LegolmError` when llama.cpp does not take it.

    `port` 0 is any that is free; `threads` are torch's, if not given.
    """
    settings = {
        "model": str(model),
        "context": context,
        "adapters": [(str(path), scale) for path, scale in adapters],
        "parallel": parallel,
        "host": host,
        "port": port,
        "alias": alias,
        "threads": threads or torch.get_num_threads(),
    }
    process = subprocess.Popen(
        [sys.executable, "-P", str(PROGRAM), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C is for those who can say how to go on
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        said = json.loads(line) if line else {"error": "its process ended"}
        if "error" in said:
            files = [model, *(path for path, _ in adapters)]
            raise LegolmError(
                f"llama.cpp: does not load {' with '.join(path.name for path in files)} ({brief(said['error'])})"
            )
        yield LlamaCpp(said["address"], process)
    finally:
        process.kill()
        process.communicate()
