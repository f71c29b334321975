"""Cut a model that is larger than the memory it is cut in: random weights, real shapes.

    python benchmarks/big_model.py [--folder DIR] [--layers 28] [--samples 8] [--length 256]

Writes a Llama with the shape of Llama-3.2-3B (hidden 3,072, 28 layers, 8 KV groups, MLP 8,192, vocabulary 128,256;
bfloat16, 6.4 GB) layer by layer, cuts blocks from it in fresh processes, and reports seconds and peak resident memory
of each. Random weights: what is cut means nothing, what it costs does. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BLOCKS: list[dict[str, Any]] = [
    {"method": "wanda", "sparsity": 0.5},
    {"method": "structured", "num_key_value_heads": 4},
]
SLOW: list[dict[str, Any]] = [{"method": "structured", "intermediate_size": 4096}]
"""Half a minute a layer on one core, for the square matrices of 8,192: cut from the first two layers, whose peak memory
is that of all."""


def make(folder: Path, layers: int) -> None:
    """Write the model one layer at a time, and a tokenizer of single bytes."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from legolm.models import CheckpointWriter
    from random_model import byte_tokenizer

    config = LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128_256,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    writer = CheckpointWriter(folder, torch.bfloat16)
    for index in range(layers):
        layer = LlamaDecoderLayer(config, index)
        for name, parameter in layer.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.02)
        writer.add(f"model.layers.{index}.", layer.state_dict())
    writer.add("model.embed_tokens.", {"weight": torch.randn(config.vocab_size, config.hidden_size) * 0.02})
    writer.add("model.norm.", {"weight": torch.ones(config.hidden_size)})
    writer.close()
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def cut(folder: Path, out: Path, target: dict[str, Any], samples: int, length: int) -> dict[str, Any]:
    """In this process: cut one block."""
    from legolm.config import BlockConfig, CalibrationConfig
    from legolm.prune import cut_blocks
    from legolm.system import Progress

    text = CalibrationConfig(text="pydoc", samples=samples, length=length)
    began, cpu = time.perf_counter(), time.process_time()
    (block,) = cut_blocks(
        folder, "random", [(BlockConfig(name="block", calibration=text, **target), out)], 0, "bf16", Progress()
    )
    return {
        "target": target,
        "sparsity": round(block.sparsity, 4),
        "params": block.parameters,
        "wall_s": round(time.perf_counter() - began, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.target:
        with tempfile.TemporaryDirectory(dir=options.folder.parent) as out:
            target = json.loads(options.target)
            print(json.dumps(cut(options.folder, Path(out) / "block", target, options.samples, options.length)))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="legolm-big-") as room:
        folders = {}
        for layers in (options.layers, 2):
            folder = folders[layers] = Path(room) / f"model-{layers}"
            folder.mkdir()
            make(folder, layers)
        size = sum(file.stat().st_size for file in folders[options.layers].glob("*.safetensors"))
        print(f"model: {size / 1e9:.2f} GB", flush=True)
        for layers, target in [*((options.layers, target) for target in BLOCKS), *((2, target) for target in SLOW)]:
            folder = folders[layers]
            command = [sys.executable, __file__, "--folder", str(folder), "--target", json.dumps(target)]
            command += ["--samples", str(options.samples), "--length", str(options.length)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append({"layers": layers} | json.loads(output.splitlines()[-1]))
            print(rows[-1], flush=True)
    print(json.dumps({"model_gb": round(size / 1e9, 2), "rows": rows}))


if __name__ == "__main__":
    main()
