"""The LLM's update, kept off public text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from legolm import config as configs
from legolm import pipeline
from legolm.adapter import load_factors, parse_key
from legolm.block import read_block
from legolm.config import ProtectConfig, RunConfig
from legolm.data import Tokens, begin, calibration_tokens, client_data, tokens_of
from legolm.errors import LegolmError
from legolm.federate.server import protecting
from legolm.federate.server.protecting import OFF_DIAGONAL
from legolm.models import fingerprint, load_config, load_model, load_tokenizer, shape_of, written
from legolm.plan import make_plan
from legolm.prune import collect, load_statistics
from legolm.runs import RunDir
from legolm.system import Progress

ASKED = {"statistics": "clients", "samples": 8, "length": 32}


@pytest.fixture
def raw(three_clients: Callable[..., dict[str, Any]], tmp_path: Path, corpus: Path) -> dict[str, Any]:
    found = three_clients(tmp_path, ("dense", "wide", "wide"), evaluate={"local_only": False})
    found["blocks"][1]["calibration"] = dict(ASKED)
    found["federation"] |= {"protect": {"text": str(corpus), "samples": 16, "length": 64, "weight": 0.3}}
    return found


@pytest.mark.parametrize("generated", [False, True])
def test_the_update_is_the_nearest_that_public_text_hardly_sees(
    generated: bool, raw: dict[str, Any], tmp_path: Path
) -> None:
    """Against V that minimises own error and public change, found by float64 least squares over stacked roots."""
    run = RunDir(tmp_path / "out")
    raw["train"] |= {"steps": 8}
    raw["precision"] = "fp32"
    if generated:
        raw["federation"]["protect"]["text"] = "generated"
    summary = pipeline.run(configs.validate(RunConfig, raw, "test"), run.path)
    number, found = summary.llm.best_round, load_factors(run.final("llm"))[0]
    assert number > 0
    scale = configs.validate(RunConfig, raw, "test").lora.scaling
    plain = load_file(run.round(number) / "adapter.safetensors")
    plain = {key: tensor * (scale if parse_key(key)[2] == "B" else 1) for key, tensor in plain.items()}
    base = Path(raw["model"])
    text = configs.validate(ProtectConfig, raw["federation"]["protect"], "test")
    tokenizer = load_tokenizer(base)
    if generated:
        tokens = written(base, tokenizer, begin(tokenizer), (16, 64), 0, "fp32", torch.device("cpu"), Progress())
    else:
        tokens = calibration_tokens(text, tokenizer, 0)
    public = collect(base, fingerprint(base), tokens, "full", "fp32", Progress())
    own = load_statistics([run.sums], shape_of(load_config(base)), fingerprint(base))
    seen = [0.0, 0.0]
    for key in [key for key in plain if parse_key(key)[2] == "A"]:
        other = key.removesuffix("A") + "B"
        assert torch.equal(plain[other], found[other])  # one side only, so that the rank stays
        layer, module, _ = parse_key(key)
        first = {"k_proj": "q_proj", "v_proj": "q_proj"}
        if module in ("mlp.gate_proj", "mlp.up_proj"):  # which feed neurons
            assert torch.equal(plain[key], found[key])
            continue
        part, _, last = module.rpartition(".")
        name = f"layers.{layer}.{part}.{first.get(last, last)}"
        c, p = (one.sums[name].sum.double() / one.sums[name].tokens for one in (own, public))
        before, after = (one[other].double() @ one[key].double() for one in (plain, found))
        c, p = (OFF_DIAGONAL * one + (1 - OFF_DIAGONAL) * torch.diag(one.diagonal()) for one in (c, p))
        roots = [torch.linalg.cholesky(one).T for one in (c, p)]
        wanted = torch.cat([roots[0] @ before.T, torch.zeros(len(c), len(before), dtype=torch.float64)])
        exact = torch.linalg.lstsq(torch.cat([roots[0], 0.3**0.5 * roots[1]]), wanted).solution.T
        torch.testing.assert_close(after, exact, rtol=0, atol=float(2e-3 * before.abs().max()))
        for place, change in enumerate((before, after)):
            seen[place] += float((change @ p * change).sum())
    assert seen[1] < 0.98 * seen[0]

    # What it was protected by is not to be changed.
    matrices = run.protection / "matrices.safetensors"
    was = matrices.read_bytes()
    matrices.write_bytes(was[:-8] + bytes(8))
    shutil.rmtree(run.final("llm"))
    with pytest.raises(LegolmError, match=r"matrices\.safetensors: is not what the run wrote"):
        pipeline.run(configs.validate(RunConfig, raw, "test"), run.path, resume=True)
    matrices.write_bytes(was)
    pipeline.run(configs.validate(RunConfig, raw, "test"), run.path, resume=True)

    # The run scored the LLM that it wrote: the loss of its record is that of the final model.
    config = configs.validate(RunConfig, raw, "test")
    data, tokenizer = client_data(config), load_tokenizer(base, config.data)
    model, losses = load_model(run.final("llm")).eval(), list[float]()
    for one in data.values():
        parts = [one_row(model, row) for row in tokens_of(one.test, tokenizer, config.train.max_length, "last")]
        losses.append(sum(total for total, _ in parts) / sum(count for _, count in parts))
    assert summary.llm.loss_after == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_runs_with_one_store_write_the_text_once(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    raw["federation"]["protect"]["text"] = "generated"
    seeds, write = list[int](), protecting.written

    def counted(*given: Any) -> torch.Tensor:
        seeds.append(given[4])
        return write(*given)

    monkeypatch.setattr(protecting, "written", counted)

    def matrices(name: str, store: Path | None = tmp_path / "store", **changes: Any) -> bytes:
        run = RunDir(tmp_path / name)
        pipeline.run(configs.validate(RunConfig, raw | changes, "test"), run.path, store=store, models=False)
        return (run.protection / "matrices.safetensors").read_bytes()

    first = matrices("one")
    assert matrices("two") == first and seeds == [0]
    assert matrices("alone", None) == first and seeds == [0, 0]
    assert matrices("other", seed=1) != first and seeds == [0, 0, 1]
    for file in (tmp_path / "store").glob("text-*/tokens.safetensors"):
        file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    assert matrices("damaged") == first and seeds == [0, 0, 1, 0]
    assert "tokens.safetensors: is not what the run wrote" in capfd.readouterr().err


def test_each_client_gets_what_its_own_slice_gave(raw: dict[str, Any], tmp_path: Path) -> None:
    """Against V that is the nearest to each client's slice on its own text, by float64 least squares of all at once.

    `dense` holds all, `wide` 64 of 96 neurons, `half` one layer and one KV group.
    """
    raw["blocks"].append({"name": "half", "method": "structured", "num_hidden_layers": 1, "num_key_value_heads": 1})
    raw["clients"][2]["block"] = "half"
    raw["federation"] |= {"regmean": True, "protect": None}
    raw["train"] |= {"steps": 8}
    config, run = configs.validate(RunConfig, raw, "test"), RunDir(tmp_path / "out")
    summary = pipeline.run(config, run.path)
    number, found = summary.llm.best_round, load_factors(run.final("llm"))[0]
    assert number > 0
    plain = load_file(run.round(number) / "adapter.safetensors")
    base, names = Path(raw["model"]), [client["block"] for client in raw["clients"]]
    shape = shape_of(load_config(base))
    own = {name: load_statistics([run.block_sums(name)], shape, fingerprint(base)) for name in names}
    coverages = {name: read_block(run.block(name)).coverage for name in names}
    moved = 0
    for key in [key for key in plain if parse_key(key)[2] == "A"]:
        other = key.removesuffix("A") + "B"
        layer, module, _ = parse_key(key)
        before, after = (config.lora.scaling * plain[other].double()) @ plain[key].double(), 0.0
        after = found[other].double() @ found[key].double()
        if module not in ("self_attn.o_proj", "mlp.down_proj"):  # they read the hidden state, which every block has
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-7)
            continue
        roots, wanted = [], []
        for name in names:
            c = own[name].sums[f"layers.{layer}.{module}"].sum.double()
            c = OFF_DIAGONAL * c + (1 - OFF_DIAGONAL) * torch.diag(c.diagonal())
            roots.append(torch.linalg.cholesky(c).T)
            units, coverage = torch.zeros(len(c), dtype=torch.float64), coverages[name]
            if layer in coverage.layers:
                kept = coverage.cols(layer, module)
                units[slice(None) if kept is None else kept] = 1
            wanted.append(roots[-1] @ (before * units).T)
        exact = torch.linalg.lstsq(torch.cat(roots), torch.cat(wanted)).solution.T
        torch.testing.assert_close(after, exact, rtol=0, atol=float(2e-3 * before.abs().max()))
        moved += int(not torch.allclose(after, before, rtol=1e-2, atol=0))
    assert moved == 4
    # Its A is nobody else's, and a composition of factors is not to take it for theirs.
    begun = {id: load_factors(run.final(id))[1] for id in ("llm", "fr", "de")}
    assert begun["fr"] == begun["de"] != begun["llm"]

    # Without some sums it says so, without any it does not go on as if there was nothing to fit.
    shutil.rmtree(run.protection)
    run.block_sums("half").unlink()
    said = StringIO()
    pipeline.run(config, run.path, resume=True, progress=Progress(Console(file=said, width=300)))
    assert "block half: no client with it has sent sums" in said.getvalue()
    shutil.rmtree(run.protection), shutil.rmtree(run.block_sums("wide").parent)
    with pytest.raises(LegolmError, match=r"federation\.regmean: no sums in .*calibration"):
        pipeline.run(config, run.path, resume=True)


def test_who_comes_later_is_not_fitted_and_that_is_said(raw: dict[str, Any]) -> None:
    raw["clients"][2]["joins"] = 2
    raw["federation"] |= {"regmean": True, "protect": None}
    notes = make_plan(configs.validate(RunConfig, raw, "test")).notes
    assert any("fitted to the text of those who are there in round 1, not of es." in note for note in notes)


def test_where_all_hold_everything_nothing_changes(raw: dict[str, Any], tmp_path: Path) -> None:
    """A wide block of all neurons: the LLM is that of a run without."""
    raw["blocks"][1] |= {"intermediate_size": 96}
    raw["federation"] |= {"protect": None}
    finals = []
    for regmean in (False, True):
        raw["federation"]["regmean"] = regmean
        run = RunDir(tmp_path / str(regmean))
        pipeline.run(configs.validate(RunConfig, raw, "test"), run.path)
        finals.append(load_factors(run.final("llm"))[0])
    assert not load_file(run.protection / "matrices.safetensors")
    assert all(torch.equal(tensor, finals[1][key]) for key, tensor in finals[0].items())


def one_row(model: Any, row: Tokens) -> tuple[float, int]:
    """Summed loss of the answer's tokens, and how many they are."""
    with torch.no_grad():
        found = torch.log_softmax(model(input_ids=torch.tensor(row.ids)[None]).logits[0, row.answer - 1 : -1], -1)
    wanted = torch.tensor(row.ids[row.answer :])
    return -float(found.gather(1, wanted[:, None]).sum()), len(wanted)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"blocks.1.calibration.statistics": None},
            "needs the clients' sums: give blocks calibration.statistics: clients",
        ),
        (
            {"blocks.1": {"name": "wide", "method": "wanda", "sparsity": 0.5, "calibration": ASKED}},
            "needs all second moments",
        ),
        ({"federation.protect": {"text": "nowhere.txt"}}, r"federation\.protect\.text: .*nowhere.txt"),
        (
            {"federation.protect": {"length": 4096}},
            r"protect\.length: 4096 tokens are more than the model takes at once",
        ),
        ({"federation.protect.samples": 100_000}, r"federation\.protect\.samples = 100000: .* has \d+ samples of 64"),
        ({"federation.mode": "alone", "evaluate.local_only": True}, "learns nothing in mode alone; take it out"),
        (
            {"federation.regmean": True, "clients.0": {"id": "fr", "blocks": ["dense", "wide"]}},
            "what each client holds",
        ),
        (
            {"federation.regmean": True, "lora.targets": ["q_proj", "v_proj"]},
            "and lora.targets has none",
        ),
        ({"federation.regmean": True, "federation.mode": "pooled"}, "not all of them train; set it to false"),
        ({"federation.regmean": True, "federation.capable": True}, "not all of them train; set it to false"),
        ({"federation.regmean": True, "clients.0.layers": [1]}, "what each client holds"),
    ],
)
def test_what_cannot_be_protected_is_refused(raw: dict[str, Any], changes: dict[str, Any], says: str) -> None:
    for name, value in changes.items():
        *path, last = name.split(".")
        place: Any = raw
        for one in path:
            place = place[int(one)] if isinstance(place, list) else place[one]
        place[int(last) if isinstance(place, list) else last] = value
    with pytest.raises(LegolmError, match=says):
        make_plan(configs.validate(RunConfig, raw, "test"))
