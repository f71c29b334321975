"""Tasks of the harness on models whose answers are known, and what is wrong with a task as one line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from legolm.data import Example, Message
from legolm.errors import LegolmError
from legolm.evaluation import compare
from legolm.evaluation.harness import run_tasks
from legolm.evaluation.questions import Questions, measure
from legolm.evaluation.tasks import load_tasks
from legolm.models import load_model, resolve
from legolm.system import hub

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "tasks").glob("*.yaml"))
Write = Callable[..., Path]
Unigram = Callable[..., Any]


def test_three_questions_by_hand(tasks: Write, unigram: Unigram, tokenizer: PreTrainedTokenizerFast) -> None:
    """Of equal logits the shorter choice wins, b; where a is likelier the longer one, aaaa. Gold is a, b, b."""
    loaded = load_tasks(["three"], tasks())
    equal, likes_a = (run_tasks(model, tokenizer, loaded)["three"]["acc"] for model in (unigram(), unigram(a=9.0)))
    assert (equal.value, likes_a.value) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert (equal.stderr, equal.count) == (pytest.approx(1 / 3), 3)
    # They differ on all three questions: -1, 1, 1. McNemar: 2 (1 + 3) / 8.
    found = compare(equal, likes_a)
    assert found is not None
    assert (found.difference, found.test, found.p) == (pytest.approx(1 / 3), "McNemar", 1.0)
    assert found.stderr == pytest.approx(2 / 3)  # squares of 4/3, 2/3, 2/3 are 24/9; over n (n - 1) = 6
    first = run_tasks(unigram(), tokenizer, loaded, limit=2)["three"]["acc"]
    assert (first.value, first.count) == (0.5, 2)
    assert compare(first, equal) is None


def test_bf16_is_used(tasks: Write, unigram: Unigram, tokenizer: PreTrainedTokenizerFast) -> None:
    # 9.01 is 9 in bfloat16, so that a and b are alike there and only there.
    rows = [{"query": "one", "choices": ["b", "a"], "gold": 1}]
    loaded, model = load_tasks(["three"], tasks(rows)), unigram(a=9.01, b=9.0)
    assert run_tasks(model, tokenizer, loaded, precision="fp32")["three"]["acc"].value == 1
    assert run_tasks(model, tokenizer, loaded, precision="bf16")["three"]["acc"].value == 0


def test_running_text_in_words_and_bytes(tasks: Write, unigram: Unigram, tokenizer: PreTrainedTokenizerFast) -> None:
    """Each byte is a token of ln 260 nats: log2 260 bits a byte; three words of 13 bytes."""
    metrics = ["word_perplexity", "bits_per_byte"]
    folder = tasks(
        [{"page": "aa bb cc dd e"[:11]}, {"page": "a"}],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{page}}",
        doc_to_choice=None,
        metric_list=[{"metric": metric} for metric in metrics],
    )
    found = run_tasks(unigram(), tokenizer, load_tasks(["three"], folder))["three"]
    assert found["bits_per_byte"].value == pytest.approx(math.log2(260), rel=1e-5)
    assert found["word_perplexity"].value == pytest.approx(260 ** (12 / 5), rel=1e-5)
    assert found["bits_per_byte"].stderr == pytest.approx(0, abs=1e-5)


def test_every_sequence_begins_with_bos_once(
    tasks: Write, tiny: Callable[[str], Path], bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Answers, generation, running text and tasks, a question that is too long for the model among them."""
    model, seen = load_model(tiny("llama")), list[list[int]]()
    model.config.max_position_embeddings = 48

    def see(_module: Any, _inputs: Any, named: dict[str, Any]) -> None:
        starts = named["position_ids"][0].eq(0).nonzero()[:, 0].tolist() if named.get("packing") else [0]
        for row in named["input_ids"].tolist() if named["input_ids"].shape[1] > 1 else ():  # else a step of generation
            seen.extend(row[start:] for start in starts)

    model.get_decoder().register_forward_pre_hook(see, with_kwargs=True)
    rows = [{"query": query, "choices": ["aaaa", "b"], "gold": 1} for query in ("one", "o" * 60)]
    questions = Questions(
        tasks=load_tasks(["three"], tasks(rows)),
        examples=tuple(Example((Message("user", text), Message("assistant", "b"))) for text in ("one", "other")),
        text="a text " * 9,
        rouge=True,
        length=16,
    )
    measure(model, bos_tokenizer, questions)
    bos, pad = bos_tokenizer.bos_token_id, bos_tokenizer.pad_token_id
    # Choices, answers scored (what both begin with is read once) and generated, windows.
    assert len(seen) == 4 + 1 + 2 + 4
    for row in seen:
        start = next(place for place, id in enumerate(row) if id != pad)
        assert row[start] == bos
        assert row[start + 1] not in (bos, pad)


def test_running_text_has_no_second_bos(tasks: Write, unigram: Unigram, bos_tokenizer: PreTrainedTokenizerFast) -> None:
    kind = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}"}
    folder = tasks([{"page": "aa"}], **kind, doc_to_choice=None, metric_list=[{"metric": "bits_per_byte"}])
    found = run_tasks(unigram(), bos_tokenizer, load_tasks(["three"], folder))["three"]["bits_per_byte"]
    assert found.value == pytest.approx(math.log2(260), rel=1e-5)


def test_a_group_beside_its_tasks_and_a_metric_that_is_no_mean(
    tasks: Write, unigram: Unigram, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tasks(tag="some", metric_list=[{"metric": "acc"}, {"metric": "f1"}])
    two = json.loads((folder / "three.yaml").read_text()) | {"task": "again"}
    (folder / "again.yaml").write_text(json.dumps(two))
    metric = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = {"group": "both", "task": ["three", "again"], "aggregate_metric_list": [metric]}
    (folder / "both.yaml").write_text(json.dumps(group))
    found = run_tasks(unigram(), tokenizer, load_tasks(["both"], folder))
    assert found["both"]["acc"].value == found["again"]["acc"].value == pytest.approx(2 / 3)
    assert found["both"]["acc"].count == 6
    # Gold 0, 1, 1 and always 1: precision 2/3, recall 1.
    assert found["three"]["f1"].value == pytest.approx(0.8)
    assert compare(found["three"]["f1"], found["three"]["f1"]) is None
    assert set(load_tasks(["some"], folder).loaded["tasks"]) == {"three", "again"}


def test_data_beside_the_yaml_or_in_the_working_directory(
    tasks: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tasks()
    monkeypatch.chdir(tmp_path)
    assert len(load_tasks(["three"], folder).loaded["tasks"]["three"].eval_docs) == 3
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "four.jsonl").write_text((folder / "data" / "three.jsonl").read_text() * 2)
    for files in ("data/four.jsonl", ["data/f*.jsonl"], str(tmp_path / "data" / "four.jsonl")):
        folder = tasks(dataset_kwargs={"data_files": {"test": files}})
        assert len(load_tasks(["three"], folder).loaded["tasks"]["three"].eval_docs) == 6


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_run(
    example: Path, tasks: Write, unigram: Unigram, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = tasks().rename(tmp_path / "copy")
    (folder / "three.yaml").unlink()
    (folder / example.name).write_text(example.read_text())
    (folder / "data" / "three.jsonl").rename(folder / f"{example.stem}.jsonl")
    found = run_tasks(unigram(), tokenizer, load_tasks([example.stem], folder))[example.stem]
    assert found["acc"].value == pytest.approx(2 / 3)
    assert set(found) == {"acc", "acc_norm"}


def test_what_is_wrong_with_a_task_file_is_one_line(tasks: Write, tmp_path: Path) -> None:
    def fails(*says: str, name: str = "three", rows: list[dict[str, Any]] | None = None, **changes: Any) -> None:
        folder = tasks(**({} if rows is None else {"rows": rows}), **changes)
        with pytest.raises(LegolmError) as error:
            load_tasks([name], folder)
        assert "\n" not in str(error.value)
        for part in says:
            assert part in str(error.value)

    for field in ("dataset_path", "doc_to_text", "doc_to_target", "doc_to_choice"):
        fails("three.yaml: no field `" + field, **{field: None})
    fails("three.yaml: no field `test_split or validation_split`", test_split=None)
    fails("three.yaml", "data_files names none.jsonl", "beside it", dataset_kwargs={"data_files": "none.jsonl"})
    fails("three.yaml", "/none.jsonl", dataset_kwargs={"data_files": {"test": "/none.jsonl"}})
    fails("three.yaml", "test_split is 'test'", "make train", dataset_kwargs={"data_files": "data/three.jsonl"})
    fails("three.yaml", "gold", "the data have query, choices", rows=[{"query": "a", "choices": ["a", "b"]}])
    fails("three.yaml", "want the data's fields choices, gold, query", rows=[{"query": "a", "gold": 0}])
    fails("three.yaml", "'question' is undefined", doc_to_text="{{question}}")
    fails("three.yaml", "unexpected end of template", doc_to_text="{{query")
    fails("three.yaml", "test_split is 'valid'; its data_files make test", test_split="valid")
    for gold in (2, -1):
        both = [{"query": "a", "choices": ["a", "b"], "gold": one} for one in (0, gold)]
        fails(f"question 2: the right choice is {gold}, and it has choices 0 to 1", rows=both)
    both = [{"query": "a", "choices": ["a", "b"], "gold": gold} for gold in ("b", "c")]
    fails("question 2: the right choice is 'c', and it has choices 0 to 1", rows=both)
    load_tasks(["three"], tasks(both), limit=1)
    fails("or its right choice none of its choices?", rows=[{"query": "a", "choices": ["a"], "gold": 3}])
    # The harness takes several right choices by their places.
    for gold in (["b"], []):
        many = [{"query": "a", "choices": ["a", "b"], "gold": one} for one in ([0, 1], gold)]
        fails("question 2: the right choice is", rows=many)
    bare = [{"query": "a", "choices": ["a", "b"], "gold": 0}, {"query": "b", "choices": None, "gold": 0}]
    fails("three.yaml", "'NoneType'", rows=bare)
    fails("three.yaml", "'x' is undefined", doc_to_target="{{x.y}}")
    for members, says in (
        ([{"task": "inner", "dataset_path": "json"}], "holds a task within a group"),
        ("three", "task 'both': holds no task"),
    ):
        (tasks() / "both.yaml").write_text(json.dumps({"group": "both", "task": members}))
        with pytest.raises(LegolmError, match=says):
            load_tasks(["both"], tmp_path / "tasks")
    (tmp_path / "tasks" / "both.yaml").unlink()
    (tasks() / "data" / "three.jsonl").write_text("{\n")
    with pytest.raises(LegolmError, match=r"three\.yaml"):
        load_tasks(["three"], tmp_path / "tasks")
    fails("no YAML below", "has a field `task`", name="zzz_no_such", task=None)
    (tasks() / "broken.yaml").write_text("task: [")
    with pytest.raises(LegolmError, match=r"broken\.yaml: not a task"):
        load_tasks(["three"], tmp_path / "tasks")
    with pytest.raises(LegolmError, match="no such folder"):
        load_tasks(["three"], tmp_path / "none")


def test_what_functions_beside_a_task_file_raise_is_one_line(
    tasks: Write, unigram: Unigram, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tasks()
    config = json.loads((folder / "three.yaml").read_text())
    lines = [f"{key}: {json.dumps(value)}" for key, value in config.items() if key != "doc_to_target"]
    second = f"doc['query'] == {json.loads((folder / 'data' / 'three.jsonl').read_text().splitlines()[1])['query']!r}"
    for number, (code, says) in enumerate(
        (
            ("def gold(doc):\n    return nothing\n", "name 'nothing' is not defined"),
            ("def gold(doc)\n", r"three\.yaml: expected ':'"),
            ("nothing\n", r"three\.yaml: name 'nothing' is not defined"),
            (f"def gold(doc):\n    return [][0] if {second} else 0\n", "question 2: list index out of range"),
        )
    ):
        (folder / f"mine{number}.py").write_text(code)
        (folder / "three.yaml").write_text("\n".join([*lines, f"doc_to_target: !function mine{number}.gold", ""]))
        with pytest.raises(LegolmError, match=says) as error:
            load_tasks(["three"], folder)
        assert "\n" not in str(error.value)
    (folder / "last.py").write_text("def results(doc, answers):\n    return doc['nothing']\n")
    lines += [f"doc_to_target: {json.dumps(config['doc_to_target'])}", "process_results: !function last.results", ""]
    (folder / "three.yaml").write_text("\n".join(lines))
    with pytest.raises(LegolmError, match="task three: KeyError: 'nothing'"):
        run_tasks(unigram(), tokenizer, load_tasks(["three"], folder))


def test_a_later_question_without_a_field(tasks: Write, unigram: Unigram, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"query": {"text": "a"}, "choices": ["a", "b"], "gold": 0}]
    folder = tasks([*rows, rows[0] | {"query": None}], doc_to_text="{{query.text}}")
    with pytest.raises(LegolmError, match="task three: a question has not what its templates name"):
        run_tasks(unigram(), tokenizer, load_tasks(["three"], folder))


def test_the_harness_own_tasks_by_name_and_nothing_waits_for_the_hub(
    tasks: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(LegolmError, match=r"no task 'thre'; nearest: three"):
        load_tasks(["thre"], tasks())
    with pytest.raises(LegolmError, match="no task 'hellaswg'; nearest: hellaswag, "):
        load_tasks(["hellaswg"])
    offline = re.escape("task 'hellaswag': its data are not on this machine") + ".*go online once, or give a YAML task"
    with pytest.raises(LegolmError, match=offline):
        load_tasks(["three", "hellaswag"], tasks())


def test_a_hub_that_does_not_answer_is_found_at_once(tasks: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody said offline, and there is no network: one try, where the hub's clients go on for half a minute."""
    tried = []

    def refused(address: tuple[str, int], timeout: float) -> None:
        tried.append(address)
        raise OSError("unreachable")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub, "KNOWN_S", math.inf)
    monkeypatch.setattr(hub.socket, "create_connection", refused)
    hub._answers.cache_clear()
    with pytest.raises(LegolmError, match="no task 'hellaswg'; nearest: hellaswag, "):
        load_tasks(["hellaswg"])
    for names, folder in ((["hellaswag"], None), (["three"], tasks(dataset_path="owner/three", dataset_kwargs=None))):
        with pytest.raises(LegolmError, match="which does not answer; go online, set HF_HUB_OFFLINE=1"):
            load_tasks(names, folder)
    with pytest.raises(LegolmError, match="it does not answer, and no earlier download is here"):
        resolve("owner/model")
    assert len(tried) == 1
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://mirror")
    assert not hub.hub_answers()
    assert tried[1] == ("mirror", 80)
    monkeypatch.setattr(hub, "getproxies", lambda: {"all": "http://proxy"})
    assert hub.hub_answers()
    hub._answers.cache_clear()


def test_many_runs_on_one_model_in_memory(tasks: Write, unigram: Unigram, tokenizer: PreTrainedTokenizerFast) -> None:
    """Tasks are loaded once; each run sees the model as it is then."""
    loaded, model = load_tasks(["three"], tasks()), unigram()
    before = run_tasks(model, tokenizer, loaded)["three"]["acc"]
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[tokenizer.convert_tokens_to_ids("a"), 0] = 9.0
    after = run_tasks(model, tokenizer, loaded)["three"]["acc"]
    assert (before.value, after.value) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
