"""What tests in several rooms need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, 260 tokens in all, with the ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    """Checkpoint folder of a random model of a family: 2 layers, hidden 64, 96 neurons, 2 KV groups of 2 heads."""
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            config = AutoConfig.for_model(
                family,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                vocab_size=len(tokenizer),
                max_position_embeddings=512,
                tie_word_embeddings=True,
            )
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(config)
            folders[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(folders[family])
            tokenizer.save_pretrained(folders[family])
        return folders[family]

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text file for calibration: 8,000 bytes of sentences that differ."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    lines = [
        f"Sentence {i} says that {i * i} is the square of {i}, and {i % 7} its rest by seven.\n" for i in range(110)
    ]
    path.write_text("".join(lines))
    return path
