"""An OpenAI-compatible endpoint: llama.cpp's own server on what is exported for it."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from legolm.config import EXPORTERS
from legolm.errors import LegolmError, brief
from legolm.export.gguf_write import BALANCED
from legolm.export.llama_cpp import LlamaCpp, llama_cpp
from legolm.export.write import check_export, export
from legolm.models import is_gguf
from legolm.system import scratch_folder

MOST_CONTEXT = 4096
"""Tokens of each conversation, where the model takes as many."""


@contextmanager
def serving(
    model: str, adapters: Sequence[str], host: str, port: int, quant: str, parallel: int, folder: Path
) -> Iterator[tuple[LlamaCpp, Mapping[str, int]]]:
    """The server of a model (or a GGUF file), and the number of each adapter in a request's `lora`.

    `adapters` are `NAME=PATH` of PEFT folders or of LoRA files for the model. What is exported on the way lies in
    `folder` and vanishes. Raises `LegolmError` for what cannot be exported or loaded.
    """
    EXPORTERS.entry("gguf").make().need("serve")
    _check_free(host, port)
    named = _named(adapters)
    with scratch_folder(folder / "legolm-serve") as scratch:
        if not is_gguf(Path(model)):
            check_export(model, "gguf", scratch / "checked", settings={"quant": quant}, field="--quant")
        for path in named.values():
            if not is_gguf(path):
                check_export(model, "gguf-adapter", scratch / "checked", path)
            elif _fields(path, f"--adapter {path}").get("general.type") != "adapter":
                raise LegolmError(f"--adapter {path}: is no LoRA file; give one, or a PEFT adapter's folder")
        file, context, balanced = _file(model, quant, scratch)
        files = []
        for number, path in enumerate(named.values()):
            if not is_gguf(path):
                made = scratch / f"adapter-{number}.gguf"
                export(model, "gguf-adapter", made, path)
                path = made
            else:
                fields = _fields(path, f"--adapter {path}")
                if bool(fields.get(BALANCED)) != balanced:
                    raise LegolmError(
                        f"--adapter {path}: is for a file of {model} whose channels are{' not' * balanced} balanced; "
                        "export the model and the adapter alike, by legolm export --to gguf and --to gguf-adapter"
                    )
            files.append((path, 0.0))  # until a request asks for it
        with llama_cpp(file, context * parallel, files, parallel, host, port, Path(model).name) as server:
            yield server, {name: number for number, name in enumerate(named)}


def _check_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise LegolmError(f"--host {host} --port {port}: cannot be listened on ({brief(error)}); give others") from None


def _named(adapters: Sequence[str]) -> dict[str, Path]:
    """Paths by name. Raises `LegolmError` for one that is not there, and a name that is given twice."""
    named: dict[str, Path] = {}
    for given in adapters:
        name, equals, path = given.partition("=")
        path = path if equals else name
        if not Path(path).exists():
            raise LegolmError(f"--adapter {given}: there is no {path}; give NAME=DIR, a PEFT adapter or a LoRA file")
        name = name if equals else Path(path).stem
        if name in named:
            raise LegolmError(f"--adapter {given}: the name {name!r} is given twice; call them NAME=DIR")
        named[name] = Path(path)
    return named


def _file(model: str, quant: str, scratch: Path) -> tuple[Path, int, bool]:
    """A GGUF file of the model, the context to serve, and whether its channels are balanced."""
    path = Path(model)
    if not is_gguf(path):
        path = scratch / "model.gguf"
        export(model, "gguf", path, settings={"quant": quant})
    elif not path.is_file():
        raise LegolmError(f"{model}: there is no such file")
    fields = _fields(path, model)
    trained = fields.get(f"{fields.get('general.architecture')}.context_length")
    if not isinstance(trained, int):
        raise LegolmError(f"{model}: is no GGUF file of a model")
    return path, min(trained, MOST_CONTEXT), bool(fields.get(BALANCED))


def _fields(path: Path, where: str) -> dict[str, Any]:
    """The plain metadata of a GGUF file. Raises `LegolmError` for a file that is none."""
    import gguf

    try:
        return {key: one.contents() for key, one in gguf.GGUFReader(path).fields.items() if len(one.types) == 1}
    except (ValueError, OSError, LookupError) as error:
        raise LegolmError(f"{where}: is no GGUF file that can be read ({type(error).__name__})") from None
