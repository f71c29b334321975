"""An LLM, the blocks that are cut from it, and examples to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from legolm.api.door import door
from legolm.block import Block
from legolm.config import RowsConfig, block_at, validate
from legolm.data import Example, read_examples, with_system
from legolm.errors import LegolmError
from legolm.models import fingerprint, lasting_name, load_config, load_model, load_tokenizer, resolve, shape_of
from legolm.prune import cut_blocks, kept_block
from legolm.system import Progress, check_room


@dataclass(frozen=True)
class LLM:
    """The dense model that everything is cut from: `starter`, a local folder, or a hub id (owner/name).

    Raises `LegolmError` for one that is not there and for a family that is not known.
    """

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise LegolmError(f"LLM: `name` = {self.name!r}: must be text: `starter`, a folder or a hub id")
        shape_of(load_config(self.path))

    @cached_property
    def path(self) -> Path:
        """Its checkpoint's folder."""
        return resolve(self.name)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of its weights, hexadecimal: what blocks record."""
        return fingerprint(self.path)

    def load(self) -> tuple[Any, Any]:
        """(model, tokenizer) of transformers; float32 on the CPU, in eval mode, nothing trainable."""
        return load_model(self.path), load_tokenizer(self.path)


@door
def cut(
    llm: LLM,
    out: str | Path,
    *,
    method: str = "structured",
    recover: int = 0,
    calibration: str | Mapping[str, Any] = "pydoc",
    samples: int = 32,
    length: int = 256,
    seed: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    **target: Any,
) -> Block:
    """Cut a block out of `llm` into the folder `out`, and recover it by `recover` steps of distillation.

    `target` is one of `sparsity` (removed share of the decoder's linear weights), `pattern` ("2:4"), `params` ("70M"),
    `memory` ("150MB"), `speedup` (1.7), or a shape (`intermediate_size`, `num_key_value_heads`, `num_hidden_layers`; of
    a window `layers` by name, and `offset`); and the criterion's own settings. `calibration` is `starter-dates`,
    `starter`, `pydoc`, a text file or a file of conversations, of which `samples` of `length` tokens are read; or a
    config's section, {"text": file, "layout": "dolly"}.

    A block that is there and was cut by the same recipe is given as it is, so that a script can run again. Raises
    `LegolmError` for another one, and for a target that cannot be met.
    """
    folder = Path(out)
    if others := sorted({"name", "path"} & target.keys()):
        raise LegolmError(
            f"cut: `{others[0]}` = {target[others[0]]!r}: a block is called as its folder `out`; leave it out"
        )
    if not 0 <= seed < 2**63:
        raise LegolmError(f"cut: `seed` = {seed}: must be from 0 to 2**63 - 1")
    named = dict(calibration) if isinstance(calibration, Mapping) else {"text": calibration}
    text = {"samples": samples, "length": length} | named
    raw = {"method": method, "calibration": text} | target
    spec = block_at(folder, f"cut: `out` = {str(out)!r}", raw, recover, "cut")
    tokenizer = load_tokenizer(llm.path)
    if (found := kept_block(folder, llm.fingerprint, spec, seed, precision, tokenizer)) is not None:
        return found
    check_room(folder)
    wanted, model = [(spec, folder)], lasting_name(llm.name)
    (block,) = cut_blocks(llm.path, llm.fingerprint, wanted, seed, precision, Progress(), model, tokenizer=tokenizer)
    return block


@door
def read(
    source: str | Path | Sequence[str],
    *,
    layout: str = "auto",
    instruction: str | None = None,
    input: str | None = None,
    answer: str | None = None,
    messages: str | None = None,
    text: str | None = None,
    bad_rows: Literal["refuse", "skip"] = "refuse",
    system: str | None = None,
) -> list[Example]:
    """Conversations from files (JSON, JSONL, CSV, Parquet; patterns), `hub:owner/name[[:config]:split]`, or a list.

    `layout` is that of rows: alpaca, dolly, sharegpt, messages, pairs (prompt and completion as they stand) or text;
    `auto` takes each row as its fields say. The others name its fields where they are called otherwise: `instruction`,
    `input` beside it and `answer`, or `messages`, or `text`. `bad_rows` that are skipped are in none of it; `system` is
    put before each conversation without a system message. Raises `LegolmError` with the places of bad rows.
    """
    fields = {"instruction": instruction, "input": input, "answer": answer, "messages": messages, "text": text}
    rows = validate(RowsConfig, {"layout": layout, "fields": fields, "bad_rows": bad_rows}, "read")
    files = str(source) if isinstance(source, Path) else source
    return [with_system(example, system) for example in read_examples(files, rows, "read")]
