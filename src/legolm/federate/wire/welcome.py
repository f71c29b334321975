"""What a device is told beside each request: which block it is about, and how it is to read its own data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from legolm.config import DataConfig, RowsConfig, RunConfig
from legolm.errors import PublicError
from legolm.federate.bridge import PIECE
from legolm.federate.wire.messages import Hash, Name, plain

MAX_FILES, MAX_PIECES = 1000, 1 << 20
Limit = Annotated[int, Field(ge=1)] | None
FileName = Annotated[
    str, Field(max_length=200, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$")
]


class _Told(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BlockFile(_Told):
    """A file of a block: its path there, its bytes, and the hash of the whole and of each piece of `PIECE` bytes."""

    name: FileName
    bytes: Annotated[int, Field(ge=0, le=1 << 44)]
    sha256: Hash
    pieces: Annotated[list[Hash], Field(max_length=MAX_PIECES)]


class OwnData(_Told):
    """How a device makes examples of its rows: layout, what it holds out, how many at most, what is put before."""

    rows: RowsConfig
    validation: Annotated[float, Field(gt=0, lt=1)]
    test: Annotated[float, Field(gt=0, lt=1)]
    limits: tuple[Limit, Limit, Limit]
    system: str | None
    part: Name
    seed: int

    @property
    def config(self) -> DataConfig:
        """The same as a config's section; its sources are the device's."""
        train, validation, test = self.limits
        limits = {"limit_train": train, "limit_validation": validation, "limit_test": test}
        held_out = {"validation": self.validation, "test": self.test}
        return DataConfig(**dict(self.rows), **held_out, **limits, system=self.system)  # type: ignore[arg-type]


class Welcome(_Told):
    """Of one client of a run with one block; without files where it is not about a block.

    `relay`: the server takes it for one, which answers for others.
    """

    run: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    client: Name
    block: Name
    relay: bool = False
    files: Annotated[list[BlockFile], Field(max_length=MAX_FILES)]
    data: OwnData

    @property
    def block_id(self) -> str:
        """The block's (`block_id`)."""
        return block_id(self.files)

    @property
    def bytes(self) -> int:
        """Of the block."""
        return sum(one.bytes for one in self.files)


def read_welcome(text: str) -> Welcome:
    """Raises `LegolmError` for what is none, as a server of another version may send."""
    try:
        found = Welcome.model_validate_json(text)
        _ = found.data.config  # what no section of a config holds, its rows cannot be read by
        return found
    except ValidationError as error:
        problem = error.errors()[0]
        said = plain(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}")
        raise PublicError(f"the server's welcome: {said}; is it of another version of legolm?") from None


def block_files(folder: Path) -> list[BlockFile]:
    """All files of a block's folder with their hashes."""
    return [_file(path, str(path.relative_to(folder))) for path in sorted(folder.rglob("*")) if path.is_file()]


def block_id(files: Sequence[BlockFile]) -> str:
    """Of what a block holds, whatever it is called: 32 hexadecimal digits."""
    content = json.dumps(sorted((one.name, one.sha256) for one in files))
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def rows_hash(data: OwnData) -> str:
    """Of how rows are read; whose they are is each client's own."""
    return hashlib.sha256(data.model_copy(update={"part": ""}).model_dump_json().encode()).hexdigest()


def own_data(config: RunConfig, client: str) -> OwnData:
    """What the config says of a client's rows."""
    data = config.data
    part = next(one.data or one.id for one in config.clients if one.id == client)
    assert isinstance(data.validation, float) and isinstance(data.test, float)  # the config's own check
    limits = data.limit_train, data.limit_validation, data.limit_test
    return OwnData(
        rows=RowsConfig(layout=data.layout, fields=data.fields, bad_rows=data.bad_rows),
        validation=data.validation,
        test=data.test,
        limits=limits,
        system=data.system,
        part=part,
        seed=config.seed,
    )


def _file(path: Path, name: str) -> BlockFile:
    whole, pieces = hashlib.sha256(), []
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            whole.update(piece)
            pieces.append(hashlib.sha256(piece).hexdigest())
    return BlockFile(name=name, bytes=path.stat().st_size, sha256=whole.hexdigest(), pieces=pieces)
