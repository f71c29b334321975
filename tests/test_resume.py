"""A resumed run: what it may change, what it makes again, what it refuses, and what its times count."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import legolm as lg
from helpers import assert_one_line, legolm, without_clocks
from legolm import config as configs
from legolm import pipeline
from legolm.block import Coverage, Manifest
from legolm.cli.run import run as run_command
from legolm.errors import LegolmError
from legolm.federate.transport import Exchange, Reply, Request, run_local
from legolm.federate.transport.engine import Body
from legolm.federate.wire import kind_of
from legolm.models import find_model
from legolm.prune import build
from legolm.report import read_status
from legolm.runs import Clock, RunDir, Summary, run_of
from legolm.runs.resume import differences, settled
from legolm.system import Progress


@pytest.fixture(scope="module")
def home(three_clients: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run.yaml`, two rounds in int8 whose clients keep what it lost and a personal step, finished in `out`."""
    folder = tmp_path_factory.mktemp("home")
    data = {"train": f"{folder}/data/*.jsonl", "limit_test": 1, "limit_validation": 1}
    federation = {"engine": "local", "rounds": 2, "personal_steps": 1, "codec": "int8", "keep_updates": True}
    raw = three_clients(folder, ("wide", "dense", "dense"), rows=10, data=data, federation=federation)
    raw["train"]["schedule"] = "constant"
    (folder / "run.yaml").write_text(json.dumps(raw))
    resume(folder, "out")
    return folder


def resume(home: Path, out: str | Path, *sets: str, store: Path | None = None) -> tuple[Summary, str]:
    """The run's summary and what it said."""
    said = StringIO()
    progress, config = Progress(Console(file=said, width=500)), configs.load(home / "run.yaml", list(sets))
    found = pipeline.run(config, home / out, resume=True, progress=progress, store=store)
    return found, said.getvalue()


def copy(home: Path, to: Path) -> Path:
    shutil.copytree(home / "out", to)
    return to


def assert_same(one: Path, two: Path) -> None:
    """Everything that a run ends with, bit for bit, but its clocks and how it got there."""
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*.safetensors"))
    assert names == sorted(str(path.relative_to(two)) for path in two.rglob("*.safetensors"))
    for name in names:
        if "updates/" not in name:  # each says how long it took
            first, second = load_file(one / name), load_file(two / name)
            assert all(torch.equal(first[key], second[key]) for key in first), name
    summaries = [json.loads((folder / "summary.json").read_text()) | {"changes": []} for folder in (one, two)]
    assert without_clocks(summaries[0]) == without_clocks(summaries[1])


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ("federation.rounds=3", "training alone, the personal models, the final models"),
        ("federation.personal_steps=2", "training alone, the personal models, the final models"),
        ("evaluate.others=1", "training alone, the personal models"),
        ("evaluate.local_only=false", "the personal models, the final models"),
        ("federation.personal=mixture", "the personal models, the final models"),
        ("evaluate.batch_size=8", None),
    ],
)
def test_a_changed_run_ends_where_one_begun_so_ends(change: str, again: str | None, home: Path, tmp_path: Path) -> None:
    out = copy(home, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (out / "rounds").rglob("*")}
    _, said = resume(home, out, change)
    field, _, value = change.partition("=")
    if again:
        assert f"note: {field} was " in said
        assert f" is {value}; rounds 1 to 2 stay; made again: {again}\n" in said.replace("False", "false")
    assert "rounds to come" not in said  # its rates do not depend on how many there are
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items() if path.is_file())
    if field == "evaluate.local_only":
        shutil.rmtree(out / "local")  # kept, in case it is asked for again
    resume(home, tmp_path / "begun", change, store=home / "store")
    assert_same(tmp_path / "begun", out)
    _, said = resume(home, out, change)  # finished: nothing is said or made again
    assert "note" not in said and "train" not in said


def test_who_leaves_earlier_is_trained_alone_for_fewer_rounds(home: Path, tmp_path: Path) -> None:
    out = copy(home, tmp_path / "out")
    for gone in ("rounds/0002", "personal", "final"):  # it was stopped there
        shutil.rmtree(out / gone)
    (out / "clients" / "fr" / "0002.safetensors").unlink()
    _, said = resume(home, out, "clients.0.leaves=1")
    assert "clients.0.leaves was None and is 1; round 1 stays; made again: training alone\n" in said
    resume(home, tmp_path / "begun", "clients.0.leaves=1", store=home / "store")
    assert_same(tmp_path / "begun", out)


def test_clients_that_came_later_end_as_if_they_had_been_named_at_first(home: Path, tmp_path: Path) -> None:
    raw = json.loads((home / "run.yaml").read_text())
    raw["blocks"].append({"name": "late", "method": "magnitude", "sparsity": 0.5})
    raw["clients"][2] |= {"block": "late", "joins": 2}
    few = raw | {"clients": raw["clients"][:2], "blocks": raw["blocks"][:2]}
    raw["federation"]["rounds"] = 2
    begun, out = tmp_path / "begun", tmp_path / "out"
    first = configs.validate(configs.RunConfig, few | {"federation": few["federation"] | {"rounds": 1}}, "test")
    pipeline.run(first, out)
    moved = out.rename(tmp_path / "moved")
    said = StringIO()
    progress = Progress(Console(file=said, width=500))
    config = configs.validate(configs.RunConfig, raw, "test")
    early = config.model_copy(
        update={"clients": [*config.clients[:2], config.clients[2].model_copy(update={"joins": 1})]}
    )
    with pytest.raises(LegolmError, match=r"`clients` differs .* let client 'es' join in round 2 \(`joins`\)"):
        pipeline.run(early, moved, resume=True)
    iid = config.model_copy(update={"data": config.data.model_copy(update={"limit_test": 2})})
    with pytest.raises(LegolmError, match=r"`data\.limit_test` differs"):
        pipeline.run(iid, moved, resume=True)
    pipeline.run(config, moved, resume=True, progress=progress)
    assert "clients was ['fr', 'de'] and is ['fr', 'de', 'es']; round 1 stays" in said.getvalue()
    pipeline.run(config, begun)
    assert_same(begun, moved)
    fewer = config.model_copy(update={"clients": config.clients[:2]})
    with pytest.raises(LegolmError, match=r"`clients` differs .* let them leave"):
        pipeline.run(fewer, moved, resume=True)


def test_a_change_is_recorded_and_said_where_rates_follow_the_whole_run(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = ("train.schedule=cosine", "evaluate.local_only=false", "federation.personal_steps=0")
    resume(home, out, *settings, "federation.rounds=1")
    found, said = resume(home, out, *settings)
    assert "federation.rounds was 1 and is 2; round 1 stays; made again: the final models" in said
    assert "train.schedule cosine follows the steps of the whole run" in said
    (change,) = found.changes
    assert (change.field, change.old, change.new, change.rounds) == ("federation.rounds", 1, 2, 1)
    assert "federation.rounds was changed from 1 to 2 after round 1" in (out / "report.html").read_text()


def test_a_run_that_goes_on_is_not_finished(home: Path, tmp_path: Path) -> None:
    out, looked = copy(home, tmp_path / "out"), list[int]()

    def looks(folder: RunDir, config: configs.RunConfig, actors: int, body: Body) -> None:
        found = read_status(out)
        looked.append(found["rounds_done"])
        assert found["rounds"] == 3 and not found["finished"]
        assert_one_line(legolm("report", out), "no summary.json; finish the run first")
        run_local(folder, config, actors, body)

    run, config = lg.Run(out), configs.load(home / "run.yaml", ["federation.rounds=3", "evaluate.local_only=false"])
    assert run.config.federation.rounds == run.summary.rounds == 2 and read_status(out)["finished"]
    pipeline.run(config, out, resume=True, engine=looks)
    assert run.config.federation.rounds == run.summary.rounds == 3 and read_status(out)["finished"]
    shutil.rmtree(out / "rounds" / "0003")  # what is lost is made again
    pipeline.run(config, out, resume=True, engine=looks)
    assert looked == [2, 2] and read_status(out)["finished"]


def test_final_models_may_go_elsewhere(home: Path, tmp_path: Path) -> None:
    out, disk = copy(home, tmp_path / "out"), tmp_path / "disk"
    _, said = resume(home, out, f"final={disk}")
    assert f"final was None and is {disk}; rounds 1 to 2 stay\n" in said
    for name in ("llm", "fr", "de", "es"):  # the same, and those that were there stay
        one, two = (load_file(folder / name / "model.safetensors") for folder in (out / "final", disk))
        assert all(torch.equal(one[key], two[key]) for key in one)
    found = find_model(f"{out}:fr")
    assert found == disk / "fr" and run_of(found) == RunDir(out)
    base = json.loads((found / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert (Path(base) / "model.safetensors").samefile(out / "blocks" / "wide" / "model.safetensors")
    (disk / "llm" / "model.safetensors").unlink()  # as in the run's folder, what is lost is made again, and no more
    stamps = {name: (disk / name / "manifest.json").stat().st_mtime_ns for name in ("llm", "fr")}
    resume(home, out, f"final={disk}")
    again = {name: (disk / name / "manifest.json").stat().st_mtime_ns for name in ("llm", "fr")}
    assert again["llm"] != stamps["llm"] and again["fr"] == stamps["fr"]
    _, said = resume(home, out, f"final={disk}", "evaluate.local_only=false")
    assert "made again: the personal models, the final models" in said
    assert (disk / "fr" / "manifest.json").stat().st_mtime_ns != stamps["fr"]
    assert (disk / "run.txt").read_text() == str(out)


def test_final_models_of_two_runs_never_meet(home: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "fr").mkdir()
    run = ("run", home / "run.yaml", "--out")
    for more in ((tmp_path / "new",), (tmp_path / "new", "--dry-run"), (home / "out", "--resume", "--dry-run")):
        done = legolm(*run, *more, "--set", f"final={taken}")
        assert done.returncode == 2 and done.stderr.startswith(f"error: final: {taken} is already there and not an em")
    file = tmp_path / "file"
    file.write_text("")
    assert_one_line(legolm(*run, tmp_path / "new", "--set", f"final={file / 'x'}"), "give another final")
    assert not (tmp_path / "new").exists()


def test_what_the_past_stands_on_is_refused_by_name(home: Path, tmp_path: Path) -> None:
    out = copy(home, tmp_path / "out")
    for change, says in (
        ("federation.rounds=1", "`federation.rounds` differs (was 2, is 1); set it back, or give another --out: 2 rou"),
        ("train.learning_rate=0.02", "`train.learning_rate` differs (was 0.01, is 0.02)"),
        (
            "clients.0.leaves=1",
            "`clients.0.leaves` differs (was null, is 1); set it back, or give another --out: round 2",
        ),
        ("clients.1.block=wide", '`clients.1.block` differs (was "dense", is "wide")'),
        ("evaluate.scores=own", '`evaluate.scores` differs (was "everyone", is "own")'),
    ):
        assert_one_line(legolm("run", home / "run.yaml", "--out", out, "--resume", "--set", change), says)
    # An edited config.yaml is a wish like any other, not what the run did.
    written = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(written.replace("seed: 0", "seed: 1"))
    assert_one_line(legolm("run", out / "config.yaml", "--out", out, "--resume"), "`seed` differs (was 0, is 1)")


def test_the_dry_run_says_what_a_resumed_run_changes_and_refuses(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dry_run(*sets: str) -> None:
        run_command(home / "run.yaml", home / "out", list(sets), dry_run=True, resume=True)

    before = {path: path.stat().st_mtime_ns for path in (home / "out").rglob("*")}
    dry_run("federation.rounds=3")
    assert "federation.rounds was 2 and is 3; rounds 1 to 2 stay; made again: training alone" in capsys.readouterr().out
    with pytest.raises(LegolmError, match=r"`train.learning_rate` differs \(was 0.01, is 0.02\)"):
        dry_run("train.learning_rate=0.02")
    left_open = ("run", home / "run.yaml", "--out", home / "out", "--set", "precision=auto")
    for more in ((), ("--dry-run",)):  # it is what the run decided
        assert_one_line(legolm(*left_open, *more), "out: already there; add --resume to go on")
    assert {path: path.stat().st_mtime_ns for path in (home / "out").rglob("*")} == before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


MADE_AGAIN = (  # those of a line at once: nothing stands on another
    ("blocks/wide/model.safetensors",),
    ("blocks/wide/coverage.safetensors", "final/de/tokenizer.json"),
    ("blocks/wide/manifest.json", "local/de/metrics.json"),
    ("blocks/wide/config.json", "final/llm/factors.safetensors"),
    ("blocks/wide/hashes.json", "personal/es/metrics.json"),
    ("local/fr/adapter.safetensors", "final/de/adapter/adapter_model.safetensors"),
    ("personal/fr/adapter.safetensors",),
    ("final/fr/model.safetensors",),
)
SILENT = ("config.yaml", "metrics.jsonl", "summary.json", "report.html", "clients.csv", "rounds.csv")
KEPT = (
    "rounds/0000/adapter.safetensors",
    "rounds/0001/adapter.safetensors",
    "rounds/0002/metrics.json",
    "clients/fr/0002.safetensors",
    "run.json",
)


def test_each_damaged_file_is_made_again_or_named(home: Path, tmp_path: Path) -> None:
    named = ("clock.json", "rounds/0001/updates/fr.safetensors")
    for names in (*MADE_AGAIN, SILENT, named):
        out = copy(home, tmp_path / "out")
        for name in names:
            flip(out / name)
        _, said = resume(home, out)
        for name in names:
            if names in MADE_AGAIN:
                folder = "/".join(name.split("/")[:2])
                assert f"{out / folder} is made again" in said, name
            else:
                assert (f"{out / name}: is " in said) == (names == named), name
        assert_same(home / "out", out)
        shutil.rmtree(out)
    for name in KEPT:
        out = copy(home, tmp_path / "out")
        flip(out / name)
        assert_one_line(legolm("run", home / "run.yaml", "--out", out, "--resume"), f"{out / name}: is ")
        (out / name).unlink()
        assert_one_line(legolm("run", home / "run.yaml", "--out", out, "--resume"), str(out / name))
        shutil.rmtree(out)


def test_a_damaged_file_is_named_by_what_reads_it(home: Path, tmp_path: Path) -> None:
    for command, name in (
        ("report", "summary.json"),
        ("ablate", "summary.json"),
        ("ablate", "blocks/wide/manifest.json"),
        ("compose", "final/fr/factors.safetensors"),
    ):
        out = copy(home, tmp_path / "out")
        rest = {"compose": (out / "final" / "fr", "--into", "llm", "--out", tmp_path / "made")}.get(command, (out,))
        content = (out / name).read_bytes()
        other = content.replace(b'": ', b'":  ', 1) if name.endswith("json") else content[:-1] + b"\x01"
        (out / name).write_bytes(other)
        assert_one_line(legolm(command, *rest), f"{out / name}: is not what the run wrote (its hash differs)")
        shutil.rmtree(out)
    assert not (tmp_path / "made").exists()


def test_what_people_put_beside_the_runs_files_stays(home: Path, tmp_path: Path) -> None:
    out = copy(home, tmp_path / "out")
    shutil.copytree(out / "rounds" / "0001", out / "rounds" / "0001 copy")
    (out / "answers.json").write_text("[" * 100_000)
    _, said = resume(home, out)
    assert f"{out}/answers.json: is broken" in said and (out / "rounds" / "0001 copy").is_dir()
    shutil.rmtree(out / "rounds" / "0001 copy")
    assert_same(home / "out", out)
    (out / "run.json").write_text("[" * 100_000)
    assert_one_line(legolm("run", home / "run.yaml", "--out", out, "--resume"), f"{out}/run.json: is broken")


def test_rounds_after_one_that_is_gone_are_made_again(home: Path, tmp_path: Path) -> None:
    out = copy(home, tmp_path / "out")
    shutil.rmtree(out / "rounds" / "0001")
    for client in ("fr", "de", "es"):  # as they were after the round before
        shutil.rmtree(out / "clients" / client)
    _, said = resume(home, out)
    assert f"{out}/rounds/0002: is made again, for an earlier round is not there" in said
    assert_same(home / "out", out)


@pytest.mark.parametrize("damage", [flip, lambda file: shutil.rmtree(file.parent)])
def test_a_block_that_cannot_be_made_again_as_it_was_is_named_each_time(
    damage: Callable[[Path], None], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = copy(home, tmp_path / "out"), build.write_block
    damage(out / "blocks" / "wide" / "model.safetensors")

    def otherwise(manifest: Manifest, coverage: Coverage, folder: Path) -> None:
        """As where another machine cuts otherwise."""
        flip(folder / "model.safetensors")
        real(manifest, coverage, folder)

    with monkeypatch.context() as patched:
        patched.setattr(build, "write_block", otherwise)
        for _ in range(2):
            with pytest.raises(LegolmError, match=r"blocks/wide: cannot be made again as it was \(other weights"):
                resume(home, out)
            assert not (out / "blocks" / "wide").exists()
    _, said = resume(home, out)
    assert f"note: {out}/blocks/wide: is lost; {out}/blocks/wide is made again" in said
    assert_same(home / "out", out)
    shutil.copytree(out / "blocks" / "dense", out / "blocks" / "wide", dirs_exist_ok=True)  # whole, and another's
    _, said = resume(home, out)
    assert f"note: {out}/blocks/wide: is another block than the run's; {out}/blocks/wide is made again" in said
    assert_same(home / "out", out)


def test_the_dry_run_says_what_is_damaged(home: Path, tmp_path: Path) -> None:
    out = copy(home, tmp_path / "out")
    ask = ("run", home / "run.yaml", "--out", out, "--resume", "--dry-run")
    for name in ("blocks/wide", "final/fr"):
        flip(out / name / "model.safetensors")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    done = legolm(*ask)
    assert done.returncode == 0, done.stderr
    for name in ("blocks/wide", "final/fr"):
        folder = out / name
        says = f"{folder}/model.safetensors: is not what the run wrote (its hash differs); {folder} is made again\n"
        assert says in done.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    flip(out / "rounds" / "0001" / "adapter.safetensors")
    assert_one_line(legolm(*ask), f"{out}/rounds/0001/adapter.safetensors: is not what the run wrote")


def test_a_damaged_block_that_runs_share_is_named_once_and_cut_again(home: Path, tmp_path: Path) -> None:
    store, one, two = tmp_path / "store", tmp_path / "one", tmp_path / "two"
    quick = ("federation.rounds=1", "federation.personal_steps=0", "evaluate.local_only=false")
    resume(home, one, *quick, store=store)
    (shared,), own = store.glob("wide-*"), one / "blocks" / "wide"
    was = {name: (own / name).read_bytes() for name in ("model.safetensors", "coverage.safetensors")}
    for name in (*was, "manifest.json", "hashes.json"):
        assert name == "hashes.json" or (own / name).samefile(shared / name)
        for file in {(folder / name).stat().st_ino: folder / name for folder in (own, shared)}.values():
            os.truncate(file, file.stat().st_size // 2)  # one file with two names is broken once
        _, said = resume(home, one, *quick, store=store)
        assert said.count(f"{own} is made again") == said.count(f"{shared} is made again") == 1, name
        assert was == {name: (own / name).read_bytes() for name in was}
    _, said = resume(home, one, *quick, store=store)
    assert "made again" not in said
    flip(shared / "model.safetensors")
    _, said = resume(home, two, *quick, store=store)
    assert said.count(f"{shared} is made again") == 1
    assert was == {name: (two / "blocks" / "wide" / name).read_bytes() for name in was}


@pytest.mark.parametrize(("kind", "number"), [("evaluate", 1), ("train", 2)])
def test_work_before_an_interruption_counts(kind: str, number: int, home: Path, tmp_path: Path) -> None:
    def interrupted(run: RunDir, config: configs.RunConfig, actors: int, body: Body) -> None:
        def wrap(exchange: Exchange) -> Exchange:
            def changed(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                asked = list(requests)
                for reply in exchange(asked, deadline_s):
                    if (run.path / "rounds" / "0001").exists() and kind_of(asked[0].content) == kind:
                        time.sleep(0.4)
                        raise KeyboardInterrupt
                    yield reply

            return changed

        run_local(run, config, actors, lambda exchange: body(wrap(exchange)))

    out, sets = tmp_path / "out", ["evaluate.local_only=false", "federation.personal_steps=0"]
    config = configs.load(home / "run.yaml", sets)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(config, out, resume=True, engine=interrupted)
    found, _ = resume(home, out, *sets)
    assert found.history[number].seconds > 0.8
    assert found.seconds["rounds"] > 0.8
    began = time.perf_counter()
    again, _ = resume(home, out, *sets)
    assert 0 < again.wall_s - found.wall_s < time.perf_counter() - began + 0.1
    assert again.seconds["rounds"] == found.seconds["rounds"]


def test_who_ends_while_a_round_is_scored_loses_nothing_of_it(home: Path, tmp_path: Path) -> None:
    asked, dies = list[str](), [True]

    def engine(run: RunDir, config: configs.RunConfig, actors: int, body: Body) -> None:
        def wrap(exchange: Exchange) -> Exchange:
            def changed(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                there = list(requests)
                kind = kind_of(there[0].content)
                if dies[0] and kind == "evaluate" and (run.path / "rounds" / "0002").exists():
                    raise KeyboardInterrupt
                asked.append(kind)
                yield from exchange(there, deadline_s)

            return changed

        run_local(run, config, actors, lambda exchange: body(wrap(exchange)))

    out, sets = tmp_path / "out", ["evaluate.local_only=false", "federation.personal_steps=0"]
    config = configs.load(home / "run.yaml", sets)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, out, engine=engine)
    kept = (out / "rounds" / "0002" / "adapter.safetensors").read_bytes()
    asked.clear()
    dies[0] = False
    pipeline.run(config, out, resume=True, engine=engine)
    assert asked == ["evaluate"]  # nobody trained again
    assert (out / "rounds" / "0002" / "adapter.safetensors").read_bytes() == kept
    whole = pipeline.run(config, tmp_path / "whole")
    assert [one.llm for one in Summary.read(out).history] == [one.llm for one in whole.history]


def test_a_round_that_is_scored_later_keeps_the_time_of_its_training(home: Path, tmp_path: Path) -> None:
    out, sets = tmp_path / "out", ["evaluate.local_only=false", "federation.personal_steps=0", "evaluate.every=2"]
    sets.append("federation.codec=none")  # clients keep nothing
    pipeline.run(configs.load(home / "run.yaml", [*sets, "federation.rounds=3"]), out)
    trained = json.loads((out / "rounds" / "0001" / "metrics.json").read_text())["seconds"]
    for number in (2, 3):
        shutil.rmtree(out / "rounds" / f"{number:04d}")
    found = pipeline.run(configs.load(home / "run.yaml", [*sets, "federation.rounds=1"]), out, resume=True)
    assert found.history[1].seconds > trained and found.history[1].scored


def test_a_killed_process_loses_a_second_at_most(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "clock.json")
    with clock.stage("round 1"):
        time.sleep(1.1)
        clock.tick()
        later = Clock(tmp_path / "clock.json")  # another process, after this one was killed
        assert later.seconds("round 1") > 1 and later.wall > 1
    with later.stage("round 1"):
        assert later.seconds("round 1") > 1.1 - 0.1
    assert Clock(tmp_path / "clock.json").seconds("round 1") == 0  # its record has it


def test_how_long_blocks_recover_stays_as_it_was_decided(home: Path) -> None:
    def config(*sets: str) -> configs.RunConfig:
        return configs.load(home / "run.yaml", ["train.steps=8", *sets])

    one, two, three = (config(f"federation.rounds={rounds}") for rounds in (1, 2, 3))
    for known, asked, steps in ((one, two, 0), (two, three, 16), (two, two, None)):
        found = settled(known, asked)
        assert found.blocks[0].recover.steps == steps
        assert {change.field for change in differences(known, found)} <= {"federation.rounds"}
    longer = config("federation.rounds=2", "blocks.0.recover.steps=20")
    assert [change.field for change in differences(two, settled(two, longer))] == ["blocks.0.recover.steps"]
