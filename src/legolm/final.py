"""What everyone ends with: normal checkpoints, each with its manifest and the adapter that is merged in it."""

from __future__ import annotations

from pathlib import Path

from legolm.adapter import Tensors, merge, save_adapter, save_factors, tensors_hash
from legolm.block import Block, Manifest, write_block
from legolm.config import RunConfig
from legolm.evaluation import OTHERWISE, save_familiar
from legolm.federate.server import Rounds, familiar_of
from legolm.models import carry, lasting_name, load_config, load_model, load_tokenizer, save_model
from legolm.plan import Plan
from legolm.runs import RunDir, lasting_base, seal
from legolm.system import Progress, atomic_folder


def write_final(
    folder: RunDir,
    config: RunConfig,
    plan: Plan,
    blocks: dict[str, Block],
    block_of: dict[str, str],
    rounds: Rounds,
    progress: Progress,
) -> None:
    """The LLM and every client's block with what they learned merged, each a normal checkpoint with its manifest."""
    left = [id for id in ["llm", *block_of] if not folder.final(id).exists()]
    if not left:
        return
    tokenizer, dtype = load_tokenizer(plan.base, config.data), load_config(plan.base).dtype
    llm_best, best = rounds.best("llm_validation"), rounds.best("validation")
    start = {number: rounds.start_hash(number) for number in {llm_best, best}}
    apart, examples = rounds.apart(), {client.id: client.examples for client in plan.clients}

    def write_one(partial: Path, client: str | None, factors: Tensors, begun: str, steps: int) -> None:
        block, number = blocks[block_of[client] if client else "llm"], best if client else llm_best
        model = load_model(block.path)
        merge(model, block.coverage, factors, config.lora.scaling)
        if not block.coverage.masks:
            base = str(lasting_base(block.path) if client else _llm_base(config.model, block.path))
            save_adapter(block.coverage, factors, config.lora.scaling, base, partial / "adapter")
        save_factors(factors, config.lora.scaling, begun, partial)
        save_model(model, tokenizer, partial, dtype)
        carry(plan.base, partial)
        held = [examples[client]] if client else list(examples.values())
        manifest = Manifest(
            name=block.name,
            method=block.method,
            base_fingerprint=block.base_fingerprint,
            coverage_hash=block.coverage.hash,
            parameters=block.parameters,
            sparsity=block.coverage.sparsity,  # a plain adapter leaves no zeros
            details={
                "client": client,
                "round": number,
                "personal_steps": steps,
                "examples": None if None in held else sum(one for one in held if one),
                "model": lasting_name(config.model),
            },
        )
        write_block(manifest, block.coverage, partial)

    changes_llm = config.federation.fitted or config.federation.quorum
    familiar = familiar_of(config, blocks["llm"]) if config.federation.personal == "by_input" else None
    with progress.stage("write final models", len(left)) as advance:
        for id in left:
            client = None if id == "llm" else id
            factors = rounds.final_factors(client)
            alone = client in apart or (client is None and changes_llm)  # no others have its frozen side, or its units
            begun = tensors_hash(factors) if alone else start[best if client else llm_best]
            with atomic_folder(folder.final(id)) as partial:
                write_one(partial, client, factors, begun, config.federation.personal_steps if client else 0)
                if client and familiar:
                    (partial / OTHERWISE).mkdir()
                    write_one(partial / OTHERWISE, client, rounds.adapter(client, best), start[best], 0)
                    save_familiar(familiar(client, rounds.away(client)), partial)
                seal(partial)
            advance(1)


def _llm_base(model: str, path: Path) -> str | Path:
    """What PEFT finds from any folder; nothing but legolm knows what `starter` is."""
    return path.resolve() if model == "starter" or Path(model).is_dir() else model
