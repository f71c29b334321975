"""Whole runs on a tiny model: both engines, killed and resumed, with clients that send rubbish."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import command, ended, forked, is_there, legolm, without_clocks
from legolm import config as configs
from legolm import pipeline
from legolm.adapter import slice_factors
from legolm.block import read_block
from legolm.config import RunConfig
from legolm.data import Example, client_data, layouts, prompt_look, render, tokens
from legolm.errors import LegolmError
from legolm.evaluation import score
from legolm.federate import wire
from legolm.federate.transport import Exchange, Reply, Request, run_local
from legolm.federate.transport.engine import Body
from legolm.models import load_model, load_tokenizer
from legolm.runs import Others, RunDir, Summary, dump_record, read_record
from legolm.system import Progress, locked


@pytest.fixture(scope="module")
def home(three_clients: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A structured, a smaller and a sparse block, one of them recovered, and a personal step: `run.yaml`.

    It ran into `undisturbed`, with `store`.
    """
    folder = tmp_path_factory.mktemp("home")
    federation = {"engine": "local", "rounds": 2, "personal_steps": 2}
    raw = three_clients(folder, ("wide", "half", "sparse"), federation=federation)
    raw["blocks"][1]["recover"] = {"steps": 1, "batch_size": 2}
    raw["blocks"][2]["method"] = "sparsegpt"
    raw["clients"][1]["rank"] = 2
    (folder / "run.yaml").write_text(json.dumps(raw))
    pipeline.run(configs.load(folder / "run.yaml"), folder / "undisturbed", store=folder / "store")
    return folder


@pytest.fixture
def config_file(home: Path) -> Path:
    return home / "run.yaml"


@pytest.fixture
def store(home: Path) -> Path:
    """Of blocks that are cut, and of scores before training."""
    return home / "store"


@pytest.fixture
def finished(home: Path) -> tuple[RunConfig, Path]:
    """What ran, for those who only read it."""
    return configs.load(home / "run.yaml"), home / "undisturbed"


@pytest.fixture
def copied(finished: tuple[RunConfig, Path], tmp_path: Path) -> tuple[RunConfig, Path]:
    config, out = finished
    return config, Path(shutil.copytree(out, tmp_path / "undisturbed"))


def test_what_takes_a_runs_time_is_told_of_its_folder(
    finished: tuple[RunConfig, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    out = str(finished[1])
    monkeypatch.setattr("sys.argv", ["run_time.py", "--demo", out, "--ten", out])
    importlib.import_module("run_time").main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    parts, summary = found["ten_rounds"]["seconds"], json.loads((finished[1] / "summary.json").read_text())
    wall = parts.pop("wall")
    assert wall == found["demo_s"] == pytest.approx(summary["wall_s"], abs=0.1)
    assert sum(parts.values()) == pytest.approx(wall, abs=0.5) and min(parts.values()) >= 0
    assert parts["cutting"] + parts["recovery"] == pytest.approx(summary["seconds"]["blocks"], abs=0.2)
    stages = sum(summary["seconds"].values()) - summary["seconds"]["blocks"]
    assert parts["training"] + parts["scoring"] == pytest.approx(stages, abs=0.2)  # every round is scored
    rounded = 0.06 / wall + 0.001  # seconds are told to a tenth
    assert found["scoring_share"] == pytest.approx(parts["scoring"] / wall, abs=rounded) and parts["training"] > 0


def adapters(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("adapter.safetensors"))}


def assert_same_run(one: Path, two: Path, exact: bool) -> None:
    first, second = adapters(one), adapters(two)
    assert list(first) == list(second)
    for name in first:
        for key, tensor in first[name].items():
            if exact:
                assert torch.equal(tensor, second[name][key]), (name, key)
            else:
                torch.testing.assert_close(tensor, second[name][key], rtol=1e-5, atol=1e-8)
    summaries = [without_clocks(json.loads((folder / "summary.json").read_text())) for folder in (one, two)]
    if exact:
        assert summaries[0] == summaries[1]


def actors_niceness(server: int) -> set[int]:
    """Of the client actors that run below the process `server` at this moment."""
    found = set()
    with suppress(psutil.NoSuchProcess):  # they come and go
        for process in psutil.Process(server).children(recursive=True):
            if "".join(process.cmdline()).startswith("ray::ClientAppActor"):
                found.add(process.nice())
    return found


def test_a_run_leaves_everything_promised(finished: tuple[RunConfig, Path]) -> None:
    _, out = finished
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rounds"] == 2
    assert [block["name"] for block in summary["blocks"]] == ["llm", "wide", "half", "sparse"]
    for block in summary["blocks"]:
        assert block["params"] > 0
        assert block["file_bytes"] > 0
        assert set(block["coverage"]) == {"layers", "kv_groups", "neurons", "weights", "hash"}
    for client in summary["clients"]:
        assert set(client["own"]) == set(client["others"]) == {"before", "local", "global", "personal"}
        assert client["own"]["local"] < client["own"]["before"]
    assert summary["llm"]["loss_after"] < summary["llm"]["loss_before"]
    assert summary["bytes_up_per_round"] > 0
    assert summary["bytes_down_per_round"] > 0
    assert summary["wall_s"] > 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["stage"] for record in records] == ["round"] + ["local"] * 3 + ["round"] * 2 + ["personal"] * 3
    assert "<svg" in (out / "report.html").read_text()
    typed = read_record(out / "summary.json", Summary)
    assert json.loads(dump_record(typed)) == summary
    assert (out / "summary.json").read_text() == dump_record(typed, indent=2)
    assert typed.others == Others(asked=2, there=2)
    with (out / "rounds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["0", "1", "2"]
    for row, entry in zip(rows, typed.history, strict=True):
        assert entry.llm is not None
        assert float(row["llm_loss"]) == entry.llm.loss
        assert float(row["llm_exact_match"]) == entry.llm.exact_match
        assert float(row["validation"]) == entry.validation
        assert (int(row["bytes_up"]), int(row["bytes_down"])) == (entry.bytes_up, entry.bytes_down)
        assert (int(row["accepted"]), int(row["refused"])) == (3 if entry.round else 0, 0)
    with (out / "clients.csv").open() as file:
        lines = {row["id"]: row for row in csv.DictReader(file)}
    for client in typed.clients:
        assert lines[client.id]["block"] == client.block
        assert float(lines[client.id]["own_personal"]) == client.own["personal"]
        assert float(lines[client.id]["others_exact_match_local"]) == client.others_exact_match["local"]
    assert not list(out.rglob("*.partial"))


def test_final_models_load_plainly_and_are_what_was_scored(finished: tuple[RunConfig, Path]) -> None:
    config, out = finished
    summary = json.loads((out / "summary.json").read_text())
    assert sorted(path.name for path in (out / "final").iterdir()) == ["de", "es", "fr", "llm"]
    for path in (out / "final").iterdir():
        model = AutoModelForCausalLM.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert bool(model(**tokenizer("Say 1", return_tensors="pt")).logits.isfinite().all())
        block = read_block(path)
        for key, mask in block.coverage.masks.items():
            layer, module = int(key.split(".")[1]), key.split(".", 2)[2]
            assert bool((model.model.layers[layer].get_submodule(module).weight[~mask] == 0).all())

    tokenizer = load_tokenizer(out / "final" / "de")
    rows = [render(row, tokenizer, config.train.max_length) for row in client_data(config)["de"].test]
    found = score(load_model(out / "final" / "de"), rows, 16, "fp32")
    entry = next(client for client in summary["clients"] if client["id"] == "de")
    assert found.loss == pytest.approx(entry["own"]["personal"], rel=1e-4)


WHOLE = """
from legolm.finetune import Task, fit, trainer

@trainer("mine")
def whole(task: Task, *, share: float = 0.5):
    change, metrics = fit(task)
    return {key: share * tensor for key, tensor in change.items()}, metrics | {"share": share}
"""


def test_the_flower_engine_gives_the_same_result_with_a_trainer_from_outside(
    config_file: Path, finished: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    _, local = finished
    out = tmp_path / "flower"
    (tmp_path / "mine.py").write_text(WHOLE)
    # In a process of its own, as users run it: Ray and its threads end with it. Of -P, like the command, without the
    # working directory in its path: it and Ray's processes each find the plugin.
    command = [sys.executable, "-P", "-m", "legolm.cli", "run", str(config_file), "--out", str(out)]
    sets = ("federation.engine=flower", "plugins=[mine:whole]", "train.trainer=mine", "train.share=1")
    errors, deadline, niceness = tmp_path / "stderr.txt", time.monotonic() + 1500, set[int]()
    # A socket's path below it has to be short.
    with errors.open("w") as stderr, TemporaryDirectory(prefix="r", dir="/tmp") as sessions:
        started = [*command, *(part for one in sets for part in ("--set", one))]
        environment = os.environ | {"RAY_TMPDIR": sessions}
        process = subprocess.Popen(started, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, cwd=tmp_path)
        while process.poll() is None:
            assert time.monotonic() < deadline, errors.read_text()
            niceness |= actors_niceness(process.pid)
            time.sleep(0.5)
        assert list(Path(sessions).iterdir()) == []
    assert process.returncode == 0, errors.read_text()
    assert_same_run(local, out, exact=False)
    assert niceness == {os.nice(0)}  # beside other work, actors get as much of a core as anyone
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {one["share"] for record in records if record.get("round") for one in record["train"].values()} == {1.0}


def test_a_killed_run_goes_on_and_ends_at_the_same_result(
    config_file: Path, finished: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    _, undisturbed = finished
    out = tmp_path / "killed"
    # Kill at three different stages: while blocks are cut, in the rounds, in the personal step.
    for waits_for in ("blocks/wide", "rounds/0001", "personal/fr"):
        pid = forked(lambda: command("run", config_file, "--out", out, "--resume"))
        while not (out / waits_for).exists():
            assert is_there(pid)
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    done = legolm("run", config_file, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(undisturbed, out, exact=True)
    assert not list(out.rglob("*.partial"))


Tamper = Callable[[wire.UpdateReply, dict[str, torch.Tensor]], bytes]


def tampering_engine(
    tampers: dict[str, Tamper], crash: str | None = None, phases: tuple[str, ...] = ("round",)
) -> Callable[..., None]:
    """The local engine over a line on which some clients' updates of these phases arrive changed, or not at all."""

    def engine(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def wrap(exchange: Exchange) -> Exchange:
            def changed(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                asked: list[Request] = []
                for reply in exchange((asked.append(one) or one for one in requests), deadline_s):
                    request = asked[reply.index]
                    is_round = wire.kind_of(request.content) == "train" and (
                        wire.unpack(request.content, wire.TrainRequest)[0].phase in phases
                    )
                    if is_round and request.client == crash:
                        yield Reply(reply.index, error="the device went away")
                    elif is_round and request.client in tampers:
                        content = tampers[request.client](*wire.unpack(reply.content, wire.UpdateReply))
                        yield replace(reply, content=content)
                    else:
                        yield reply

            return changed

        run_local(run, config, actors, lambda exchange: body(wrap(exchange)))

    return engine


def poison(header: wire.UpdateReply, delta: dict[str, torch.Tensor]) -> bytes:
    poisoned = delta["factors"].clone()
    poisoned[0] = float("nan")
    return wire.pack(header, {"factors": poisoned})


def swollen(header: wire.UpdateReply, delta: dict[str, torch.Tensor]) -> bytes:
    return wire.pack(header, {key: torch.full_like(tensor, 9e3) for key, tensor in delta.items()})


def foreign(header: wire.UpdateReply, delta: dict[str, torch.Tensor]) -> bytes:
    return wire.pack(header.model_copy(update={"base_fingerprint": "another"}), delta)


def misshapen(header: wire.UpdateReply, delta: dict[str, torch.Tensor]) -> bytes:
    return wire.pack(header, {key: tensor[1:] for key, tensor in delta.items()})


def test_bad_updates_are_refused_and_named_and_the_round_goes_on(
    config_file: Path, store: Path, tmp_path: Path
) -> None:
    config = configs.load(
        config_file, ["federation.rounds=1", "federation.personal_steps=0", "evaluate.local_only=false"]
    )
    tampers: dict[str, Tamper]
    for name, tampers, crash, reasons in (
        ("one", {"fr": poison, "es": misshapen}, None, {"fr": "is not finite", "es": "has shape"}),
        ("two", {"de": foreign}, "es", {"de": "base_fingerprint is 'another'", "es": "the device went away"}),
    ):
        engine = tampering_engine(tampers, crash)
        summary = pipeline.run(config, tmp_path / name, engine=engine, store=store, models=False)
        last = summary.history[-1]
        assert last.accepted == [client for client in ("fr", "de", "es") if client not in reasons]
        assert {one.client for one in last.refused} == set(reasons)
        for one in last.refused:
            assert reasons[one.client] in one.reason
        state = load_file(tmp_path / name / "rounds" / "0001" / "adapter.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in state.values())


def test_refusals_outside_the_rounds_are_named_and_passed_over(config_file: Path, store: Path, tmp_path: Path) -> None:
    config, out = configs.load(config_file, ["federation.rounds=1", "federation.personal_steps=1"]), tmp_path / "out"
    engine = tampering_engine({"fr": poison}, phases=("local", "personal"))
    summary = pipeline.run(config, out, engine=engine, store=store)
    (fr, *others) = summary.clients
    assert set(fr.refused) == {"local", "personal"} and "is not finite" in fr.refused["local"]
    assert set(fr.own) == {"before", "global"} and all(one.refused == {} for one in others)
    assert "The personal model of fr was refused" in (out / "report.html").read_text()
    # It ends with what the rounds gave it, and a resumed run does not ask it again.
    ended = load_file(out / "final" / "fr" / "factors.safetensors")
    known = load_file(out / "rounds" / f"000{summary.best_round}" / "adapter.safetensors")
    block = read_block(out / "blocks" / "wide").coverage
    expected = slice_factors(block, {key: known[key] for key in known if key.startswith("layers.")}, 4)
    assert all(torch.equal(ended[key], tensor) for key, tensor in expected.items())
    assert pipeline.run(config, out, resume=True).clients == summary.clients
    with pytest.raises(LegolmError, match=r"local: every client was refused \(fr: .*; de: .*; es: .*not finite.*\)"):
        everyone = dict.fromkeys(("fr", "de", "es"), poison)
        pipeline.run(config, tmp_path / "none", engine=tampering_engine(everyone, phases=("local",)), store=store)


def test_an_adapter_that_overflows_is_named_with_who_made_it(config_file: Path, store: Path, tmp_path: Path) -> None:
    config = configs.load(
        config_file,
        ["aggregate.server_learning_rate=1e37", "federation.personal_steps=0", "evaluate.local_only=false"],
    )
    with pytest.raises(LegolmError, match=r"round 1: the new global adapter is not finite in layers.*of fr, de, es"):
        pipeline.run(config, tmp_path / "out", engine=tampering_engine({"fr": swollen}), store=store)


def test_replies_twice_of_nobody_and_none_are_named(config_file: Path, store: Path, tmp_path: Path) -> None:
    config = configs.load(
        config_file, ["federation.rounds=1", "federation.personal_steps=0", "evaluate.local_only=false"]
    )

    def engine(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def wrap(exchange: Exchange) -> Exchange:
            def changed(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                for reply in exchange(requests, deadline_s):
                    if wire.kind_of(reply.content) != "update":
                        yield reply
                    elif reply.index != 1:  # of three, the second one's never comes
                        yield from (reply, reply, replace(reply, index=7))

            return changed

        run_local(run, config, actors, lambda exchange: body(wrap(exchange)))

    said = StringIO()
    progress = Progress(Console(file=said, width=200))
    summary = pipeline.run(config, tmp_path / "out", engine=engine, progress=progress, store=store, models=False)
    assert re.search(r"round 1: train: one more reply of (fr|de|es) \(request 0\) was dropped", said.getvalue())
    assert "one more reply of nobody (request 7) was dropped" in said.getvalue()
    last = summary.history[-1]
    assert len(last.accepted) == 2 and [one.reason for one in last.refused] == ["no reply came"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loss": float("nan")}, "fr.* has loss nan; if training diverged, lower train.learning_rate"),
        ({"exact_match": 2.0}, "has exact_match 2.0"),
        ({"stderr": -1.0}, "has standard error -1.0"),
        ({"tokens": 0}, "tokens 0"),
        ({"loss": 1e308}, "has loss 1e\\+308; if training diverged"),
        ({"tokens": 10**400}, "tokens 10000"),
        (None, "scores came for"),
    ],
)
def test_scores_are_checked_and_named(
    change: dict[str, float] | None, says: str, three_clients: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    raw = three_clients(tmp_path, ("dense", "dense", "dense"), rows=10, evaluate={"local_only": False})
    config = configs.validate(RunConfig, raw, "test")

    def engine(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def wrap(exchange: Exchange) -> Exchange:
            def changed(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                for reply in exchange(requests, deadline_s):
                    scores = list(wire.unpack(reply.content, wire.ScoreReply)[0].scores)
                    scores = scores[1:] if change is None else [scores[0].model_copy(update=change), *scores[1:]]
                    yield replace(reply, content=wire.pack(wire.ScoreReply(scores=scores), {}))

            return changed

        run_local(run, config, actors, lambda exchange: body(wrap(exchange)))

    with pytest.raises(LegolmError, match=rf"before: evaluate: client .*, block .*: .*{says}"):
        pipeline.run(config, tmp_path / "out", engine=engine)


def test_too_few_updates_stop_the_run_with_the_reasons(config_file: Path, store: Path, tmp_path: Path) -> None:
    config = configs.load(config_file, ["federation.min_replies=3", "evaluate.local_only=false"])
    with pytest.raises(LegolmError, match=r"round 1: 2 updates accepted.*fr: .*is not finite"):
        pipeline.run(config, tmp_path / "out", engine=tampering_engine({"fr": poison}), store=store)


def test_a_folder_of_another_run_is_left_alone(finished: tuple[RunConfig, Path]) -> None:
    config, out = finished
    before = sorted((str(path), path.stat().st_mtime_ns) for path in out.rglob("*"))
    with pytest.raises(LegolmError, match="add --resume"):
        pipeline.run(config, out)
    with pytest.raises(LegolmError, match="belongs to another config"):
        pipeline.run(config.model_copy(update={"seed": 1}), out, resume=True)
    assert sorted((str(path), path.stat().st_mtime_ns) for path in out.rglob("*")) == before


def test_changed_data_stops_a_resume(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "data", tmp_path / "data")
    config = configs.load(home / "run.yaml", [f"data.train={tmp_path}/data/*.jsonl"])
    RunDir.open(tmp_path / "out", config, resume=False)
    pipeline._identify(RunDir(tmp_path / "out"), config, pipeline.make_plan(config))
    with (tmp_path / "data" / "fr.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "Say", "output": "x"}) + "\n")
    with pytest.raises(LegolmError, match="the data changed since the run started"):
        pipeline.run(config, tmp_path / "out", resume=True)


def test_rows_are_read_once_a_run_and_again_when_they_change(
    three_clients: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = three_clients(tmp_path, ("dense", "dense", "dense"), rows=10, evaluate={"local_only": False})
    config, read, real = configs.validate(RunConfig, raw, "test"), [], layouts.read_records
    monkeypatch.setattr(layouts, "read_records", lambda source, field: read.append(field) or real(source, field))
    pipeline.run(config, tmp_path / "out")
    assert read == ["data.train"]
    held = len(client_data(config)["fr"].train)
    with (tmp_path / "data" / "fr.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "Say", "output": "x"}) + "\n")
    assert len(client_data(config)["fr"].train) == held + 1
    assert len(read) == 2


@pytest.mark.parametrize("change", ["federation.mode=pooled", "train.long_examples=refuse"])
def test_rows_are_tokenized_once_a_process(
    change: str, three_clients: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the plan, which wants their lengths, and for training on blocks with tokenizers of their own."""
    federation = {"engine": "local", "rounds": 1}
    raw = three_clients(tmp_path, ("dense", "wide", "wide"), rows=10, federation=federation)
    (tmp_path / "run.yaml").write_text(json.dumps(raw | {"evaluate": {"local_only": False}}))
    config, seen = configs.load(tmp_path / "run.yaml", [change]), Counter[Example]()
    rendering = importlib.import_module("legolm.data.render")
    real = rendering._texts
    monkeypatch.setattr(tokens, "_kept", tokens._Kept())  # by other tests, of the same rows
    monkeypatch.setattr(rendering, "_texts", lambda some, given: seen.update(some) or real(some, given))
    pipeline.run(config, tmp_path / "out", models=False)
    assert seen == {row: 1 for one in client_data(config).values() for part in (one.train, one.validation, one.test)
                    for row in part}  # fmt: skip


def test_profiles_get_the_largest_block_that_fits(home: Path, tmp_path: Path) -> None:
    raw, config_file = json.loads((home / "run.yaml").read_text()), tmp_path / "run.yaml"
    raw["clients"] = [
        {"id": "fr", "profile": {"memory_mb": 100_000}},
        {"id": "de", "block": "half"},
        {"id": "es", "profile": {"memory_mb": 1}},
    ]
    config_file.write_text(json.dumps(raw))
    with pytest.raises(LegolmError, match=r"'es' has 1 MB \(profile.memory_mb\); the smallest block, '\w+', needs"):
        pipeline.make_plan(configs.load(config_file))
    plan = pipeline.make_plan(configs.load(config_file, ["clients.2.profile.memory_mb=100000"]))
    largest = max(plan.blocks, key=lambda block: block.parameters).name
    assert [client.block for client in plan.clients] == [largest, "half", largest]


def test_what_a_stage_kept_is_checked(copied: tuple[RunConfig, Path]) -> None:
    config, out = copied
    path = out / "rounds" / "0002" / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # one bit of the last weight: it reads as well as before
    path.write_bytes(content)
    shutil.rmtree(out / "final")
    with pytest.raises(LegolmError, match=r"rounds/0002/adapter.safetensors: is not what the run wrote"):
        pipeline.run(config, out, resume=True)


def test_two_processes_do_not_share_a_folder(config_file: Path, tmp_path: Path) -> None:
    config, out, errors = configs.load(config_file), tmp_path / "out", tmp_path / "stderr.txt"
    with locked(out):
        assert ended(forked(lambda: command("run", config_file, "--out", out), errors)) == 2
    assert f"another process ({os.getpid()}) works in this folder" in errors.read_text()
    assert not (out / "config.yaml").exists()
    RunDir.open(out, config, resume=False)


def test_a_block_that_another_run_is_cutting_is_waited_for(config_file: Path, tmp_path: Path) -> None:
    config, store = configs.load(config_file), tmp_path / "store"
    pipeline.run(config, tmp_path / "first", store=store, models=False)
    place = next(one for one in (store / ".cut").iterdir() if one.name.startswith("half-"))
    other = Thread(
        target=pipeline.run, args=(config, tmp_path / "second"), kwargs={"store": store, "models": False}, daemon=True
    )
    with locked(place):
        other.start()
        other.join(1)
        assert other.is_alive() and not (tmp_path / "second" / "blocks" / "half").exists()
    other.join(60)
    assert (tmp_path / "second" / "blocks" / "half").exists()


def test_a_resumed_run_may_change_what_does_not_change_the_past(copied: tuple[RunConfig, Path]) -> None:
    config, out = copied
    before = json.loads((out / "summary.json").read_text())
    changed = config.federation.model_copy(update={"deadline_s": 99.0, "threads": 2, "min_replies": 2})
    pipeline.run(config.model_copy(update={"federation": changed}), out, resume=True)
    assert RunDir(out).known().federation.deadline_s == 99.0
    assert without_clocks(json.loads((out / "summary.json").read_text())) == without_clocks(before)
    with pytest.raises(LegolmError, match=r"belongs to another config, `train.steps` differs \(was 2, is 9\); set it"):
        train = config.train.model_copy(update={"steps": 9})
        pipeline.run(config.model_copy(update={"train": train}), out, resume=True)


def test_a_given_block_gets_the_runs_template_and_stays_as_it_is(
    three_clients: Callable[..., dict[str, Any]], tiny: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    """Of an LLM without one; the block's files and folders are read-only."""
    model, given, said = Path(shutil.copytree(tiny("llama"), tmp_path / "model")), tmp_path / "given", StringIO()
    (model / "chat_template.jinja").unlink()
    text = ("--calibration", corpus, "--samples", 2, "--length", 32, "--template", "chatml")
    cut = legolm("prune", model, "--method", "structured", "--intermediate-size", 64, *text, "--out", given)
    assert cut.returncode == 0, cut.stderr
    (given / "additional_chat_templates").mkdir()
    (given / "additional_chat_templates" / "brief.jinja").write_text("{{ messages[0]['content'] }}")
    for path in (given, *given.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def there() -> dict[Path, tuple[int, bytes]]:
        return {one: (one.stat().st_mode, one.read_bytes() if one.is_file() else b"") for one in given.rglob("*")}

    before = there()
    raw = three_clients(tmp_path, ("wide", "dense", "dense"), rows=10, model=str(model), federation={"rounds": 1})
    raw["blocks"][0] = {"name": "wide", "path": str(given)}
    raw["federation"]["engine"] = "local"
    out, progress = tmp_path / "out", Progress(Console(file=said, width=500))
    pipeline.run(configs.validate(RunConfig, raw, "test"), out, progress=progress)
    assert "block wide: was cut with another chat template or date; it gets this run's" in said.getvalue()
    block, wanted = out / "blocks" / "wide", prompt_look(load_tokenizer(model))
    for path in (block, out / "final" / "fr", out / "final" / "de"):
        assert prompt_look(load_tokenizer(path)) == wanted
    assert (block / "model.safetensors").samefile(given / "model.safetensors")
    assert there() == before
    assert block.stat().st_mode & 0o700 == 0o700  # its files may be replaced, by others than root too


def test_final_models_are_readable_as_the_umask_says(finished: tuple[RunConfig, Path]) -> None:
    _, out = finished
    (out / "probe").touch()
    wanted = (out / "probe").stat().st_mode
    assert {path.stat().st_mode for path in (out / "final").rglob("*") if path.is_file()} == {wanted}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on(number: signal.Signals, config_file: Path, tmp_path: Path) -> None:
    out, errors = tmp_path / "out", tmp_path / "stderr.txt"

    def run() -> None:
        signal.signal(number, signal.default_int_handler)  # of a shell's background job SIGINT is ignored
        command("run", config_file, "--set", "federation.rounds=200", "--out", out)  # never over before the signal

    pid = forked(run, errors)
    while not (out / "rounds" / "0000").exists():
        assert is_there(pid)
        time.sleep(0.01)
    os.kill(pid, number)
    assert ended(pid) == 130
    said = errors.read_text()
    assert said.splitlines()[-1].startswith("stopped: what is finished is kept")
    assert "Traceback" not in said
    assert not list(out.rglob("*.partial"))
