"""What a client keeps for its next round: what the way up lost of its change, and what was folded into its base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save

from legolm.adapter import Tensors
from legolm.federate.wire import TrainRequest
from legolm.system import open_tensors


def read_state(folder: Path, request: TrainRequest) -> Tensors:
    """What this client kept after the last round in which its update was added."""
    path = _file(folder, request.accepted)
    if request.phase != "round" or not request.accepted or not path.exists():
        return {}
    with open_tensors(path, "", "remove it: what was kept of earlier rounds is lost then") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)


def keep_state(write: Callable[[Path, bytes], None], folder: Path, request: TrainRequest, state: Tensors) -> str:
    """Write this round's state and give its hash; older ones than the round that stands are not needed any more."""
    if request.phase != "round" or not state:
        return ""
    path, content = _file(folder, request.round), save({key: one.contiguous() for key, one in state.items()})
    write(path, content)
    for old in path.parent.glob("*.safetensors"):
        if old.stem.isdecimal() and int(old.stem) < request.accepted:
            old.unlink()
    return hashlib.sha256(content).hexdigest()


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:04d}.safetensors"
