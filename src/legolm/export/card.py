"""The model card of a block: what it is cut from, what it holds, what it was measured at, and under what licence."""

from __future__ import annotations

from typing import Any

from legolm.block import picture, without_places
from legolm.errors import LegolmError
from legolm.evaluation import tokens_per_second
from legolm.export.source import Source
from legolm.models import count_parameters, folder_bytes
from legolm.runs import ClientSummary, LlmSummary, Summary, run_of
from legolm.system import machine, versions

FRONT = """---
{licence}library_name: transformers
pipeline_tag: text-generation
tags: [legolm, pruned]
---
"""


def model_card(source: Source, model: Any) -> str:
    """Markdown with the front matter that the hub reads."""
    block, coverage = source.block, source.coverage
    licence = f"license: {source.licence}\n" if source.licence else ""
    llm = without_places(block.details.get("model")) or "an LLM that its manifest does not name"
    cut = (
        "as it is"
        if not source.is_block
        else f"cut by `{block.method}`, {block.sparsity:.1%} of the decoder's linear weights removed"
    )
    lines = [
        FRONT.format(licence=licence),
        f"# {source.name}",
        f"A small language model of [legolm](https://arxiv.org/abs/2410.18287): {llm}, {cut}.",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "model = AutoModelForCausalLM.from_pretrained(FOLDER)\ntokenizer = AutoTokenizer.from_pretrained(FOLDER)\n```",
        "## What it holds",
        f"```\n{picture(coverage, block.sparsity)}\n```",
        "## Size and speed",
        f"{count_parameters(source.path) / 1e6:,.1f} M parameters, {folder_bytes(source.path) / 1e6:,.1f} MB; "
        f"{tokens_per_second(model, 'fp32'):,.1f} tokens a second (transformers, float32, one answer at a time) on "
        f"{machine()['cpu']}, {machine()['cores']} cores.",
        "## Quality",
        _quality(source),
        "## Where it comes from",
        _table(_provenance(source)),
        "## Licence",
        f"That of the LLM: {source.licence}."
        if source.licence
        else "That of the LLM, which its files do not name here: look there.",
    ]
    return "\n\n".join(lines) + "\n"


def _quality(source: Source) -> str:
    found = _summary(source)
    if found is None:
        return "Not measured in a run. `legolm eval` compares it with its LLM."
    summary, own = found
    if isinstance(own, LlmSummary):
        if own.loss_before is None or own.loss_after is None:
            return "Not measured in its run."
        return (
            f"Loss (nats per answer token) on all clients' test data: {own.loss_before:.3f} before the federation, "
            f"{own.loss_after:.3f} after."
        )
    rows = ["| | loss (nats per answer token) | exact answers |", "|---|---|---|"]
    for stage, loss in own.loss("own").items():
        exact = own.exact_match("own").get(stage)
        rows.append(f"| {stage}, own test data | {loss:.3f} | {'' if exact is None else f'{exact:.0%}'} |")
    return "\n".join([f"As the client `{own.id}` of the run `{summary.run}` measured it:\n", *rows])


def _summary(source: Source) -> tuple[Summary, ClientSummary | LlmSummary] | None:
    """Of a run's final model, what the run measured of it; None of other models, and where an adapter was added."""
    run = run_of(source.folder)
    if source.adapter is not None or run is None:
        return None
    try:
        summary = Summary.read(run.path)
    except LegolmError:  # not finished
        return None
    client = source.block.details.get("client")
    if client is None:
        return summary, summary.llm
    return next(((summary, one) for one in summary.clients if one.id == client), None)


def _provenance(source: Source) -> dict[str, object]:
    block, found = source.block, without_places(source.block.details)
    rows: dict[str, object] = {
        "LLM": found.pop("model", None) or "not recorded",
        "its fingerprint": block.base_fingerprint or "not recorded",
    }
    if source.is_block:
        rows |= {"block": block.name, "coverage": source.coverage.hash}
    rows |= {name: value for name, value in found.items() if value is not None}
    if source.adapter is not None:
        rows["adapter"] = "merged at export"
    return rows | {"written by": ", ".join(f"{name} {found}" for name, found in versions().items())}


def _table(rows: dict[str, object]) -> str:
    lines = [f"| {name} | `{str(value).replace('|', ' ')}` |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
