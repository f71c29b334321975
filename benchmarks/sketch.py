"""How near to the LLM are blocks that are cut by sums of what clients have, whole or in sketches of so many columns?

    python benchmarks/sketch.py [--columns 64 96 128]

Four clients with the dates of one language each sum second moments over 96 windows of 128 tokens of their own training
rows. A third of the neurons goes (`structured`), or half of the weights (`sparsegpt`, with and without its refit).
Beside: blocks cut on as much public text of the same form in other languages. KL(LLM ‖ block) in nats per token is over
the answers of 12 test rows a client. `mb` is what a client sends. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from legolm import config as configs
from legolm.config import BlockConfig, CalibrationConfig
from legolm.data import client_data, own_tokens, tokens_of
from legolm.models import fingerprint, load_config, load_model, load_tokenizer, resolve, shape_of
from legolm.prune import Statistics, collect, cut_blocks, flat, save_statistics, sent_bytes, sketched
from legolm.system import Progress, derive_seed

CONFIG = Path(__file__).parent.parent / "examples" / "dates.yaml"
LANGUAGES = ("fr", "de", "es", "it")
SAMPLES, LENGTH, ROWS = 96, 128, 12
BLOCKS: dict[str, dict[str, Any]] = {
    "structured": {"method": "structured", "intermediate_size": 1024},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
    "sparsegpt_no_refit": {"method": "sparsegpt", "sparsity": 0.5, "refit": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[64, 96, 128])
    columns = parser.parse_args().columns
    changes = [f"clients.{place}.data={language}" for place, language in enumerate(LANGUAGES)]
    config = configs.load(CONFIG, ["data.train=starter-languages", *changes])
    base, progress = resolve(config.model), Progress()
    shape, print_, tokenizer = shape_of(load_config(base)), fingerprint(base), load_tokenizer(base, config.data)
    data = client_data(config)
    settings = CalibrationConfig(samples=SAMPLES, length=LENGTH)
    own = {}
    for id, one in data.items():
        tokens = own_tokens(one.train, settings, tokenizer, config.seed)
        own[id] = (tokens.numel(), collect(base, print_, tokens, "full", "bf16", progress))
    rows = [tokens_of(one.test, tokenizer, LENGTH, "last")[i] for one in data.values() for i in range(ROWS)]
    wanted = answers(base, rows)

    def sums(count: int | None) -> Statistics:
        """Of all clients, as the server has them."""
        each = []
        for id, (tokens, found) in own.items():
            if count is None:
                each.append(Statistics.unflat(flat(found.sums.items()), tokens, shape, print_, "full"))
            else:
                seed = derive_seed(config.seed, "sketch", id)
                sent = sketched(found.sums.items(), count, seed)
                each.append(Statistics.restored(*sent, tokens, shape, print_, count, seed))
        for other in each[1:]:
            each[0].absorb(other)
        return each[0]

    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sums.safetensors"

        def measure(name: str, calibration: Callable[[], dict[str, Any]], mb: float) -> None:
            found[name] = {"mb": round(mb, 1)}
            given = calibration()
            for kind, target in BLOCKS.items():
                block = {"name": "b", "calibration": given, "recover": {"steps": 0}} | target
                spec, out = BlockConfig.model_validate(block), Path(folder) / f"{name}-{kind}"
                cut_blocks(base, print_, [(spec, out)], config.seed, "bf16", progress, "starter")
                found[name][kind] = round(divergence(wanted, answers(out, rows)), 3)
            print(name, found[name], flush=True)

        def collected(count: int | None) -> dict[str, Any]:
            save_statistics(sums(count), file)
            return {"statistics": [str(file)]}

        public = {"text": "starter-languages", "samples": len(LANGUAGES) * SAMPLES, "length": LENGTH}
        measure("public", lambda: public, 0)
        for count in (*columns, None):
            name = "whole" if count is None else f"{count}_columns"
            measure(name, lambda: collected(count), sent_bytes(shape, "full", count) / 1e6)  # noqa: B023 (used at once)
    print(json.dumps(found))


def answers(model: Path, rows: list[Any]) -> list[Tensor]:
    """Log-probabilities (answer tokens, vocabulary) of each row's answer."""
    loaded, found = load_model(model, torch.float32).eval(), []
    with torch.no_grad():
        for row in rows:
            logits = loaded(input_ids=torch.tensor(row.ids)[None]).logits[0, row.answer - 1 : -1]
            found.append(torch.log_softmax(logits.float(), -1))
    return found


def divergence(wanted: list[Tensor], found: list[Tensor]) -> float:
    """KL in nats, mean over answers of the mean over tokens."""
    return fmean(float((a.exp() * (a - b)).sum(-1).mean()) for a, b in zip(wanted, found, strict=True))


if __name__ == "__main__":
    main()
