"""What tests in several rooms need."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:  # pytest-xdist's own process reads this file, and need not wait for torch
    from transformers import PreTrainedTokenizerFast

pytest_plugins = ["export_fixtures"]

# The same examples each time: whether `make test` passes is no matter of luck. To look for others:
# pytest -m hypothesis --hypothesis-profile default
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")


LONG = (
    "test_pipeline.py",
    "test_deployment.py",
    "test_options.py",
    "test_cli.py",
    "test_comparisons.py",
    "test_forms.py",
    "test_who_takes_part.py",
    "test_federation.py",
    "test_resume.py",
    "test_ray.py",
    "test_export.py",
    "test_gguf.py",
    "test_plugins.py",
    "test_scoring.py",
    "test_starter.py",
    "test_gpu.py",
    "test_start.py",
)
"""Files that take the longest begin, so that no worker is left with one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, else in order."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of a test stays in the user's cache, and none waits for the disk: no test cuts the power.

    Workers share one, where what was proved of a model's layers is kept.
    """
    folder = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patched:
        shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
        patched.setenv("XDG_CACHE_HOME", str(shared / "cache"))
        patched.setattr(os, "fsync", lambda descriptor: None)
        patched.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a thread for each tiny tensor takes longer than reading it
        yield


@pytest.fixture(autouse=True)
def imports_stay() -> None:
    """Runs collect garbage when they have cut blocks and asked models: what was imported need not be looked at again.

    Before each test, for much is imported when it is first used.
    """
    gc.collect()
    gc.freeze()


UNDRAWN = ("federate", "study", "runs", "test_resume.py", "test_plugins.py", "test_honest_failures.py")
"""Tests that read a run's figures as numbers: drawing its curves would be a fifth of their time."""


@pytest.fixture(scope="module", autouse=True)
def figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs write their page without curves where nobody looks at it; where pages or all options are tested, with."""
    from helpers import no_figure

    with pytest.MonkeyPatch.context() as patched:
        if set(UNDRAWN) & {*request.path.relative_to(Path(__file__).parent).parts}:
            patched.setattr("legolm.report.plots._svg", no_figure)
        yield


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registries as legolm ships them, whatever other tests registered; what this one registers is forgotten."""
    from legolm.config import CRITERIA, EXPORTERS, SCHEMES, TRAINERS

    for registry in (SCHEMES, CRITERIA, TRAINERS, EXPORTERS):
        ours = {name: registry.entry(name) for name in registry if registry.entry(name).module.startswith("legolm.")}
        monkeypatch.setattr(registry, "_entries", ours)


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, 260 tokens in all, with the ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

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
def bos_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same without a template; its post-processor begins every text with BOS, as Llama's and Gemma's do."""
    from tokenizers import processors

    found = copy.deepcopy(tokenizer)
    bos, found.chat_template = str(found.bos_token), None
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, found.bos_token_id)]
    )
    return found


SLIDING: dict[str, Any] = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-bias": {"family": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 24},
    "qwen2": {"tie_word_embeddings": False, "use_sliding_window": True, **SLIDING},
    "qwen3": {},
    "gemma3_text": {"query_pre_attn_scalar": 16, **SLIDING},
    "olmo2": {"tie_word_embeddings": False},
    "phi3": {"tie_word_embeddings": False, "sliding_window": 24},
    "gpt_neox": {"tie_word_embeddings": False, "num_key_value_heads": 4},
}

THREE: dict[str, Any] = {"num_hidden_layers": 3, "sliding_window": 24}
SLIDES = ["sliding_attention", "full_attention", "sliding_attention"]
ROUND_TRIPS: dict[str, dict[str, Any]] = {
    "llama-3": {
        "family": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "ministral": {**THREE, "layer_types": SLIDES},
    "ministral3": {"sliding_window": None},
    "qwen2-window": {"family": "qwen2", **THREE, "use_sliding_window": True, "max_window_layers": 1},
    "gemma2": {**THREE, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3-three": {"family": "gemma3_text", **THREE, "query_pre_attn_scalar": 24, "layer_types": SLIDES},
    "smollm3": {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
    "granite": {
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.22,
        "logits_scaling": 4.0,
    },
    "olmo3": {**THREE, "tie_word_embeddings": False, "layer_types": SLIDES},
    "phi-4-mini": {
        "family": "phi3",
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 1.5, 2.0, 3.0],
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 16,
        },
    },
    "starcoder2": {"sliding_window": 24, "use_bias": True},
    "gpt2": {"n_inner": 96},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "opt-350m": {
        "family": "opt",
        "ffn_dim": 96,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
    },
}
"""Of other families, and of other layers: for `tiny` too."""


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """Each of `VARIANTS` in turn, for `tiny`."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Path]:
    """Checkpoint folder of a random model of `VARIANTS`: 2 layers, hidden 64, 96 neurons, 2 KV groups of 2 heads.

    GPT-NeoX has 4 KV groups of one head.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folders: dict[str, Path] = {}

    def make(variant: str) -> Path:
        if variant not in folders:
            usual = {"tie_word_embeddings": True, "num_key_value_heads": 2, "num_hidden_layers": 2}
            settings: dict[str, Any] = usual | (VARIANTS | ROUND_TRIPS)[variant]
            if settings.get("family", variant) in ("gpt2", "opt"):  # they have no such thing
                del settings["num_key_value_heads"]
            config = AutoConfig.for_model(
                settings.pop("family", variant),
                hidden_size=64,
                intermediate_size=96,
                num_attention_heads=4,
                head_dim=16,
                vocab_size=len(tokenizer),
                max_position_embeddings=512,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **settings,
            )
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(config)
            with torch.no_grad():  # or norms would be the identity and biases nothing
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter += 0.1 * torch.randn_like(parameter)
            folders[variant] = tmp_path_factory.mktemp(variant)
            model.save_pretrained(folders[variant])
            tokenizer.save_pretrained(folders[variant])
        return folders[variant]

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


LETTERS = {"fr": "abc", "de": "def", "es": "ghi"}


@pytest.fixture(scope="session")
def three_clients(tiny: Callable[[str], Path], corpus: Path) -> Callable[..., dict[str, Any]]:
    """A run of two rounds in this process: clients that answer with their own `LETTERS`, each with its block.

    Their data go into `folder`; `changes` replace whole sections.
    """
    text = {"text": str(corpus), "samples": 4, "length": 64}
    blocks: dict[str, dict[str, Any]] = {
        "dense": {"method": "dense"},
        "wide": {"method": "structured", "intermediate_size": 64, "calibration": text},
        "half": {"method": "structured", "num_key_value_heads": 1, "num_hidden_layers": 1, "calibration": text},
        "sparse": {"method": "wanda", "sparsity": 0.5, "calibration": text},
    }

    def make(folder: Path, holds: tuple[str, str, str], rows: int = 20, **changes: Any) -> dict[str, Any]:
        (folder / "data").mkdir(parents=True)
        for client, letters in LETTERS.items():
            pairs = [{"instruction": f"Say {i}", "output": letters[i % 3] * 2} for i in range(rows)]
            (folder / "data" / f"{client}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        raw: dict[str, Any] = {
            "model": str(tiny("llama")),
            "precision": "fp32",
            "data": {"train": f"{folder}/data/*.jsonl", "limit_test": 3, "limit_validation": 2},
            "blocks": [{"name": name, **blocks[name]} for name in dict.fromkeys(holds)],
            "clients": [{"id": id, "block": block} for id, block in zip(LETTERS, holds, strict=True)],
            "lora": {"rank": 4},
            "train": {"steps": 2, "batch_size": 4, "learning_rate": 0.01},
            "federation": {"engine": "local", "rounds": 2},
        }
        return raw | changes

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk]).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture
def full_disk(small_disk: Path) -> Path:
    """One without room for a byte, with the file `filler`: files can be made on it, and not filled."""
    (small_disk / "filler").write_bytes(bytes(1 << 16))
    return small_disk


TASK = {
    "task": "three",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data/three.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
}
QUESTIONS = [
    {"query": "one", "choices": ["aaaa", "b"], "gold": 0},
    {"query": "two", "choices": ["aaaa", "b"], "gold": 1},
    {"query": "three", "choices": ["aaaa", "b"], "gold": 1},
]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A folder with the task `three`, its YAML with `changes` (None leaves a field out) and its data beside it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(rows: list[dict[str, Any]] = QUESTIONS, **changes: Any) -> Path:
        folder = tmp_path / "tasks"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "data" / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        fields = {key: value for key, value in (TASK | changes).items() if value is not None}
        (folder / "three.yaml").write_text(json.dumps(fields))  # JSON is YAML
        return folder

    return write
