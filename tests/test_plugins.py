"""Schemes, criteria and trainers from outside legolm: run end to end, and refused in one line.

In Ray's processes, `test_pipeline` runs one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers import assert_one_line, legolm
from legolm.block import Coverage, read_block
from legolm.config import load
from legolm.finetune import trainer_of
from legolm.models import Shape

HEAD = """
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from legolm.adapter import Change, Tensors
from legolm.aggregate import FactorSum, Scheme, scheme
from legolm.finetune import Task, fit, trainer
from legolm.prune import Moments, Pattern, criterion

"""
STATISTIC = """
@scheme("bounded_mean")
def bounded_mean(
    changes: Tensor, weight: Tensor, *, bound: Annotated[float, Field(gt=0)] = 3.0, least: int = 1
) -> Tensor:
    size = changes.nanquantile(0.5, dim=0).abs()
    return torch.maximum(torch.minimum(changes, bound * size), -bound * size).nanmean(0)
"""
CLASS = """
@scheme("heavy")
class Heavy(FactorSum):
    "FedAvg that counts each client's examples to a power."

    def __init__(self, *, power: float = 2.0) -> None:
        super().__init__("coverage_mean")
        self.power = power

    def add(self, change: Change, coverage: Any) -> None:
        super().add(Change(change.delta, change.received, change.examples**self.power, change.rank), coverage)
"""
CRITERION = """
@criterion("signed", needs="nothing")
def signed(
    weight: Tensor, moments: Moments | None, pattern: Pattern, *, sign: int = 1
) -> tuple[Tensor, Tensor]:
    mask = pattern.keep(sign * weight, over="row")
    return weight * mask, mask
"""
TRAINER = """
@trainer("half_way")
def half_way(task: Task, *, share: Annotated[float, Field(gt=0, le=1)] = 0.5) -> tuple[Tensors, dict[str, float]]:
    change, metrics = fit(task)
    return {key: share * tensor for key, tensor in change.items()}, metrics | {"share": share}
"""


@pytest.fixture
def plugin(tmp_path: Path, shipped: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Write the module file `mine.py` into the working directory; afterwards nothing knows of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(*parts: str) -> None:
        sys.modules.pop("mine", None)
        (tmp_path / "mine.py").write_text(HEAD + "\n".join(parts))

    yield write
    sys.modules.pop("mine", None)


@pytest.fixture
def config(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """A config file of one round on the tiny model, with sections changed."""

    def write(holds: tuple[str, str, str] = ("dense", "wide", "wide"), **changes: Any) -> Path:
        raw = three_clients(tmp_path / "clients", holds, federation={"engine": "local", "rounds": 1})
        raw["evaluate"] = {"local_only": False}
        for name, section in changes.items():
            raw[name] = raw.get(name, {}) | section if isinstance(section, dict) else section
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(raw))
        return path

    return write


def ran(path: Path, out: str, *overrides: str) -> dict[str, Any]:
    done = legolm("run", path, "--out", out, *(part for one in overrides for part in ("--set", one)))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((Path(out) / "summary.json").read_text())
    return found


def test_a_statistic(plugin: Callable[..., None], config: Callable[..., Path]) -> None:
    plugin(STATISTIC)
    path = config(plugins=["mine:bounded_mean"], aggregate={"scheme": "bounded_mean", "bound": 1e9})
    summary = ran(path, "mean")
    assert summary["llm"]["loss_after"] < summary["llm"]["loss_before"]
    # A bound that nobody meets leaves the plain mean over those who hold an entry: the trimmed mean without trim.
    ran(path, "trimmed", "aggregate.scheme=trimmed_mean", "aggregate.trim=0")
    ran(path, "bound", "aggregate.bound=0.01")
    mean, same, other = (
        load_file(Path(out) / "rounds" / "0001" / "adapter.safetensors") for out in ("mean", "trimmed", "bound")
    )
    assert all(bool((mean[key] - same[key]).abs().max() < 1e-6) for key in mean)
    assert not all(bool((mean[key] - other[key]).abs().max() < 1e-6) for key in mean)


def test_a_class(plugin: Callable[..., None], config: Callable[..., Path]) -> None:
    plugin(CLASS)
    path = config(plugins=["mine:Heavy"], aggregate={"scheme": "heavy", "power": 1.0})
    ran(path, "heavy")
    ran(path, "factor", "aggregate.scheme=heteagg", "aggregate.form=factor")
    one, two = (load_file(Path(out) / "rounds" / "0001" / "adapter.safetensors") for out in ("heavy", "factor"))
    assert all(bool((one[key] - two[key]).abs().max() < 1e-6) for key in one)


def test_a_criterion(plugin: Callable[..., None], config: Callable[..., Path]) -> None:
    plugin(CRITERION)
    blocks = [{"name": "low", "method": "signed", "sparsity": 0.25, "sign": -1}]
    path = config(plugins=["mine:signed"], blocks=blocks, clients=[{"id": "fr", "block": "low"}])
    ran(path, "out")
    block = read_block(Path("out") / "blocks" / "low")
    assert block.sparsity == pytest.approx(0.25, abs=0.01)
    weights = load_file(block.path / "model.safetensors")
    query = weights["model.layers.0.self_attn.q_proj.weight"]
    assert bool(((query != 0).sum(1) == 48).all())  # of 64 in a row
    assert float(query.min()) < -0.9 * float(query.abs().max())
    assert float(query.max()) < 0.8 * float(query.abs().max())


def test_prune_takes_it_too(plugin: Callable[..., None], tiny: Callable[[str], Path]) -> None:
    plugin(CRITERION)
    cut = ("prune", tiny("llama"), "--method", "signed", "--sparsity", "0.25", "--out", "low")
    assert_one_line(legolm(*cut), "criterion 'signed' is not known")
    assert_one_line(legolm(*cut, "--plugin", "mine"), "plugins: 'mine': write it as module:name")
    done = legolm(*cut, "--plugin", "mine:signed")
    assert done.returncode == 0, done.stderr
    assert read_block(Path("low")).method == "signed"


def test_a_block_is_not_kept_where_its_criterions_code_changed(
    plugin: Callable[..., None], tiny: Callable[[str], Path]
) -> None:
    cut = (
        "prune",
        tiny("llama"),
        "--method",
        "signed",
        "--sparsity",
        "0.25",
        "--out",
        "low",
        "--plugin",
        "mine:signed",
    )
    plugin(CRITERION)
    for _ in range(2):
        done = legolm(*cut)
        assert done.returncode == 0, done.stderr
        plugin(CRITERION)
    assert "is there already, cut by the same recipe" in done.stderr
    plugin(CRITERION.replace("sign * weight", "-sign * weight"))
    assert_one_line(legolm(*cut), "holds another block: plugin was")
    plugin("HELPER = 1", CRITERION)  # what else is in its module
    assert_one_line(legolm(*cut), "holds another block: plugin was")


def test_a_trainer(plugin: Callable[..., None], config: Callable[..., Path]) -> None:
    plugin(TRAINER)
    path = config(plugins=["mine:half_way"], train={"trainer": "half_way", "share": 0.25})
    summary = ran(path, "local")
    assert summary["llm"]["loss_after"] < summary["llm"]["loss_before"]
    records = [json.loads(line) for line in Path("local/metrics.jsonl").read_text().splitlines()]
    assert {one["share"] for record in records if record.get("round") == 1 for one in record["train"].values()} == {
        0.25
    }


def test_a_trainer_says_what_it_can_and_how_far_it_moves(
    plugin: Callable[..., None], config: Callable[..., Path], tmp_path: Path
) -> None:
    plugin(TRAINER)
    dp = {"dp": {"level": "example", "epsilon": 8, "delta": 1e-5}}
    path = config(plugins=["mine:half_way"], train={"trainer": "half_way"}, privacy=dp)
    done = legolm("run", str(path), "--dry-run")
    assert done.returncode == 2
    assert "is DP-SGD, which train.trainer 'half_way' does not do; take one of adamw" in done.stderr
    full = Coverage.full(Shape("llama", layers=1, hidden=8, neurons=8, kv_groups=1, queries_per_group=1, head_dim=8))
    key = "layers.0.mlp.down_proj.B"
    plugin(TRAINER.replace('"half_way"', '"half_way", private=True, moves=lambda coverage, key, *, share: 2 * share'))
    assert trainer_of(load(path).train).moves(full, key) == 1
    assert trainer_of(load(path, ["train.trainer=adamw"]).train).moves(full, key) == 2
    # One that says nothing of what its steps cost.
    told = '{name: value for name, value in metrics.items() if name != "sampling_rate"}'
    plugin(TRAINER.replace('"half_way"', '"half_way", private=True').replace("metrics |", f"{told} |"))
    done = legolm("run", path, "--out", tmp_path / "out", "--set", "evaluate.local_only=false")
    assert done.returncode == 2
    says = "fr: trainer 'half_way': gave nothing for metric sampling_rate; it must give a number"
    assert says in done.stderr.splitlines()[-1]


def test_an_entry_point_is_a_plugin(
    plugin: Callable[..., None], config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin(STATISTIC, CRITERION)
    package = tmp_path / "site" / "mine-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[legolm.schemes]\nbounded_mean = mine:bounded_mean\nother = mine:bounded_mean\ngone = nowhere:thing\n"
        "[legolm.criteria]\nsigned = mine:signed\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    blocks = [{"name": "low", "method": "signed", "sparsity": 0.25}]
    path = config(blocks=blocks, clients=[{"id": "fr", "block": "low"}], aggregate={"scheme": "bounded_mean"})
    ran(path, "out")
    for name, says in (
        ("bounded_mea", "did you mean `bounded_mean`?"),
        ("other", "entry point 'other' of legolm.schemes: is scheme 'bounded_mean'; call both alike"),
        ("gone", "entry point 'gone' of legolm.schemes: does not import (ModuleNotFoundError: No module named 'nowher"),
    ):
        done = legolm("run", path, "--dry-run", "--set", f"aggregate.scheme={name}")
        assert_one_line(done, says)


SCHEME = {"scheme": "mine"}
F = "@scheme('mine')\ndef f"
BODY = "(changes: Tensor, weight: Tensor) -> Tensor:\n    return "
SUM = """
@scheme("mine")
class f(FactorSum):
    def __init__(self) -> None:
        super().__init__("coverage_mean")
"""
BLOCK = "@criterion('mine', needs='diagonal')\ndef f(weight: Tensor, moments: Moments, pattern: Pattern) -> Any:\n    "


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import nothing_here", ("does not import", "No module named 'nothing_here'")),
        ("raise RuntimeError('no\\nluck')", ("does not import (RuntimeError: no luck)",)),
        ("import sys; sys.exit(3)", ("does not import (SystemExit: 3)",)),
        ("def f(:", ("does not import (SyntaxError: ", "mine.py")),
        ("", ("mine has no f",)),
        ("def f(changes, weight): ...", ("registers nothing; put @scheme, @criterion",)),
        ("@scheme('median')\ndef f" + BODY + "1", ("scheme 'median': is registered already by legolm.aggregate.r",)),
        (F + "(*args: Any) -> Any: ...", ("its signature is (*args: Any) -> Any; it must be (changes, weight",)),
        (F + "(updates: Any, weight: Any) -> Any: ...", ("it must be (changes, weight, *, own_setting: type = def",)),
        (F + "(changes: Any, weight: Any, **kw: Any) -> Any: ...", ("it must be (changes, weight, *, own_setting",)),
        (F + "(changes: Any, weight: Any, *, a=1) -> Any: ...", ("its setting `a` needs a type and a default",)),
        (F + "(changes: Any, weight: Any, *, a: int) -> Any: ...", ("its setting `a` needs a type and a default",)),
        (F + "(changes: 'Tensr', weight: Any) -> Any: ...", ("type in its signature is unknown", "'Tensr'")),
        (F + "(*, start: float = 1.0) -> Any: ...", ("its setting `start` is taken here already; rename it",)),
        (F + "(*, a: int = 1) -> Any:\n    return 3", ("scheme 'mine': makes a int; it must make a Scheme",)),
        (F + "(*, a: int = 1) -> Any:\n    return 1 / 0", ("raised ZeroDivisionError: division by zero at mine.py:",)),
        (F + "(*, a: int = 1) -> Any:\n    raise ValueError('a is odd')", ("`aggregate`: a is odd",)),
        ("@scheme('mine')\nclass f(Scheme):\n    ...", ("scheme 'mine': raised TypeError: Can't instantiate",)),
        (
            SUM + "    def finish(self) -> None:\n        self.nothing()",
            ("scheme 'mine': raised AttributeError: 'f' object has no attribute 'nothing' at mine.py:",),
        ),
        (
            SUM + "    def adapter(self, coverage: Any, rank: int) -> Tensors:\n        return {}",
            ("its adapter has other factors than the run's start",),
        ),
        (F + BODY + "changes", ("'mine': gave (2, 2, 4) for layers.0", "it must give (rows, columns), (2, 4)")),
        (F + BODY + "3", ("'mine': gave int for layers.0",)),
        (F + BODY + "changes.mean(0)", ("a number that is not finite", "where clients hold something")),
        (F + BODY + "changes @ weight", ("scheme 'mine': raised RuntimeError: ", "at mine.py:")),
    ],
)  # fmt: skip
def test_broken_schemes(
    code: str, says: tuple[str, ...], plugin: Callable[..., None], config: Callable[..., Path]
) -> None:
    plugin(code)
    path = config(plugins=["mine:f"], aggregate=SCHEME)
    for how in (("--dry-run",), ("--out", "out")):
        assert_one_line(legolm("run", path, *how), *says)
    assert not Path("out").exists()


RAISES = "raise KeyError('no luck')"


@pytest.mark.parametrize(
    ("method", "does", "says"),
    [
        ("add(self, change: Any, coverage: Any) -> None", RAISES, "KeyError: 'no luck' at mine.py:"),
        ("finish(self) -> None", RAISES, "KeyError: 'no luck' at mine.py:"),
        ("payload(self, coverage: Any, rank: int) -> Tensors", RAISES, "KeyError: 'no luck' at mine.py:"),
        ("whole(self, coverage: Any, rank: int) -> Tensors", RAISES, "KeyError: 'no luck' at mine.py:"),
        # What it does to itself breaks in a method that it has from legolm.
        (
            "add(self, change: Any, coverage: Any) -> None",
            "self._round = None",
            "AttributeError: 'NoneType' object has",
        ),
    ],
)
def test_a_scheme_that_breaks_only_in_a_real_round(
    method: str, does: str, says: str, plugin: Callable[..., None], config: Callable[..., Path]
) -> None:
    """The rehearsal's LLM has one layer, and this one's has two."""
    name, _, rest = method.partition("(")
    given = ", ".join(one.partition(":")[0] for one in rest.partition(")")[0].split(", ")[1:])
    body = f"        if self._start.shape.layers > 1:\n            {does}\n        return super().{name}({given})"
    plugin(f"{SUM}    def {method.replace('-> None', '-> Any')}:\n{body}")
    path = config(plugins=["mine:f"], aggregate=SCHEME)
    assert legolm("run", path, "--dry-run").returncode == 0
    done = legolm("run", path, "--out", "out")
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(error) == 1, done.stderr
    assert f"scheme 'mine': raised {says}" in error[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bond": 2}, "unknown key `aggregate.bond` of scheme 'bounded_mean'; did you mean `bound`?"),
        ({"trim": 0.1}, "unknown key `aggregate.trim` of scheme 'bounded_mean'; it is trimmed_mean's"),
        ({"bound": -1}, "`aggregate`: `bound` = -1: input should be greater than 0"),
        ({"bound": "wide"}, "`aggregate`: `bound` = 'wide': input should be a valid number"),
        ({"scheme": "bounded"}, "`aggregate`: scheme 'bounded' is not known; did you mean `bounded_mean`?"),
        ({"scheme": "heteagg", "bound": 2}, "unknown key `aggregate.bound` of scheme 'heteagg'; it is bounded_mean's"),
    ],
)
def test_settings_that_a_plugin_does_not_have(
    changes: dict[str, Any], says: str, plugin: Callable[..., None], config: Callable[..., Path]
) -> None:
    plugin(STATISTIC)
    path = config(plugins=["mine:bounded_mean"], aggregate={"scheme": "bounded_mean"} | changes)
    assert_one_line(legolm("run", path, "--dry-run"), says)


@pytest.mark.parametrize(
    ("plugins", "says"),
    [
        (["mine"], "plugins: 'mine': write it as module:name"),
        (["mine.py:f"], "plugins: 'mine.py:f': does not import (ModuleNotFoundError: "),
        (["../mine:f"], "plugins: '../mine:f': write it as module:name"),
        ("mine:f", "`plugins` = 'mine:f': input should be a valid list"),
        ([3], "`plugins.0` = 3: input should be a valid string"),
    ],
)
def test_plugins_that_are_written_otherwise(
    plugins: object, says: str, plugin: Callable[..., None], config: Callable[..., Path]
) -> None:
    plugin(STATISTIC)
    assert_one_line(legolm("run", config(plugins=plugins), "--dry-run"), says)


@pytest.mark.parametrize(
    ("body", "target", "says"),
    [
        ("return weight", {"sparsity": 0.5}, "it must give (new weight, bool mask); it gave a Tensor"),
        ("return weight, weight > 0", {"sparsity": 0.5}, "finite and zero where the mask is False; it did not"),
        ("return weight, weight * 0", {"sparsity": 0.5}, "and a mask (8, 16) of torch.float32"),
        ("return weight[1:], weight[1:] > 0", {"sparsity": 0.5}, "it gave (7, 16) and a mask (7, 16)"),
        ("return weight / 0, weight == weight", {"sparsity": 0.5}, "finite and zero where the mask is False"),
        ("return weight, weight == weight", {"pattern": "2:4"}, "that keeps 2 of each 4 in a row; it kept 4"),
        ("return 1 / 0", {"sparsity": 0.5}, "criterion 'mine': raised ZeroDivisionError: division by zero at mine.py:"),
    ],
)
def test_broken_criteria(
    body: str, target: dict[str, Any], says: str, plugin: Callable[..., None], config: Callable[..., Path]
) -> None:
    plugin(BLOCK + body)
    blocks = [{"name": "a", "method": "mine"} | target]
    path = config(plugins=["mine:f"], blocks=blocks, clients=[{"id": "fr", "block": "a"}])
    assert_one_line(legolm("run", path, "--dry-run"), "criterion 'mine': ", says)


def test_a_criterion_says_what_it_needs(plugin: Callable[..., None], config: Callable[..., Path]) -> None:
    plugin(BLOCK.replace("diagonal", "all") + "...")
    path = config(plugins=["mine:f"])
    assert_one_line(legolm("run", path, "--dry-run"), "needs is 'all'; it must be one of nothing, diagonal, full")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return {}, fit(task)[1]", "gave nothing for layers.0.mlp.down_proj.A, which is (4, "),
        ("return {k: t[1:] for k, t in fit(task)[0].items()}, fit(task)[1]", "which is (4, "),
        (
            "return fit(task)[0] | {'more': torch.ones(1)}, fit(task)[1]",
            "gave (1,) for more, which is none that",
        ),
        ("return fit(task)[0]", "gave a dict; it must give (changes by factor, metrics by name)"),
        ("return fit(task)[0], {}", "gave nothing for metric loss_first; it must give a number"),
        ("return fit(task)[0], fit(task)[1] | {'why': 'so'}", "gave a str for metric why; it must give a number"),
        ("return {k: t / 0 for k, t in fit(task)[0].items()}, fit(task)[1]", "is not finite"),
        ("return 1 / 0", "raised ZeroDivisionError: division by zero at mine.py:"),
    ],
)
def test_broken_trainers(body: str, says: str, plugin: Callable[..., None], config: Callable[..., Path]) -> None:
    plugin("@trainer('mine')\ndef f(task: Task) -> Any:\n    " + body)
    path = config(("dense",) * 3, plugins=["mine:f"], train={"trainer": "mine"}, aggregate={"form": "factor"})
    done = legolm("run", path, "--out", "out")
    *stages, last = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert all(line.startswith(("done: ", "note: data.train: ")) for line in stages), done.stderr
    assert last.startswith("error: round 1: 0 updates accepted, federation.min_replies is 1 (fr: ")
    assert says in last


@pytest.mark.parametrize("code", ["def f(work: Task) -> Any: ...", "def f(*task: Task) -> Any: ..."])
def test_trainers_with_another_signature(code: str, plugin: Callable[..., None], config: Callable[..., Path]) -> None:
    plugin("@trainer('mine')\n" + code)
    path = config(plugins=["mine:f"], train={"trainer": "mine"})
    assert_one_line(legolm("run", path, "--dry-run"), "trainer 'mine': its signature is", "it must be (task, *, own_")
