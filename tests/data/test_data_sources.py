from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from legolm.config import Fields, RowsConfig
from legolm.data import Example, files, read_rows, sources, to_example, with_system
from legolm.data.examples import Message
from legolm.data.prose import check_prose, read_text
from legolm.data.sources import Row
from legolm.errors import LegolmError

QUESTION = {"instruction": "2 + 2?", "output": "4"}
PAIR = Example((Message("user", "2 + 2?"), Message("assistant", "4")))


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def rows(source: str | list[str]) -> list[Row]:
    return list(read_rows(source, "data.train"))


def error_of(source: str | list[str]) -> str:
    with pytest.raises(LegolmError) as caught:
        rows(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def example_error(values: dict[str, Any], config: RowsConfig | None = None) -> str:
    with pytest.raises(LegolmError) as caught:
        to_example(Row(values, "a.jsonl", "a.jsonl:17"), config or RowsConfig())
    return str(caught.value)


class TestReading:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.csv.gz", "a.txt"])
    def test_what_the_system_does_not_let_us_read_is_one_line(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        path.symlink_to("/proc/self/mem")  # a file that opens, and gives an error to who reads it, root too
        said = f": {path}: cannot be read (Input/output error); check its permissions and its disk"
        if name != "a.txt":
            assert error_of(str(path)) == f"data.train{said}"
            return
        for read in (read_text, check_prose):
            with pytest.raises(LegolmError) as caught:
                read(path, "calibration.text")
            assert str(caught.value) == f"calibration.text{said}"

    def test_every_format_gives_the_same_examples(self, tmp_path: Path) -> None:
        table = pyarrow.table({key: [value] for key, value in QUESTION.items()})
        parquet.write_table(table, tmp_path / "a.parquet")
        files = [
            write(tmp_path / "a.jsonl", json.dumps(QUESTION) + "\n"),
            write(tmp_path / "a.json", json.dumps([QUESTION])),
            write(tmp_path / "a.csv", "instruction,output\n2 + 2?,4\n"),
            str(tmp_path / "a.parquet"),
        ]
        assert [to_example(row, RowsConfig()) for row in rows(files)] == [PAIR] * 4

    def test_rows_know_their_place(self, tmp_path: Path) -> None:
        path = write(tmp_path / "north.jsonl", f"{json.dumps(QUESTION)}\n\n{json.dumps(QUESTION)}\n")
        assert [(row.source, row.place) for row in rows(path)] == [(path, f"{path}:1"), (path, f"{path}:3")]

    def test_glob_is_sorted_and_may_be_absolute_or_relative(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("b", "a"):
            write(tmp_path / f"{name}.jsonl", json.dumps(QUESTION))
        monkeypatch.chdir(tmp_path)
        for pattern in (str(tmp_path / "*.jsonl"), "*.jsonl"):
            assert [Path(row.source).stem for row in rows(pattern)] == ["a", "b"]

    def test_line_separators_inside_strings_do_not_end_a_json_line(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", '{"instruction": "a\u2028b", "output": "c"}\n')
        assert rows(path)[0]["instruction"] == "a\u2028b"

    def test_csv_with_byte_order_mark_quotes_and_line_breaks(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.csv", '\ufeffinstruction,output\r\n"a, ""b""\nc",d\r\n')
        assert rows(path)[0].values == {"instruction": 'a, "b"\nc', "output": "d"}

    @pytest.mark.parametrize(
        ("source", "asked"),
        [
            ("hub:org/name", ("org/name", None, "train")),
            ("hub:org/name:test", ("org/name", None, "test")),
            ("hub:org/name:main:test", ("org/name", "main", "test")),
            ("hub:org/name:train[:10%]", ("org/name", None, "train[:10%]")),
            ("hub:org/name:main:train[10%:]", ("org/name", "main", "train[10%:]")),
        ],
    )
    def test_hub_data_set_with_config_and_split(
        self, monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[str, str | None, str]
    ) -> None:
        def load(name: str, config: str | None, split: str) -> list[dict[str, str]]:
            assert (name, config, split) == asked
            return [QUESTION]

        monkeypatch.setattr(sources, "hub_answers", lambda: True)
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
        (row,) = rows(source)
        assert (row.place, to_example(row, RowsConfig())) == (f"{source} row 1", PAIR)

    def test_a_folder_with_several_configs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        folder = tmp_path / "sums"
        folder.mkdir()
        configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("main", "socratic"))
        write(folder / "README.md", f"---\nconfigs:\n{configs}---\n")
        for name in ("main", "socratic"):
            write(folder / f"{name}.jsonl", json.dumps({"question": name, "answer": "4"}) + "\n")
        assert [row["question"] for row in rows(f"hub:{folder}:socratic:train")] == ["socratic"]
        message = error_of(f"hub:{folder}")
        assert "has several configs (main, socratic); name one, as in hub:" in message
        assert message.endswith(f"{folder}:main:train")
        assert error_of(f"hub:{folder}:socratic").endswith(f"{folder}:socratic:train")
        assert sources.names_of(f"hub:{folder}:socratic:train") == ["sums", "socratic"]


class TestReadingErrors:
    def test_missing_file(self) -> None:
        assert error_of("absent.jsonl") == "data.train: no file absent.jsonl"

    def test_glob_without_match(self) -> None:
        assert error_of("absent/*.jsonl") == "data.train: 'absent/*.jsonl' matches no file"

    def test_folder(self, tmp_path: Path) -> None:
        assert error_of(str(tmp_path)).endswith(f"is a folder; name its files, for instance {tmp_path}/*.jsonl")

    def test_unknown_kind(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.txt", "x")
        assert error_of(path).endswith("known: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, and .gz of them")

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
    @pytest.mark.parametrize("text", ["", "\n"])
    def test_empty_file(self, tmp_path: Path, name: str, text: str) -> None:
        path = write(tmp_path / name, text)
        assert error_of(path) == f"data.train: {path} is empty"

    def test_broken_json_line(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", json.dumps(QUESTION) + "\n{broken\n")
        assert error_of(path).startswith(f"{path}:2: not valid JSON (")

    def test_broken_json(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.json", '[\n{"a": 1},\n{"b" 2}]')
        assert error_of(path).startswith(f"{path}:3: not valid JSON (")

    @pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5000])
    def test_json_that_python_does_not_read(self, tmp_path: Path, value: str) -> None:
        path = write(tmp_path / "a.jsonl", value)
        assert error_of(path).startswith(f"{path}:1: cannot be read (")

    @pytest.mark.parametrize("pattern", ["da**ta.jsonl", "~nobody-is-here/a.jsonl"])
    def test_pattern_that_is_none(self, pattern: str) -> None:
        assert error_of(pattern).startswith(f"data.train: {pattern!r} is no path or pattern (")

    def test_json_that_is_no_list(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.json", '{\n"rows": []\n}')
        assert error_of(path).startswith(f"data.train: {path} must be a list of objects, or JSON lines: {path}:1 is")

    def test_row_that_is_no_object(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", "1\n")
        assert error_of(path) == f"{path}:1: a row must be an object, not int"
        path = write(tmp_path / "a.json", "[{}, 1]")
        assert error_of(path) == f"{path} row 2: a row must be an object, not int"

    @pytest.mark.parametrize("line", ["1", "1,2,3"])
    def test_csv_with_wrong_number_of_cells(self, tmp_path: Path, line: str) -> None:
        path = write(tmp_path / "a.csv", f'instruction,output\n\n"a\nb",c\n{line}\n')
        cells = line.count(",") + 1
        assert error_of(path) == f"{path}:5: {cells} cells but 2 in the header; quote cells with commas"

    def test_broken_csv(self, tmp_path: Path) -> None:
        for broken in ('"a"b,c\n', '"a,c\nd,e\n'):
            path = write(tmp_path / "a.csv", f"instruction,output\n{broken}")
            assert error_of(path).startswith(f"{path}:2: not valid CSV (")

    @pytest.mark.parametrize(
        ("name", "text", "says"),
        [
            (
                "a.jsonl",
                '{"output": "a"}\n{"output": "b", "output": "c"}',
                "{path}:2: cannot be read ('output' is there twice)",
            ),
            ("a.json", '[{"a": 1, "a": 2}]', "{path}:1: cannot be read ('a' is there twice)"),
            (
                "a.csv",
                "output,instruction,output\n1,2,3\n",
                "{path}:1: column output is there twice; rename one or take",
            ),
        ],
    )
    def test_a_field_that_is_there_twice(self, tmp_path: Path, name: str, text: str, says: str) -> None:
        path = write(tmp_path / name, text)
        assert error_of(path).startswith(says.format(path=path))

    def test_csv_columns_without_a_name_are_nobodys(self, tmp_path: Path) -> None:
        assert rows(write(tmp_path / "a.csv", "instruction,output,,\n1,2,,\n"))[0]["output"] == "2"

    def test_parquet_that_python_cannot_hold(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.table({"when": pyarrow.array([4_000_000], pyarrow.date32())}), path)
        assert error_of(str(path)).startswith(f"data.train: {path} is not valid Parquet (")

    def test_not_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n')
        assert error_of(str(path)) == f"{path}:2: not UTF-8; save the file in UTF-8"

    def test_broken_parquet(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.parquet", "no parquet at all")
        assert error_of(path).startswith(f"data.train: {path} is not valid Parquet (")

    def test_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert files.MAX_BYTES == 4_000_000_000
        monkeypatch.setattr(files, "MAX_BYTES", 1)
        path = write(tmp_path / "a.jsonl", "{}\n")
        assert error_of(path).startswith(f"data.train: {path} has more than ")

    @pytest.mark.parametrize(("module", "source"), [("pyarrow", "a.parquet"), ("datasets", "hub:org/name")])
    def test_missing_package_names_the_extra(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "a.parquet", "x")
        monkeypatch.setitem(sys.modules, module, None)
        assert error_of(source).endswith("run: pip install 'legolm[data]'")

    def test_no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(name: str, config: None, split: str) -> None:
            raise ConnectionError("cannot reach the hub\nlong story")

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
        for answers, offline, says in (
            (True, False, " (cannot reach the hub); give a file"),
            (False, True, " (cannot reach the hub); give a file"),  # from what was downloaded before, at once
            (False, False, ", the hub does not answer; set HF_HUB_OFFLINE=1 to use what was downloaded before, or give"
             " a file"),
        ):  # fmt: skip
            monkeypatch.setattr(sources, "hub_answers", lambda answers=answers: answers)
            monkeypatch.setattr(sources, "wants_offline", lambda offline=offline: offline)
            assert error_of("hub:org/name") == f"data.train: 'hub:org/name' cannot be loaded{says}"


class TestExamples:
    CHAT = RowsConfig(fields=Fields(messages="chat"))

    def test_messages(self) -> None:
        turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
        assert to_example(Row({"chat": turns}, "a.jsonl", "a.jsonl:1"), self.CHAT) == PAIR

    def test_missing_field_names_place_and_fields_there(self) -> None:
        message = example_error({"question": "a", "output": "b"})
        assert message.startswith(
            "a.jsonl:17: no field `instruction`; there are: question, output; name them (`fields`"
        )

    @pytest.mark.parametrize("field", ["instruction", "output"])
    def test_empty_text(self, field: str) -> None:
        message = example_error(QUESTION | {field: " \n"})
        assert message == f"a.jsonl:17: `{field}` is empty; fill it or take the row out"

    def test_half_a_character(self) -> None:
        message = example_error({"instruction": "a", "output": "b\ud800"})
        assert message.startswith("a.jsonl:17: `output` has half a character at 1")

    def test_value_that_is_no_text(self) -> None:
        assert example_error(QUESTION | {"output": {}}) == "a.jsonl:17: `output` must be text, not dict"

    @pytest.mark.parametrize(
        ("turns", "message"),
        [
            ("hello", "`chat` must be a list of two messages or more"),
            ([{"role": "assistant", "content": "a"}], "`chat` must be a list of two messages or more"),
            (["a", "b"], "`chat[0]` must be an object with `role` and `content`"),
            (
                [{"role": "human", "content": "a"}, {"role": "assistant", "content": "b"}],
                "`chat[0]` has role 'human'; known: system, user, assistant, tool",
            ),
            (
                [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
                "`chat` must end with role 'assistant'",
            ),
            (
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}],
                "`chat[1].content` is empty; fill it or take the row out",
            ),
        ],
    )
    def test_bad_messages(self, turns: object, message: str) -> None:
        assert example_error({"chat": turns}, self.CHAT) == f"a.jsonl:17: {message}"

    def test_system_message_is_put_first_where_there_is_none(self) -> None:
        system = Message("system", "Be brief.")
        assert with_system(PAIR, "Be brief.") == Example((system, *PAIR.messages))
        assert with_system(with_system(PAIR, "Be brief."), "Be long.") == Example((system, *PAIR.messages))
        assert with_system(PAIR, None) == PAIR
