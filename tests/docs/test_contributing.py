"""CONTRIBUTING.md is followed: its map names every room, and its recipes work as they stand."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers import legolm
from legolm.adapter import Change, initial_factors
from legolm.aggregate import Start, make_scheme
from legolm.block import Block, Coverage, read_block
from legolm.config import AggregateConfig, BlockConfig, CalibrationConfig, ServerConfig
from legolm.models import FAMILIES, Family, Module, Shape, fingerprint
from legolm.prune import cut_blocks
from legolm.system import Progress

HERE = Path(__file__).parents[2]
TEXT = (HERE / "CONTRIBUTING.md").read_text()
# What the file that a recipe's code goes into imports.
IMPORTS = {
    "scheme": """
from dataclasses import replace

from legolm.adapter import Change
from legolm.aggregate import FactorSum, scheme
from legolm.aggregate.factors import Denominator
from legolm.block import Coverage
""",
    "criterion": """
from typing import Annotated

from pydantic import Field
from torch import Tensor

from legolm.prune import Moments, Pattern, criterion
""",
}


def recipe(name: str) -> str:
    """The code of the recipe "### A name"."""
    return re.findall(rf"### A {name}\n.*?```python\n(.*?)```", TEXT, re.DOTALL)[0]


@pytest.fixture
def written(tmp_path: Path, shipped: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a recipe into a module of the working directory; its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(name: str) -> str:
        module = f"contributed_{name}"
        monkeypatch.delitem(sys.modules, module, raising=False)
        (tmp_path / f"{module}.py").write_text(IMPORTS[name] + "\n\n" + recipe(name))
        return module

    return write


@pytest.fixture
def ran(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """The folder of a run of the tiny model with sections changed."""

    def run(holds: tuple[str, str, str], **changes: Any) -> Path:
        raw = three_clients(tmp_path / "clients", holds, federation={"engine": "local", "rounds": 1}) | changes
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(raw))
        done = legolm("run", path, "--out", "out", "--set", "evaluate.local_only=false")
        assert done.returncode == 0, done.stderr
        return Path("out")

    return run


def test_the_map_has_every_room_and_ten_lines() -> None:
    lines = re.findall(r"^\d+\. .*$", TEXT, re.MULTILINE)
    assert len(lines) == 10
    rooms = {path.name for path in (HERE / "src" / "legolm").iterdir() if (path / "__init__.py").is_file()}
    named = re.findall(r"`(\w+)/`", "\n".join(lines))
    assert set(named) == rooms | {"server", "transport", "client", "wire", "bridge", "relay"}
    for path in re.findall(r"`([\w/.]+\.py)`", TEXT):
        assert any((HERE / base / path).is_file() for base in ("", "src/legolm", "tests")), path


@pytest.mark.parametrize("name", ["scheme", "family", "criterion"])
def test_a_recipe_is_about_ten_lines(name: str) -> None:
    assert len([line for line in recipe(name).splitlines() if line.strip()]) <= 12


def test_the_scheme(written: Callable[[str], str], ran: Callable[..., Path]) -> None:
    module = written("scheme")
    out = ran(("dense", "wide", "half"), plugins=[f"{module}:PerClient"], aggregate={"scheme": "per_client"})
    assert json.loads((out / "summary.json").read_text())["rounds"] == 1
    # Two clients, 1 and 3 examples, changes 1 and 5: the mean is 3, and not 4.
    shape = Shape("llama", layers=1, hidden=4, neurons=3, kv_groups=1, queries_per_group=1, head_dim=2)
    scheme, start = make_scheme(AggregateConfig(scheme="per_client")), initial_factors(shape, None, 2, 0)
    scheme.begin(Start(shape, lambda: dict(start), 2, 0, ServerConfig()))
    whole = Coverage.full(shape)
    for size, examples in ((1.0, 1), (5.0, 3)):
        sent = scheme.payload(whole, 2)
        scheme.add(Change({key: torch.full_like(t, size) for key, t in sent.items()}, sent, examples, 2), whole)
    scheme.finish()
    for key, tensor in scheme.adapter(whole, 2).items():
        torch.testing.assert_close(tensor, start[key] + 3)


def test_the_criterion(written: Callable[[str], str], ran: Callable[..., Path], corpus: Path) -> None:
    module = written("criterion")
    text = {"text": str(corpus), "samples": 4, "length": 64}
    blocks = [{"name": "dense", "method": "ria", "pattern": "2:4", "power": 0.3, "calibration": text}]
    out = ran(("dense",) * 3, plugins=[f"{module}:ria"], blocks=blocks)
    block = read_block(out / "blocks" / "dense")
    assert block.sparsity == 0.5
    query = load_file(block.path / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert bool(((query != 0).view(64, 16, 4).sum(2) == 2).all())


@pytest.fixture
def checks() -> ModuleType:
    """tests/models/test_families.py."""
    spec = importlib.util.spec_from_file_location("families_checks", HERE / "tests" / "models" / "test_families.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_family(
    tiny: Callable[[str], Path], corpus: Path, checks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "glm" not in FAMILIES  # or take another one for the recipe
    variants: dict[str, Any] = tiny.__globals__["VARIANTS"]
    for table in (FAMILIES, variants):
        monkeypatch.setitem(table, "glm", None)  # afterwards it is gone again
    exec(recipe("family"), {"FAMILIES": FAMILIES, "VARIANTS": variants, "Family": Family, "Module": Module})

    def cut(variant: str, **target: Any) -> Block:
        text = CalibrationConfig(text=str(corpus), samples=8, length=64)
        spec = BlockConfig(name="b", calibration=text, **{"method": "structured"} | target)
        out = tmp_path / f"block{len(list(tmp_path.iterdir()))}"
        (block,) = cut_blocks(tiny(variant), fingerprint(tiny(variant)), [(spec, out)], 0, "fp32", Progress())
        return block

    checks.test_the_table_has_every_linear_layer_and_its_size("glm", tiny)
    checks.test_layer_by_layer_equals_the_whole_model("glm", tiny)
    for target in checks.SHAPES.values():
        checks.test_structured_blocks_load_plainly_and_keep_the_llms_rows("glm", target, cut, tiny)
    for target in (checks.SHAPES["neurons"], checks.SHAPES["heads"]):
        checks.test_a_block_computes_what_the_llm_does_with_the_cut_columns_at_zero("glm", target, cut, tiny)
    for target in (checks.SHAPES["all"], {"method": "magnitude", "sparsity": 0.5}):
        checks.test_an_adapter_fits_trains_and_merges("glm", target, cut)
    checks.test_the_slice_of_an_adapter_is_the_slice_of_its_product("glm", cut, tiny)
    assert AutoModelForCausalLM.from_pretrained(tiny("glm")).config.attention_bias
