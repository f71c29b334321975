"""What a model costs on this machine: prefill, decode, first token, memory, bytes, energy where the system tells it.

Each runtime works in a process of its own, whose peak memory is told, and all take turns: other work on the machine
then takes from all alike. The fastest turn counts.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import torch

from legolm.errors import LegolmError, nearest
from legolm.export.llama_cpp import llama_cpp
from legolm.export.write import check_export, export, target_of
from legolm.models import find_model, folder_bytes, load_config, load_model
from legolm.system import Spawning, scratch_folder

Runtime = Literal["llama.cpp", "transformers", "onnxruntime"]
TARGETS: dict[Runtime, str] = {"llama.cpp": "gguf", "onnxruntime": "onnx"}
"""What a model is exported to for a runtime."""
PROMPT, TOKENS = 128, 32
"""Tokens that are read and generated, if nothing else is wanted."""
ENERGY = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


@dataclass(frozen=True)
class Turn:
    """One answer: seconds until its first token, and seconds of the others."""

    first_s: float
    rest_s: float
    joules: float | None


@dataclass(frozen=True)
class Speed:
    """Of one model in one runtime. Tokens a second; seconds; bytes; joules a generated token, None where not told."""

    model: str
    runtime: str
    prefill: float
    decode: float
    first_s: float
    memory: int
    bytes: int
    joules: float | None


def checked_runtimes(names: Sequence[str]) -> list[Runtime]:
    """Each once. Raises `LegolmError` for one that is not known."""
    for name in names:
        if name not in get_args(Runtime):
            raise LegolmError(f"--runtimes: {name!r} is not known;{nearest(name, get_args(Runtime))}")
    return list(dict.fromkeys(names))  # type: ignore[arg-type]


def check_bench(models: Sequence[str], runtimes: Sequence[Runtime], quant: str, prompt: int, tokens: int) -> None:
    """Raise `LegolmError` for what `bench` refuses before any weight is read."""
    for name in models:
        most = load_config(find_model(name)).max_position_embeddings
        if prompt + tokens > most:
            raise LegolmError(
                f"{name}: takes {most} tokens in all, and speed is that of reading {prompt} and writing {tokens}; "
                "leave it out, or give bench fewer (--prompt, --tokens)"
            )
    for runtime in runtimes:
        if runtime in TARGETS:
            settings = {"quant": quant} if runtime == "llama.cpp" else {}
            target_of(TARGETS[runtime], settings, "--quant").need(f"runtime {runtime}")
            for name in models:
                check_export(name, TARGETS[runtime], _beside(), settings=settings, field="--quant")


def _beside() -> Path:
    """Beside what exported models lie while they answer: nothing of them is the user's."""
    return Path(tempfile.gettempdir()) / "legolm-bench"


class Runner:
    """A loaded model: `turn()` makes it answer once."""

    def __init__(self, name: str, runtime: str, size: int, turn: Callable[[], Turn], memory: Callable[[], int]) -> None:
        self.name, self.runtime, self.size, self.turn, self.memory = name, runtime, size, turn, memory
        self.turns: list[Turn] = []

    def speed(self, prompt: int, tokens: int) -> Speed:
        """Of its fastest turns."""
        first, rest = (min(getattr(one, part) for one in self.turns) for part in ("first_s", "rest_s"))
        joules = [one.joules for one in self.turns if one.joules is not None]
        each = min(joules) / tokens if joules else None
        decode = (tokens - 1) / rest
        return Speed(self.name, self.runtime, prompt / first, decode, first, self.memory(), self.size, each)


def bench(
    models: Sequence[str],
    runtimes: Sequence[Runtime],
    quant: str = "q8_0",
    prompt: int = PROMPT,
    tokens: int = TOKENS,
    turns: int = 3,
) -> list[Speed]:
    """Answers of `tokens` tokens to a prompt of `prompt`, one at a time, in turns over all models and runtimes.

    For llama.cpp and onnxruntime the models are exported into the temporary folder, and vanish. Raises `LegolmError`
    for a model that cannot be had or exported, and a prompt that does not fit its context.
    """
    check_bench(models, runtimes, quant, prompt, tokens)
    with ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder(_beside()))
        runners = []
        for place, name in enumerate(models):
            for runtime in runtimes:
                if runtime == "llama.cpp":
                    file = scratch / f"{place}.gguf"
                    export(name, "gguf", file, settings={"quant": quant})
                    runners.append(stack.enter_context(in_llama_cpp(name, file, quant, prompt, tokens)))
                elif runtime == "onnxruntime":
                    export(name, "onnx", scratch / f"{place}")
                    runners.append(stack.enter_context(in_process(name, runtime, scratch / f"{place}", prompt, tokens)))
                else:
                    runners.append(stack.enter_context(in_process(name, runtime, find_model(name), prompt, tokens)))
        for number in range(turns + 1):
            for runner in runners:
                found = runner.turn()
                if number:  # the first warms up
                    runner.turns.append(found)
        return [runner.speed(prompt, tokens) for runner in runners]


@contextmanager
def in_llama_cpp(name: str, file: Path, quant: str, prompt: int, tokens: int) -> Iterator[Runner]:
    """A GGUF file, asked over its server's endpoint; seconds are those that llama.cpp tells."""
    with llama_cpp(file, prompt + tokens + 8) as server:
        asked = {
            "prompt": [index % 200 for index in range(prompt)],
            "n_predict": tokens,
            "cache_prompt": False,
            "ignore_eos": True,
            "temperature": 0,
        }

        def turn() -> Turn:
            before = _joules()
            times = server.post("/completion", asked)["timings"]
            return Turn(times["prompt_ms"] / 1e3, times["predicted_ms"] / 1e3, _spent(before))

        yield Runner(name, f"llama.cpp {quant}", file.stat().st_size, turn, lambda: peak(server.process.pid))


@contextmanager
def in_process(name: str, runtime: str, path: Path, prompt: int, tokens: int) -> Iterator[Runner]:
    """A checkpoint in transformers, or what was exported for onnxruntime, in a process of its own; both in float32."""
    with ProcessPoolExecutor(1, Spawning()) as pool:
        pool.submit(_load, runtime, path, torch.get_num_threads()).result()

        def turn() -> Turn:
            return pool.submit(_answer, prompt, tokens).result()

        yield Runner(name, runtime, folder_bytes(path), turn, lambda: pool.submit(_own_peak).result())


Step = Callable[[torch.Tensor], torch.Tensor]
"""(ids (n,) behind those before) -> the likeliest next token (1,)."""
_begin: list[Callable[[], Step]] = []
"""Of the process: what begins an answer."""


def _load(runtime: str, path: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    _begin[:] = [_in_onnxruntime(path) if runtime == "onnxruntime" else _in_transformers(load_model(path))]


def _in_transformers(model: Any) -> Callable[[], Step]:
    def begin() -> Step:
        cache = None

        def step(ids: torch.Tensor) -> torch.Tensor:
            nonlocal cache
            found = model(input_ids=ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = found.past_key_values
            return torch.as_tensor(found.logits[0, -1:].argmax(-1))

        return step

    return begin


def _in_onnxruntime(path: Path) -> Callable[[], Step]:
    from legolm.export.onnx import Session

    session = Session(path / "model.onnx")

    def begin() -> Step:
        session.forget()
        return lambda ids: session.logits(ids.tolist()).argmax(-1)[None]

    return begin


@torch.no_grad()
def _answer(prompt: int, tokens: int) -> Turn:
    """Greedy, with a cache: the prompt at once, then one token after the other."""
    step, before = _begin[0](), _joules()
    ids, began, first = torch.arange(prompt) % 200, time.perf_counter(), 0.0
    for number in range(tokens):
        ids = step(ids)
        int(ids)
        if not number:
            first = time.perf_counter() - began
    return Turn(first, time.perf_counter() - began - first, _spent(before))


def _own_peak() -> int:
    return peak(os.getpid())


def peak(pid: int) -> int:
    """Bytes of memory that a process had at most; what it has now where the system does not tell."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(psutil.Process(pid).memory_info().rss)


def _joules() -> float | None:
    """What the processor used since some time; None where the system does not tell."""
    try:
        return int(ENERGY.read_text()) / 1e6
    except (OSError, ValueError):
        return None


def _spent(before: float | None) -> float | None:
    now = _joules()
    return None if before is None or now is None or now < before else now - before
