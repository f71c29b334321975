"""A federation and its run folder: data go there alone, whatever it is called and wherever it is moved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import legolm as lg
from helpers import PAIRS, legolm


def federation(llm: lg.LLM, **changes: Any) -> lg.Federation:
    given: dict[str, Any] = {
        "clients": {id: lg.Client(llm, pairs) for id, pairs in PAIRS.items()},
        "rounds": 1, "precision": "fp32", "lora": {"rank": 2}, "train": {"steps": 1, "learning_rate": 0.01},
        "federation": {"engine": "local", "keep_updates": True}, "evaluate": {"local_only": False},
    }  # fmt: skip
    return lg.Federation(llm, **given | changes)


def test_a_moved_run_goes_on_where_it_is(llm: lg.LLM, tmp_path: Path) -> None:
    run = federation(llm).run(tmp_path / "before", models=False)
    first = [record.seconds for record in run.rounds]
    moved = (tmp_path / "before").rename(tmp_path / "after")
    train = lg.Run(moved).config.data.train
    assert isinstance(train, str) and train.startswith(f"{moved}/data/")
    assert len(lg.read(train)) == 34
    for more in (["--dry-run"], ["--set", "federation.rounds=2"]):
        done = legolm("run", moved / "config.yaml", "--out", moved, "--resume", *more)
        assert done.returncode == 0, done.stderr
    again = moved.rename(tmp_path / "again")
    rounds = federation(llm, rounds=3).run(again, resume=True, models=False).rounds
    assert [record.seconds for record in rounds[:2]] == first and len(rounds) == 4
    last = again.rename(tmp_path / "last")
    assert {one.name for one in lg.ablate(last).without if one.kind == "client"} == set(PAIRS)


@pytest.mark.parametrize("name", ["r[1]", "what?", "a*b"])
def test_a_folder_may_be_called_like_a_pattern(llm: lg.LLM, tmp_path: Path, name: str) -> None:
    config = federation(llm).config(tmp_path / name)
    assert len(lg.read(config.data.train)) == 34


def test_a_refused_folder_gets_no_rows(llm: lg.LLM, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("mine")
    with pytest.raises(lg.LegolmError, match="theirs: is not empty and not a run"):
        federation(llm).run(tmp_path / "theirs")
    federation(llm).run(tmp_path / "run", models=False)
    before = sorted((tmp_path / "run").rglob("*"))
    other = {id: lg.Client(llm, pairs[1:]) for id, pairs in PAIRS.items()}
    with pytest.raises(lg.LegolmError, match=r"`data.train` differs"):
        federation(llm, clients=other).run(tmp_path / "run", resume=True)
    assert sorted((tmp_path / "run").rglob("*")) == before
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"federation": {"rounds": 5}}, "`federation.rounds` = 5 in the section, and 1 by the argument `rounds`"),
        ({"aggregate": {"scheme": "fedit"}}, "`aggregate.scheme` = 'fedit' in the section, and 'heteagg' by the"),
        (
            {"train": {"trainer": "sam"}},
            "`train.trainer` = 'sam' in the section, and 'adamw' by the argument `trainer`",
        ),
        ({"data": {"train": "mine.jsonl"}}, "`data.train` = 'mine.jsonl' in the section, and '"),
        ({"data": "starter"}, "`data.train` = 'starter' in the section, and '"),
        ({"data": {"layout": "text"}}, "`data.layout` = 'text' in the section, and 'auto' by the argument `clients`"),
        ({"data": {"split": {"by": "iid"}}}, "`data.split` = {'by': 'iid'} in the section"),
        ({"train": None}, "section train is None; give a mapping"),
        ({"aggregate": "fedavg"}, "section aggregate is 'fedavg'; give a mapping"),
        ({"plugins": "my:scheme"}, "plugins is 'my:scheme'; give a list"),
        ({"clients": 5}, "`clients` int; give an LLM, and each Client by its name"),
    ],
)
def test_a_section_says_nothing_else_than_the_arguments(llm: lg.LLM, sections: dict[str, Any], says: str) -> None:
    with pytest.raises(lg.LegolmError) as caught:
        federation(llm, **sections).plan()
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_section_may_say_the_same_and_more(llm: lg.LLM, tmp_path: Path) -> None:
    fed = federation(llm, federation={"rounds": 1}, aggregate={"form": "factor"}, data={"validation": 0.2})
    config = fed.config(tmp_path / "run")
    assert (config.federation.rounds, config.data.validation) == (1, 0.2)
    assert config.aggregate.settings["form"] == "factor"


def pairs_once() -> Iterator[tuple[str, str]]:
    yield from PAIRS["paris"]


@pytest.mark.parametrize(
    "given", [5, "data.jsonl", pairs_once(), Path("data.jsonl")], ids=["number", "text", "generator", "path"]
)
def test_examples_are_a_list(llm: lg.LLM, given: Any) -> None:
    with pytest.raises(lg.LegolmError, match=r"Client: `data` is \w+; give a list of Examples"):
        lg.Client(llm, given)
    with pytest.raises(lg.LegolmError, match=r"Client: `test` is \w+; give a list of Examples"):
        lg.Client(llm, PAIRS["paris"], test=given)


def test_half_a_character_is_one_line(llm: lg.LLM) -> None:
    clients = {"paris": lg.Client(llm, [*PAIRS["paris"], ("x\ud800", "y")])}
    with pytest.raises(lg.LegolmError, match=r"train example 20 of 'paris' has half a character \('\\ud800'\)"):
        federation(llm, clients=clients).plan()
