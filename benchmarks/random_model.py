"""Models of random weights in a given shape, for what depends on shapes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from legolm.models import decoder_layers, dtype_of, family_of


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, 256 in all, and one that ends the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<|end|>", pad_token="<|end|>")


def llama(**sizes: Any) -> LlamaConfig:
    """A Llama's config. Sizes in the config's words."""
    return LlamaConfig(tie_word_embeddings=True, architectures=["LlamaForCausalLM"], **sizes)


def random_model(config: LlamaConfig, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """The causal LM, made on the device, in eval mode."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def as_loaded(model: Any, precision: Any) -> Any:
    """The model as `load_model` gives it: float32, linear weights in the products' dtype, nothing trainable."""
    model.requires_grad_(False).float()
    for layer in decoder_layers(model):
        for module in family_of(model.config).modules:
            layer.get_submodule(module).to(dtype_of(precision))
    model.config.use_cache = False
    return model


def save_random(folder: Path, config: LlamaConfig, seed: int = 0) -> None:
    """A float32 checkpoint of random weights, with the byte tokenizer."""
    random_model(config, "cpu", torch.float32, seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
