"""A LoRA adapter for llama.cpp, so that one block's file serves many."""

from __future__ import annotations

from pathlib import Path

from legolm.adapter import factor_key, parse_key
from legolm.export.adapter import check_unmasked, merged_reference
from legolm.export.gguf import EXACT_ASKED, PACKAGES, described, spans, verify
from legolm.export.gguf_balance import balance_of
from legolm.export.gguf_write import write_gguf, write_lora
from legolm.export.source import Source
from legolm.export.target import exporter
from legolm.models import load_model


def _check(source: Source) -> None:
    check_unmasked(source)
    described(source)


@exporter("gguf-adapter", packages=PACKAGES, extra="gguf", check=_check)
def gguf_adapter(source: Source, out: Path) -> list[str]:
    """One file, for the GGUF file of the block as it was cut; compared on that in f16."""
    layout, vocabulary = described(source)
    place = {layer: j for j, layer in enumerate(source.coverage.layers)}
    prefix, factors = source.coverage.shape.entry.layers, {}
    for layer, module, side in map(parse_key, source.factors):
        if side == "A":
            a, b = (source.factors[factor_key(layer, module, one)] for one in "AB")
            factors[f"{prefix}.{place[layer]}.{module}.weight"] = a, b
    balance = balance_of(load_model(source.bare), source.tokenizer, layout)
    write_lora(factors, layout, out, source.block.name, balance)
    base = source.scratch / "base.gguf"
    write_gguf(source.bare, base, layout, vocabulary, "f16", source.block.name, balance)
    reference = merged_reference(source, *spans(layout, EXACT_ASKED))
    found = verify(source, base, reference, "f16", vocabulary, adapters=[(out, 1.0)])
    return [f"for the block {source.bare}, as --to gguf writes it", f"llama.cpp, f16, with it: {found.said()}"]
