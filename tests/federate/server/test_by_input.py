"""Two models of a client, of which each question gets the one that fits it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers import assert_one_line, legolm
from legolm import config as configs
from legolm import pipeline
from legolm.adapter import merged, slice_factors
from legolm.block import read_block
from legolm.config import RunConfig
from legolm.data import Familiar, client_data, tokens_of
from legolm.evaluation import Answers, score_each
from legolm.federate.server import familiar_of
from legolm.federate.server.mixture import choose_own, let_go
from legolm.models import load_model, load_tokenizer
from legolm.runs import clients_of, read_stages

WORDS = {"fr": "aab", "de": "ccd", "es": "aab ccd"}
"""es asks half as fr does: some of the others' questions look like its own."""


@pytest.fixture
def raw(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    federation = {"engine": "local", "rounds": 1, "personal": "by_input", "public": f"{tmp_path}/public.jsonl"}
    data = {"train": f"{tmp_path}/data/*.jsonl", "limit_test": 4, "limit_validation": 3}
    found = three_clients(tmp_path, ("dense", "half", "sparse"), data=data, federation=federation)
    for id, word in WORDS.items():
        rows = [{"instruction": f"{word} {i}", "output": id[0] * 2} for i in range(20)]
        (tmp_path / "data" / f"{id}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    public = [{"instruction": f"xyz {i}", "output": "-"} for i in range(20)]
    (tmp_path / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in public))
    return found


@pytest.mark.parametrize("form", ["frozen_side", "factor"])
def test_each_question_is_scored_and_answered_by_the_model_that_fits(
    form: str, raw: dict[str, Any], tmp_path: Path
) -> None:
    raw["aggregate"] = {"form": form}
    config, out = configs.validate(RunConfig, raw, "test"), tmp_path / "out"
    summary = pipeline.run(config, out)
    assert summary.by_input and "most of the others’ data, have the global update" in (out / "report.html").read_text()
    data = client_data(config)
    shared = load_file(out / "rounds" / f"{summary.best_round:04}" / "adapter.safetensors")
    met = set()
    for record in clients_of(read_stages(out / "metrics.jsonl"), "personal"):
        id = record.client
        assert record.weights == choose_own(record.mixtures).weights
        block = read_block(out / "blocks" / {"fr": "dense", "de": "half", "es": "sparse"}[id])
        tokenizer, model = load_tokenizer(block.path), load_model(block.path)
        familiar = familiar_of(config, block)(id, let_go(record.mixtures))
        knows = familiar.knows
        own = load_file(out / "personal" / id / "adapter.safetensors")
        other = slice_factors(block.coverage, {k: t for k, t in shared.items() if k.startswith("layers")}, 4)
        for whose, score in record.scores.root.items():
            rows = list(tokens_of(data[whose].test, tokenizer, config.train.max_length))
            parts = []
            for factors, mine in ((own, True), (other, False)):
                with merged(model, block.coverage, factors, config.lora.scaling) as one:
                    parts.append(score_each(one, [row for row in rows if knows(row) == mine], 8, "fp32"))
            met |= {(id, whose, len(part.losses)) for part in parts}
            wanted = Answers.joined(parts).score
            assert score.loss == pytest.approx(wanted.loss, rel=1e-5)
            assert (score.exact_match, score.examples) == (wanted.exact_match, 4)
        # Both are plain checkpoints, and `generate` says how many questions each answers.
        final = out / "final" / id
        assert Familiar.read(load_file(final / "familiar.safetensors")) == familiar
        for folder in (final, final / "otherwise"):
            assert load_model(folder).num_parameters() == model.num_parameters()
    assert {("fr", "de", 4), ("de", "fr", 4)} <= met and met & {("fr", "fr", 4), ("fr", "fr", 3)}
    questions = tmp_path / "questions.jsonl"
    asked = ["aab 3", "ccd 4", "aab 5"]
    questions.write_text("".join(json.dumps({"instruction": one}) + "\n" for one in asked))
    done = legolm("generate", f"{out}:fr", questions, "--out", tmp_path / "answers.jsonl", "--max-tokens", 3)
    assert done.returncode == 0 and "1 of 3 questions are not like the client's own" in done.stderr
    each = {}
    for folder in ("final/fr", "final/fr/otherwise"):
        (out / "final/fr/familiar.safetensors").unlink(missing_ok=True)
        legolm("generate", out / folder, questions, "--out", tmp_path / f"{folder[-1]}.jsonl", "--max-tokens", 3)
        each[folder] = [json.loads(line)["answer"] for line in (tmp_path / f"{folder[-1]}.jsonl").open()]
    answers = [json.loads(line)["answer"] for line in (tmp_path / "answers.jsonl").open()]
    mine, others = each.values()
    assert answers == [mine[0], others[1], mine[2]]


def test_what_cannot_be_chosen_by_input_is_one_line(raw: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for changes, why in (
        ({"evaluate": {"local_only": False}}, "federation.personal: by_input chooses between the global update and"),
        ({"federation": raw["federation"] | {"public": "none.jsonl"}}, "federation.public: no file none.jsonl"),
        (
            {"federation": raw["federation"] | {"public": f"{tmp_path}/data/fr.jsonl"}},
            "so that nobody's own questions could be told from it",
        ),
        (
            {
                "federation": raw["federation"] | {"engine": "deployment", "superlink": {"address": "127.0.0.1:1"}},
                "data": {"limit_test": 4},
                "evaluate": {"scores": "own"},
            },
            "which a device does not show; take mixture",
        ),
    ):
        path.write_text(json.dumps(raw | changes))
        assert_one_line(legolm("run", path, "--out", tmp_path / "out", "--dry-run"), why)
    rows = "".join(json.dumps({"instruction": f"aab {i}", "output": "f"}) + "\n" for i in range(3))
    (tmp_path / "data" / "fr.jsonl").write_text(rows)
    path.write_text(json.dumps(raw | {"data": raw["data"] | {"limit_test": 1, "limit_validation": 1}}))
    done = legolm("run", path, "--out", tmp_path / "out", "--dry-run")
    assert_one_line(done, "by_input: client fr has one training example")
