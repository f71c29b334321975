"""Text that a model writes by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from legolm.data import begin
from legolm.models import load_model, load_tokenizer, save_model, written
from legolm.system import Progress

CPU = torch.device("cpu")


def test_tokens_are_drawn_as_the_model_gives_them(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Their log-likelihood is minus the entropy of what the model gives, in the mean of 20,000 of them."""
    base, tokenizer = tiny("llama"), load_tokenizer(tiny("llama"))
    model: Any = load_model(base)
    model.get_input_embeddings().weight.mul_(4)  # a random model gives all tokens about alike
    save_model(model, tokenizer, tmp_path / "sharp", torch.float32)
    before = torch.random.get_rng_state()
    found = written(tmp_path / "sharp", tokenizer, [3, 4], (320, 66), 7, "fp32", CPU, Progress())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (
        found.shape == (320, 66) and found.dtype == torch.int64 and bool((found[:, :2] == torch.tensor([3, 4])).all())
    )
    special = torch.tensor(tokenizer.all_special_ids)
    assert not bool(torch.isin(found[:, 2:], special).any())
    with torch.no_grad():
        logits = load_model(tmp_path / "sharp")(input_ids=found).logits[:, 2:-1].double()
    logits[..., special] = -torch.inf
    logs = torch.log_softmax(logits, -1)
    said = logs.gather(2, found[:, 3:, None]).squeeze(2)
    entropy = -(logs.exp() * logs.nan_to_num(neginf=0)).sum(2)
    assert 0.5 < float(entropy.mean()) < 5  # of ln 257 = 5.5
    surprise = -said - entropy
    assert abs(float(surprise.mean())) < 4 * float(surprise.std()) / surprise.numel() ** 0.5
    again = written(tmp_path / "sharp", tokenizer, [3, 4], (320, 66), 7, "fp32", CPU, Progress())
    other = written(tmp_path / "sharp", tokenizer, [3, 4], (32, 66), 8, "fp32", CPU, Progress())
    assert torch.equal(found, again) and not torch.equal(found[:32], other)
    assert len(found[:, 2].unique()) > 100  # of 257 tokens that begin a text


def test_every_family_writes(variant: str, tiny: Callable[[str], Path]) -> None:
    base, tokenizer = tiny(variant), load_tokenizer(tiny(variant))
    found = written(base, tokenizer, begin(tokenizer), (3, 40), 0, "bf16", CPU, Progress())
    assert found.shape == (3, 40) and int(found.max()) < len(tokenizer)
