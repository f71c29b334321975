"""What is recovery worth? Perplexity of a block merely cut and recovered, beside the dense LLM trained alike.

    python benchmarks/recover.py --text TEST.txt --calibration VALID.txt [--model starter] [--sparsity 0.5]
        [--minutes 10] [--steps 1000] [--batch-size 4] [--learning-rate 2e-3] [--rank 32]

A structured block is cut and distilled from the LLM on the calibration text for some minutes, with as many threads as
there are cores. Text of the test's own kind flatters, so `dense_trained` is the LLM after as many steps of next-token
training, of a LoRA of the same rank, with the same optimizer on the same windows (it cannot be distilled from itself).
Perplexity is over windows of 1,024 test tokens, the first ten. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch

from legolm.block import Coverage
from legolm.config import BlockConfig, CalibrationConfig, RecoverConfig
from legolm.data import Tokens, calibration_tokens, read_text
from legolm.evaluation import perplexity
from legolm.models import (
    Head,
    answer_losses,
    choose_precision,
    fingerprint,
    hidden_states,
    lean,
    load_model,
    load_tokenizer,
    pack,
    resolve,
    shape_of,
)
from legolm.prune import cut_blocks
from legolm.prune.recover import recover, teacher_of, trainable
from legolm.system import Progress


def train_dense(model: Any, spec: BlockConfig, tokenizer: Any, steps: int) -> None:
    """Next-token training on recovery's windows, in its order and with its optimizer."""
    recipe, precision = spec.recover, choose_precision("auto")
    wanted = {"samples": steps * recipe.batch_size}
    windows = calibration_tokens(spec.calibration.model_copy(update=wanted), tokenizer, 1, fewer=True)
    coverage = Coverage.full(shape_of(model.config))
    with trainable(model, coverage, recipe, precision, 0) as weights, lean(model, precision):
        head = Head.of(model, precision)
        optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * (1 - step / steps)
            places = [(step * recipe.batch_size + i) % len(windows) for i in range(recipe.batch_size)]
            packing = pack([Tokens(tuple(windows[place].tolist()), 1) for place in places], model.device)
            losses = answer_losses(hidden_states(model, packing)[packing.predict], head, packing.labels)
            losses.mean().backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--text", type=Path, required=True, help="test text")
    parser.add_argument("--calibration", required=True, help="text to cut and to recover on")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--steps", type=int, default=1000, help="at most; fewer make the learning rate fall sooner")
    parser.add_argument("--batch-size", type=int, default=4, help="windows of 512 tokens a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=32, help="of a LoRA; 0 trains the weights themselves")
    options = parser.parse_args()
    base, precision = resolve(options.model), choose_precision("auto")
    tokenizer = load_tokenizer(base)
    text = torch.tensor(tokenizer.encode(read_text(options.text, "--text"), add_special_tokens=False, verbose=False))
    spec = BlockConfig(
        name="half",
        method="structured",
        sparsity=options.sparsity,
        calibration=CalibrationConfig(text=options.calibration, samples=32, length=512),
        recover=RecoverConfig(
            steps=options.steps,
            minutes=options.minutes,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            rank=options.rank or None,
        ),
    )

    def measured(model: Any) -> float:
        return round(perplexity(model, text, 1024, "bf16", 10), 2)

    found: dict[str, Any] = {"threads": torch.get_num_threads(), "dense": measured(load_model(base))}
    with tempfile.TemporaryDirectory(prefix="legolm-recover-") as folder:
        merely = spec.model_copy(update={"recover": RecoverConfig(steps=0)})
        [block] = cut_blocks(base, fingerprint(base), [(merely, Path(folder) / "half")], 0, precision, Progress())
        model = load_model(block.path)
        found["cut"] = measured(model)
        print(found, flush=True)
        with teacher_of(base, precision, model.device, 1) as teacher:
            assert teacher is not None
            found["recovery"] = recover(model, block.coverage, teacher, tokenizer, spec, precision, 0, lambda _: None)
        found["recovered"] = measured(model)
        found["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        print(found, flush=True)
    dense = load_model(base)
    train_dense(dense, spec, tokenizer, int(found["recovery"]["steps"]))
    found["dense_trained"] = measured(dense)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
