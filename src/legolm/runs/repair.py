"""What a run wrote is checked by its hashes: what can be made again is taken away, and what cannot is an error."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from legolm.config import RunConfig
from legolm.errors import LegolmError
from legolm.runs.folder import UPDATES, RunDir
from legolm.runs.records import ANEW, Record, RoundRecord, dump_sealed, read_sealed
from legolm.runs.store import check_state, read_stage
from legolm.system import atomic_write, file_hash

HASHES = "hashes.json"
REMEDY = "restore it, or let `legolm run --resume` make it again"


class Hashes(Record):
    """`hashes.json` of a block's or final model's folder: of each other file in it, by its path there."""

    schema_number: Literal[2] = 2
    files: dict[str, str]


def seal(folder: Path, *names: str) -> None:
    """Write the hashes of these files in a folder, or of all that it holds."""
    paths = [folder / name for name in names] or _files(folder)
    files = {str(path.relative_to(folder)): file_hash(path) for path in paths}
    atomic_write(folder / HASHES, dump_sealed(Hashes(files=files)))


def reseal(folder: Path, file: Path) -> None:
    """Write the hash of a file that legolm itself changed in a sealed folder; the others stay as they are."""
    known = read_sealed(folder / HASHES, Hashes).files
    files = known | {str(file.relative_to(folder)): file_hash(file)}
    atomic_write(folder / HASHES, dump_sealed(Hashes(files=files)))


def check_sealed(folder: Path) -> dict[str, str]:
    """The hashes of a sealed folder. Raises `LegolmError` with the first file that is lost or not what was written."""
    known = read_sealed(folder / HASHES, Hashes, "let `legolm run --resume` make it again").files
    for name, wanted in known.items():
        if not (folder / name).is_file():
            raise LegolmError(f"{folder / name}: is lost; {REMEDY}")
        if file_hash(folder / name) != wanted:
            raise LegolmError(f"{folder / name}: is not what the run wrote (its hash differs); {REMEDY}")
    return known


def mend(run: RunDir, config: RunConfig, note: Callable[[str], None]) -> None:
    """Take away what `damages` finds, and say so. Raises `LegolmError` as it does."""
    _keep_weights(run, config)  # while a damaged block of an earlier version still says what it was
    for path in damages(run, config, note):
        shutil.rmtree(path)


def damages(run: RunDir, config: RunConfig, note: Callable[[str], None]) -> list[Path]:
    """Folders of damaged blocks, final models and clients' stages, which are made again; each is said, as lost blocks.

    Raises `LegolmError` for what cannot be made again: a round, what clients keep for their next one, and what the run
    stands on.
    """
    done, weights = run.rounds_done(), run.identity().blocks
    records = [_check_round(run.round(number), note) for number in range(done + 1) if run.round(number).exists()]
    if config.federation.engine != "deployment":  # else it is on the devices
        _check_clients(run, records)
    found = _after(run, done)
    for path in found:
        note(f"{path}: is made again, for an earlier round is not there")
    stages = [run.client_stage(stage, client.id) for stage in ("local", "personal") for client in config.clients]
    finals = [run.final(name) for name in ("llm", *(client.id for client in config.clients))]
    checks: list[tuple[Path, Callable[[], object]]] = [
        *((path, partial(_check_stage, path)) for path in stages if path.exists()),
        *(
            (path, partial(_check_block, path, weights.get(block.name)))
            for block in config.blocks
            if (path := run.block(block.name)).exists() or block.name in weights
        ),
        *((path, partial(check_sealed, path)) for path in finals if path.exists()),
    ]
    gone = set(found)
    for path, check in checks:
        if gone.isdisjoint((path, path.parent)) and _is_damaged(path, check, note) and path.exists():
            found.append(path)
    return found


def drop_damaged(folder: Path, note: Callable[[str], None]) -> None:
    """Take away a sealed folder, if it is there, that is not what was written, and say that it is made again."""
    if folder.exists() and _is_damaged(folder, partial(check_sealed, folder), note):
        shutil.rmtree(folder)


def check_blocks(run: RunDir, config: RunConfig) -> None:
    """Keep in `run.json` which weights blocks have, once for all: what rounds learn is for these.

    Raises `LegolmError` for a block that was made again and came out otherwise; it is taken away.
    """
    known = _keep_weights(run, config)
    for block in config.blocks:
        path = run.block(block.name)
        if _weights(path) != known.get(block.name):
            shutil.rmtree(path)
            came = "other weights came" if block.path is None else f"{block.path} has other weights now"
            raise LegolmError(f"{path}: cannot be made again as it was ({came}); restore it, or {ANEW}")


def _check_round(path: Path, note: Callable[[str], None]) -> RoundRecord:
    record = read_stage(path)
    assert isinstance(record, RoundRecord)
    check_state(path, record)
    for client, wanted in record.updates.items():
        file = path / UPDATES / f"{client}.safetensors"
        if not file.is_file() or file_hash(file) != wanted:
            note(f"{file}: is lost or not what the client sent; nothing can be left out of this run (legolm ablate)")
    return record


def _check_clients(run: RunDir, records: list[RoundRecord]) -> None:
    """What each client kept after its last round that counted: its next one goes on from there."""
    last = {
        id: (record.tags.get(id, record.round), training.state)
        for record in records
        for id, training in record.train.items()
    }
    for id, (number, wanted) in last.items():
        file = run.client_state(id) / f"{number:04d}.safetensors"
        if wanted and (not file.is_file() or file_hash(file) != wanted):
            raise LegolmError(
                f"{file}: is lost or not what client {id} kept (its hash differs from that in {run.round(number)}); "
                f"restore it, or {ANEW}"
            )


def _after(run: RunDir, done: int) -> list[Path]:
    """Rounds after the first that is missing, and personal steps that went on from them."""
    rounds = [path for path in sorted(run.round(0).parent.glob("[0-9]*")) if path.name.isdecimal()]
    later = [path for path in rounds if int(path.name) > done]
    if not run.round(0).exists():
        later = [*rounds, run.path / "local"]
    followers = [run.path / "personal", *run.models()] if later else []
    return [path for path in [*later, *followers] if path.exists()]


def _check_stage(path: Path) -> None:
    check_state(path, read_stage(path))


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != HASHES)


def _is_damaged(path: Path, check: Callable[[], object], note: Callable[[str], None]) -> bool:
    try:
        check()
    except LegolmError as error:
        what = str(error).partition(";")[0]  # without its way out, which is this one
        note(f"{what}; {path} is made again")
        return True
    return False


def _check_block(path: Path, weights: dict[str, str] | None) -> None:
    if not path.exists():
        raise LegolmError(f"{path}: is lost")
    check_sealed(path)
    if weights is not None and _weights(path) != weights:
        raise LegolmError(f"{path}: is another block than the run's")


def _keep_weights(run: RunDir, config: RunConfig) -> dict[str, dict[str, str]]:
    """Of each block that was ever there, the hashes of its weights, in `run.json` from now on.

    They stand outside the block's folder, so that they outlast it.
    """
    identity = run.identity()
    found = {block.name: _weights(run.block(block.name)) for block in config.blocks}
    known = {name: weights for name, weights in found.items() if weights} | identity.blocks
    if known != identity.blocks:
        atomic_write(run.identity_file, dump_sealed(identity.model_copy(update={"blocks": known})))
    return known


def _weights(block: Path) -> dict[str, str]:
    """Hashes of a block's weights as its seal has them; none where that cannot be read."""
    try:
        files = read_sealed(block / HASHES, Hashes).files
    except LegolmError:
        return {}
    return {name: value for name, value in files.items() if name.endswith(".safetensors")}
