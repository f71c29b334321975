"""Two models of one client, of which each question gets the one that fits it.

As FedDPA has two adapters by input (Yang et al., NeurIPS 2024, arXiv 2403.19211): there their weights depend on how
near a question is to the client's own ones; here a question is one of them or not, so that both are plain models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from legolm.data import Familiar, Tokens
from legolm.system import open_tensors

OTHERWISE, FAMILIAR = "otherwise", "familiar.safetensors"
"""In a model's folder: the model for other questions, and what tells them."""


def save_familiar(familiar: Familiar, folder: Path) -> None:
    """Beside a model that has another one in `OTHERWISE`."""
    save_file(familiar.tensors(), folder / FAMILIAR)


def load_familiar(folder: Path) -> Familiar | None:
    """What tells the questions that are for the model in `folder`; None where all are. Raises `LegolmError`."""
    path = folder / FAMILIAR
    if not path.is_file():
        return None
    with open_tensors(path, "", "remove it to take this model for all questions") as handle:
        return Familiar.read({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118 (not a dict)


def by_input(folder: Path, examples: Sequence[Tokens]) -> dict[Path, list[int]]:
    """Which model answers which of these questions, by their places; `folder` all where it is the only one."""
    familiar, found = load_familiar(folder), dict[Path, list[int]]()
    for place, example in enumerate(examples):
        known = familiar is None or familiar.knows(example)
        found.setdefault(folder if known else folder / OTHERWISE, []).append(place)
    return found
