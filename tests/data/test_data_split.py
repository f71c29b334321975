from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from legolm.config import DataConfig
from legolm.config.sections import Split
from legolm.data import ClientData, Example, load_parts, own_part
from legolm.errors import LegolmError


def write(path: Path, count: int, topic: str = "t", start: int = 0) -> str:
    """JSON lines with the answers `{topic}{start}` and on, and a column `topic`."""
    lines = [
        json.dumps({"instruction": "?", "output": f"{topic}{n}", "topic": topic}) for n in range(start, start + count)
    ]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))
    return str(path)


def answers(examples: Iterable[Example]) -> list[str]:
    return [example.messages[-1].content for example in examples]


def everything(parts: dict[str, ClientData]) -> list[str]:
    return [a for part in parts.values() for a in answers([*part.train, *part.validation, *part.test])]


def error_of(config: DataConfig, clients: list[str]) -> str:
    with pytest.raises(LegolmError) as caught:
        load_parts(config, clients, seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestByFile:
    def test_stems_are_parts_in_train_validation_and_test(self, tmp_path: Path) -> None:
        for split in ("train", "validation", "test"):
            (tmp_path / split).mkdir()
            for client in ("north", "south"):
                write(tmp_path / split / f"{client}.jsonl", 2, f"{client}-{split}-")
        config = DataConfig(**{s: str(tmp_path / s / "*.jsonl") for s in ("train", "validation", "test")})
        parts = load_parts(config, ["south", "north"], seed=0)
        assert list(parts) == ["south", "north"]
        for client, data in parts.items():
            assert sorted(answers(data.train)) == [f"{client}-train-0", f"{client}-train-1"]
            assert sorted(answers(data.validation)) == [f"{client}-validation-0", f"{client}-validation-1"]
            assert sorted(answers(data.test)) == [f"{client}-test-0", f"{client}-test-1"]

    def test_shares_are_held_out_of_the_training_rows(self, tmp_path: Path) -> None:
        parts = load_parts(DataConfig(train=write(tmp_path / "a.jsonl", 20)), ["a"], seed=0)
        data = parts["a"]
        assert [len(data.train), len(data.validation), len(data.test)] == [14, 2, 4]
        assert sorted(everything(parts)) == sorted(f"t{n}" for n in range(20))

    def test_at_least_one_is_held_out(self, tmp_path: Path) -> None:
        data = load_parts(DataConfig(train=write(tmp_path / "a.jsonl", 3)), ["a"], seed=0)["a"]
        assert [len(data.train), len(data.validation), len(data.test)] == [1, 1, 1]

    def test_only_the_parts_asked_for_whatever_their_order(self, tmp_path: Path) -> None:
        for name in "abc":
            write(tmp_path / f"{name}.jsonl", 9, name)
        config = DataConfig(train=str(tmp_path / "*.jsonl"))
        assert load_parts(config, ["c", "a"], 0) == load_parts(config, ["a", "c"], 0)
        assert load_parts(config, ["a"], 0)["a"] == load_parts(config, ["c", "a"], 0)["a"]

    def test_seed_decides_who_is_held_out(self, tmp_path: Path) -> None:
        config = DataConfig(train=write(tmp_path / "a.jsonl", 50))
        assert load_parts(config, ["a"], 0) == load_parts(config, ["a"], 0)
        assert set(load_parts(config, ["a"], 0)["a"].test) != set(load_parts(config, ["a"], 1)["a"].test)

    def test_limits_keep_a_random_prefix(self, tmp_path: Path) -> None:
        train = write(tmp_path / "a.jsonl", 50)
        whole = load_parts(DataConfig(train=train), ["a"], 0)["a"]
        config = DataConfig(train=train, limit_train=3, limit_validation=2, limit_test=1)
        cut = load_parts(config, ["a"], 0)["a"]
        assert cut == ClientData(whole.train[:3], whole.validation[:2], whole.test[:1])
        assert answers(cut.train) != ["t0", "t1", "t2"]

    def test_system_message(self, tmp_path: Path) -> None:
        config = DataConfig(train=write(tmp_path / "a.jsonl", 3), system="Be brief.")
        data = load_parts(config, ["a"], 0)["a"]
        for example in [*data.train, *data.validation, *data.test]:
            assert [m.role for m in example.messages] == ["system", "user", "assistant"]

    def test_two_files_of_one_stem_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "x").mkdir()
        first, second = write(tmp_path / "a.jsonl", 3), write(tmp_path / "x" / "a.jsonl", 3)
        message = error_of(DataConfig(train=[first, second]), ["a"])
        assert (
            message == f"data.train: {first} and {second} are both part 'a'; rename one, or name their folders after "
            "the clients"
        )


class TestByColumn:
    def test_a_test_set_without_the_column_is_everyones(self, tmp_path: Path) -> None:
        for topic in ("x", "y"):
            write(tmp_path / "train.jsonl", 4, topic)
        test = tmp_path / "test.jsonl"
        test.write_text("".join(json.dumps({"instruction": "?", "output": answer}) + "\n" for answer in "ab"))
        split = {"by": "column", "column": "topic"}
        config = DataConfig.model_validate({"train": str(tmp_path / "train.jsonl"), "test": str(test), "split": split})
        notes: list[str] = []
        parts = load_parts(config, ["x", "y"], 0, notes)
        assert [sorted(answers(one.test)) for one in parts.values()] == [["a", "b"]] * 2
        assert "data.test: no row has `topic`, so that all clients share it." in notes
        write(test, 1, "x")  # with it in one row, those without are bad
        assert "no field `topic`" in error_of(config, ["x", "y"])

    def test_rows_of_no_client_are_said(self, tmp_path: Path) -> None:
        for number, topic in enumerate("abcdefgh", 4):
            write(tmp_path / "train.jsonl", number, topic)
        split = {"by": "column", "column": "topic"}
        config = DataConfig.model_validate({"train": str(tmp_path / "train.jsonl"), "split": split, "test": 0.25})
        notes: list[str] = []
        load_parts(config, ["g", "h"], 0, notes)
        assert notes[-1] == "data.train: 39 rows are of no client: 'a', 'b', 'c', 'd', 'e' and 1 more."
        notes.clear()
        load_parts(config, list("abcdefgh"), 0, notes)
        assert not any("of no client" in note for note in notes)

    def test_values_are_parts_in_every_split(self, tmp_path: Path) -> None:
        for topic in ("x", "y"):
            write(tmp_path / "train.jsonl", 4, topic)
            write(tmp_path / "test.jsonl", 2, topic, start=100)
        config = DataConfig(
            train=str(tmp_path / "train.jsonl"),
            validation=0.25,
            test=str(tmp_path / "test.jsonl"),
            split=Split(by="column", column="topic"),
        )
        data = load_parts(config, ["y"], seed=0)["y"]
        assert sorted(answers([*data.train, *data.validation])) == ["y0", "y1", "y2", "y3"]
        assert len(data.validation) == 1
        assert sorted(answers(data.test)) == ["y100", "y101"]

    def test_missing_column(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", 1)
        message = error_of(DataConfig(train=path, split=Split(by="column", column="task")), ["t"])
        assert message == f"{path}:1: no field `task`; there are: instruction, output, topic"


class TestDealing:
    @pytest.mark.parametrize(("rows", "clients"), [(10, 3), (11, 4), (6, 4), (40, 7)])
    def test_iid_covers_all_rows_once_in_sizes_that_differ_by_one_at_most(
        self, tmp_path: Path, rows: int, clients: int
    ) -> None:
        paths = {s: write(tmp_path / f"{s}.jsonl", rows, s) for s in ("train", "validation", "test")}
        config = DataConfig(**paths, split=Split(by="iid"))
        parts = load_parts(config, [f"c{n}" for n in range(clients)], seed=3)
        for split in ("train", "validation", "test"):
            sizes = [len(getattr(part, split)) for part in parts.values()]
            assert sum(sizes) == rows
            assert max(sizes) - min(sizes) <= 1
        assert len(set(everything(parts))) == 3 * rows

    @settings(max_examples=25)
    @given(
        # Each client needs a row for training, validation and test: 20 rows serve four clients, however uneven.
        topics=st.lists(st.integers(20, 30), min_size=1, max_size=4),
        clients=st.integers(1, 4),
        alpha=st.sampled_from([0.01, 0.3, 1.0, 100.0]),
        seed=st.integers(-5, 2**40),
    )
    def test_dirichlet_covers_all_rows_once_and_leaves_nobody_out(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        topics: list[int],
        clients: int,
        alpha: float,
        seed: int,
    ) -> None:
        path = tmp_path_factory.mktemp("data") / "train.jsonl"
        for number, count in enumerate(topics):
            write(path, count, f"topic{number}-")
        config = DataConfig(train=str(path), split=Split(by="dirichlet", column="topic", alpha=alpha))
        names = [f"c{n}" for n in range(clients)]
        parts = load_parts(config, names, seed)
        assert load_parts(config, names, seed) == parts
        assert Counter(everything(parts)) == Counter(
            f"topic{number}-{n}" for number, count in enumerate(topics) for n in range(count)
        )
        assert all(part.train and part.validation and part.test for part in parts.values())

    def test_dirichlet_deals_test_rows_in_the_shares_of_the_training_rows(self, tmp_path: Path) -> None:
        for topic in ("x", "y", "z"):
            write(tmp_path / "train.jsonl", 200, topic)
            write(tmp_path / "test.jsonl", 100, topic)
        config = DataConfig(
            train=str(tmp_path / "train.jsonl"),
            validation=str(tmp_path / "test.jsonl"),
            test=str(tmp_path / "test.jsonl"),
            split=Split(by="dirichlet", column="topic", alpha=0.5),
        )
        parts = load_parts(config, ["a", "b", "c"], seed=0)
        shares = []
        for data in parts.values():
            for topic in ("x", "y", "z"):
                train, test = (sum(a.startswith(topic) for a in answers(split)) for split in (data.train, data.test))
                assert abs(train / 200 - test / 100) <= 0.01
                shares.append(train / 200)
        assert max(shares) - min(shares) > 0.3

    @pytest.mark.parametrize("rows", [1, 2, 3])
    def test_many_labels_of_few_rows_give_no_client_more_for_its_place(self, tmp_path: Path, rows: int) -> None:
        for topic in range(240):
            path = write(tmp_path / "train.jsonl", rows, f"t{topic}-")
        config = DataConfig(train=path, split=Split(by="dirichlet", column="topic", alpha=1000.0))
        parts = load_parts(config, ["a", "b", "c", "d"], seed=0)
        sizes = [sum(len(getattr(data, split)) for split in ("train", "validation", "test")) for data in parts.values()]
        assert sum(sizes) == 240 * rows
        assert all(abs(size - 60 * rows) < 25 for size in sizes)  # a few standard errors

    def test_a_larger_alpha_is_more_even(self, tmp_path: Path) -> None:
        path = write(tmp_path / "train.jsonl", 300)

        def spread(alpha: float) -> int:
            config = DataConfig(train=path, split=Split(by="dirichlet", column="topic", alpha=alpha))
            sizes = [len(data.train) for data in load_parts(config, ["a", "b", "c"], seed=0).values()]
            return max(sizes) - min(sizes)

        assert spread(1000.0) < 25 < spread(0.3)


def test_rows_to_test_on_that_are_learned_are_said(tmp_path: Path) -> None:
    def said(config: DataConfig) -> list[str]:
        notes: list[str] = []
        load_parts(config, ["a", "b"], 0, notes)
        return [note for note in notes if "too" in note]

    for client in ("a", "b"):
        write(tmp_path / f"{client}.jsonl", 20, client)
    own = DataConfig(train=f"{tmp_path}/?.jsonl", test=0.25, validation=0.25)
    assert said(own) == []
    (tmp_path / "test").mkdir()
    test = write(tmp_path / "test" / "all.jsonl", 10, "t")  # everybody's
    write(tmp_path / "test" / "all.jsonl", 3, "a")
    write(tmp_path / "b.jsonl", 1, "t")
    apart = own.model_copy(update={"test": test, "validation": test})
    assert said(apart) == [
        "data: 4 of 13 test rows are training rows, too (of the same client or another): what was learned is "
        "tested; leave rows out that are there twice."
    ]
    assert said(apart.model_copy(update={"limit_train": 1})) == []
    write(tmp_path / "a.jsonl", 20, "a")
    assert len(said(own)) == 1
    notes: list[str] = []
    own_part(str(tmp_path / "a.jsonl"), own, "a", 0, "data.train", notes)
    assert "test rows are training rows, too" in notes[-1]


class TestErrors:
    def test_unknown_part_names_the_nearest(self, tmp_path: Path) -> None:
        for name in ("north", "south"):
            write(tmp_path / f"{name}.jsonl", 3)
        message = error_of(DataConfig(train=str(tmp_path / "*.jsonl")), ["north", "nort"])
        assert message == "clients: the data has no part 'nort'; of its 2 the nearest is 'north'"

    def test_a_part_of_which_every_row_was_skipped_is_not_only_unknown(self, tmp_path: Path) -> None:
        write(tmp_path / "north.jsonl", 3)
        (tmp_path / "south.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
        config = DataConfig.model_validate({"train": str(tmp_path / "*.jsonl"), "bad_rows": "skip"})
        message = error_of(config, ["north", "south"])
        assert message.startswith(
            "clients: the data has no part 'south'; of its 1 the nearest is 'north'; data.train: "
        )
        assert f"2 of 5 rows skipped: {tmp_path / 'south.jsonl'}:1: " in message

    def test_no_rows(self) -> None:
        message = error_of(DataConfig(train=[]), ["a"])
        assert message == "data.train: [] has no rows; name files with examples"

    def test_too_few_rows_to_hold_out(self, tmp_path: Path) -> None:
        message = error_of(DataConfig(train=write(tmp_path / "a.jsonl", 2)), ["a"])
        assert message.startswith("data.train: client 'a' is left without train examples (2 rows in data.train")

    def test_no_test_file_of_the_clients_name(self, tmp_path: Path) -> None:
        for client in ("a", "b"):
            write(tmp_path / f"{client}.jsonl", 3)
        (tmp_path / "test").mkdir()
        test = write(tmp_path / "test" / "b.jsonl", 3)
        message = error_of(DataConfig(train=f"{tmp_path}/*.jsonl", test=test), ["a", "b"])
        assert message.startswith("data.test: client 'a' is left without test examples")
        assert message.endswith("split by file); put more rows in a file named after it")

    @pytest.mark.parametrize("by", ["iid", "dirichlet"])
    def test_fewer_rows_than_clients(self, tmp_path: Path, by: Any) -> None:
        config = DataConfig(train=write(tmp_path / "a.jsonl", 5), split=Split(by=by, column="topic"))
        assert "without train examples" in error_of(config, ["a", "b", "c"])


class TestStarter:
    def test_parts_by_language_with_limit_and_system_message(self) -> None:
        config = DataConfig(limit_train=5, system="Be brief.")
        parts = load_parts(config, ["pl", "fr"], seed=0)
        assert list(parts) == ["pl", "fr"]
        assert len(parts["fr"].train) == 5
        assert len(parts["fr"].test) > 100
        assert parts["fr"].train[0].messages[0].content == "Be brief."

    def test_unknown_language(self) -> None:
        assert error_of(DataConfig(), ["ptt"]) == ("clients: the data has no part 'ptt'; of its 8 the nearest is 'pt'")

    @pytest.mark.parametrize(("field", "value"), [("test", 0.5), ("validation", "v.jsonl"), ("split", {"by": "iid"})])
    def test_settings_it_would_ignore_are_refused(self, field: str, value: Any) -> None:
        config = DataConfig.model_validate({field: value})
        assert error_of(config, ["fr"]).startswith(f"data.{field}: the starter data has its own")
