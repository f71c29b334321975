"""The peer of benchmarks/prune.py: llm-compressor, run by the Python of its own environment.

    PEER_PYTHON benchmarks/prune_peer.py MODEL TOKENS.safetensors METHOD SPARSITY PATTERN OUT

Prunes with the same calibration tokens and one thread, writes a plain checkpoint and prints one JSON object.
"""

from __future__ import annotations

import json
import resource
import sys
import time


def main() -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_path, tokens_path, method, sparsity, pattern, out = sys.argv[1:]
    torch.set_num_threads(1)
    tokens = load_file(tokens_path)["tokens"]
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    kind = SparseGPTModifier if method == "sparsegpt" else WandaPruningModifier
    structure = "0:0" if pattern == "unstructured" else pattern
    recipe = kind(sparsity=float(sparsity), mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"])
    began = time.process_time()
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(model_path),
        dataset=rows,
        recipe=recipe,
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
    )
    cpu_s = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model.save_pretrained(out, save_compressed=False)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(out)
    print(json.dumps({"cpu_s": round(cpu_s, 1), "peak_rss_mb": round(peak / 1e6)}))


if __name__ == "__main__":
    main()
