"""Leave one out: the replay against the run and against sums by hand, the files, going on, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import assert_one_line, legolm
from legolm import config as configs
from legolm import pipeline
from legolm.adapter import Tensors, adapter_keys, merged
from legolm.adapter.flat import adapter_layout
from legolm.block import llm_block, read_block
from legolm.data import client_data
from legolm.errors import LegolmError
from legolm.evaluation import Questions, read_questions
from legolm.evaluation.perplexity import perplexity
from legolm.federate import wire
from legolm.federate.server import Rounds
from legolm.models import fingerprint, load_model, load_tokenizer
from legolm.report.ablation import page, plot
from legolm.runs import (
    Ablation,
    LeftOut,
    Losses,
    Others,
    RunDir,
    Scores,
    StageRecord,
    clients_of,
    dump_sealed,
    read_record,
    read_stages,
    rounds_of,
    seal,
)
from legolm.study import leave_one_out, retrain
from legolm.study.leave_one_out import ablate
from legolm.system import Progress

QUIET = Progress()
BLOCKS = (0, "wide"), (1, "sparse")


@pytest.fixture(scope="module")
def config_file(three_clients: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clients, two of them with one block."""
    folder = tmp_path_factory.mktemp("ablate")
    federation = {"engine": "local", "rounds": 2, "keep_updates": True}
    raw = three_clients(folder, ("wide", "sparse", "wide"), federation=federation, aggregate={"form": "factor"})
    raw["clients"][1]["rank"] = 2
    (folder / "run.yaml").write_text(json.dumps(raw))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def run(config_file: Path) -> Path:
    pipeline.run(configs.load(config_file), config_file.parent / "run")
    return config_file.parent / "run"


@pytest.fixture(scope="module")
def other_run(config_file: Path) -> Path:
    """The exact form over an int8 codec, with clipped updates and no local-only stage."""
    sets = ["aggregate.form=exact", "federation.codec=int8", "evaluate.local_only=false"]
    sets += ["aggregate.outliers.action=clip", "aggregate.outliers.factor=1.01"]
    pipeline.run(configs.load(config_file, sets), config_file.parent / "exact")
    return config_file.parent / "exact"


def replayed(folder: Path) -> Rounds:
    run, summary = RunDir(folder), json.loads((folder / "summary.json").read_text())
    config = run.known()
    base = Path(config.model)
    blocks = {block.name: read_block(run.block(block.name)) for block in config.blocks}
    blocks["llm"] = llm_block(base, fingerprint(base))
    block_of = {client["id"]: client["block"] for client in summary["clients"]}
    return Rounds(run, config, summary["run_id"], blocks, block_of, QUIET)


def metrics(folder: Path) -> list[StageRecord]:
    return read_stages(folder / "metrics.jsonl")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What the run had, and `legolm ablate` has: sums of a decomposition round by the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["run", "other_run"])
def test_with_nobody_left_out_the_replay_is_the_run(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    for last in (1, 2):
        expected = load_file(folder / "rounds" / f"{last:04d}" / "adapter.safetensors")
        found = replayed(folder).replay(last, ())
        assert set(found.state()) == set(expected)
        for key, tensor in found.state().items():
            assert torch.equal(tensor, expected[key]), key


def test_the_replay_without_a_client_is_the_sum_of_the_others(run: Path) -> None:
    # Factor form, coverage mean: all train on 14 examples. The wide block has 64 of 96 rows of up_proj's B.
    key = "layers.1.mlp.up_proj.B"
    rows = read_block(run / "blocks" / "wide").coverage.rows(1, "mlp.up_proj")
    assert rows is not None
    factor = load_file(run / "rounds" / "0000" / "adapter.safetensors")[key].double()
    for number in (1, 2):
        total, count = torch.zeros_like(factor), torch.zeros_like(factor)
        for client, rank in (("fr", 4), ("de", 2)):
            content = (run / "rounds" / f"{number:04d}" / "updates" / f"{client}.safetensors").read_bytes()
            header, tensors = wire.unpack(content, wire.UpdateReply)
            assert header.examples == 14
            delta = decoded(run, client, tensors, rank)[key].double()
            held = rows if client == "fr" else torch.arange(len(factor))
            total[held, :rank] += delta
            count[held, :rank] += 1
        factor += torch.where(count > 0, total / count, 0.0)
        factor = factor.float().double()
    found = replayed(run).replay(2, ["es"]).state()
    torch.testing.assert_close(found[key].double(), factor, rtol=1e-6, atol=1e-8)
    start = load_file(run / "rounds" / "0000" / "adapter.safetensors")
    everyone = replayed(run).replay(2, ["fr", "de", "es"]).state()
    assert all(torch.equal(everyone[key], tensor) for key, tensor in start.items() if key.startswith("layers."))


def decoded(run: Path, client: str, tensors: Tensors, rank: int) -> Tensors:
    """Factors one after the other in the order of their keys."""
    coverage = read_block(run / "blocks" / ("wide" if client == "fr" else "sparse")).coverage
    layout = adapter_layout(coverage, adapter_keys(coverage, None), rank)
    return {key: tensors["factors"][span].view(layout.shapes[key]) for key, span in layout.spans.items()}


def test_the_figures_are_what_they_say(run: Path, corpus: Path, tmp_path: Path, tasks: Callable[..., Path]) -> None:
    folder = tasks(metric_list=[{"metric": metric} for metric in ("acc", "acc_norm", "f1")])
    questions = ("--text", corpus, "--length", 64, "--tasks", "three", "--include", folder)
    done = legolm("ablate", run, "--out", tmp_path, *questions)
    assert done.returncode == 0, done.stderr
    assert "dearest block" in done.stdout
    found = json.loads((tmp_path / "ablation.json").read_text())
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("block", "client"))]
    assert max(map(len, done.stdout.splitlines()[:-2])) <= 80  # the verdict and the page's path are lines of their own
    without = found["without"]
    for row, one in zip(rows, without, strict=False):  # nothing is cut off, however many columns there are
        assert (row[0], row[1], row[2]) == (one["kind"], one["name"], f"{one['blocks']:.3f}")
    assert len(rows) % len(without) == 0 and all(f"{one['perplexity']:.3f}" in done.stdout for one in without)
    records, clients = metrics(run), ("fr", "de", "es")
    local = {one.client: one.scores for one in clients_of(records, "local")}
    shared = rounds_of(records)[found["round"]].by_client()

    def mean(scores: dict[str, Scores]) -> float:
        return fmean(scores[client].root[data].loss for client in clients for data in clients)

    assert found["gain"] == pytest.approx(mean(local) - mean(shared))
    assert found["all"]["blocks"] == pytest.approx(mean(shared))
    assert [(one["kind"], one["name"], one["clients"]) for one in found["without"]] == [
        ("block", "wide", ["fr", "es"]),
        ("block", "sparse", ["de"]),
        ("client", "fr", ["fr"]),
        ("client", "de", ["de"]),
        ("client", "es", ["es"]),
    ]
    for one in found["without"]:
        cost = found["cost" if one["kind"] == "block" else "cost_clients"][one["name"]]
        assert cost == pytest.approx(one["blocks"] - found["all"]["blocks"])
        assert one["perplexity"] == pytest.approx(perplexity_without(run, one["clients"], corpus), rel=1e-5)
        paired = one["paired"]["perplexity"]
        assert paired["difference"] == pytest.approx(one["perplexity"] - found["all"]["perplexity"])
        assert 0 < paired["p"] <= 1
        assert one["stderr"]["perplexity"] > 0
    assert found["cost"]["wide"] != 0
    assert found["cost"]["sparse"] == found["cost_clients"]["de"]  # one set of clients, evaluated once
    assert found["before"]["llm"] > found["all"]["llm"]
    page = (tmp_path / "ablation.html").read_text()
    assert page.count("<rect") == 30
    assert page.count('text-anchor="middle"') == 30
    assert page.count(">local only ") == 1  # it has no LLM
    assert page.count(">global update ") == 6


def perplexity_without(run: Path, clients: Sequence[str], corpus: Path) -> float:
    rounds, config = replayed(run), RunDir(run).known()
    base = Path(config.model)
    coverage = llm_block(base, "").coverage
    factors = rounds.replay(json.loads((run / "summary.json").read_text())["best_round"], clients).adapter(coverage, 4)
    tokens = torch.tensor(load_tokenizer(base).encode(corpus.read_text(), add_special_tokens=False))
    with merged(load_model(base), coverage, factors, config.lora.scaling) as model:
        return perplexity(model, tokens, 64, "fp32")


def test_other_data_are_another_run_and_other_questions_want_another_folder(
    run: Path, tmp_path: Path, tasks: Callable[..., Path]
) -> None:
    def asked(elsewhere: Path | None = None) -> Questions:
        folder = tasks(rows)
        return read_questions(["three"], folder.rename(elsewhere) if elsewhere else folder, None, None, None)

    rows = [{"query": f"{number}", "choices": ["a", "b"], "gold": 0} for number in range(3)]
    found = ablate(run, tmp_path / "out", asked(), QUIET)
    assert ablate(run, tmp_path / "out", asked(tmp_path / "elsewhere"), QUIET) == found
    rows[0]["gold"] = 1
    with pytest.raises(LegolmError, match="holds an ablation with other questions; give another folder"):
        ablate(run, tmp_path / "out", asked(), QUIET)
    other = ablate(run, tmp_path / "other", asked(), QUIET)
    assert other.questions != found.questions
    assert abs(other.all.measures()["three acc"] - found.all.measures()["three acc"]) == pytest.approx(1 / 3)
    identity = RunDir(run).identity().model_copy(update={"data_fingerprint": "of other data"})
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(dump_sealed(identity))
    with pytest.raises(LegolmError, match="the data changed since the run"):
        ablate(tmp_path / "run", tmp_path / "new", None, QUIET)


def test_questions_are_others_where_more_is_asked_or_otherwise(run: Path, corpus: Path, tmp_path: Path) -> None:
    asked = read_questions([], None, None, None, corpus, length=64, windows=1)
    found = ablate(run, tmp_path, asked, QUIET, only=["fr"])
    assert ablate(run, tmp_path, asked, QUIET, only=["fr"]) == found
    example = next(iter(client_data(RunDir(run).known()).values())).test[0]
    for change in ({"windows": 2}, {"length": 32}, {"examples": (example,)}, {"rouge": True}):
        with pytest.raises(LegolmError, match="holds an ablation with other questions; give another folder"):
            ablate(run, tmp_path, replace(asked, **change), QUIET)


def test_files_that_are_not_the_runs_are_one_line(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "summary.json"
    summary = json.loads(path.read_text())
    for changes, says in (
        ({"best_round": 7}, "its clients or best_round are not the config's"),
        ({"clients": []}, "its clients or best_round are not the config's"),
        ({"best_round": None}, r"is broken \(best_round: "),
        ({"clients": [{}]}, r"is broken \(clients.0.id: "),
        ({"schema_number": 1}, "another version of legolm wrote it"),
    ):
        path.write_text(json.dumps(summary | changes))
        seal(path.parent, path.name)
        with pytest.raises(LegolmError, match=rf"summary\.json: {says}.*; write it anew: legolm run --resume"):
            ablate(tmp_path / "run", tmp_path / "out", None, QUIET)
    (tmp_path / "out").mkdir()
    for content, says in (
        ("{", "is broken"),
        ("[]", "is broken"),
        ('{"schema_number": 2, "without": "x"}', "is broken"),
        ('{"without": []}', "another version of legolm wrote it"),
    ):
        (tmp_path / "out" / "ablation.json").write_text(content)
        with pytest.raises(LegolmError, match=rf"ablation\.json: {says} .*; delete it, or give another --out"):
            ablate(run, tmp_path / "out", None, QUIET)


def test_bars_and_whiskers_stay_within_the_plot() -> None:
    def case(name: str, value: float) -> LeftOut:
        return LeftOut.model_validate(
            {"blocks": 1.0, "by_client": {}, "llm": None, "stderr": {"m": 0.5}, "m": value}
            | {"kind": "block", "name": name, "clients": [], "paired": {}}
        )

    shared = Losses.model_validate({"blocks": 1.0, "by_client": {}, "llm": None, "stderr": {}, "m": 0.5})
    found = Ablation(
        run="",
        round=1,
        questions=None,
        name="two",
        others=Others(asked=8, there=24),
        before=shared,
        local=None,
        all=shared,
        without=[case("a", 1.0), case("b", -0.5)],
        gain=None,
        cost={"a": 0.0, "b": 0.0},
        cost_clients={},
        cost_llm={},
    )
    drawing = plot(found, "m")
    # From -1 to 1.5 in 150 points above 180.
    drawn = [[float(one) for one in re.findall(rf'{side}="(.*?)"', drawing)] for side in ("y1", "y2")]
    assert [tuple(ends) for ends in zip(*drawn, strict=True)][:2] == [(90.0, 30.0), (180.0, 120.0)]
    assert re.findall(r"<rect [^>]*", drawing)[1].count('y="120.0"') == 1
    text = page(found)  # with no LLM's loss there is no such section
    assert "the LLM's loss" not in text and "on the test data of 8 of the 24 other clients" in text


def test_it_goes_on_where_it_stopped(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, score = [2], Rounds.score_global

    def dies(self: Rounds, *given: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return score(self, *given)

    monkeypatch.setattr(Rounds, "score_global", dies)
    with pytest.raises(KeyboardInterrupt):
        ablate(run, tmp_path, None, QUIET)
    there = json.loads((tmp_path / "ablation.json").read_text())["without"]
    assert [one["name"] for one in there] == ["wide", "sparse", "de"]  # sparse is de: fr and es are left
    left[0] = 2
    found = ablate(run, tmp_path, None, QUIET)
    assert left == [0]
    assert len(found.without) == 5
    assert read_record(tmp_path / "ablation.json", Ablation) == found
    written, write = list[int](), leave_one_out.atomic_write

    def counted(path: Path, content: str) -> None:
        written.append(len(json.loads(content)["without"]))
        write(path, content)

    monkeypatch.setattr(leave_one_out, "atomic_write", counted)
    assert ablate(run, tmp_path, None, QUIET) == found
    assert written == [5]  # never less than is known


def test_trained_again_without_a_client_is_the_run_that_it_never_joined(
    run: Path, config_file: Path, tmp_path: Path
) -> None:
    done = legolm("ablate", run, "--out", tmp_path / "out", "--retrain", "--only", "sparse,fr")
    assert done.returncode == 0, done.stderr
    assert "note: 2 to train again without; the rounds with all took " in done.stderr
    assert "each trained again" in done.stdout and str(tmp_path / "out" / "retrained.html") in done.stdout
    found = read_record(tmp_path / "out" / "retrained.json", Ablation)
    assert found.retrained and not (tmp_path / "out" / "ablation.json").exists()
    # The block of de alone is de: one run.
    assert [(one.kind, one.name) for one in found.without] == [("block", "sparse"), ("client", "fr"), ("client", "de")]
    assert {path.name for path in (tmp_path / "out" / "without").iterdir()} == {"block-sparse", "client-fr"}
    sets = [f"blocks.{n}={json.dumps({'name': name, 'path': str(run / 'blocks' / name)})}" for n, name in BLOCKS]
    sets += ["clients.0.joins=3", "evaluate.local_only=false", "federation.keep_updates=false"]
    expected = pipeline.run(configs.load(config_file, sets), tmp_path / "fr", models=False)
    records = metrics(tmp_path / "fr")
    scored = rounds_of(records)[expected.best_round]
    assert all("fr" not in one.accepted for one in rounds_of(records))
    without = found.without[1]
    assert scored.llm and without.llm == scored.llm.loss
    assert without.by_client == {
        id: pytest.approx(fmean(one.root[of].loss for of in ("fr", "de", "es")))
        for id, one in scored.by_client().items()
    }
    replayed = ablate(run, tmp_path / "out", None, QUIET)
    assert replayed.all == found.all and replayed.without[2].llm != without.llm


def test_training_again_goes_on_and_nobody_left_is_the_start(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = list[str]()
    whole = retrain.run_whole

    def counted(config: configs.RunConfig, folder: Path, *given: Any, **more: Any) -> Any:
        ended.append(folder.name)
        return whole(config, folder, *given, **more)

    monkeypatch.setattr(retrain, "run_whole", counted)
    first = ablate(run, tmp_path, None, QUIET, retrain=True, only=["de"])
    assert [one.name for one in first.without] == ["sparse", "de"]
    found = ablate(run, tmp_path, None, QUIET, retrain=True, only=["es", "wide"])
    assert ended == ["block-sparse", "block-wide", "client-es"]
    assert [one.name for one in found.without] == ["wide", "sparse", "de", "es"]
    monkeypatch.setattr(leave_one_out, "_cases", lambda block_of: {("block", "wide"): tuple(block_of)})
    alone = ablate(run, tmp_path / "all", None, QUIET, retrain=True)
    assert len(ended) == 3 and alone.without[0].measures() == alone.before.measures()


def test_blocks_that_clients_sums_cut_are_cut_again_without_the_left_out(
    three_clients: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    raw = three_clients(tmp_path, ("wide", "sparse", "wide"), evaluate={"local_only": False})
    raw["blocks"][0]["calibration"] = {"statistics": "clients", "samples": 8, "length": 32}
    out = tmp_path / "run"
    pipeline.run(configs.validate(configs.RunConfig, raw, "test"), out)
    found = ablate(out, out, None, QUIET, retrain=True, only=["fr"])
    assert "The dearest client to leave out is fr" in page(found)
    without = out / "without" / "client-fr"
    assert set(RunDir(without).known().clients[0].named) == {"wide"}
    records = [rounds_of(metrics(folder)) for folder in (out, without)]
    assert [set(rounds[0].bytes) for rounds in records] == [{"fr", "de", "es"}, {"de", "es"}]
    assert [set(rounds[1].accepted) for rounds in records] == [{"fr", "de", "es"}, {"de", "es"}]
    same = [
        (out / "blocks" / name / "model.safetensors").read_bytes()
        == (without / "blocks" / name / "model.safetensors").read_bytes()
        for name in ("sparse", "wide")
    ]
    assert same == [True, False]


def test_as_many_replies_are_asked_as_are_left_in_each_round(config_file: Path, tmp_path: Path) -> None:
    sets = ["federation.min_replies=2", "clients.1.leaves=1", "federation.keep_updates=false"]
    pipeline.run(configs.load(config_file, [*sets, "evaluate.local_only=false"]), tmp_path / "run", models=False)
    found = ablate(tmp_path / "run", tmp_path / "run", None, QUIET, retrain=True, only=["fr"])
    assert [one.name for one in found.without] == ["fr"]


def test_what_cannot_be_trained_again_is_one_line(run: Path, config_file: Path, tmp_path: Path) -> None:
    assert_one_line(legolm("ablate", run, "--retrain", "--only", "wid"), "--only wid: is no client, nor a block")
    assert_one_line(legolm("ablate", run, "--only", " , "), "--only ' , ': names none")
    sets = ["clients.1.joins=2", "federation.keep_updates=false", "evaluate.local_only=false"]
    pipeline.run(configs.load(config_file, sets), tmp_path / "late", models=False)
    says = "without block-wide: round 1: no client takes part", "or name what to leave out (--only)"
    assert_one_line(legolm("ablate", tmp_path / "late", "--retrain"), *says)
    assert not (tmp_path / "late" / "without").exists()
    (tmp_path / "out" / "without" / "block-wide").mkdir(parents=True)
    (tmp_path / "out" / "without" / "block-wide" / "mine.txt").write_text("mine")
    says = "without block-wide: run folder", "is not empty and not a run"
    assert_one_line(legolm("ablate", run, "--retrain", "--out", tmp_path / "out"), *says)


def test_a_run_without_the_local_stage_has_no_such_line(other_run: Path, tmp_path: Path) -> None:
    found = ablate(other_run, tmp_path, None, QUIET)
    assert found.local is None
    assert found.gain is None
    assert "local only" not in (tmp_path / "ablation.html").read_text().partition("local-only")[0]
    assert "no local-only baseline" in page(found)
    assert set(found.cost) == {"wide", "sparse"}


def test_what_cannot_be_ablated_is_one_line(run: Path, other_run: Path, config_file: Path, tmp_path: Path) -> None:
    assert_one_line(legolm("ablate", tmp_path), "no config.yaml")
    for sets, says in (
        (["federation.keep_updates=false"], "run it anew with --set federation.keep_updates=true"),
        (["federation.mode=alone"], "aggregates no updates"),
        ([], "finish the run first"),
    ):
        folder = tmp_path / says[:3]
        RunDir.open(folder, configs.load(config_file, sets), resume=False)
        assert_one_line(legolm("ablate", folder), says)
    ablate(other_run, tmp_path / "out", None, QUIET)
    with pytest.raises(LegolmError, match="holds the ablation of another run"):
        ablate(run, tmp_path / "out", None, QUIET)
    changed = tmp_path / "lost"
    for file in other_run.rglob("*"):
        if file.is_file() and "final" not in file.parts:
            (changed / file.relative_to(other_run)).parent.mkdir(parents=True, exist_ok=True)
            (changed / file.relative_to(other_run)).write_bytes(file.read_bytes())
    rounds, new = changed / "rounds", tmp_path / "new"
    kept = rounds / "0001" / "updates" / "fr.safetensors"
    content = kept.read_bytes()
    for other, says in ((content[:-1], "is not what the client sent"), (None, "cannot be read")):
        kept.unlink() if other is None else kept.write_bytes(other)
        wanted = rf"fr\.safetensors: the kept update of fr {says}.*; restore it, or remove {rounds / '0001'} and run"
        with pytest.raises(LegolmError, match=wanted):
            ablate(changed, new, None, QUIET)
    (rounds / "0000" / "adapter.safetensors").unlink()
    with pytest.raises(LegolmError, match=f"is not what the run wrote .*; restore it, or remove {rounds / '0000'}"):
        ablate(changed, new, None, QUIET)
    for lost in ("0001", "0000"):
        shutil.rmtree(rounds / lost)
        with pytest.raises(LegolmError, match=f"{rounds / lost}: is not there; restore it, or let `legolm run"):
            ablate(changed, new, None, QUIET)
    assert not new.exists()


def test_a_config_that_was_edited_since_changes_no_figure(run: Path, tmp_path: Path) -> None:
    edited = shutil.copytree(run, tmp_path / "run")
    sets = ["aggregate.denominator=global_fill", "federation.rounds=5", "data.limit_test=1", f"final={tmp_path}/other"]
    (edited / "config.yaml").write_text(configs.dump(configs.load(run / "config.yaml", sets)))
    assert ablate(edited, tmp_path / "edited", None, QUIET) == ablate(run, tmp_path / "whole", None, QUIET)
    assert [one.name for one in RunDir(edited).models()] == [one.name for one in RunDir(run).models()]
