"""Configs: loading, overriding, and one clear line for what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from legolm import config as configs
from legolm.config import load_study
from legolm.errors import LegolmError

MINIMAL = {
    "blocks": [{"name": "a", "method": "structured", "sparsity": 0.5}],
    "clients": [{"id": "fr", "block": "a"}],
}


def write(path: Path, raw: object) -> Path:
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_dumped_config_loads_as_itself(tmp_path: Path) -> None:
    found = configs.load(write(tmp_path / "c.yaml", MINIMAL))
    (tmp_path / "again.yaml").write_text(configs.dump(found))
    assert configs.load(tmp_path / "again.yaml") == found


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL | {"data": "starter"})
    found = configs.load(path, ["train.steps=3", "blocks.0.sparsity=0.25", "data.limit_test=5", "seed=7"])
    assert (found.train.steps, found.blocks[0].sparsity, found.data.limit_test, found.seed) == (3, 0.25, 5, 7)
    assert found.data.train == "starter"
    found = configs.load(path, ["aggregate.start=~/run", "lora.start=~/adapter", "aggregate.form=factor"])
    assert (found.aggregate.start, found.lora.start) == (str(Path.home() / "run"), str(Path.home() / "adapter"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lora": {"start": "~nobody_here/adapter"}}, "'~nobody_here/adapter' is in the home of nobody"),
        ({"trian": {}}, "unknown key `trian`; did you mean `train`?"),
        ({"train": {"step": 4}}, "unknown key `train.step` of trainer 'adamw'; did you mean `steps`?"),
        ({"data": {"split": {"by": "iid", "colum": "x"}}}, "unknown key `data.split.colum`; did you mean `column`?"),
        ({"blocks": [{"name": "a", "method": "wanda", "sparsity": 1.0}]}, "`blocks.0.sparsity` = 1.0: input should be"),
        ({"blocks": [{"name": "a", "method": "wanda", "sparsity": -0.1}]}, "greater than or equal to 0"),
        ({"blocks": [{"name": "a", "method": "wand", "sparsity": 0.5}]}, "'wand' is not known; did you mean `wanda`?"),
        ({"blocks": [{"name": "a", "method": "wanda"}]}, "wanda takes one of sparsity, pattern; here is none"),
        ({"blocks": [{"name": "a", "method": "wanda", "pattern": "4:4"}]}, "N must be less than M"),
        ({"blocks": [{"name": "a", "method": "structured"}]}, "speedup, a shape; here is none"),
        ({"blocks": [{"name": "a", "method": "structured", "params": "many"}]}, "write a number, with k, M or G"),
        ({"blocks": [{"name": "a", "method": "wanda", "params": "70M"}]}, "here is params"),
        ({"blocks": [{"name": "a", "method": "dense", "sparsity": 0.1}]}, "dense takes no target: it is the whole LLM"),
        ({"blocks": [{"name": "llm", "method": "dense"}]}, "`llm` names the base model"),
        ({"blocks": [{"name": "../x", "method": "dense"}]}, "`blocks.0.name` = '../x'"),
        ({"blocks": []}, "`blocks`"),
        ({"clients": [{"id": "fr", "block": "b"}]}, "'fr' wants block 'b'"),
        ({"clients": [{"id": "fr"}]}, "give one of `block`, `blocks` and `profile`"),
        ({"clients": [{"id": "fr", "block": "a"}] * 2}, "'fr' is there twice"),
        ({"clients": [{"id": "llm", "block": "a"}]}, "`llm` names the base model"),
        ({"clients": [{"id": "fr", "block": "a", "rank": 9}]}, "has rank 9; at most lora.rank, 8"),
        ({"federation": {"min_replies": 2}}, "min_replies is 2; there are 1 clients"),
        ({"federation": {"superlink": {"address": "x:99999"}}}, "'x:99999': a port is a number of 1 to 65535"),
        ({"data": {"split": {"by": "column"}}}, "split by column needs `column`"),
        ({"data": {"test": 1.5}}, "`data.test` = 1.5: input should be less than 1"),
        ({"data": {"test": {}}}, "`data.test` = {}: input should be"),
        ({"seed": 2**63}, "`seed`"),
    ],
)  # fmt: skip
def test_bad_values_are_named(change: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(LegolmError) as caught:
        configs.load(write(tmp_path / "c.yaml", MINIMAL | change))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps", "write it as a.b=value"),
        ("blocks.1.sparsity=0.5", "index from 0 to 0"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_bad_overrides(override: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(LegolmError, match=says):
        configs.load(write(tmp_path / "c.yaml", MINIMAL), [override])


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(LegolmError, match="no such file"):
        configs.load(tmp_path / "none.yaml")
    (tmp_path / "c.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(LegolmError, match=r"c\.yaml:\d+: not valid YAML"):
        configs.load(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("a: \0")
    with pytest.raises(LegolmError, match="not valid YAML") as caught:
        configs.load(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)
    (tmp_path / "c.yaml").write_text("- 1")
    with pytest.raises(LegolmError, match="must be a mapping"):
        configs.load(tmp_path / "c.yaml")


def test_blocks_recover_where_the_rounds_leave_time(tmp_path: Path) -> None:
    blocks = [
        {"name": "a", "method": "structured", "sparsity": 0.5},
        {"name": "b", "method": "structured", "sparsity": 0.5, "recover": {"steps": 3}},
        {"name": "c", "method": "structured", "sparsity": 0.5, "recover": {"minutes": 0.25}},
        {"name": "d", "method": "dense"},
        {"name": "e", "method": "wanda", "sparsity": 0.5, "calibration": {"statistics": ["sums"]}},
    ]
    path = write(tmp_path / "c.yaml", MINIMAL | {"blocks": blocks})
    for rounds, steps, expected in ((3, 5, 0), (2, 8, 16), (9, 8, 40)):
        found = configs.load(path, [f"federation.rounds={rounds}", f"train.steps={steps}"]).cuts
        assert [block.recover.most_steps for block in found] == [expected, 3, 15, 0, 0]


@pytest.mark.parametrize("changes", [["aggregate.trim=0.3", "aggregate.scheme=trimmed_mean"]])
def test_changes_count_in_whatever_order(changes: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL)
    for one in (changes, changes[::-1]):
        assert configs.load(path, one).aggregate.settings["trim"] == 0.3
    study = write(
        tmp_path / "s.yaml",
        {"run": MINIMAL, "variants": [{"name": "a", "set": dict(change.split("=") for change in changes)}]},
    )
    assert load_study(study)[1]["a"].aggregate.settings["trim"] == 0.3


def test_a_change_to_what_is_the_default_drops_nothing(tmp_path: Path) -> None:
    held = {"aggregate": {"form": "exact", "residual": "drop"}, "train": {"by_width": True}}
    found = configs.load(
        write(tmp_path / "c.yaml", MINIMAL | held), ["aggregate.scheme=heteagg", "train.trainer=adamw"]
    )
    assert (found.aggregate.settings["form"], found.aggregate.settings["residual"]) == ("exact", "drop")
    assert found.train.settings["by_width"] is True


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("privacy.dp.epsilon=yes", "`epsilon` is True, and takes a number"),
        ("train.learning_rate=yes", "`learning_rate` is True"),
        ("federation.rounds=true", "`rounds` is True"),
        ("aggregate={scheme: trimmed_mean, trim: no}", "`trim` is False"),
        ("federation.rounds=1:30", "`federation.rounds` = '1:30'"),
        ("lora.scale=1e90", "`scale` is larger than any number of its kind"),
        ("train.batch_size=9000000000", "`train.batch_size` = 9000000000"),
        ("blocks.0.calibration={statistics: []}", "give `clients`, or a list of files"),
    ],
)
def test_what_is_no_number_is_none(change: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(LegolmError, match=re.escape(says)):
        configs.load(write(tmp_path / "c.yaml", MINIMAL), [change])


def test_numbers_are_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "blocks: [{name: a, method: wanda, pattern: 2:4}]\nclients: [{id: fr, block: a}]\n"
        "federation: {rounds: 010}\ntrain: {steps: 1_0, learning_rate: 1.5e-3}\n"
    )
    found = configs.load(tmp_path / "c.yaml")
    assert (found.blocks[0].pattern, found.federation.rounds) == ("2:4", 10)
    assert (found.train.steps, found.train.learning_rate) == (10, 0.0015)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"calibration": {"statistics": "clients", "text": "pydoc"}}, "text pydoc: beside"),
        ({"calibration": {"statistics": ["sums"], "text": "pydoc"}, "recover": {"steps": 0}}, "text pydoc: beside"),
        (
            {"calibration": {"statistics": "clients", "text": "pydoc"}, "recover": {"steps": 2, "text": "starter"}},
            "text",
        ),
        ({"calibration": {"sketch": 96}}, "sketch 96: is for `statistics: clients`"),
        ({"calibration": {"statistics": ["sums"], "sketch": None}}, "sketch None: is for"),
    ],
)
def test_calibration_that_nothing_reads_is_refused(block: dict[str, object], says: str, tmp_path: Path) -> None:
    cut = {"name": "a", "method": "sparsegpt", "sparsity": 0.5}
    with pytest.raises(LegolmError, match=says):
        configs.load(write(tmp_path / "c.yaml", MINIMAL | {"blocks": [cut | block]}))
    read = {"calibration": {"statistics": "clients", "text": "pydoc"}, "recover": {"steps": 2}}
    assert configs.load(write(tmp_path / "c.yaml", MINIMAL | {"blocks": [cut | read]})).cuts[0].recover.steps == 2


def test_a_factor_that_trains_alone_has_a_higher_rate(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL | {"train": {"steps": 3}})
    for overrides, form, rate in (
        ([], "frozen_side", 0.003),
        (["aggregate.form=factor"], "factor", 0.002),
        (["aggregate.form=exact"], "exact", 0.002),
        (["aggregate.scheme=fedavg"], "factor", 0.002),
        (["train.learning_rate=0.005"], "frozen_side", 0.005),
    ):
        found = configs.load(path, overrides)
        assert found.aggregate.settings.get("form", "factor") == form
        assert (found.train.learning_rate, found.train.steps) == (rate, 3)
