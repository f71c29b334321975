"""Who scores what: clients on their own data only, the LLM on the server's, a sample of the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from helpers import assert_one_line, legolm, without_clocks
from legolm import config as configs
from legolm import pipeline
from legolm.config import RunConfig
from legolm.data import client_data, data_fingerprint, render
from legolm.errors import LegolmError
from legolm.evaluation import score
from legolm.federate import wire
from legolm.federate.server import server_examples
from legolm.federate.transport import Exchange, Reply, Request, run_local
from legolm.federate.transport.engine import Body
from legolm.models import load_model, load_tokenizer
from legolm.report import print_summary
from legolm.runs import (
    Held,
    Others,
    Refusal,
    RoundRecord,
    RunDir,
    Score,
    Scores,
    best_round,
    clients_of,
    others_of,
    passed_of,
    read_stages,
    rounds_of,
)


@pytest.fixture
def raw(three_clients: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """Two clients hold the LLM, one `half`; each scores its own data only."""
    federation = {"engine": "local", "rounds": 2, "personal_steps": 1}
    found = three_clients(tmp_path, ("dense", "dense", "half"), rows=10, federation=federation)
    found["data"] |= {"limit_test": 2, "limit_validation": 1}
    rows = [{"instruction": f"Tell {i}", "output": "acd"[i] * 2} for i in range(3)]
    (tmp_path / "server.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found | {"evaluate": {"scores": "own"}}


def load(raw: dict[str, Any], **evaluate: Any) -> RunConfig:
    return configs.validate(RunConfig, raw | {"evaluate": raw["evaluate"] | evaluate}, "test")


def asked_for(asked: list[tuple[str, str, str]]) -> Callable[..., None]:
    """The local engine; it adds (kind of request, to whom, of whose data) to `asked`."""

    def engine(folder: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def watched(exchange: Exchange) -> Exchange:
            def ask(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                def seen() -> Iterator[Request]:
                    for one in requests:
                        if wire.kind_of(one.content) == "evaluate":
                            header, _ = wire.unpack(one.content, wire.EvaluateRequest)
                            asked.extend(("evaluate", one.client, owner) for owner, _ in header.sets)
                        else:
                            training, _ = wire.unpack(one.content, wire.TrainRequest)
                            asked.append((training.phase, one.client, training.client))
                        yield one

                yield from exchange(seen(), deadline_s)

            return ask

        run_local(folder, config, actors, lambda exchange: body(watched(exchange)))

    return engine


def test_no_client_is_asked_for_anothers_data_and_the_server_scores_the_llm(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    config, out = load(raw, server_data=str(tmp_path / "server.jsonl")), tmp_path / "out"
    asked: list[tuple[str, str, str]] = []
    summary = pipeline.run(config, out, engine=asked_for(asked))
    assert {kind for kind, *_ in asked} == {"evaluate", "local", "round", "personal"}
    assert {(client, owner) for _, client, owner in asked} == {(id, id) for id in ("fr", "de", "es")}
    # Of everyone the same would be asked for others' data.
    everyone: list[tuple[str, str, str]] = []
    usual = configs.validate(RunConfig, raw | {"evaluate": {}}, "x")
    pipeline.run(usual, tmp_path / "all", engine=asked_for(everyone), models=False)
    assert any(client != owner for _, client, owner in everyone)

    assert summary.llm.best_round > 0
    model, tokenizer = load_model(out / "final" / "llm"), load_tokenizer(out / "final" / "llm")
    rows = [render(row, tokenizer, config.train.max_length) for row in server_examples(config)]
    assert len(rows) == 3
    found, chosen = (score(model, some, 16, "fp32") for some in (rows[::2], rows[1::2]))
    assert summary.llm.loss_after == pytest.approx(found.loss, rel=1e-4)
    assert summary.llm.exact_match_after == found.exact_match
    best = rounds_of(read_stages(out / "metrics.jsonl"))[summary.llm.best_round]
    # A round is not chosen by the rows that say how good it is.
    assert best.llm_validation == pytest.approx(chosen.loss, rel=1e-4) != best.llm.loss  # type: ignore[union-attr]
    assert all(set(client.own) == {"before", "local", "global", "personal"} for client in summary.clients)
    assert all(client.others == {} for client in summary.clients)
    assert summary.others == Others(asked=0, there=2)
    assert "The LLM’s loss on the server’s own held-out answers went from" in (out / "report.html").read_text()


def test_without_rows_of_the_server_nobody_scores_the_llm(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = load(raw), tmp_path / "out"
    summary = pipeline.run(config, out)
    assert all(one.llm is None and one.llm_validation is None for one in rounds_of(read_stages(out / "metrics.jsonl")))
    assert (summary.llm.loss_before, summary.llm.loss_after, summary.llm.exact_match_after) == (None, None, None)
    assert summary.llm.best_round == summary.best_round > 0
    said = "Nobody scored the LLM: the server has no data of its own (evaluate.server_data)."
    capsys.readouterr()
    print_summary(summary, out)
    assert said in capsys.readouterr().out
    html = (out / "report.html").read_text()
    assert said in html and "The LLM’s loss" not in html
    assert load_model(out / "final" / "llm") is not None
    assert json.loads((out / "final" / "llm" / "manifest.json").read_text())["details"]["round"] == summary.best_round

    killed = tmp_path / "killed"
    shutil.copytree(out, killed)
    for gone in ("rounds/0002", "personal", "final"):
        shutil.rmtree(killed / gone)
    again = pipeline.run(config, killed, resume=True)
    one, two = (without_clocks(json.loads(found.model_dump_json())) for found in (summary, again))
    assert one == two
    for name in ("rounds/0002/adapter", "personal/es/adapter", "final/llm/model", "final/es/model"):
        assert (out / f"{name}.safetensors").read_bytes() == (killed / f"{name}.safetensors").read_bytes()


def test_of_many_clients_a_sample_of_the_others_is_asked_in_all_stages(raw: dict[str, Any], tmp_path: Path) -> None:
    ids = [f"c{place:02}" for place in range(17)]
    rows = [{"instruction": f"Say {i}", "output": "abc"[i % 3] * 2} for i in range(85)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw |= {
        "evaluate": {},
        "blocks": [{"name": "dense", "method": "dense"}],
        "clients": [{"id": id, "block": "dense"} for id in ids],
        "data": {"train": str(tmp_path / "many.jsonl"), "split": {"by": "iid"}, "limit_test": 1},
        "train": {"steps": 1, "batch_size": 2},
        "federation": {"engine": "local", "rounds": 1, "personal_steps": 1},
    }
    config, out = load(raw), tmp_path / "out"
    others = others_of(config)
    assert all(len(set(found)) == 8 and id not in found for id, found in others.items())
    summary = pipeline.run(config, out, models=False)
    assert summary.others == Others(asked=8, there=16)
    assert "test data of 8 of the 16 other clients" in (out / "report.html").read_text()
    records = read_stages(out / "metrics.jsonl")
    stages = {
        "before": rounds_of(records)[0].by_client(),
        "global": rounds_of(records)[summary.best_round].by_client(),
        "local": {one.client: one.scores for one in clients_of(records, "local")},
        "personal": {one.client: one.scores for one in clients_of(records, "personal")},
    }
    for stage in ("local", "personal"):
        assert all(set(found.root) == {id, *others[id]} for id, found in stages[stage].items())
    assert all(set(found) == set(ids) for found in stages.values())
    for client in summary.clients:
        assert set(client.others) == set(stages)
        for stage, loss in client.others.items():
            scores = stages[stage][client.id].root
            assert loss == pytest.approx(fmean(scores[id].loss for id in others[client.id]), rel=1e-12)


def test_bad_rows_of_the_server_are_refused_by_the_dry_run(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"instruction": "Say", "output": "a"}\n{"instruction": "Say"}\n')
    (tmp_path / "long.jsonl").write_text(2 * (json.dumps({"instruction": "x" * 600, "output": "a"}) + "\n"))
    (tmp_path / "one.jsonl").write_text('{"instruction": "Say", "output": "a"}\n')
    raw["train"]["long_examples"] = "refuse"
    path = tmp_path / "run.yaml"
    for data, says in (
        (str(tmp_path / "none.jsonl"), f"evaluate.server_data: no file {tmp_path / 'none.jsonl'}"),
        (str(tmp_path / "bad.jsonl"), "bad.jsonl:2: no field `output`; there are: instruction"),
        ([], "evaluate.server_data: [] has no rows"),
        (str(tmp_path / "one.jsonl"), "one row, and every second one chooses the round; name files"),
        (str(tmp_path / "data" / "f*.jsonl"), "fr.jsonl is also in data.train, so that what was learned would be"),
        (str(tmp_path / "long.jsonl"), "evaluate.server_data example 0 of 'llm' is longer than 512 tokens"),
    ):
        path.write_text(json.dumps(raw | {"evaluate": {"scores": "own", "server_data": data}}))
        assert_one_line(legolm("run", path, "--dry-run", "--out", tmp_path / "out"), says)
    assert not (tmp_path / "out").exists()


def test_changed_rows_of_the_server_stop_a_resume(raw: dict[str, Any], tmp_path: Path) -> None:
    rows = tmp_path / "server.jsonl"
    config, out = load(raw, server_data=str(rows), local_only=False), tmp_path / "out"
    pipeline.run(config, out, models=False)
    rows.write_text(rows.read_text().replace("Tell 1", "Tell 7"))
    with pytest.raises(LegolmError, match="the data changed since the run started"):
        pipeline.run(config, out, resume=True)
    data = client_data(config)
    assert data_fingerprint(data, []) == data_fingerprint(data) != data_fingerprint(data, server_examples(config))


def tampering(change: Callable[[str, list[Score]], list[Score] | None]) -> Callable[..., None]:
    """The local engine; `change` gets each reply of scores (None: none comes), by the client who sends it."""

    def engine(folder: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def wrap(exchange: Exchange) -> Exchange:
            def changed(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                asked: list[str] = []
                for reply in exchange((asked.append(one.client) or one for one in requests), deadline_s):
                    if wire.kind_of(reply.content) == "scores":
                        scores = list(wire.unpack(reply.content, wire.ScoreReply)[0].scores)
                        said = change(asked[reply.index], scores)
                        if said is not None:
                            yield Reply(reply.index, wire.pack(wire.ScoreReply(scores=said), {}))
                    else:
                        yield reply

            return changed

        run_local(folder, config, actors, lambda exchange: body(wrap(exchange)))

    return engine


def broken_from(client: str, first: int, how: str) -> Callable[..., None]:
    """Its scores from its reply number `first` (0 is before training) on come broken, or not at all."""
    seen = 0

    def change(sender: str, scores: list[Score]) -> list[Score] | None:
        nonlocal seen
        seen += sender == client
        if sender != client or seen <= first:
            return scores
        broken = [scores[0].model_copy(update={"loss": float("nan")}), *scores[1:]]
        return {"nan": broken, "few": scores[1:], "none": None}[how]

    return tampering(change)


@pytest.mark.parametrize(
    ("how", "says"),
    [("nan", "has loss nan"), ("few", "scores came for"), ("none", "no reply came")],
)
def test_a_client_whose_own_scores_are_bad_is_passed_over_by_name(
    how: str, says: str, raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = load(raw, local_only=False), tmp_path / "out"
    summary = pipeline.run(config, out, engine=broken_from("de", 1, how))  # all but those before training
    records = read_stages(out / "metrics.jsonl")
    before, *rounds = rounds_of(records)
    assert [one.clients for one in before.held] == [["fr"], ["de"], ["es"]] and before.unscored == []
    for record in rounds:
        assert [one.clients for one in record.held] == [["fr"], ["es"]]
        assert [one.client for one in record.unscored] == ["de"] and says in record.unscored[0].reason
        assert record.validation == fmean(one.validation or 0.0 for one in record.held)
    assert [(one.phase, one.client) for one in passed_of(records)] == [("personal", "de")]
    de = summary.clients[1]
    assert set(de.own) == {"before"} and says in de.refused["personal"]
    assert load_model(out / "final" / "de") is not None  # it ends with what the rounds gave it
    capsys.readouterr()
    print_summary(summary, out)
    for said in (capsys.readouterr().out, (out / "report.html").read_text()):
        assert "The scores of de are missing in round 1, 2, and no round was chosen by them: " in said
        assert "The personal model of de was refused: " in said


def test_where_nobodys_scores_are_good_the_run_ends_with_the_names(raw: dict[str, Any], tmp_path: Path) -> None:
    engine = tampering(lambda sender, scores: [])
    with pytest.raises(LegolmError, match=r"before: evaluate: no client has scores \(fr: 0 scores .*; de: .*; es: "):
        pipeline.run(load(raw), tmp_path / "out", engine=engine)


def test_rounds_are_compared_by_the_clients_that_all_of_them_scored() -> None:
    """By hand: b is bad in both rounds, and missing in the second, which would look the better for it."""

    def held(client: str, loss: float) -> Held:
        score = Score(loss=loss, exact_match=0.0, tokens=1, examples=1)
        return Held(clients=[client], scores=Scores({client: score}), validation=loss)

    first = RoundRecord(
        round=0, llm=None, held=[held("a", 1.0), held("b", 5.0)], validation=3.0, llm_validation=None, seconds=1.0
    )
    second = first.model_copy(
        update={"round": 1, "held": [held("a", 2.0)], "validation": 2.0}
        | {"unscored": [Refusal(client="b", reason="no reply came")]}
    )
    assert best_round([first, second], "validation").round == 0
    assert best_round([first, second], "llm_validation").round == 0
    nobody = second.model_copy(update={"unscored": [Refusal(client=id, reason="x") for id in "ab"]})
    assert best_round([first, nobody], "validation").round == 1  # nobody to compare by: what each round has


def test_rounds_are_scored_as_often_as_asked_and_the_last_in_any_case(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["federation"]["rounds"] = 3
    config = configs.validate(RunConfig, raw | {"evaluate": {"every": 2}}, "test")
    asked: list[tuple[str, str, str]] = []
    summary = pipeline.run(config, tmp_path / "rare", engine=asked_for(asked), models=False)
    often = pipeline.run(configs.validate(RunConfig, raw | {"evaluate": {}}, "test"), tmp_path / "often", models=False)
    records, all_records = (rounds_of(read_stages(tmp_path / name / "metrics.jsonl")) for name in ("rare", "often"))
    assert [one.validation is not None for one in records] == [True, False, True, True]
    assert [bool(one.held) and one.llm is not None for one in records] == [True, False, True, True]
    # Training is the same; so is every score that was asked for.
    assert [one.adapter for one in records] == [one.adapter for one in all_records]
    assert [one for one in records if one.validation is not None][1].held == all_records[2].held
    assert best_round(records, "validation").round in (0, 2, 3)
    assert summary.history[1].clients == {} and often.history[1].clients
    assert "–" in (tmp_path / "rare" / "report.html").read_text()
    print_summary(summary, tmp_path / "rare")


def test_a_round_that_was_not_to_be_the_last_is_scored_when_it_is(raw: dict[str, Any], tmp_path: Path) -> None:
    """Because a budget ends the run, or who goes on with it wants fewer rounds: else it would end as it began."""
    raw["federation"] = {"engine": "local", "rounds": 4}
    raw["evaluate"], raw["train"]["schedule"] = {"every": 3}, "constant"
    dp = {"level": "example", "epsilon": 6.0, "noise_multiplier": 1.0, "clip": 1.0, "delta": 1e-5}
    config = configs.validate(
        RunConfig, raw | {"privacy": {"dp": dp}, "evaluate": {"every": 3, "local_only": False}}, "test"
    )
    pipeline.run(config, tmp_path / "budget", models=False)
    records = rounds_of(read_stages(tmp_path / "budget" / "metrics.jsonl"))
    assert len(records) < 4 and records[-1].validation is not None

    def dies(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def stopped(exchange: Exchange) -> Exchange:
            def until_round_3(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                def those() -> Iterator[Request]:
                    for one in requests:
                        if (
                            wire.kind_of(one.content) == "train"
                            and wire.unpack(one.content, wire.TrainRequest)[0].round == 3
                        ):
                            raise KeyboardInterrupt
                        yield one

                return exchange(those(), deadline_s)

            return until_round_3

        run_local(run, config, actors, lambda exchange: body(stopped(exchange)))

    with pytest.raises(KeyboardInterrupt):
        pipeline.run(configs.validate(RunConfig, raw, "test"), tmp_path / "fewer", engine=dies, models=False)
    raw["federation"]["rounds"] = 2
    fewer = configs.validate(RunConfig, raw, "test")
    summary = pipeline.run(fewer, tmp_path / "fewer", resume=True, models=False)
    assert summary.best_round == 2
    anew = pipeline.run(fewer, tmp_path / "anew", models=False)
    assert [one.clients for one in summary.history] == [one.clients for one in anew.history]
