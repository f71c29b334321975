"""The pages of a run, a comparison and an ablation: one style, readable by everybody, on a phone and on paper."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import legolm
from legolm import config as configs
from legolm import pipeline
from legolm.config import load_study
from legolm.data import client_data
from legolm.errors import LegolmError
from legolm.report.style import DARK, LIGHT, STYLE
from legolm.runs import Comparison, RunDir, Summary, read_record

BEST = "rates/0.02/faster"
PHONE = 360 - 2 * 14.4  # px within the page's margins of .9rem


@dataclass(frozen=True)
class Study:
    out: Path
    done: CompletedProcess[str]
    pages: dict[str, str]
    study: Path


@pytest.fixture(scope="module")
def study(three_clients: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two variants with two seeds each, one at the better of two rates, and one of the runs left one out."""
    folder = tmp_path_factory.mktemp("study")
    federation = {"engine": "local", "rounds": 2, "keep_updates": True}
    data = {"train": f"{folder}/data/*.jsonl", "limit_test": 1, "limit_validation": 1}
    raw = three_clients(folder, ("wide", "wide", "dense"), rows=10, federation=federation, data=data)
    faster = {"name": "faster", "rates": [1e-6, 0.02], "set": {"aggregate.form": "factor"}}
    variants = [{"name": "usual"}, faster]
    (folder / "study.yaml").write_text(json.dumps({"run": raw, "variants": variants}))
    out = folder / "out"
    done = legolm("compare", folder / "study.yaml", "--seeds", 2, "--no-models", "--out", out)
    assert done.returncode == 0, done.stderr
    left_out = legolm("ablate", out / BEST)
    assert left_out.returncode == 0, left_out.stderr
    pages = {
        "compare": out / "compare.html",
        "report": out / BEST / "report.html",
        "ablation": out / BEST / "ablation.html",
    }
    return Study(
        out, done, {name: path.read_text(encoding="utf-8") for name, path in pages.items()}, folder / "study.yaml"
    )


def test_a_comparison_over_seeds_has_errors_rounds_rates_and_answers(study: Study) -> None:
    found, shown = read_record(study.out / "compare.json", Comparison), study.done.stdout
    assert [(one.name, one.seed) for one in found.rows] == [("usual", 0), ("faster", 0), ("usual", 1), ("faster", 1)]
    assert [one.learning_rate for one in found.rows] == [0.01, 0.02] * 2
    assert RunDir(study.out / "seeds" / "1" / "usual").known().seed == 1
    tables = "\n".join(line for line in shown.splitlines() if not line.startswith("table"))
    assert max(map(len, tables.splitlines())) <= 80
    heads = " ".join(shown.split())
    for head in ("learning", "exact", "round", "LLM loss"):
        assert head in heads
    page = re.sub(r"<[^>]+>", " ", study.pages["compare"])
    for name in ("usual", "faster"):
        for column in ("llm", "own", "others"):
            values = [getattr(one, column) for one in found.rows if one.name == name]
            text = f"{fmean(values):.3f} ±{stdev(values) / 2**0.5:.3f}"
            assert text in shown and text in page
    assert "Means over 2 seeds ± standard error" in " ".join(shown.split()) and "0.02" in shown


def test_a_variant_goes_on_with_the_rate_that_is_best_on_validation_data(study: Study) -> None:
    usual, faster, _, again = read_record(study.out / "compare.json", Comparison).rows
    assert (usual.folder, faster.folder, again.folder) == ("usual", BEST, "seeds/1/0.02/faster")
    assert faster.searched is not None and min(faster.searched, key=faster.searched.__getitem__) == "0.02"
    worse = Summary.read(study.out / "rates" / "1e-06" / "faster")
    assert faster.searched.keys() == {"1e-06", "0.02"} and faster.searched["0.02"] == faster.llm_validation
    assert worse.llm.loss_after is not None and faster.llm is not None and worse.llm.loss_after > faster.llm
    assert again.searched is None and again.learning_rate == 0.02
    assert len([one for one in (study.out / "blocks").iterdir() if one.name.startswith("wide-")]) == 2  # a seed each


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ({"rates": [0.01]}, "variants.0.rates"),
        ({"rates": [0.01, 0.01]}, "rates has 0.01 twice"),
        ({"rates": [0.01, 0.02], "set": {"train.learning_rate": 0.1}}, "give `rates` or train.learning_rate"),
        ({"rates": [0.01, 0.02], "set": {"train": {"learning_rate": 0.1}}}, "give `rates` or train.learning_rate"),
        ({"rates": [0.01, 1e200]}, "variants.0.rates.1"),
        ({"rates": [0.01, float("inf")]}, "variants.0.rates.1"),
    ],
)
def test_rates_that_cannot_be_searched_are_refused(tmp_path: Path, variant: dict[str, Any], said: str) -> None:
    (tmp_path / "study.yaml").write_text(json.dumps({"run": {}, "variants": [{"name": "a"} | variant]}))
    with pytest.raises(LegolmError, match=re.escape(said)):
        load_study(tmp_path / "study.yaml")


def test_learning_curves_go_by_tokens_and_by_bytes(study: Study) -> None:
    for one in read_record(study.out / "compare.json", Comparison).rows:
        first, *_, last = one.curve
        assert [point.round for point in one.curve] == [0, 1, 2]
        assert (first.tokens, first.bytes, first.llm) == (0, 0, one.llm_before)
        assert last.tokens == one.tokens  # nobody trained outside the rounds
        assert last.bytes == round((one.bytes_down + one.bytes_up) * one.replies)
        best = one.curve[one.best_round]
        assert best.blocks == pytest.approx((one.own + 2 * one.others) / 3)  # type: ignore[operator]
        assert one.curve[one.llm_best_round].llm == one.llm
    page = study.pages["compare"]
    assert page.count("<polyline") == 8  # two variants, of the LLM and the blocks, by tokens and by bytes
    for caption in ("Loss of the LLM by thousand tokens trained", "Loss of blocks, all data by MB sent"):
        assert f"<figcaption>{caption}" in page


def test_progress_names_the_variant_and_gives_losses_as_they_come(study: Study) -> None:
    said = study.done.stderr
    for name in (
        "usual, seed 0 (1 of 4)",
        "faster, seed 0, rate 1e-06 (2 of 4)",
        "faster, seed 0, rate 0.02 (3 of 4)",
        "usual, seed 1 (4 of 4)",
        "faster, seed 1 (1 of 1)",
    ):
        assert f"done: {name}: round 1: train" in said
        assert re.search(
            rf"^{re.escape(name)}: round 2: loss on validation data: LLM \d\.\d+, blocks \d\.\d+$", said, re.M
        )
        assert f"{name}: finished; loss on test data: LLM " in said


def test_jobs_are_for_runs_that_are_left_and_finish_what_others_began(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("compare", study.study, "--no-models", "--out", study.out, "--seeds", 2, "--jobs", 2)
    with monkeypatch.context() as patched:
        # For what is finished no process is started.
        patched.setattr(sys.modules["legolm.study.compare"], "ProcessPoolExecutor", None)
        again = legolm(*command)
    assert again.returncode == 0 and again.stdout == study.done.stdout and "train" not in again.stderr
    for place in ("usual", "0.02/faster"):
        (study.out / "seeds" / "1" / place / "summary.json").unlink()
    again = legolm(*command)
    assert again.returncode == 0 and again.stdout == study.done.stdout and "train" not in again.stderr


def test_more_seeds_go_on_from_fewer_and_the_dry_run_plans_them(study: Study) -> None:
    plan = legolm("compare", study.study, "--dry-run", "--seeds", 2)
    assert plan.stdout.count("Nothing was done.") == 5 and "\nseeds/1/faster\n" in plan.stdout
    both = legolm("compare", study.study, "--dry-run", "--set", "train.learning_rate=0.1")
    assert both.returncode == 2 and "variant faster chooses of its `rates`; take one out" in both.stderr
    late = legolm("compare", study.study, "--dry-run", "--seeds", 2, "--set", f"seed={2**63 - 1}")
    assert late.returncode == 2 and "--seeds 2: variant usual starts at seed" in late.stderr


def test_all_pages_have_one_style_and_load_nothing(study: Study) -> None:
    for page in study.pages.values():
        assert f"<style>{STYLE}" in page and "http" not in page and "<script" not in page


def test_every_table_and_figure_has_a_caption_and_scrolls_by_keyboard(study: Study) -> None:
    for page in study.pages.values():
        assert page.count("<table") == page.count("<caption>") and page.count("<figure>") == page.count("<figcaption>")
        assert page.count("<figure>") > 0
        outside = re.sub(
            r'<div class="scroll" tabindex="0" role="region" aria-label="[^"]+">.*?</div>', "", page, flags=re.S
        )
        assert "<table" not in outside.replace('<table class="times"', "")  # which is narrow and may wrap
        assert "<figure>" not in outside or "<svg" not in re.sub(r'<p class="key.*?</p>', "", outside, flags=re.S)


def test_letters_in_plots_are_11_px_on_a_phone(study: Study) -> None:
    (least,) = re.findall(r"figure svg\{min-width:(\d+)rem\}", STYLE)
    (drawn,) = re.findall(r"text\{font-size:(\d+)px", STYLE)
    sizes = []
    for page in study.pages.values():
        for figure in re.findall(r"<figure>.*?</figure>", page, flags=re.S):
            (width,) = re.findall(r'<svg [^>]*viewBox="0 0 ([\d.]+)', figure)
            own = re.findall(r"<svg [^>]*min-width:(\d+)px", figure)
            wide = max(PHONE, float(own[0]) if own else 16 * float(least))
            letters = [float(size) for size in re.findall(r"font(?:-size)?: *(?:bold )?([\d.]+)px", figure)]
            assert letters or own
            sizes += [size * wide / float(width) for size in letters or [float(drawn)]]
    assert len(sizes) > 20 and min(sizes) >= 11


def test_nothing_is_cut_off_on_paper() -> None:
    _, _, printed = STYLE.partition("@media print")
    for rule in (
        ".scroll{overflow:visible}",
        "min-width:0!important;max-width:100%!important",
        "white-space:normal;overflow-wrap:anywhere",
        "break-inside:avoid",
        LIGHT,
    ):
        assert rule in printed


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    digits = colour.lstrip("#")
    digits = "".join(2 * one for one in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_letters_have_a_contrast_of_4_5(colours: str) -> None:
    found = dict(one.split(":") for one in colours.split(";"))
    assert luminance("#fff") == 1 and luminance("#000000") == 0
    for letters in ("--ink", "--soft", "--bad", *(f"--b{i}" for i in range(6))):
        for ground in ("--paper", "--wash"):
            light, dark = sorted((luminance(found[letters]), luminance(found[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (letters, ground)
    assert set(re.findall(r"[{;]color:([^;}]+)", STYLE)) <= {f"var({name})" for name in found}


def test_without_models_nobody_is_asked(study: Study) -> None:
    assert not list(study.out.rglob("answers.json")) and "Answers" not in study.pages["report"]


@pytest.fixture(scope="module")
def asked(three_clients: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A run with all phases, and what it printed."""
    folder = tmp_path_factory.mktemp("asked")
    federation = {"engine": "local", "rounds": 1, "personal_steps": 1}
    data = {"train": f"{folder}/data/*.jsonl", "limit_test": 2, "limit_validation": 1}
    raw = three_clients(folder, ("wide", "sparse", "wide"), federation=federation, data=data)
    (folder / "run.yaml").write_text(json.dumps(raw))
    done = legolm("run", folder / "run.yaml", "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    return Study(folder / "out", done, {"report": page}, folder / "run.yaml")


def greedy(folder: Path, question: str, most: int) -> str:
    """What a checkpoint answers, token by token and without the product."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": question}]
    ids = tokenizer.encode(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    start = len(ids)
    while len(ids) < start + most and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    text = str(tokenizer.decode(ids[start:], skip_special_tokens=True))
    return (text + ("" if ids[-1] == tokenizer.eos_token_id else "…")).strip()


def test_the_end_of_a_run_asks_five_questions_and_the_answers_are_the_models_own(asked: Study) -> None:
    summary = read_record(asked.out / "summary.json", Summary)
    assert [one.client for one in summary.samples] == ["fr", "fr", "de", "de", "es"]
    config = RunDir(asked.out).known()
    tests = {id: [(one.question, one.wanted) for one in data.test] for id, data in client_data(config).items()}
    folders = {"final": "final/{}", "llm": "final/llm"}
    for one in summary.samples:
        assert (one.question, one.wanted) in tests[one.client]
        assert list(one.answers) == ["before", "local", "final", "llm"]
        for speaker, folder in folders.items():
            said = greedy(asked.out / folder.format(one.client), one.question, 3 + 4)  # two letters and the end, and 4
            assert one.answers[speaker] == said  # type: ignore[index]
        assert one.answers["before"] == greedy(asked.out / "blocks" / one.block, one.question, 3 + 4)
    assert len({tuple(one.answers.values()) for one in summary.samples}) > 1


def test_the_answers_are_on_the_terminal_and_on_the_page_which_needs_no_model(asked: Study, tmp_path: Path) -> None:
    summary, lines = read_record(asked.out / "summary.json", Summary), asked.done.stdout.splitlines()
    assert max(map(len, (line for line in lines if not line.startswith(("report", "models"))))) <= 80
    words = re.sub(r"<[^>]+>", " ", asked.pages["report"])
    for one in summary.samples:
        assert f"{one.client}, {one.block}: {one.question}" in lines and one.question in words and one.wanted in words
        assert all(escape(text) in words for text in one.answers.values())
    for name in ("block before", "trained alone", "after the federation", "the LLM"):
        assert any(line.split(name)[0].strip() in ("", "✓") for line in lines if name in line) and name in words
    for name in ("summary.json", "hashes.json"):
        shutil.copy(asked.out / name, tmp_path)
    assert legolm("report", tmp_path).returncode == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == asked.pages["report"]


def test_questions_are_asked_once_and_again_where_the_models_are_others(asked: Study) -> None:
    kept = asked.out / "answers.json"
    before = kept.stat().st_mtime_ns
    again = legolm("run", asked.study, "--out", asked.out, "--resume")
    assert again.returncode == 0 and kept.stat().st_mtime_ns == before and "answer test questions" not in again.stderr
    found, samples = kept.read_text(), Summary.read(asked.out).samples
    config = configs.load(asked.study)  # as `legolm compare --no-models` does with a variant that is there
    assert pipeline.run(config, asked.out, resume=True, models=False).samples == samples
    kept.write_text(found.replace('"of": "', '"of": "0'))
    assert pipeline.run(config, asked.out, resume=True, models=False).samples == []  # others' answers are none
    assert "answer test questions" in legolm("run", asked.study, "--out", asked.out, "--resume").stderr
    assert kept.read_text() == found
    kept.write_text(found[:-20])
    broken = legolm("run", asked.study, "--out", asked.out, "--resume")
    assert broken.returncode == 0 and "answers.json: is broken" in broken.stderr and "it is made again" in broken.stderr
    assert kept.read_text() == found


def test_where_data_are_the_clients_own_nobody_asks(asked: Study, tmp_path: Path) -> None:
    options = ("--set", "evaluate.scores=own", "--set", "evaluate.local_only=false")
    done = legolm("run", asked.study, "--out", tmp_path / "own", *options)
    assert done.returncode == 0, done.stderr
    assert "Test questions" not in done.stdout and not (tmp_path / "own" / "answers.json").exists()
    assert read_record(tmp_path / "own" / "summary.json", Summary).samples == []
