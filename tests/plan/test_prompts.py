"""What a dry run says of prompts, refuses of tokens, and what goes with the models of a run."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from legolm import config as configs
from legolm import pipeline
from legolm.composition import choose_method, compose, plan
from legolm.config import DataConfig, RunConfig
from legolm.data import DATE, Example, Message, client_data, prompt_look
from legolm.errors import LegolmError
from legolm.evaluation import Questions, evaluate, line_up, measure
from legolm.models import load_model, load_tokenizer
from legolm.plan import make_plan
from legolm.system import Progress

DAY = "{{ strftime_now('%d %b %Y') }}: {% for m in messages %}{{ m['role'] + ' ' + m['content'] }}\n{% endfor %}"
Raw = dict[str, Any]


@pytest.fixture
def raw(three_clients: Callable[..., Raw], tmp_path: Path) -> Raw:
    """A run of three clients, with a model of its own whose tokenizer a test may change."""
    raw = three_clients(tmp_path, ("wide", "wide", "wide"), rows=6)
    raw["model"] = str(shutil.copytree(raw["model"], tmp_path / "model"))
    return raw


def notes(raw: Raw) -> str:
    return " ".join(make_plan(configs.validate(RunConfig, raw, "test")).notes)


def with_tokenizer(raw: Raw, tokenizer: PreTrainedTokenizerFast) -> None:
    (Path(raw["model"]) / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(raw["model"])


def test_says_how_prompts_look(raw: Raw, bos_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert "template" not in notes(raw)
    with_tokenizer(raw, bos_tokenizer)
    assert "The model has no chat template" in notes(raw)
    raw["data"] |= {"template": str(tmp_path / "own.jinja"), "date": "2026-01-02"}
    (tmp_path / "own.jinja").write_text(DAY)
    said = notes(raw)
    assert "The tokenizer begins a text with <|im_start|>, and the chat template writes none" in said
    assert "The chat template writes the day: 2026-01-02 throughout (data.date)" in said
    assert "would change" not in said


def test_says_how_many_examples_are_cut(raw: Raw) -> None:
    data = Path(raw["data"]["train"]).parent
    rows = [{"instruction": "x" * 300, "output": "a"}, {"instruction": "Hi", "output": "b" * 300}]
    (data / "fr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows, *rows, *rows]))
    raw["train"] |= {"max_length": 128}
    said = [one for one in make_plan(configs.validate(RunConfig, raw, "test")).read if "are longer than" in one]
    assert len(said) == 1 and "are longer than 128 tokens" in said[0] and "of 'fr' it is" in said[0]
    cut, whole = map(int, re.findall(r"^data: (\d+) of (\d+) training", said[0])[0])
    (answers,) = map(int, re.findall(r"(\d+) the end of their answer", said[0]))
    held = client_data(configs.validate(RunConfig, raw, "test"))
    assert cut == len(held["fr"].train) and whole == sum(len(one.train) for one in held.values())
    assert answers == sum(example.wanted.startswith("b") for example in held["fr"].train)


def test_says_how_many_answers_the_template_would_change(raw: Raw, tokenizer: PreTrainedTokenizerFast) -> None:
    template = Path(raw["model"]) / "chat_template.jinja"
    last = "message['content'].split('</think>') | last"
    template.write_text(str(tokenizer.chat_template).replace("message['content']", f"({last})"))
    data = Path(raw["data"]["train"]).parent / "fr.jsonl"
    rows = [{"instruction": f"Say {i}", "output": "<think>so</think>aa"} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # One is held out for validation and one for testing; 4 of each client's 6 are learned.
    assert "would change 4 of 12 answers to learn" in notes(raw)


def test_says_how_many_answers_do_not_begin_as_they_are_asked_for(raw: Raw, tokenizer: PreTrainedTokenizerFast) -> None:
    data = Path(raw["data"]["train"]).parent / "fr.jsonl"
    rows = [{"instruction": f"Say {i}", "output": "<think>\nso</think>aa"} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "begins the answer" not in notes(raw)
    template = Path(raw["model"]) / "chat_template.jinja"
    template.write_text(str(tokenizer.chat_template).replace("assistant\n' }}", "assistant\n<think>\n' }}"))
    assert "begins the answer (as with <think>), and 8 of 12 answers to learn are without" in notes(raw)


def test_says_how_many_conversations_the_template_takes_something_out_of(raw: Raw, tokenizer: Any) -> None:
    raw["data"]["system"] = "Be brief."
    assert "leaves out" not in notes(raw)
    template = Path(raw["model"]) / "chat_template.jinja"
    others = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"
    template.write_text(others + str(tokenizer.chat_template))
    assert "leaves out or changes what 12 of 12 conversations have beside the answer (a system message" in notes(raw)
    del raw["data"]["system"]
    assert "leaves out" not in notes(raw)
    data = Path(raw["data"]["train"]).parent / "fr.jsonl"
    calls = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    mended = str(tokenizer.chat_template).replace("message['content']", "(message['content'] or '')")
    for field, value in (("reasoning_content", "so"), ("tool_calls", calls)):
        turns = [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "aa", field: value}]
        data.write_text("".join(json.dumps({"messages": turns, "n": i}) + "\n" for i in range(6)))
        template.write_text(mended)
        assert "leaves out or changes what 4 of 12 conversations" in notes(raw)
        text = f"(message['{field}'] | tojson if '{field}' in message else '')"
        template.write_text(mended.replace("(message['content'] or '')", f"{text} + (message['content'] or '')"))
        assert "leaves out" not in notes(raw)


def test_tools_that_the_template_leaves_out_are_said_once(raw: Raw) -> None:
    turns = [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "aa"}]
    rows = [{"messages": turns, "tools": [{"function": {"name": f"add {i}"}}]} for i in range(6)]
    data = Path(raw["data"]["train"]).parent / "fr.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "no place for tools: nothing uses those of 4 chats" in notes(raw)
    template = Path(raw["model"]) / "chat_template.jinja"
    template.write_text("{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + template.read_text())
    assert "no place" not in notes(raw)


@pytest.mark.parametrize("where", ["train", "test", "calibration"])
def test_a_token_without_an_embedding_is_one_line(where: str, raw: Raw, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(raw["model"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(raw["model"])
    assert notes(raw) is not None  # nothing has it yet
    row = json.dumps({"instruction": "Call <|tool|>", "output": "aa"}) + "\n"
    says = {"train": "data: train rows of 'fr'", "test": "data: test rows of 'fr'", "calibration": "calibration.text"}
    if where == "train":
        path = Path(raw["data"]["train"]).parent / "fr.jsonl"
        path.write_text(row * 6)
    elif where == "test":
        for client in ("fr", "de", "es"):
            (tmp_path / "held").mkdir(exist_ok=True)
            (tmp_path / "held" / f"{client}.jsonl").write_text(row)
        raw["data"]["test"] = f"{tmp_path}/held/*.jsonl"
    else:
        text = tmp_path / "text.txt"
        text.write_text("a <|tool|> " * 99)
        raw["blocks"][0]["calibration"]["text"] = str(text)
    with pytest.raises(
        LegolmError, match=r"'<\|tool\|>' has id 260 in .*/tokenizer.json.*embeddings for 260"
    ) as caught:
        notes(raw)
    assert says[where] in str(caught.value)


def test_a_word_without_an_embedding_is_named(raw: Raw) -> None:
    tokenizer = AutoTokenizer.from_pretrained(raw["model"])
    tokenizer.add_tokens("<|tool|>")
    tokenizer.save_pretrained(raw["model"])
    with pytest.raises(LegolmError, match=r"rows for 260 \(vocab_size\), none for '<\|tool\|>', id 260"):
        notes(raw)


def test_a_given_block_gets_the_runs_template_and_its_own_folder_keeps_what_it_had(
    raw: Raw, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    given = Path(raw["model"])
    shutil.copytree(given, tmp_path / "block", copy_function=os.link)
    pipeline._replace_tokenizer(load_tokenizer(given, DataConfig(template="alpaca")), tmp_path / "block")
    assert "### Response" in load_tokenizer(tmp_path / "block").chat_template
    assert load_tokenizer(given).chat_template == tokenizer.chat_template
    assert {file.name for file in given.iterdir()} == {file.name for file in (tmp_path / "block").iterdir()}


def test_the_template_goes_with_blocks_final_and_composed_models_and_a_resumed_run_keeps_it(
    raw: Raw, bos_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with_tokenizer(raw, bos_tokenizer)
    (tmp_path / "own.jinja").write_text(DAY)
    raw["data"] |= {"template": str(tmp_path / "own.jinja"), "date": "2026-01-02"}
    raw["federation"]["rounds"], raw["evaluate"] = 1, {"local_only": False}
    config, out = configs.validate(RunConfig, raw, "test"), tmp_path / "out"
    pipeline.run(config, out)
    sources = [str(out / "final" / "fr"), str(out / "final" / "de")]
    wanted = plan(sources, "llm", raw["model"], choose_method("heteagg", None, None, None), "1,1", None, Progress())
    compose(wanted, tmp_path / "composed", Progress())
    for folder in (out / "blocks" / "wide", out / "final" / "llm", out / "final" / "fr", tmp_path / "composed"):
        assert prompt_look(load_tokenizer(folder)) == (DAY, "2026-01-02"), folder
    questions = Questions(examples=(Example((Message("user", "Say 1"), Message("assistant", "bb"))),))
    found = evaluate(line_up(sources[:1], raw["model"]), questions)  # the LLM beside its block, and asked as it was
    assert found.warnings[0] == f"{raw['model']}: is asked in the chat template of {sources[0]}, not in its own"
    asked = measure(load_model(Path(raw["model"])), load_tokenizer(out / "final" / "fr"), questions)
    assert found.results[0].figure.value == pytest.approx(asked["answers"]["answer loss"].value)
    known = json.loads((out / "run.json").read_text())
    assert (known["template"], known["config"]["data"]["date"]) == (DAY, "2026-01-02")
    assert DATE in json.loads((out / "final" / "fr" / "tokenizer_config.json").read_text())
    (tmp_path / "own.jinja").write_text(DAY.replace(": ", "; "))
    with pytest.raises(LegolmError, match=r"the chat template .*own.jinja changed since the run started"):
        pipeline.run(config, out, resume=True)
