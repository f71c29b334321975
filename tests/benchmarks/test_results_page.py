"""The results page from a small study: floors, paired differences and their errors are what a hand comes to."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import log
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import pytest

from helpers import legolm, no_figure
from legolm.data import client_data
from legolm.errors import LegolmError
from legolm.report import plots
from legolm.runs import Comparison, RunDir, read_record, read_stages, rounds_of

Modules = dict[str, ModuleType]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@dataclass(frozen=True)
class Made:
    runs: Path
    out: Path
    found: dict[str, Any]
    page: str
    rows: dict[tuple[str, int], Path]


@pytest.fixture(scope="module")
def modules() -> Iterator[Modules]:
    with pytest.MonkeyPatch.context() as patched, matplotlib.rc_context():
        patched.syspath_prepend(str(BENCHMARKS))
        yield {
            name: importlib.import_module(name)
            for name in ("results", "results_claims", "results_read", "results_shown", "results_study")
        }


@pytest.fixture(scope="module")
def made(
    modules: Modules,
    three_clients: Callable[..., dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    """A study like examples/compare/flan.yaml: three clients, three answers each, two rates to choose from."""
    folder = tmp_path_factory.mktemp("results")
    data = {"train": f"{folder}/data/*.jsonl", "fetch": "git clone rows", "limit_test": 3, "limit_validation": 2}
    federation = {"engine": "local", "rounds": 1, "keep_updates": True}
    raw = three_clients(folder, ("dense", "wide", "dense"), rows=12, data=data, federation=federation)
    raw["train"] |= {"steps": 1}
    variants = [
        {"name": "heteagg_near", "rates": [1e-6, 0.02]},
        {"name": "fedit_everyone", "block": "dense", "set": {"aggregate.scheme": "fedavg"}},
        {"name": "local", "set": {"federation.mode": "alone", "aggregate.form": "factor"}},
        {"name": "centralized", "set": {"federation.mode": "pooled", "aggregate.form": "factor"}},
        {
            "name": "heteagg_personal",
            "set": {"federation.personal_steps": 1, "federation.personal": "mixture", "evaluate.local_only": True},
        },
    ]
    (folder / "study.yaml").write_text(json.dumps({"run": raw, "variants": variants}))
    runs = folder / "runs"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plots, "_svg", no_figure)
        done = legolm("compare", folder / "study.yaml", "--no-models", "--out", runs / "flan")
        assert done.returncode == 0, done.stderr
        rows = read_record(runs / "flan" / "compare.json", Comparison).rows
        places = {(row.name, row.seed): runs / "flan" / str(row.folder) for row in rows}
        assert legolm("ablate", places["heteagg_near", 0]).returncode == 0
    for path in runs.rglob("*"):  # what comes back from a machine that is lent
        if path.is_file() and path.name not in (
            "compare.json", "config.yaml", "run.json", "metrics.jsonl", "summary.json", "ablation.json"
        ):  # fmt: skip
            path.unlink()
    answers = [
        {"task": "wikitext", "metric": "perplexity", "sums": sums, "weights": [2, 2]} for sums in ([2, 4], [2, 6])
    ]
    answers = [one | {"model": model} for one, model in zip(answers, ("starter", "llm"), strict=True)]
    (runs / "robustness.json").write_text(json.dumps({"results": answers}))
    notes = folder / "notes.md"
    notes.write_text(
        "## Every scheme: FLAN, a task a client\n\nIt is so.\n\n## What surprised\n\n## Last\n\nThe end.\n"
    )
    found = modules["results"].write(runs, folder / "docs", "a GPU", notes)
    return Made(runs, folder / "docs", found, (folder / "docs" / "results.md").read_text(), places)


def test_a_floor_is_that_of_the_best_constant_guess(modules: Modules) -> None:
    """As often as among the test answers themselves: ln 3/2 nats for each of two in three, ln 3 for the other one."""
    floor, train = modules["results_read"].floor, ["yes", "yes", "no", "yes"]
    assert floor(train, ["no", "yes"], 4) == modules["results_read"].Floor(loss=2 * log(2) / 4, exact_match=0.5)
    assert floor(train, ["no", "yes", "yes"], 4).loss == pytest.approx((2 * log(3 / 2) + log(3)) / 4)
    assert floor(["no", "yes"], ["no", "yes", "no"], 4).exact_match == pytest.approx(2 / 3)  # not which came first
    assert floor(train, ["no", "maybe"], 4).loss is None
    assert floor([str(i) for i in range(11)], ["1"], 1).loss is None
    rare = floor(["1"] * 9 + ["2"], ["2"], 1)
    assert (rare.loss, rare.exact_match) == (0, 1)
    assert floor(["1", *map(str, range(11))], ["1", "2"], 1).exact_match == 0.5  # no labels: the most frequent before


@pytest.fixture
def by_hand(modules: Modules) -> Any:
    """Three seeds of two clients: `a` has labels, `b` sentences."""
    read = modules["results_read"]
    machine = {"cpu": "mine", "cores": 2, "memory_gb": 8.0}

    def run(name: str, seed: int, loss: float, size: float, own: Any = None, others: float = 0, **more: Any) -> Any:
        clients = [
            {"id": id, "block": "x", "own": {stage: mean + shift for stage, mean in own.items()}, "others": alike}
            for id, shift in (("a", -0.15), ("b", 0.15))
            for alike in [dict.fromkeys(own, others)]
        ] if own else []  # fmt: skip
        llm = {"a": {"loss": loss - 0.5, "exact_match": 0.75}, "b": {"loss": loss + 0.5, "exact_match": 0.25}}
        return read.Run(
            name=name, seed=seed, rank=4, rate=0.1, validation=1, codec="none", machine=machine, precision="fp32",
            llm_before=3, llm=llm,
            own=1, others=2, bytes=size, block_bytes={}, tokens=1, flops=None, cut_seconds=1, train_seconds=1,
            clients=clients, **{"data": "same"} | more,
        )  # fmt: skip

    costs = [
        {"name": name, "kind": kind, "blocks": loss, "llm": 0.1}
        for name, kind, loss in (("x", "block", 0.2), ("a", "client", 0.1), ("b", "client", 0.3))
    ]
    runs = [run("heteagg_near", seed, loss, 400) for seed, loss in ((1, 1.2), (2, 1.1))]
    runs.append(run("heteagg_near", 0, 1.0, 400, left_out={"blocks": 1.5, "costs": costs}))
    runs += [run("fedit_everyone", seed, 1.1, 1000) for seed in (0, 1, 2)]
    runs += [run("fedit_capable", seed, loss, 1000) for seed, loss in ((0, 1.2), (1, 1.4))]
    runs.append(run("fedit_capable", 2, 1.3, 1000, data="other"))
    runs.append(run("heteagg_personal", 0, 1.0, 400, {"personal": 0.95, "local": 1.0, "global": 1.2}, others=2))
    runs.append(run("local", 0, 3.0, 0, {"local": 1.0}, others=3))
    floors = {
        seed: {"a": {"loss": 0.7, "exact_match": 0.5}, "b": {"loss": None, "exact_match": 0}} for seed in range(3)
    }
    setting = {"model": "m", "rounds": 1, "steps": 1, "batch_size": 1, "test": 1}
    return modules["results_study"].Study(read.Bench(gpu="", setting=setting, floors=floors, runs=runs))


def test_figures_are_means_over_seeds_and_differences_are_paired(modules: Modules, by_hand: Any) -> None:
    found = modules["results_study"].figures(by_hand)
    # 1.0, 1.2 and 1.1: a spread of 0.1, over √3.
    assert found["main"]["heteagg_near"] == {
        "loss": 1.1, "loss_se": 0.0577, "accuracy": 0.5, "accuracy_se": 0, "bytes": 400, "seeds": [0, 1, 2],
        "label_loss": 0.6, "label_loss_se": 0.0577, "label_accuracy": 0.75, "label_accuracy_se": 0,
    }  # fmt: skip
    # -0.1, 0.1 and 0 by seed; of the two seeds in which fedit_capable had the same data -0.2 twice.
    assert found["paired"]["fedit_everyone"] == {"difference": 0, "se": 0.0577}
    assert found["paired"]["fedit_capable"] == {"difference": -0.2, "se": 0}
    assert "label_loss" not in found["main"]["fedit_capable"]
    assert found["paired"]["local"] == {"difference": -2, "se": None}
    assert found["floor"] == {"tasks": ["a"], "loss": 0.7, "loss_se": 0, "accuracy": 0.5, "accuracy_se": 0}
    # a: 0.80 / 0.85; b: 1.10 / 1.15.
    personal = found["personal"]
    assert (personal["own"], personal["own_alone"], personal["worst_client"]) == (0.95, 1.0, "b")
    assert personal["worst_client_ratio"] == round(1.1 / 1.15, 4)
    # Alone 1 on their own and 3 on the others' data, so 2 on all; 1.5 with the global update.
    assert (found["omission"]["gain"], found["omission"]["cost"]) == (0.5, {"x": 0.2})


def test_the_gain_is_over_the_very_blocks_trained_alone(modules: Modules, by_hand: Any) -> None:
    """Where they did: alone 1 on their own and 4 on the others' data, so 2.5 on all; another variant's have 2."""
    runs = by_hand.runs["heteagg_near"]
    clients = [one.model_copy(update={"others": {"local": 4.0}}) for one in by_hand.runs["heteagg_personal"][0].clients]
    runs[0] = runs[0].model_copy(update={"clients": clients})
    assert modules["results_study"].omission(by_hand)["gain"] == 1.0


def test_claims_hold_as_their_figures_say(modules: Modules, by_hand: Any) -> None:
    held = {claim: one.holds for claim, one in modules["results_claims"].claims(by_hand, None).items()}
    # Of a gain of 0.5 the block costs 0.2, but client b 0.3.
    assert [claim for claim, holds in held.items() if holds is False] == ["and leaving out any one client"]
    assert [claim for claim, holds in held.items() if holds is None] == [
        "the LLM's WikiText perplexity is at most 3 % worse"  # nobody measured it
    ]
    assert len(held) == 11
    first = next(iter(modules["results_claims"].claims(by_hand, None).values()))
    assert first.shown() == "1.100 / 1.100 = 1.00 (+0.000 ± 0.058): yes, within the error"
    by_hand.runs["fedit_everyone"].pop(1)
    first = next(iter(modules["results_claims"].claims(by_hand, None).values()))
    # Of seeds 0 and 2, which both have: 1.05 and 1.1, not 1.1 and 1.1.
    assert first.shown() == "1.050 / 1.100 = 0.95 (-0.050 ± 0.050; seeds 0, 2): yes, within the error"


def test_masked_blocks_spare_neither_time_nor_memory(modules: Modules, by_hand: Any) -> None:
    """Whose devices train them could train the LLM: FedIT with everyone dense is a peer, and has as many steps."""
    study, claims = modules["results_study"], modules["results_claims"].claims
    fewer, peers = "at or below FedIT's with three quarters of the steps (`fedit_seconds`)", "better than every peer"
    by_hand.runs["fedit_seconds"] = by_hand.runs["fedit_rank_4"] = by_hand.runs["fedit_everyone"]

    def told(one: Any) -> dict[str, Any]:
        return {claim.removesuffix(" that the same devices can run"): it for claim, it in claims(one, None).items()}

    assert told(by_hand)[fewer].found.startswith("1.100 / 1.100")
    assert told(by_hand)[peers].shown() == "than 1 of 1: yes"  # fedit_capable
    as_many = told(by_hand)["at or below FedIT's of rank 4, at about as many bytes (`fedit_rank_4`)"]
    assert as_many.found.endswith("; 0.00 MB beside 0.00)")  # 400 and 1,000 bytes
    runs = [run.model_copy(update={"name": "heteagg_masks"}) for run in by_hand.runs["heteagg_near"].values()]
    masks = study.Study(by_hand.bench, runs, default="heteagg_masks")
    assert fewer not in told(masks)
    assert told(masks)[peers].shown() == "than 2 of 2; within the error: fedit_everyone: yes, within the error"
    both = modules["results"].subjects(masks)
    assert [one.default for one in both] == ["heteagg_masks", "heteagg_near"]
    assert modules["results"].subjects(by_hand) == [by_hand]


def test_what_is_sure_of_all_peers(modules: Modules) -> None:
    """One that is surely better settles that some is; that all are worse is as sure as the least sure."""
    study, held = modules["results_study"], modules["results_claims"]
    sure, near, single = study.Stat(0.5, 0.01), study.Stat(0.01, 0.02), study.Stat(0.5, None)
    assert [held.any_of(one) for one in ([near, sure], [near, single], [near])] == [True, None, False]
    assert [held.all_of(one) for one in ([sure], [sure, single], [sure, single, near])] == [True, None, False]


def test_an_error_is_students(modules: Modules) -> None:
    """Of 1, 2 and 3: 2 ± 0.577, ± 2.48 in 95 of 100; of 1 and 3: 2 ± 1, ± 12.7."""
    stat = modules["results_study"].Stat
    assert (stat.of([1, 2, 3]).beyond(-0.4), stat.of([1, 2, 3]).beyond(-0.5)) == (False, True)
    assert (stat.of([1, 3]).beyond(-10.7), stat.of([1, 3]).beyond(-10.8)) == (False, True)
    assert stat.of([2]).beyond(0) is None


def test_a_claim_is_of_all_clients_and_says_what_it_stands_on(modules: Modules, by_hand: Any) -> None:
    claims, runs = modules["results_claims"].claims, by_hand.runs
    floors = "its loss is below the label prior in hindsight (tasks with labels)"
    # 0.5, 0.7 and 0.6 where the priors are 0.7: by seed, not 0.6 with its error and 0.7.
    assert claims(by_hand, None)[floors].shown() == "0.600 ± 0.058 and 0.700 (-0.100 ± 0.058): yes, within the error"
    other = {"cpu": "another", "cores": 2, "memory_gb": 8.0}
    runs["fedit_everyone"] = {
        seed: type(run).model_validate(run.model_dump() | {"machine": other})
        for seed, run in runs["fedit_everyone"].items()
    }
    first, second, *_ = claims(by_hand, None).values()
    assert first.found.endswith("(+0.000 ± 0.058; on another processor)") and second.found == "40% (rank 4 beside 4)"
    own = claims(by_hand, None)["personal models are at or below trained alone on their own data, in the mean"]
    assert own.shown() == "0.950 / 1.000 = 0.95 (-0.0500): yes, by one seed"
    one_left_out = "and leaving out any one client"
    assert one_left_out in claims(by_hand, None)
    run = runs["heteagg_near"][0]
    lacks_b = run.left_out.model_copy(update={"costs": [one for one in run.left_out.costs if one.name != "b"]})
    # Alone 1 and 3, so 2 on all; 1.5 with the global update.
    clients = [
        one.model_copy(update={"others": one.others | {"local": 3.0}}) for one in runs["heteagg_personal"][0].clients
    ]
    runs["heteagg_near"] = {0: run.model_copy(update={"clients": clients, "left_out": lacks_b})}
    assert claims(by_hand, None)[one_left_out].shown() == "a +0.100 of 0.500; not measured: b"
    runs["heteagg_near"] = {0: run.model_copy(update={"clients": clients, "left_out": None})}
    assert claims(by_hand, None)[one_left_out].shown() == "not measured"


def test_who_is_left_out_by_training_again_stands_beside_the_replay(modules: Modules, by_hand: Any) -> None:
    run = by_hand.runs["heteagg_near"][0]
    cost = run.left_out.costs[0].model_copy(update={"blocks": 0.05, "llm": 0.02})
    by_hand.runs["heteagg_near"][0] = run.model_copy(
        update={"retrained": run.left_out.model_copy(update={"costs": [cost]})}
    )
    found = modules["results_study"].omission(by_hand)
    assert (found["cost"], found["cost_retrained"], found["cost_llm_retrained"]) == (
        {"x": 0.2},
        {"x": 0.05},
        {"x": 0.02},
    )
    held = modules["results_claims"].claims(by_hand, None)
    claim = "the dearest block of these, where the others train again without it"
    assert held[claim].shown() == "x +0.050 of 0.500: yes, by one seed"
    rows = modules["results_shown"].omission_table(found).splitlines()
    assert rows[2] == "| x | block | +0.200 | +0.100 | +0.050 | +0.020 |" and rows[3].endswith(
        "| +0.100 | +0.100 |  |  |"
    )


def test_a_verdict_by_one_seed_says_so_beside_that_seeds_floor(modules: Modules, by_hand: Any) -> None:
    """The default has seed 0 only, whose floors are not the mean of all seeds'."""
    by_hand.runs["heteagg_near"] = {0: by_hand.runs["heteagg_near"][0]}
    floors = by_hand.bench.floors
    floors[0] = floors[0] | {"a": modules["results_read"].Floor(loss=0.4, exact_match=0.8)}
    told = {claim: one.shown() for claim, one in modules["results_claims"].claims(by_hand, None).items()}
    assert told["its loss is below the label prior in hindsight (tasks with labels)"] == (
        "0.500 and 0.400 (+0.100): **no**, by one seed"
    )
    assert told["its accuracy is at least 5 points above the most frequent answer's (tasks with labels)"] == (
        "75.0 % and 80.0% (-5.0): **no**, by one seed"
    )
    assert told["better than every peer that the same devices can run"] == "than 1 of 1: yes, by one seed"
    assert told["no client above 1.05 of it"] == "b 0.96: yes, by one seed"
    assert told["and within 5 % of the global update on the others'"] == "2.000 / 2.000 = 1.00: yes, by one seed"
    capable, task = by_hand.runs["fedit_capable"], modules["results_read"].Task(loss=0.4, exact_match=1)
    capable[0] = capable[0].model_copy(update={"llm": {"a": task, "b": task}})
    worse = modules["results_claims"].claims(by_hand, None)["better than every peer that the same devices can run"]
    assert worse.shown() == "than 0 of 1; not fedit_capable (+0.600): **no**, by one seed"
    assert modules["results_claims"].paper_claims(by_hand)["the LLM is worse without any one block (figure 5)"] == (
        modules["results_claims"].Claim("1 of 1: x +0.100", True, single=True)
    )
    line = next(one for one in modules["results_shown"].main_table(by_hand).splitlines() if "*best constant" in one)
    assert line.endswith(" | 3 |")  # the tables' is of all seeds


def test_trained_alone_is_compared_over_the_seeds_that_both_have(modules: Modules, by_hand: Any) -> None:
    """With seed 0 clients end at 0.95 of 1.0; seed 1, in which nobody trained alone, has half of that."""
    (run,) = by_hand.runs["heteagg_personal"].values()
    (alone,) = by_hand.runs["local"].values()
    ends = [one.model_copy(update={"own": {"personal": one.own["personal"]}}) for one in run.clients]
    half = [one.model_copy(update={"own": {"personal": one.own["personal"] / 2}}) for one in run.clients]
    by_hand.runs["heteagg_personal"] = {
        seed: run.model_copy(update={"seed": seed, "clients": clients}) for seed, clients in ((0, ends), (1, half))
    }
    assert by_hand.alone == "local"
    found = modules["results_study"].figures(by_hand)["personal"]
    assert (found["own"], found["own_alone"], found["worst_client_ratio"]) == (0.95, 1.0, round(1.1 / 1.15, 4))
    told = modules["results_claims"].claims(by_hand, None)
    assert told["no client above 1.05 of it"].shown() == "b 0.96: yes, by one seed"
    assert not told["and within 5 % of the global update on the others'"].single
    # The better of two is so with the seed that both have: `local` with 1.0, not with seed 1's 0.1 besides.
    better = [one.model_copy(update={"own": {"local": 0.1}}) for one in alone.clients]
    by_hand.runs["local"][1] = alone.model_copy(update={"seed": 1, "clients": better})
    by_hand.runs["heteagg_personal"] = {0: run}
    assert by_hand.alone == "heteagg_personal"


@pytest.mark.parametrize("name", ["heteagg_near", "heteagg_personal"])
def test_a_client_that_was_passed_over_alone_ends_nothing(name: str, modules: Modules, by_hand: Any) -> None:
    """Its run did not train alone as a whole: the gain is over another variant's, 2 - 1.5, or over none."""
    (run,) = by_hand.runs["heteagg_personal"].values()
    first, second = run.clients
    passed = [first.model_copy(update={"own": {"personal": 1.0}, "others": {"personal": 2.0, "global": 2.0}}), second]
    by_hand.runs[name][0] = by_hand.runs[name][0].model_copy(update={"clients": passed})
    study = modules["results_study"]
    assert study.omission(by_hand)["gain"] == 0.5
    del by_hand.runs["local"]
    by_hand.runs["heteagg_personal"][0] = run.model_copy(update={"clients": passed})
    assert study.omission(by_hand)["gain"] is None
    assert "own_alone" not in study.figures(by_hand)["personal"]
    assert "no client above 1.05 of it" not in modules["results_claims"].claims(by_hand, None)


def test_the_plot_and_the_table_call_alike_what_trained_alone(
    modules: Modules, by_hand: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The paper's clients have the whole LLM alone, whatever their block is."""
    by_hand.runs["heteagg_near"] = by_hand.runs["heteagg_personal"]
    (run,) = by_hand.runs["local"].values()
    clients = [one.model_copy(update={"block": "whole", "own": {"local": 0.1}}) for one in run.clients]
    by_hand.runs["local"] = {0: run.model_copy(update={"clients": clients})}
    shown: list[str] = []
    monkeypatch.setattr(
        modules["results_shown"],
        "save",
        lambda figure, _: shown.extend(figure.axes[0].get_legend_handles_labels()[1]),
    )
    modules["results_shown"].figure_3(by_hand, tmp_path / "none.svg")
    assert {"own, whole LLM alone", "others, whole LLM alone"} <= set(shown)
    assert "own, whole LLM alone" in modules["results_shown"].client_table(by_hand)


def test_a_variant_with_a_seed_of_its_own_keeps_its_labels(modules: Modules, by_hand: Any) -> None:
    """Its data are another seed's, which the default has not; 1.1 - 0.5 on the task with labels."""
    runs = by_hand.runs["fedit_everyone"]
    runs[5] = runs[0].model_copy(update={"seed": 5, "data": "of seed 5"})
    assert modules["results_study"].figures(by_hand)["main"]["fedit_everyone"]["label_loss"] == 0.6
    runs[5] = runs[5].model_copy(update={"llm": {"c": runs[0].llm["a"]}})
    assert "label_loss" not in modules["results_study"].figures(by_hand)["main"]["fedit_everyone"]


@pytest.mark.parametrize(("local", "alone", "ratio"), [(2.0, "0.850", "0.94"), (0.5, "0.350", "2.29")])
def test_clients_stand_beside_the_training_alone_that_their_ratio_is_of(
    local: float, alone: str, ratio: str, modules: Modules, by_hand: Any
) -> None:
    """Client a ends with 0.80; alone it has 0.85 in the same run, and 0.15 less than the mean in `local`."""
    by_hand.runs["heteagg_near"] = by_hand.runs["heteagg_personal"]
    (run,) = by_hand.runs["local"].values()
    clients = [one.model_copy(update={"own": {"local": one.own["local"] - 1 + local}}) for one in run.clients]
    by_hand.runs["local"] = {0: run.model_copy(update={"clients": clients})}
    head, _, first, *_ = modules["results_shown"].client_table(by_hand).splitlines()
    row = dict(zip(head.split(" | "), first.split(" | "), strict=True))
    assert (row["own, personal"], row["own, alone"]) == ("0.800", alone)
    assert row["personal / alone, own |"] == f"{ratio} |"


def test_the_floor_is_of_the_runs_own_data(made: Made) -> None:
    """Three answers a client: −Σ ln p over its test answers, as often as they are there; tokens as the run counted."""
    assert made.found["floor"]["tasks"] == ["fr", "de", "es"]
    path, nats = made.rows["heteagg_near", 0], []
    scores = rounds_of(read_stages(path / "metrics.jsonl"))[0].llm
    assert scores is not None
    for id, held in client_data(RunDir(path).known()).items():
        assert len({one.wanted for one in held.train}) == 3
        seen = Counter(one.wanted for one in held.test)
        nats.append(-sum(log(seen[one.wanted] / len(held.test)) for one in held.test) / scores.root[id].tokens)
    record = json.loads((made.out / "results" / "records" / "flan.json").read_text())
    kept = [one["loss"] for one in record["floors"]["0"].values()]
    assert kept == pytest.approx(nats, rel=1e-4)


def test_bytes_personal_omission_and_robustness(made: Made) -> None:
    main, found = made.found["main"], made.found
    rows = {(row.name, row.seed): row for row in read_record(made.runs / "flan" / "compare.json", Comparison).rows}
    assert main["local"]["bytes"] == main["centralized"]["bytes"] == 0
    for name in main:
        row = rows[name, 0]
        assert main[name]["loss"] == pytest.approx(row.llm, abs=1e-3)
        assert main[name]["bytes"] == pytest.approx(row.bytes_down + row.bytes_up, rel=1e-3)
    assert found["personal"]["worst_client_ratio"] >= found["personal"]["own"] / found["personal"]["own_alone"] - 1e-3
    assert found["omission"]["cost"].keys() == {"dense", "wide"}
    alone, shared = rows["local", 0], rows["heteagg_near", 0]
    assert alone.others is not None and shared.others is not None
    gain = (alone.own + 2 * alone.others) / 3 - (shared.own + 2 * shared.others) / 3
    assert found["omission"]["gain"] == pytest.approx(gain, abs=1e-3)
    # Means of 6 and 8 nats over 4 tokens.
    assert found["robustness"] == pytest.approx(
        {"wikitext_before": 2.71828**1.5, "wikitext_after": 2.71828**2}, rel=1e-4
    )
    says = {one["claim"]: one["holds"] for one in found["claims"]}
    assert says["the LLM's WikiText perplexity is at most 3 % worse"] is False
    assert says["for under half of its bytes, same codec"] == (
        main["heteagg_near"]["bytes"] < main["fedit_everyone"]["bytes"] / 2
    )


def test_the_page_says_what_is_missing_and_what_was_searched(made: Made) -> None:
    assert "## What is missing" in made.page
    assert "compare/languages.yaml: no run of it" in made.page
    assert re.search(
        r"compare/flan.yaml, by seeds: heteagg_masks \[0\], heteagg_frozen_side \[0\], .*heterofl \[0\]", made.page
    )
    assert re.search(r"\| heteagg_near \| \S+ \| \*\*\S+\*\* \|", made.page)
    assert "compare/flan.yaml, learning rates: heteagg_near 2 of 3, fedit_everyone 1 of 3" in made.page
    assert "with a GPU" in made.page
    assert made.page.index("It is so.") < made.page.index("# The rest") < made.page.index("The end.")
    assert "## What surprised" not in made.page


def test_the_page_is_the_same_from_its_records(modules: Modules, made: Made, tmp_path: Path) -> None:
    modules["results"].write(made.out / "results" / "records", tmp_path, "", made.runs.parent / "notes.md")
    assert {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == {
        path.relative_to(made.out): path.read_bytes() for path in made.out.rglob("*") if path.is_file()
    }


def test_runs_of_another_version_and_lost_data_are_one_line(modules: Modules, made: Made, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(made.runs, runs)
    summary = runs / "flan" / "fedit_everyone" / "summary.json"
    summary.write_text(summary.read_text().replace('"schema_number": 2', '"schema_number": 1'))
    with pytest.raises(LegolmError, match=r"summary.json: another version of legolm wrote it \(schema 1"):
        modules["results"].write(runs, tmp_path / "docs", "", tmp_path / "none.md")
    summary.unlink()  # as if it had not ended
    data = made.runs.parent / "data"
    data.rename(data.with_name("away"))
    try:
        with pytest.raises(LegolmError, match=r"matches no file; bring it: git clone rows, or go to"):
            modules["results"].write(runs, tmp_path / "docs", "", tmp_path / "none.md")
    finally:
        data.with_name("away").rename(data)
    with pytest.raises(LegolmError, match="no finished run of heteagg_near"):
        modules["results"].write(tmp_path / "absent", tmp_path / "docs", "", tmp_path / "none.md")
