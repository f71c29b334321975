"""From records to figures, on losses that a person can average."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest

from legolm.config import RunConfig
from legolm.report import summarize
from legolm.runs import (
    ClientRecord,
    Held,
    Identity,
    Machine,
    Others,
    Refusal,
    RoundRecord,
    Score,
    Scores,
    StageRecord,
    Summary,
    Traffic,
    Training,
    others_of,
)

IDS = [f"c{i:02}" for i in range(20)]


def score(loss: float) -> Score:
    return Score(loss=loss, exact_match=loss / 100, tokens=10, examples=2)


def on_everyone(extra: float) -> Scores:
    """Client 7's data have a loss of 7, and so on; `extra` more for the model's stage."""
    return Scores({id: score(i + extra) for i, id in enumerate(IDS)})


def summary_of(evaluate: dict[str, Any], records: list[StageRecord]) -> Summary:
    clients = [{"id": id, "block": "dense"} for id in IDS]
    dense = {"name": "dense", "method": "dense"}
    config = RunConfig.model_validate({"blocks": [dense], "clients": clients, "evaluate": evaluate})
    machine = Machine(cpu="a processor", cores=2, memory_gb=23.5)
    identity = Identity(run="4f1c", base_fingerprint="9f2c", data_fingerprint="77", machine=machine, versions={})
    return summarize(config, {}, dict.fromkeys(IDS, "dense"), records, identity, "demo", 1.0)


def round_of(number: int, extra: float, **changes: Any) -> RoundRecord:
    traffic = {"c00": Traffic(up=3, down=5), "c01": Traffic(up=4, down=6)} if number else {}
    record = RoundRecord(
        llm=on_everyone(extra),
        held=[Held(clients=IDS, scores=on_everyone(extra))],
        validation=extra,
        llm_validation=-extra,
        round=number,
        bytes=traffic,
        seconds=2.0,
    )
    return record.model_copy(update=changes)


def alone(id: str, scores: Scores) -> ClientRecord:
    train = Training(loss_first=2.0, loss_last=1.0, steps=1, tokens=10, seconds=1.0)
    return ClientRecord(stage="local", client=id, scores=scores, train=train, validation=1.0, seconds=3.0)


def test_others_are_the_same_clients_in_every_stage() -> None:
    records: list[StageRecord] = [round_of(0, 30.0), round_of(1, 20.0), round_of(2, 10.0)]
    records += [alone(id, on_everyone(5.0)) for id in IDS]
    found = summary_of({}, records)
    config = RunConfig.model_validate(
        {"blocks": [{"name": "dense", "method": "dense"}], "clients": [{"id": id, "block": "dense"} for id in IDS]}
    )
    assert found.others == Others(asked=8, there=19)
    for i, client in enumerate(found.clients):
        drawn = [IDS.index(id) for id in others_of(config)[client.id]]
        assert len(drawn) == 8 and i not in drawn
        assert client.own == {"before": i + 30, "global": i + 10, "local": i + 5}
        for stage, extra in {"before": 30, "global": 10, "local": 5}.items():
            assert client.others[stage] == pytest.approx(fmean(drawn) + extra)  # type: ignore[index]
        assert found.history[1].clients[client.id].others == pytest.approx(fmean(drawn) + 20)
    # The blocks are best after round 2, the LLM before training; its losses are 0 to 19 and 30.
    assert (found.best_round, found.llm.best_round) == (2, 0)
    assert found.llm.loss_after == found.llm.loss_before == pytest.approx(39.5)
    assert (found.bytes_up_per_round, found.bytes_down_per_round) == (7, 11)
    assert [entry.bytes_up for entry in found.history] == [0, 7, 7]
    assert found.seconds == {"blocks": 0, "before": 2, "local": 3, "rounds": 4} and found.wall_s == 9
    assert Summary.model_validate_json(found.model_dump_json()) == found
    frame = found.to_frame()
    assert list(frame["llm_loss"]) == pytest.approx([39.5, 29.5, 19.5])
    assert list(found.to_frame("clients")["own_local"]) == [i + 5 for i in range(20)]
    assert found.to_frame("clients")["own_personal"].isna().all()


def test_rounds_are_compared_by_the_clients_that_all_of_them_scored() -> None:
    """c19 has the highest loss and is away in round 2, in which all others are worse than in round 1."""

    def scored(extra: float, ids: list[str]) -> dict[str, Any]:
        held = [
            Held(clients=[id], scores=Scores({id: score(extra)}), validation=extra + 10 * (id == "c19")) for id in ids
        ]
        gone = [Refusal(client=id, reason="gone") for id in IDS if id not in ids]
        loss = fmean(one.validation or 0.0 for one in held)
        return {"held": held, "llm": None, "llm_validation": None, "validation": loss, "unscored": gone}

    sent = {id: Traffic(up=1, down=20) for id in IDS[:19]}
    records = [round_of(0, 0, **scored(3.0, IDS)), round_of(1, 0, **scored(2.0, IDS))]
    records.append(round_of(2, 0, **scored(2.25, IDS[:19]), scoring=sent))
    assert records[2].validation == 2.25 < (records[1].validation or 0.0) == 2.5
    found = summary_of({"scores": "own"}, [*records])
    assert [entry.validation for entry in found.history] == [3.0, 2.0, 2.25] and found.best_round == 1
    # Of scoring in the rounds, and not in what training took.
    assert [(entry.bytes_up, entry.bytes_down) for entry in found.history] == [(0, 0), (7, 11), (7 + 19, 11 + 380)]
    assert (found.bytes_up_per_round, found.bytes_down_per_round, found.bytes_scoring) == (7, 11, 399)


def test_what_blocks_were_cut_by_is_spread_over_the_rounds() -> None:
    asked = {"c00": Traffic(up=40, down=2)}
    found = summary_of({}, [round_of(0, 2.0, bytes=asked), round_of(1, 1.0), round_of(2, 1.0)])
    assert (found.bytes_up_per_round, found.bytes_down_per_round) == (7 + 20, 11 + 1)


def test_without_rounds_there_is_no_global_update() -> None:
    found = summary_of({}, [round_of(0, 30.0), *(alone(id, on_everyone(5.0)) for id in IDS)])
    assert all(set(client.own) == set(client.others) == {"before", "local"} for client in found.clients)


def test_where_each_scores_its_own_data_there_are_no_others_and_perhaps_no_llm() -> None:
    held = [Held(clients=[id], scores=Scores({id: score(float(i))})) for i, id in enumerate(IDS)]
    changes = {"held": held, "llm": None, "llm_validation": None}
    found = summary_of({"scores": "own"}, [round_of(0, 2.0, **changes), round_of(1, 1.0, **changes)])
    assert found.others == Others(asked=0, there=19) and found.scores == "own"
    assert found.clients[7].own == {"before": 7, "global": 7} and found.clients[7].others == {}
    assert found.history[1].llm is None and found.history[1].clients["c07"].others is None
    assert (found.llm.best_round, found.llm.loss_after) == (1, None)  # the blocks' best round
    assert Summary.model_validate_json(found.model_dump_json()) == found
