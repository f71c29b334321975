"""`legolm chat`, `generate`, `inspect` of a run's model, and `compose --then`."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import assert_one_line, legolm
from legolm.config import DataConfig
from legolm.data import Message, render_prompt
from legolm.errors import LegolmError
from legolm.export import Candidate, Speed, pick
from legolm.models import load_model, load_tokenizer
from legolm.report.tradeoff import front
from legolm.runs import Score


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """What the user types."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def greedy(path: Path, *messages: Message) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), load_tokenizer(path)
    ids = torch.tensor([render_prompt(messages, tokenizer)])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def test_a_chat_remembers_and_an_empty_line_begins_anew(
    tiny: Callable[[str], Path], said: Callable[[str], None]
) -> None:
    path = tiny("llama")
    said("Hi\nAnd?\n\nHi\n")
    done = legolm("chat", path, "--max-tokens", 6)
    assert done.returncode == 0, done.stderr
    first = greedy(path, Message("user", "Hi"))
    second = greedy(path, Message("user", "Hi"), Message("assistant", first), Message("user", "And?"))
    assert done.stdout == f"{first}\n{second}\n{first}\n"


def test_the_llm_answers_beside_its_block(
    exported_run: Path, tiny: Callable[[str], Path], said: Callable[[str], None]
) -> None:
    said("Hi\n")
    done = legolm("chat", f"{exported_run.parent.parent}:fr", "--compare", "--max-tokens", 4, "--system", "Be brief.")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[") and str(exported_run) in done.stdout
    assert_one_line(legolm("chat", tiny("llama").parent), "has no config.json")
    assert_one_line(legolm("chat", "runs/rum:fr"), "runs/rum:fr: there is no run folder runs/rum; give RUN:CLIENT")
    for value in ("nan", "1e-300"):
        assert_one_line(legolm("chat", tiny("llama"), "--temperature", value), f"--temperature {value}: must be 0")
    said("\udcff\n")
    assert_one_line(legolm("chat", tiny("llama")), "a message is not UTF-8 text")


def test_a_command_that_is_stopped_says_what_it_keeps(
    tiny: Callable[[str], Path], exported_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    data = tmp_path / "q.jsonl"
    data.write_text(json.dumps({"instruction": "Hi", "output": "ab"}) + "\n")
    monkeypatch.setattr("legolm.evaluation.side_by_side.tokens_per_second", stop)
    monkeypatch.setattr("legolm.evaluation.greedy.continued", stop)
    monkeypatch.setattr("legolm.export.hf.model_card", stop)
    nothing, kept = "nothing was written", "what is finished is kept; the same command goes on there"
    composed = tmp_path / "c"
    then = ("--into", "union", "--weights", "1", "--out", composed, "--then", f"export --to hf --out {tmp_path / 'x'}")
    for command, says in (
        (("generate", tiny("llama"), data, "--out", tmp_path / "a"), nothing),
        (("export", tiny("llama"), "--to", "hf", "--out", tmp_path / "a"), nothing),
        (("eval", tiny("llama"), "--data", data), nothing),
        (("eval", tiny("llama"), "--data", data, "--out", tmp_path / "e"), kept),
        (("compose", exported_run, *then), f"{composed} is composed; nothing was exported"),
    ):
        done = legolm(*command)
        assert done.returncode == 130
        assert done.stderr.splitlines()[-1] == f"stopped: {says}"
    assert not (tmp_path / "a").exists() and not (tmp_path / "x").exists() and composed.is_dir()


def test_a_block_with_an_adapter_answers_without_its_llm(
    exported_run: Path, said: Callable[[str], None], tmp_path: Path
) -> None:
    cut = Path(shutil.copytree(exported_run.parent.parent / "blocks" / "b", tmp_path / "b"))
    manifest = json.loads((cut / "manifest.json").read_text())
    manifest["details"]["model"] = "/nowhere"
    (cut / "manifest.json").write_text(json.dumps(manifest))
    said("Hi\n")
    done = legolm("chat", cut, "--adapter", exported_run / "adapter", "--max-tokens", 6)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{greedy(exported_run, Message('user', 'Hi'))}\n"
    assert_one_line(legolm("chat", exported_run, "--adapter", exported_run / "adapter"), "is merged into", "already")


def test_generate_answers_every_row(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path, data, out = tiny("llama"), tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions = ["Hi", "What is it?", "And?"]
    data.write_text("".join(json.dumps({"q": text, "id": place}) + "\n" for place, text in enumerate(questions)))
    done = legolm("generate", path, data, "--instruction", "q", "--out", out, "--max-tokens", 6, "--batch-size", 2)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["q"]) for row in rows] == list(enumerate(questions))
    assert [row["answer"] for row in rows] == [greedy(path, Message("user", text)) for text in questions]
    assert "generate: 3 of 3 answers were cut at 6 tokens; --max-tokens gives more." in done.stderr
    data.write_text(json.dumps({"instruction": "x" * 450}) + "\n")
    done = legolm("generate", path, data, "--out", tmp_path / "long", "--max-tokens", 90)
    assert "generate: 1 of 1 answers were cut where the model's context, 512, ends." in done.stderr
    data.write_text(json.dumps({"instruction": "Hi", "context": "What?", "why": "so"}) + "\n")
    for more, asked in (((), "Hi\n\nWhat?"), (("--input", "why"), "Hi\n\nso")):
        done = legolm("generate", path, data, "--out", tmp_path / f"{len(more)}", "--max-tokens", 6, *more)
        assert json.loads((tmp_path / f"{len(more)}").read_text())["answer"] == greedy(path, Message("user", asked))
        assert f"generate: nothing uses field `{'context' if more else 'why'}` (1 rows)." in done.stderr
    data.write_text("".join(json.dumps({"q": text, "id": place}) + "\n" for place, text in enumerate(questions)))
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"m": [{"role": "user", "content": "Hi"}]}) + "\n")
    done = legolm("generate", path, chats, "--messages", "m", "--out", tmp_path / "b.jsonl", "--max-tokens", 6)
    assert json.loads((tmp_path / "b.jsonl").read_text())["answer"] == rows[0]["answer"]
    says = "generate: none of 3 rows can be used", "q.jsonl:1: fields q, id are of no known layout", "--instruction"
    assert_one_line(legolm("generate", path, data, "--out", tmp_path / "c"), *says)
    assert_one_line(legolm("generate", path, data, "--out", out), "is already there")
    gold = tmp_path / "gold.jsonl"
    gold.write_text(json.dumps({"instruction": "Hi", "answer": "mine"}) + "\n")
    assert_one_line(legolm("generate", path, gold, "--out", tmp_path / "c"), "has a field 'answer' already", "--answer")
    done = legolm("generate", path, gold, "--out", tmp_path / "c", "--answer", "said", "--max-tokens", 6)
    assert json.loads((tmp_path / "c").read_text()) == {
        "instruction": "Hi",
        "answer": "mine",
        "said": rows[0]["answer"],
    }


def test_generate_gives_rows_back_as_they_are_written(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    numbers = '"price": 1.50, "big": [1e400, {"tiny": 0.1000000000000000055}]'
    row = f'{{"instruction": "Hi", {numbers}, "cut": "\\ud83d", "é": "é"}}'
    tables = '{"instruction": "Hi", "lost": NaN, "most": [Infinity, -Infinity]}'
    data, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    data.write_text(f"{row}\n{tables}\n")
    done = legolm("generate", tiny("llama"), data, "--out", out, "--max-tokens", 6)
    assert done.returncode == 0, done.stderr
    first, second = out.read_text().splitlines()
    assert first.startswith(row.removesuffix("}") + ', "answer": "')
    assert second.startswith('{"instruction": "Hi", "lost": null, "most": [null, null], "answer": "')


def test_generate_reads_the_layouts_of_training_with_or_without_answers(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    path, hi = tiny("llama"), Message("user", "Hi")
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}, {"from": "human", "value": "What?"}]
    weather = [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "rain"}]
    rows: list[tuple[dict[str, Any], tuple[Message, ...]]] = [
        ({"instruction": "Hi", "input": "there"}, (Message("user", "Hi\n\nthere"),)),
        ({"instruction": "Hi", "input": "", "output": "gold"}, (hi,)),
        ({"instruction": "Hi", "context": "What?", "category": "qa"}, (Message("user", "Hi\n\nWhat?"),)),
        ({"conversations": turns}, (hi, Message("assistant", "Yes?"), Message("user", "What?"))),
        ({"conversations": turns[:2]}, (hi,)),
        ({"messages": weather}, (hi, Message("tool", "rain"))),
    ]
    data, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row, _ in rows))
    done = legolm("generate", path, data, "--out", out, "--max-tokens", 6)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert found == [row | {"answer": greedy(path, *asked)} for row, asked in rows]
    assert "alpaca: 2 of 6 rows, 1 with input; dolly: 1 of 6 rows, 1 with context; sharegpt: 2 of 6" in done.stderr
    bad = [{"instruction": "Hi"}, {"instruction": 3.5}, {"text": "Hi"}, {"messages": []}, {"other": "Hi"}, "no object"]
    data.write_text("".join(json.dumps(row) + "\n" for row in bad))
    refused = legolm("generate", path, data, "--out", tmp_path / "b")
    says = (
        "4 of 6 rows are bad",
        ":3: `text` is a text, and asks nothing",
        ":4: `messages` must be a list",
        ":5:",
        ":6:",
    )
    assert_one_line(refused, *says, "bad_rows: skip")
    done = legolm("generate", path, data, "--bad-rows", "skip", "--out", tmp_path / "b", "--max-tokens", 6)
    assert [json.loads(line)["instruction"] for line in (tmp_path / "b").read_text().splitlines()] == ["Hi", 3.5]
    assert "4 of 6 rows skipped" in done.stderr
    prompt = [{"prompt": "Hi"}]
    data.write_text(json.dumps(prompt))
    assert_one_line(
        legolm("generate", path, data.rename(tmp_path / "p.json"), "--layout", "text", "--out", out), "there"
    )


def test_every_command_with_prompts_takes_a_template(
    tiny: Callable[[str], Path], said: Callable[[str], None], tmp_path: Path
) -> None:
    path, data, refuses = tiny("llama"), tmp_path / "q.jsonl", tmp_path / "no.jinja"
    data.write_text(json.dumps({"instruction": "Hi", "output": "ab"}) + "\n")
    refuses.write_text("{{ raise_exception('not here') }}")
    text, out = ("--samples", 1, "--length", 32), ("--out", tmp_path / "b")
    cut = ("prune", path, "--method", "wanda", "--sparsity", 0.5, "--calibration", data, *text, *out)
    said("Hi\n")
    for command in (
        ("generate", path, data, *out),
        ("chat", path),
        ("eval", path, "--data", data),
        ("pick", path, "--data", data),
        ("calibrate", path, "--text", data, *text, *out),
        cut,
    ):
        done = legolm(*command, "--template", refuses)
        assert_one_line(done, f"data.template: {refuses}: it refuses the data (not here)")
    assert_one_line(legolm("chat", path, "--template", "alpacka"), "alpacka' is neither model, alpaca, chatml nor")
    assert legolm(*cut, "--template", "alpaca").returncode == 0
    wanted = load_tokenizer(path, DataConfig(template="alpaca")).chat_template
    assert load_tokenizer(tmp_path / "b").chat_template == wanted
    assert_one_line(legolm(*cut), "is already there, cut with another chat template")


def test_inspect_draws_what_a_client_ended_with(exported_run: Path) -> None:
    done = legolm("inspect", f"{exported_run.parent.parent}:fr")
    assert done.returncode == 0, done.stderr
    assert "kept of each matrix" in done.stdout and "█" in done.stdout


def test_compose_then_export(exported_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("compose", exported_run, "--into", "union", "--weights", "1", "--out", tmp_path / "both")
    assert_one_line(legolm(*asked, "--then", "run x"), "must be an export: 'export --to gguf --out FILE'")
    for bad, says in (
        (f"export --to hf --out {exported_run}", "is already there"),
        (f"export --to hf --out {tmp_path / 'both'}", "is the composed model's own"),
        (f"export --to foo --out {tmp_path / 'x'}", "--to: target 'foo' is not known"),
        (f"export --to hf --quant q8_0 --out {tmp_path / 'x'}", "unknown key `quant` of target 'hf'"),
        (f"export --to adapter --out {tmp_path / 'x'}", "both: has no adapter; give one (--adapter DIR)"),
        (f"export --to gguf-adapter --out {tmp_path / 'x'}", "both: has no adapter; give one (--adapter DIR)"),
        (f"export --to hf --adapter {tmp_path} --out {tmp_path / 'x'}", "no readable adapter_config.json"),
        (f"export --to sparse --out {tmp_path / 'x'}", "both has no bit masks"),
        (f"export --to hf --push-to-hub me/b --out {tmp_path / 'x'}", "there is no token"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.get_token", lambda: None)
            assert_one_line(legolm(*asked, "--then", bad), says)
            assert_one_line(legolm(*asked, "--dry-run", "--then", bad), says)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "3 May", "output": "3 mai"}\n')
    scored = ("compose", exported_run, "--into", "union", "--validate", rows, "--out", tmp_path / "both")
    with monkeypatch.context() as patch:
        patch.setattr("legolm.composition.build.weights_by_loss", lambda *_: pytest.fail("scored before it is refused"))
        assert_one_line(legolm(*scored, "--then", f"export --to sparse --out {tmp_path / 'x'}"), "has no bit masks")
    with monkeypatch.context() as patch:
        patch.setattr("legolm.export.target.importlib.util.find_spec", lambda name: None)
        assert_one_line(
            legolm(*asked, "--then", f"export --to gguf --out {tmp_path / 'x'}"), "needs gguf, which is not"
        )
    twice = ("compose", exported_run, "--into", "layers=2,layers=1", "--out", tmp_path / "both")
    assert_one_line(legolm(*twice), "--into layers=2,layers=1: layers is given twice")
    digits = ("compose", exported_run, "--into", f"neurons={'9' * 5000}", "--out", tmp_path / "both")
    assert_one_line(legolm(*digits), "neurons must be a number from 1")
    assert not (tmp_path / "both").exists()
    done = legolm(*asked, "--then", f"export --to hf --out {tmp_path / 'plain'}")
    assert done.returncode == 0, done.stderr
    ids = torch.arange(2, 42)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert torch.equal(plain(ids).logits, load_model(tmp_path / "both")(ids).logits)


def test_bench_tells_what_models_cost(exported_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.chdir("/proc")  # where nothing can be made
    cut, short = exported_run.parent.parent / "blocks" / "b", ("--prompt", 16, "--tokens", 4)
    done = legolm("bench", cut, *short, "--runtimes", "llama.cpp,transformers", "--quant", "f16")
    assert done.returncode == 0, done.stderr
    assert "llama.cpp f16" in done.stdout and "transformers" in done.stdout and "time to the first token" in done.stdout
    assert_one_line(legolm("bench", cut, "--prompt", 600), "takes 512 tokens in all")
    assert_one_line(legolm("bench", cut, "--runtimes", "llama"), "'llama' is not known; did you mean `llama.cpp`?")


def made(name: str, decode: float, memory: int, loss: float) -> Candidate:
    speed = Speed(name, "llama.cpp q8_0", 100.0, decode, 0.1, memory, memory // 2, None)
    return Candidate(speed, Score(loss=loss, exact_match=0.5, tokens=10, examples=5))


def test_the_best_that_fits_is_picked() -> None:
    large, half, small = made("large", 10, 900, 1.0), made("half", 20, 500, 1.2), made("small", 40, 300, 2.0)
    worse = made("worse", 15, 600, 1.5)
    every = [half, large, worse, small]
    assert pick(every, 1000, 0) is large and pick(every, 600, 15) is half and pick(every, 1000, 30) is small
    with pytest.raises(LegolmError, match=r"none of 4 models has at most .* the fastest makes 40.0"):
        pick(every, 100, 30)
    assert front(every) == [large, half, small]
    # The same answers in twice the tokens: 0.8 nats each of 20 are more than 1.0 of 10.
    bytes_ = replace(made("bytes", 50, 200, 0.8), score=Score(loss=0.8, exact_match=0.5, tokens=20, examples=5))
    assert pick([*every, bytes_], 1000, 0) is large and front([*every, bytes_])[-1] is bytes_
    assert bytes_.loss == pytest.approx(16 / 5) and large.loss == 2.0


def test_pick_measures_a_runs_models_on_the_users_questions(
    exported_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.chdir("/proc")  # where nothing can be made
    run, data = exported_run.parent.parent, tmp_path / "q.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"Say {i}", "output": "ab"}) + "\n" for i in range(4)))
    asked = ("pick", run, "--data", data, "--quant", "f16")
    done = legolm(*asked, "--memory", "4GB", "--picture", tmp_path / "p.svg")
    assert done.returncode == 0, done.stderr
    assert "best of those that fit, in llama.cpp f16:" in done.stdout
    assert (tmp_path / "p.svg").read_text().count("<svg") == 1
    assert_one_line(legolm(*asked, "--picture", tmp_path / "p.svg"), f"error: --picture {tmp_path / 'p.svg'}: is alr")
    assert_one_line(legolm(*asked, "--memory", "much"), "--memory much: write a number, with k, M or G")
    assert_one_line(legolm("pick", run, "--data", tmp_path / "none.jsonl"), "none.jsonl")


def test_what_cannot_be_measured_is_refused_before_the_questions_are_asked(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr("legolm.export.picking.score", lambda *_: pytest.fail("it is too late"))
    data, short = tmp_path / "q.jsonl", Path(shutil.copytree(tiny("llama"), tmp_path / "short"))
    data.write_text(json.dumps({"instruction": "Say", "output": "ab"}) + "\n")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    for model, more, says in (
        (short, (), "short: takes 100 tokens in all"),
        (tiny("opt"), (), "family 'opt' cannot be written for llama.cpp"),
        (tiny("llama"), ("--quant", "q9"), "--quant: `quant` = 'q9': input should be"),
    ):
        assert_one_line(legolm("pick", tiny("llama"), model, "--data", data, *more), says)
        assert_one_line(legolm("bench", tiny("llama"), model, *more), says)
    monkeypatch.setattr("legolm.export.target.importlib.util.find_spec", lambda name: None)
    assert_one_line(legolm("pick", tiny("llama"), "--data", data), "llama.cpp: needs gguf, which is not installed")
