"""What a run would refuse of its files and clients: the plan refuses it."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from legolm.adapter import FACTORS
from legolm.aggregate import make_scheme
from legolm.block import Block, read_block
from legolm.config import AUTO, CLIENTS, SCHEMES, ClientConfig, RowsConfig, RunConfig
from legolm.data import (
    calibration_tokens,
    check_length,
    check_samples,
    check_text,
    check_tokens,
    is_bundled,
    paths_of,
    read_text,
)
from legolm.errors import LegolmError
from legolm.federate.server import whitening_text
from legolm.federate.wire import MAX_SUMS_BYTES
from legolm.models import Shape, check_weights, fingerprint, load_config, resolve
from legolm.prune import check_recovery, check_statistics, clients_needs, clients_sketch, needs_of, sent_bytes
from legolm.runs import HASHES, check_sealed
from legolm.trust import server_files


def given_blocks(config: RunConfig, base: Path) -> dict[str, Block]:
    """Blocks that are there already, by name.

    Raises `LegolmError` for one of another LLM, one that learned, and one that is not what a run wrote.
    """
    found = {spec.name: read_block(Path(spec.path)) for spec in config.blocks if spec.path is not None}
    own = fingerprint(base) if found else ""
    for name, block in found.items():
        if block.base_fingerprint != own:
            raise LegolmError(f"block {name}: {block.path} was cut from another LLM than {config.model}; cut it anew")
        if (block.path / FACTORS).is_file():
            raise LegolmError(f"block {name}: {block.path} has learned something already; give the block as it was cut")
        check_weights(block.path)
        if (block.path / HASHES).is_file():  # of a run
            check_sealed(block.path)
    return found


def check_files(config: RunConfig, base: Path, shape: Shape) -> tuple[str, ...]:
    """What there is to say of calibration rows. Raises `LegolmError` when a file that the run needs is not there, or is
    none for the LLM at `base`.
    """
    read, said, own = set(), list[str](), ""  # most blocks see one text
    for spec in config.cuts:
        if spec.method not in ("dense", "given"):
            where = f"block {spec.name}: "
            rows = RowsConfig(**{name: getattr(spec.calibration, name) for name in RowsConfig.model_fields})
            texts = []
            given = spec.calibration.statistics
            if given and given != CLIENTS:
                own = own or fingerprint(base)
                check_statistics([Path(file) for file in given], shape, own, needs_of(spec), where)
            recovers = spec.recover.most_steps > 0
            if not given or (recovers and not spec.recover.text):
                texts.append((spec.calibration.text, "calibration.text"))
            if recovers and spec.recover.text:
                texts.append((spec.recover.text, "recover.text"))
            for text, field in texts:
                if (text, rows) not in read:
                    said += check_text(text, rows, f"{where}{field}")
                    read.add((text, rows))
    protect = config.federation.protect
    if protect is not None and not protect.generated:
        said += check_text(protect.text, protect, "federation.protect.text")
    for name, asked in config.report:
        if asked and importlib.util.find_spec(name) is None:
            raise LegolmError(f"report.{name}: needs {name}; run: pip install 'legolm[{name}]', or set it to false")
    superlink = config.federation.superlink
    if config.federation.engine == "deployment" and superlink.address is None:
        server_files(Path(superlink.home))
    if superlink.root_certificates is not None and not Path(superlink.root_certificates).is_file():
        raise LegolmError(f"federation.superlink.root_certificates: no file {superlink.root_certificates}")
    for field, folder in (("lora.start", config.lora.start), ("aggregate.start", config.aggregate.start)):
        if folder and not Path(folder).is_dir():
            raise LegolmError(f"{field}: no folder {folder}")
    return tuple(said)


def check_sums(config: RunConfig, shape: Shape, llm_bytes: int) -> tuple[str, ...]:
    """What asking clients for sums of their text costs. Raises `LegolmError` where they would be too large to travel.

    `llm_bytes` are those of the LLM, which devices fetch for it.
    """
    needs = clients_needs(config.cuts)
    field = f"federation.{'regmean' if config.federation.regmean else 'protect'}" if config.federation.fitted else ""
    field = field or ("aggregate.whiten" if make_scheme(config.aggregate).whitened == CLIENTS else "")
    if field and needs != "full":
        raise LegolmError(
            f"{field}: needs all second moments, and no block here asks clients for more than squares; give "
            "calibration.statistics: clients to one whose cut reads them all"
        )
    readers = {name.rpartition(".")[2] for name, module in shape.modules.items() if module.cols != "hidden"}
    if config.federation.regmean and not readers & set(config.lora.targets or readers):
        raise LegolmError(
            f"federation.regmean: fits what reads units, {' and '.join(sorted(readers))}, and lora.targets has none; "
            "add one, or set it to false"
        )
    hidden = {name.rpartition(".")[2] for name, module in shape.modules.items() if module.cols == "hidden"}
    if make_scheme(config.aggregate).whitened is not None and not hidden & set(config.lora.targets or hidden):
        raise LegolmError(
            f"aggregate.whiten: makes factors that read the hidden state, of {', '.join(sorted(hidden))}, and "
            "lora.targets has none; add one, or take it out"
        )
    if needs == "nothing":
        return ()
    asked = next(spec.calibration for spec in config.cuts if spec.calibration.statistics == CLIENTS)
    if asked.samples * asked.length < shape.hidden:
        raise LegolmError(
            f"calibration.statistics {CLIENTS!r}: sums over {asked.samples} x {asked.length} tokens, fewer than the "
            f"hidden size, {shape.hidden}, would tell them; ask for more samples"
        )
    columns = clients_sketch(config.cuts, shape)
    size, whole = (sent_bytes(shape, needs, one) for one in (columns, None))
    if size > MAX_SUMS_BYTES:
        what, out = "all second moments", "set calibration.sketch"
        if columns is not None:
            what, out = f"second moments in sketches of {columns} columns", "lower calibration.sketch"
        raise LegolmError(
            f"calibration.statistics {CLIENTS!r}: {what} of this LLM are {size / 1e6:,.0f} MB, a message "
            f"holds {MAX_SUMS_BYTES / 1e6:,.0f}; {out}, or take a criterion that reads squares only, or files of "
            "legolm calibrate"
        )
    said = f"Blocks are cut by sums of the clients' own text: {size / 1e6:,.1f} MB of each"
    if columns is not None:
        said += f", in sketches of {columns} columns (whole: {whole / 1e6:,.0f} MB)"
    if config.federation.engine == "deployment":
        said += f", for which a device fetches the LLM, {llm_bytes / 1e6:,.0f} MB"
    return (f"{said}. The server sees each client's: they are its text in aggregate, without noise.",)


def check_texts(config: RunConfig, tokenizer: Any) -> None:
    """Raise `LegolmError` when a text to calibrate or recover on names a token that the model has no embedding for, has
    too few samples, or longer ones than the model takes.
    """
    found: dict[str, str] = {}
    for spec in config.cuts:
        texts = {"calibration": spec.calibration.text}
        if spec.recover.text and spec.recover.most_steps:
            texts["recover"] = spec.recover.text
        if spec.method not in ("dense", "given"):
            found |= {f"block {spec.name}: {section}.text": text for section, text in texts.items()}
    protect, whitened = config.federation.protect, make_scheme(config.aggregate).whitened
    most = load_config(resolve(config.model)).max_position_embeddings
    if protect is not None:
        check_length(protect.length, most, "federation.protect")
        protect = None if protect.generated else protect
    drawn = {spec.calibration: f"block {spec.name}: calibration" for spec in config.cuts if needs_of(spec) != "nothing"}
    for calibration, field in drawn.items():
        check_length(calibration.length, most, field)
    if protect is not None:
        found["federation.protect.text"] = protect.text
    if whitened not in (None, CLIENTS):
        found["aggregate.whiten"] = whitened
    for field, text in found.items():
        if is_bundled(text) or text.startswith("hub:"):
            continue
        files = (path for path in paths_of(text, field) if path.suffix.lower() not in (".parquet", ".gz"))
        check_tokens((read_text(path, field) for path in files), tokenizer, field)
    for calibration, field in drawn.items():
        if not calibration.statistics:
            check_samples(calibration, tokenizer, config.seed, field)
    check_recovery([spec for spec in config.cuts if spec.path is None], tokenizer, config.seed, most)
    if protect is not None:
        calibration_tokens(protect, tokenizer, config.seed, field="federation.protect")
    if whitened not in (None, CLIENTS):
        calibration_tokens(whitening_text(whitened), tokenizer, config.seed, field="aggregate.whiten")


def _check_there(config: RunConfig, taking: Sequence[ClientConfig]) -> None:
    """Raise `LegolmError` for a round in which fewer of those who may take part are asked than it needs."""
    federation, secure = config.federation, config.privacy.secure
    needs = {
        "federation.min_replies": (federation.min_replies, "lower it"),
        "privacy.secure": (secure.least if secure else 1, "take it out"),
    }
    for number in range(1, federation.rounds + 1):
        there = sum(client.there(number) for client in taking)
        if not there:
            raise LegolmError(
                f"round {number}: no client takes part; change clients' joins and leaves, or federation.capable"
            )
        asked = federation.drawn(there)
        for field, (least, remedy) in needs.items():
            if asked < least:
                raise LegolmError(
                    f"{field}: needs {least} clients, and {asked} are asked in round {number}; {remedy}, or change "
                    "clients' joins and leaves, federation.fraction or capable"
                )


def check_clients(config: RunConfig, block_of: Mapping[str, str], dense: Collection[str]) -> None:
    """Raise `LegolmError` when the scheme cannot put these clients' updates together; `dense` are whole LLMs' names."""
    if config.federation.mode == "pooled":
        return
    taking = [c for c in config.clients if not config.federation.capable or block_of[c.id] in dense]
    if not taking:
        raise LegolmError("federation.capable: no client holds a dense block; add one or set it to false")
    if config.federation.mode == "alone":
        return
    _check_there(config, taking)
    scheme, first, weight = make_scheme(config.aggregate), taking[0], config.aggregate.weight
    if weight != "capped" and not scheme.weighs():
        raise LegolmError(
            f"aggregate.weight {weight!r}: scheme {config.aggregate.scheme!r} weighs clients in its own way; "
            "take the weight out"
        )
    turning = next((client.id for client in taking if client.blocks), None)
    if turning and (scheme.folds or (config.federation.error_feedback and config.federation.codec != "none")):
        what = "aggregate.scheme" if scheme.folds else "federation.error_feedback"
        raise LegolmError(
            f"{what}: client {turning!r} trains another block in each round, which what it keeps of the last one does "
            f"not fit; take {'another scheme' if scheme.folds else 'error_feedback: false'}, or one `block`"
        )
    if scheme.unequal == "block":
        return
    for client in taking:
        if client.layers or client.blocks or (client.block == AUTO and len(config.blocks) > 1):
            field, what = ("layers", "some layers") if client.layers else ("blocks", "another block in each round")
            if client.block == AUTO:
                field, what = f"block: {AUTO}", "the block that its device can hold"
            raise LegolmError(
                f"aggregate.scheme {config.aggregate.scheme!r}: client {client.id!r} trains {what}, and it "
                f"averages equal adapters; take one of {SCHEMES.having('unequal', 'block')}, or take `{field}` out"
            )
    for client in taking:
        block, rank = block_of[client.id], client.rank or config.lora.rank
        why = ""
        if scheme.dense and block not in dense:
            why = f"holds block {block!r}, and it works on the whole LLM"
        elif block != block_of[first.id] and not {block, block_of[first.id]} <= set(dense):
            why = f"holds block {block!r} and {first.id!r} block {block_of[first.id]!r}, and it averages equal shapes"
        elif scheme.unequal == "no" and rank != (first.rank or config.lora.rank):
            why = f"has rank {rank} and {first.id!r} {first.rank or config.lora.rank}, and it averages equal ranks"
        if why:
            raise LegolmError(
                f"aggregate.scheme {config.aggregate.scheme!r}: client {client.id!r} {why}; "
                f"take one of {SCHEMES.having('unequal', 'block')}, "
                "or leave such clients out (federation.capable: true)"
            )
