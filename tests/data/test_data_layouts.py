"""Rows as people have them: what each becomes, what is said of them, and what is left out is named."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from legolm.config import DataConfig, Fields, RowsConfig
from legolm.data import Example, Message, load_parts, read_examples, with_system
from legolm.data import files as formats
from legolm.data.layouts import Reading
from legolm.data.store import Examples
from legolm.errors import LegolmError
from legolm.system import strict_json

TOWNS = ("Lyon", "Porto", "Graz", "Turin")


def write(path: Path, rows: Iterable[Any]) -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def asked(question: str, answer: str) -> Example:
    return Example((Message("user", question), Message("assistant", answer)))


def read(path: str, **config: Any) -> tuple[list[Example], list[str]]:
    notes: list[str] = []
    return list(read_examples(path, RowsConfig(**config), "data.train", notes)), notes


def error_of(path: str, **config: Any) -> str:
    with pytest.raises(LegolmError) as caught:
        read(path, **config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestLayouts:
    def test_the_input_of_alpaca_rows_is_in_the_prompt(self, tmp_path: Path) -> None:
        rows = [{"instruction": "Where?", "input": f"To {t}." * (t != "Graz"), "output": t} for t in TOWNS]
        found, notes = read(write(tmp_path / "a.jsonl", rows))
        assert found[0] == asked("Where?\n\nTo Lyon.", "Lyon")
        assert found[2] == asked("Where?", "Graz")
        assert notes == ["data.train: alpaca: 4 of 4 rows, 3 with input."]

    def test_the_context_of_dolly_rows_is_in_the_prompt_and_what_is_unused_is_named(self, tmp_path: Path) -> None:
        row = {"instruction": "Where?", "context": "To Lyon.", "response": "Lyon", "category": "closed_qa", "id": "7"}
        found, notes = read(write(tmp_path / "a.jsonl", [row, row | {"context": None}]))
        assert found == [asked("Where?\n\nTo Lyon.", "Lyon"), asked("Where?", "Lyon")]
        assert notes == [
            "data.train: dolly: 2 of 2 rows, 1 with context.",
            "data.train: nothing uses field `category` (2 rows).",
        ]

    def test_what_is_beside_a_text_and_in_turns_is_named(self, tmp_path: Path) -> None:
        _, notes = read(write(tmp_path / "a.jsonl", [{"text": "To Lyon.", "label": 0, "empty": None}]))
        assert notes[1:] == ["data.train: nothing uses field `label` (1 rows)."]
        turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "Lyon", "weight": 0, "thought": "a town"}]
        (found,), notes = read(write(tmp_path / "b.jsonl", [{"conversations": turns}]))
        assert found.messages[-1].turn == {"role": "assistant", "content": "Lyon", "weight": 0, "thought": "a town"}
        assert notes[1:] == ["data.train: nothing uses field `conversations[].weight` (1 rows)."]

    def test_a_context_that_no_row_has_is_said(self, tmp_path: Path) -> None:
        row = {"instruction": "Where?", "passage": "To Lyon.", "output": "Lyon"}
        _, notes = read(write(tmp_path / "a.jsonl", [row]), fields=Fields(input="passsage"))
        assert "data.train: no row has anything in field `passsage` (fields.input)." in notes
        _, notes = read(write(tmp_path / "a.jsonl", [row, row | {"passage": ""}]), fields=Fields(input="passage"))
        assert notes == ["data.train: alpaca: 2 of 2 rows, 1 with input."]

    def test_names_of_fields_keep_the_context(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", [{"question": "Where?", "passage": "To Lyon.", "answer": "Lyon"}])
        found, notes = read(path, fields=Fields(instruction="question", answer="answer"))
        assert found == [asked("Where?", "Lyon")]
        assert "data.train: nothing uses field `passage` (1 rows)." in notes
        assert read(path, fields=Fields(instruction="question", input="passage", answer="answer"))[0] == [
            asked("Where?\n\nTo Lyon.", "Lyon")
        ]
        assert error_of(path).startswith(
            f"{path}:1: fields question, passage, answer are of no known layout; name them"
        )

    def test_conversations_of_from_and_value(self, tmp_path: Path) -> None:
        turns = [("system", "Be brief."), ("human", "2 + 2?"), ("gpt", "4"), ("Human", "+ 1?"), ("GPT", "5")]
        row = {"id": "x", "conversations": [{"from": one, "value": text} for one, text in turns]}
        (found,), notes = read(write(tmp_path / "a.jsonl", [row]))
        assert [(one.role, one.content) for one in found.messages] == [
            ("system", "Be brief."),
            ("user", "2 + 2?"),
            ("assistant", "4"),
            ("user", "+ 1?"),
            ("assistant", "5"),
        ]
        assert [one.wanted for one in found.turns] == ["4", "5"]
        assert [len(one.messages) for one in found.turns] == [3, 5]
        assert notes[0] == "data.train: sharegpt: 1 of 1 rows."

    def test_turns_say_which_of_the_two_they_are(self, tmp_path: Path) -> None:
        turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
        for column in ("messages", "conversations"):
            found, notes = read(write(tmp_path / "a.jsonl", [{column: turns}]))
            assert found == [asked("2 + 2?", "4")]
            assert notes == ["data.train: messages: 1 of 1 rows."]

    def test_tool_calls_and_content_that_is_null_are_kept_for_the_template(self, tmp_path: Path) -> None:
        call = {"function": {"name": "add", "arguments": {"a": 2.50}}}
        turns = [
            {"role": "user", "content": "2.5 + 2?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "4.5", "tool_call_id": "1"},
            {"role": "assistant", "content": [{"type": "text", "text": "4"}, {"type": "text", "text": ".5"}]},
        ]
        (found,), _ = read(write(tmp_path / "a.jsonl", [{"messages": turns}]))
        assert [one.turn for one in found.messages] == [*turns[:3], {"role": "assistant", "content": "4.5"}]
        assert found.turns[0].wanted

    def test_tools_beside_a_chat_are_kept_for_the_template(self, tmp_path: Path) -> None:
        turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
        tools = [{"type": "function", "function": {"name": "add", "parameters": {}, "strict": None}}]
        wanted = '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'
        for held in (tools, json.dumps(tools)):
            (found,), notes = read(write(tmp_path / "a.jsonl", [{"messages": turns, "tools": held}]))
            assert found.tools == found.turns[0].tools == with_system(found, "Be brief.").tools == wanted
            assert notes == ["data.train: messages: 1 of 1 rows, 1 with tools."]
            assert Examples.of([found])[0] == found
        (found,), notes = read(write(tmp_path / "a.jsonl", [{"messages": turns, "tools": "a hammer"}]))
        assert found == asked("2 + 2?", "4") and repr(found) == repr(asked("2 + 2?", "4"))
        assert notes[1] == "data.train: nothing uses field `tools` (1 rows)."

    def test_text_and_pairs_stay_as_they_are(self, tmp_path: Path) -> None:
        pairs, said = read(write(tmp_path / "a.jsonl", [{"prompt": "It is", "completion": " Lyon."}]))
        assert pairs == [Example(asked("It is", " Lyon.").messages, raw=True)]
        assert said == ["data.train: pairs: 1 of 1 rows."]
        text, said = read(write(tmp_path / "a.jsonl", [{"text": "Lyon."}]))
        assert text == [Example((Message("assistant", "Lyon."),), raw=True)]
        named, _ = read(
            write(tmp_path / "a.jsonl", [{"body": "Lyon.", "text": "no"}]), layout="text", fields=Fields(text="body")
        )
        assert named == text

    def test_numbers_are_text_as_they_are_written(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(f'{{"instruction": "?", "output": {label}}}\n' for label in ("0", "1.50", "true")))
        found, _ = read(str(path))
        assert [one.wanted for one in found] == ["0", "1.50", "true"]

    def test_a_layout_that_is_given_is_not_guessed(self, tmp_path: Path) -> None:
        row = {"instruction": "A", "input": "B", "output": "C", "text": "A B C"}
        path = write(tmp_path / "a.jsonl", [row])
        assert read(path)[0] == [asked("A\n\nB", "C")]
        assert read(path, layout="text")[0] == [Example((Message("assistant", "A B C"),), raw=True)]
        assert f"{path}:1: no field `prompt`; there are: instruction" in error_of(path, layout="pairs")

    def test_rows_of_several_layouts_have_the_fields_of_all(self, tmp_path: Path) -> None:
        turns = [{"from": "human", "value": "A"}, {"from": "gpt", "value": "C"}]
        rows = [
            {"instruction": None, "output": None, "conversations": turns},
            {"instruction": "A", "output": "C", "conversations": None},
        ]
        found, notes = read(write(tmp_path / "a.jsonl", rows))
        assert found == [asked("A", "C")] * 2
        assert notes[0] == "data.train: sharegpt: 1 of 2 rows; alpaca: 1 of 2 rows."

    @pytest.mark.parametrize(
        ("config", "says"),
        [
            ({"fields": {"messages": "m", "answer": "a"}}, "fields: answer, messages are not those of one layout"),
            ({"layout": "text", "fields": {"answer": "a"}}, "fields: answer are not those of layout text"),
            ({"layout": "alpacca"}, "layout"),
        ],
    )
    def test_fields_that_do_not_belong_together(self, config: dict[str, Any], says: str) -> None:
        with pytest.raises(ValueError, match=says):
            RowsConfig.model_validate(config)


class TestBadRows:
    ROWS = tuple({"instruction": f"Say {t}.", "output": {"Porto": None, "Turin": ""}.get(t, t)} for t in TOWNS)

    def test_all_are_named_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        write(path, self.ROWS)
        path.write_text(path.read_text() + '{"instruction": \n')
        assert error_of(str(path)) == (
            f"data.train: 3 of 5 rows are bad: {path}:2: `output` is null; {path}:4: `output` is empty; {path}:5: not "
            "valid JSON (Expecting value); mend them, or leave them out (bad_rows: skip)"
        )

    def test_or_skipped_and_counted(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", self.ROWS)
        found, notes = read(path, bad_rows="skip")
        assert [one.wanted for one in found] == ["Lyon", "Graz"]
        assert notes == [
            "data.train: alpaca: 2 of 4 rows.",
            f"data.train: 2 of 4 rows skipped: {path}:2: `output` is null; {path}:4: `output` is empty.",
        ]

    def test_many_are_counted(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", [*self.ROWS, *[{"instruction": "?", "output": float("nan")}] * 20])
        assert f"22 of 24 rows are bad: {path}:2: `output` is null; " in error_of(path)
        assert f"{path}:8: `output` is null; and 16 more; mend them" in error_of(path)

    def test_all_of_them_are_too_many_to_skip(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", self.ROWS[1::2])
        assert error_of(path, bad_rows="skip").startswith(
            f"data.train: none of 2 rows can be used: {path}:1: `output` is null; fill it"
        )

    def test_a_row_without_the_label_by_which_rows_are_split(self, tmp_path: Path) -> None:
        rows = [{"instruction": "?", "output": t, "place": "x" if t != "Graz" else None} for t in TOWNS]
        config = {"train": write(tmp_path / "a.jsonl", rows), "split": {"by": "column", "column": "place"}}
        with pytest.raises(LegolmError, match=r"a.jsonl:3: `place` is empty, by which rows are split"):
            load_parts(DataConfig.model_validate(config), ["x"], 0)


class TestFiles:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    @pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
    def test_csv_as_spreadsheets_write_it(self, tmp_path: Path, encoding: str, sign: str) -> None:
        lines = [["instruction", "output"], ["Say; Lyon, now.", "Lyon"], ["Say\tPorto | é.", "Por\nto"]]
        text = "\r\n".join(sign.join(f'"{cell}"' for cell in line) for line in lines)
        for name, start in (("a.csv", ""), ("b.CSV", f"sep={sign}\r\n"), ("c.tsv", "")):
            (tmp_path / name).write_bytes((start + text).encode(encoding))
            found, _ = read(str(tmp_path / name))
            assert found == [asked("Say; Lyon, now.", "Lyon"), asked("Say\tPorto | é.", "Por\nto")], name

    def test_commas_in_a_table_of_tabs_and_spaces_behind_a_delimiter(self, tmp_path: Path) -> None:
        (tmp_path / "a.tsv").write_text("text, whole\tlabel\nTo Lyon, now\tLyon\n")
        named = Fields(instruction="text, whole", answer="label")
        assert read(str(tmp_path / "a.tsv"), fields=named)[0] == [asked("To Lyon, now", "Lyon")]
        (tmp_path / "a.csv").write_text('instruction, output\n"Where, now?", Lyon\n')
        assert read(str(tmp_path / "a.csv"))[0] == [asked("Where, now?", "Lyon")]
        (tmp_path / "a.csv").write_text('instruction,output\n"Say ""hi""", hi\n')  # its own space
        assert read(str(tmp_path / "a.csv"))[0] == [asked('Say "hi"', " hi")]

    def test_a_cell_longer_than_python_reads_by_itself(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text(f'instruction,output\n?,{"x" * 200_000}\n1,2,3\n?,"y"\n')
        found, notes = read(str(tmp_path / "a.csv"), bad_rows="skip")
        assert [len(one.wanted) for one in found] == [200_000, 1]
        assert notes[-1].endswith(f"{tmp_path}/a.csv:3: 3 cells but 2 in the header.")

    def test_names_in_capitals_and_gzip(self, tmp_path: Path) -> None:
        rows = [{"instruction": "?", "output": t} for t in TOWNS]
        plain = Path(write(tmp_path / "north.JSONL", rows))
        (tmp_path / "south.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
        config = DataConfig(train=[str(plain), str(tmp_path / "south.jsonl.gz")])
        parts = load_parts(config, ["north", "south"], 0)
        assert {name: len([*one.train, *one.validation, *one.test]) for name, one in parts.items()} == {
            "north": 4,
            "south": 4,
        }
        (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "south.jsonl.gz").read_bytes()[:-12])
        assert "cut.jsonl.gz is not valid gzip" in error_of(str(tmp_path / "cut.jsonl.gz"))

    def test_what_gzip_unpacks_is_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(formats, "MAX_BYTES", 10_000)
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"a" * 100_000))
        assert "has more than" in error_of(str(tmp_path / "a.jsonl.gz"))

    @settings(max_examples=30)
    @given(
        rows=st.lists(
            st.fixed_dictionaries({"text": st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)}),
            min_size=1,
        ),
        indent=st.sampled_from([None, 0, 3]),
        chunk=st.integers(1, 50),
    )
    def test_a_list_is_read_as_its_lines_are(
        self, tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]], indent: int | None, chunk: int
    ) -> None:
        folder = tmp_path_factory.mktemp("rows")
        lines = write(folder / "lines.json", rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(formats, "CHUNK", chunk)
            for name in ("list.json", "list.jsonl"):
                (folder / name).write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
                assert read(str(folder / name))[0] == read(lines)[0]

    @pytest.mark.parametrize("indent", [None, 1])
    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
    def test_a_list_with_a_byte_order_mark(self, tmp_path: Path, encoding: str, indent: int | None) -> None:
        rows = [{"instruction": f"Say {town} é.", "output": town} for town in TOWNS]
        (tmp_path / "a.json").write_text("\n" + json.dumps(rows, indent=indent, ensure_ascii=False), encoding=encoding)
        assert read(str(tmp_path / "a.json"))[0] == [asked(f"Say {town} é.", town) for town in TOWNS]

    @pytest.mark.parametrize("rest", [b"\x80", b"\n\x00\x00\xd9a\x00"])
    def test_lines_that_break_off_in_the_encoding_of_their_mark(self, tmp_path: Path, rest: bytes) -> None:
        (tmp_path / "a.jsonl").write_bytes('{"instruction": "Say a.", "output": "a"}'.encode("utf-16") + rest)
        with pytest.raises(LegolmError, match=r"a.jsonl: not UTF-8; save the file in UTF-8"):
            read(str(tmp_path / "a.jsonl"))

    def test_parquet_of_many_rows(self, tmp_path: Path) -> None:
        turns = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": f"{i}"}] for i in range(3000)]
        parquet.write_table(pyarrow.table({"messages": turns}), tmp_path / "a.parquet")
        found, _ = read(str(tmp_path / "a.parquet"))
        assert [one.wanted for one in found] == [str(i) for i in range(3000)]


class TestParts:
    ROWS = tuple({"instruction": f"Say {n}.", "output": str(n)} for n in range(12))

    @pytest.mark.parametrize("by", ["file", "folder"])
    @pytest.mark.parametrize("pattern", ["{client}/train.jsonl", "{client}/data/train.jsonl"])
    def test_a_folder_a_client(self, tmp_path: Path, by: str, pattern: str) -> None:
        for client in ("north", "south"):
            rows = [row | {"output": f"{client} {row['output']}"} for row in self.ROWS]
            write(tmp_path / pattern.format(client=client), rows)
        config = DataConfig.model_validate({"train": f"{tmp_path}/{pattern.format(client='*')}", "split": {"by": by}})
        notes: list[str] = []
        for client, data in load_parts(config, ["north", "south"], 0, notes).items():
            assert {one.wanted.split()[0] for one in data.train} == {client}
        assert (notes[0] == "data.train: parts are called as their folders are.") == (by == "file" or "data" in pattern)

    def test_several_files_in_a_clients_folder(self, tmp_path: Path) -> None:
        for client in ("north", "south"):
            for number in (1, 2):
                write(tmp_path / client / f"part-{number}.jsonl", self.ROWS)
        parts = load_parts(DataConfig(train=f"{tmp_path}/*/*.jsonl"), ["north", "south"], 0)
        assert [len([*one.train, *one.validation, *one.test]) for one in parts.values()] == [24, 24]

    def test_one_test_set_is_everyones(self, tmp_path: Path) -> None:
        for client in ("north", "south"):
            write(tmp_path / "train" / f"{client}.jsonl", [row | {"why": "y"} for row in self.ROWS])
        test = write(tmp_path / "all.jsonl", ({"instruction": "?", "output": str(n), "why": "x"} for n in range(5)))
        notes: list[str] = []
        parts = load_parts(DataConfig(train=f"{tmp_path}/train/*.jsonl", test=test), ["north", "south"], 0, notes)
        assert [sorted(one.wanted for one in data.test) for data in parts.values()] == [list("01234")] * 2
        assert notes == [
            "data.train: alpaca: 24 of 24 rows.",
            "data.test: no part has a client's name, so that all clients share it.",
            "data.test: alpaca: 5 of 5 rows.",
            "data: nothing uses field `why` (29 rows).",
        ]


def test_a_reading_says_what_a_system_message_cannot_be_put_before(tmp_path: Path) -> None:
    reading = Reading(RowsConfig(), "data.train", system=True)
    list(reading.examples(write(tmp_path / "a.jsonl", [{"text": "Lyon."}])))
    assert reading.notes[-1] == "data.train: data.system is for chats only; 1 rows are trained on as they stand."


def test_arguments_of_calls_are_what_the_call_has(tmp_path: Path) -> None:
    """Tables have null for each argument of other calls; JSON text of an object is that object, which a template would
    quote again; rows in JSON keep their nulls."""

    def rows(*arguments: Any) -> list[dict[str, Any]]:
        call = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None}]
        named = [[{"type": "function", "function": {"name": "f", "arguments": one}}] for one in arguments]
        return [{"messages": [call[0], call[1] | {"tool_calls": one}]} for one in named]

    def calls(path: Path) -> list[Any]:
        found, _ = read(str(path))
        return [json.loads(one.messages[-1].more)["tool_calls"][0]["function"]["arguments"] for one in found]

    table = pyarrow.Table.from_pylist(rows({"city": "Bonn"}, {"a": 1}))
    parquet.write_table(table, tmp_path / "a.parquet")
    assert calls(tmp_path / "a.parquet") == [{"city": "Bonn"}, {"a": 1}]
    write(tmp_path / "a.jsonl", rows({"city": None}, '{"city": "Bonn"}', "[1]", "{"))
    assert calls(tmp_path / "a.jsonl") == [{"city": None}, {"city": "Bonn"}, "[1]", "{"]


def test_what_is_nested_too_deep_is_one_bad_row(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(900):
        deep = [deep]
    rows = [{"instruction": "?", "output": "a"}, {"instruction": "?", "output": "b", "more": deep}]
    write(tmp_path / "a.jsonl", rows)
    found, notes = read(str(tmp_path / "a.jsonl"), bad_rows="skip")
    assert found == [asked("?", "a")]
    assert notes[-1].endswith(f"{tmp_path}/a.jsonl:2: is nested too deep.")


def test_a_key_that_is_there_twice_is_found_at_once() -> None:
    text = "{" + ", ".join(f'"k{i}": 0' for i in range(200_000)) + ', "k199999": 1}'
    began = time.process_time()
    with pytest.raises(ValueError, match="'k199999' is there twice"):
        strict_json(text)
    assert time.process_time() - began < 30  # by looking for each among all it was hours
