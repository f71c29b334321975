"""What a block holds of its LLM, drawn in text: a line a layer of the LLM."""

from __future__ import annotations

from collections.abc import Sequence

from legolm.block.coverage import Coverage

SHADES = " ░▒▓█"
BARS = " ▁▂▃▄▅▆▇█"
COLUMNS = {"groups": 16, "neurons": 28}
"""At most, of KV groups and of neurons: then each column stands for several."""


def picture(coverage: Coverage, sparsity: float) -> str:
    """Of each LLM layer its KV groups and neurons, dark where kept, and a bar for the kept share of each matrix.

    At most 80 signs wide. A block's `sparsity` is above its coverage's where its adapter stands beside zeros.
    """
    shape = coverage.shape
    rows = [("layer", f"KV groups ({shape.kv_groups})", f"neurons ({shape.neurons:,})", "kept of each matrix")]
    for layer in range(shape.layers):
        if layer not in coverage.layers:
            rows.append((str(layer), "cut", "", ""))
            continue
        place = coverage.layers.index(layer)
        groups = _shaded(coverage.groups[place], shape.kv_groups, COLUMNS["groups"])
        neurons = _shaded(coverage.neurons[place], shape.neurons, COLUMNS["neurons"])
        rows.append((str(layer), groups, neurons, "".join(_bar(coverage, layer, module) for module in shape.modules)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows]
    modules = ", ".join(module.rpartition(".")[2] for module in shape.modules)
    lines += [f"bars: {modules}", f"{1 - sparsity:.1%} of the decoder's linear weights are kept"]
    return "\n".join(lines)


def _shaded(kept: Sequence[int], size: int, columns: int) -> str:
    """A sign for each run of units, the darker the more of them are kept."""
    columns = min(columns, size)
    counts, sizes = [0] * columns, [0] * columns
    for unit in range(size):
        sizes[unit * columns // size] += 1
    for unit in kept:
        counts[unit * columns // size] += 1
    return "".join(_level(SHADES, count / whole) for count, whole in zip(counts, sizes, strict=True)) if columns else ""


def _bar(coverage: Coverage, layer: int, module: str) -> str:
    """Of one matrix of the LLM, the share of its weights that the block keeps."""
    rows, cols = coverage.shape.matrix(module)
    held = coverage.matrix(layer, module)
    mask = coverage.mask(layer, module)
    return _level(BARS, (held[0] * held[1] if mask is None else int(mask.sum())) / (rows * cols))


def _level(signs: str, share: float) -> str:
    """The sign of a share: the first for nothing alone, the last for all alone."""
    if share in (0, 1):
        return signs[-1 if share else 0]
    return signs[1 + min(int(share * (len(signs) - 2)), len(signs) - 3)]
