"""Every target but GGUF's own file, names of models, and bad input."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import legolm as lg
from helpers import assert_one_line, legolm
from legolm.block import Block, Coverage, picture, read_block
from legolm.config import EXPORTERS
from legolm.errors import LegolmError
from legolm.export import Source, export, exporter, serving
from legolm.export.llama_cpp import LlamaCpp
from legolm.models import Shape, find_model, load_model

MakeRun = Callable[[Path, Block], Path]
IDS = torch.arange(2, 42)[None]


@pytest.fixture
def run(exported_run: Path) -> Path:
    """Of one client with a structured block."""
    return exported_run


@pytest.fixture(scope="module")
def masked(block: Callable[..., Block]) -> Block:
    """Half of its weights are zero."""
    return block("llama", method="magnitude", sparsity=0.5)


def test_hf_is_a_plain_checkpoint_with_a_card(run: Path, masked: Block, tmp_path: Path) -> None:
    done = legolm("export", f"{run.parent.parent}:fr", "--to", "hf", "--out", tmp_path / "fr")
    assert done.returncode == 0, done.stderr
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "fr", dtype=torch.float32)
    assert torch.equal(plain(IDS).logits, load_model(run)(IDS).logits)
    assert not (tmp_path / "fr" / "factors.safetensors").exists()
    card = (tmp_path / "fr" / "README.md").read_text()
    assert all(part in card for part in ("library_name: transformers", "KV groups (2)", "tokens a second", "round"))
    assert "which its files do not name" in card and str(tmp_path) not in card
    export(str(masked.path), "hf", tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    for key, mask in masked.coverage.masks.items():
        assert not weights[f"model.{key}.weight"][~mask].any()


def test_the_card_has_the_licence_of_the_llm(block: Callable[..., Block], tmp_path: Path) -> None:
    shutil.copytree(block("llama").path, tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("---\nlicense: 'mit'\n---\n# A model\n")
    export(str(tmp_path / "b"), "hf", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nlicense: mit\n")


class Hub:
    """The hub's client, as far as it is asked; `fails` is raised in the upload."""

    def __init__(self, fails: BaseException | None = None) -> None:
        self.pushed: list[tuple[str, str]] = []
        self.fails = fails

    def __call__(self) -> Hub:
        return self

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
        assert private and exist_ok
        return f"hub/{name}"

    def upload_folder(self, repo_id: str, folder_path: str) -> None:
        if self.fails:
            raise self.fails
        self.pushed.append((repo_id, folder_path))


@pytest.mark.parametrize(
    ("fails", "code", "says"),
    [
        (OSError("no way there"), 2, "the hub does not take it (no way there); {out} is written, and `hf upload me/b"),
        (KeyboardInterrupt(), 130, "{out} is written; the hub may have a part of it"),
    ],
)
def test_an_upload_that_fails_costs_no_export(
    fails: BaseException, code: int, says: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "there"
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub(fails))
    done = legolm("export", run, "--to", "hf", "--push-to-hub", "me/b", "--out", out)
    assert done.returncode == code and says.format(out=out) in done.stderr, done.stderr
    AutoModelForCausalLM.from_pretrained(out)


def test_what_is_pushed_names_no_folder_of_this_machine(
    block: Callable[..., Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = block("llama")
    text, model = found.details["target"]["calibration"]["text"], found.details["model"]
    assert Path(text).is_absolute() and Path(model).is_absolute()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    monkeypatch.setattr("huggingface_hub.HfApi", hub := Hub())
    export(str(found.path), "hf", tmp_path / "here")
    done = export(str(found.path), "hf", tmp_path / "there", settings={"push_to_hub": "me/b"})
    assert hub.pushed == [("me/b", str(tmp_path / "there"))] and done.lines[-1] == "on the hub, private: hub/me/b"
    shown = [(tmp_path / name).read_text() for name in ("there/manifest.json", "there/README.md", "here/README.md")]
    for content in shown:
        assert str(Path(text).parent) not in content and str(Path(model).parent) not in content
        assert Path(text).name in content and Path(model).name in content
    assert read_block(tmp_path / "there").coverage.hash == found.coverage.hash
    assert read_block(tmp_path / "here").details == found.details  # by which its LLM is found


def test_a_checkpoint_in_several_files_is_exported(block: Callable[..., Block], tmp_path: Path) -> None:
    found, index, shard = block("llama"), "model.safetensors.index.json", "model-00001-of-00001.safetensors"
    for name in ("shards", "unnamed"):
        shutil.copytree(found.path, tmp_path / name)
        AutoModelForCausalLM.from_pretrained(found.path).save_pretrained(tmp_path / name, max_shard_size="60KB")
        (tmp_path / name / "model.safetensors").unlink(missing_ok=True)
    (tmp_path / "unnamed" / index).unlink()
    shutil.copytree(found.path, tmp_path / "one")
    (tmp_path / "one" / "model.safetensors").rename(tmp_path / "one" / shard)
    for name in ("shards", "unnamed", "one"):
        assert len(list((tmp_path / name).glob("model*.safetensors"))) > 1 or name == "one"
        export(str(tmp_path / name), "hf", tmp_path / f"{name}.hf")
        assert (tmp_path / f"{name}.hf" / index).is_file()
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}.hf", dtype=torch.float32)
        assert torch.equal(plain(IDS).logits, load_model(found.path)(IDS).logits)


def test_what_belongs_to_a_model_goes_along_with_an_adapter_too(run: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(run.parent.parent / "blocks" / "b", tmp_path / "b"))
    kept = {"LICENSE": "terms", "tokenizer.model": "pieces", "chat_template.json": "{}"}
    for name, content in kept.items():
        (cut / name).write_text(content)
    (cut / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5}))
    for out, adapter in ((tmp_path / "plain", None), (tmp_path / "merged", run / "adapter")):
        export(str(cut), "hf", out, with_adapter=adapter)
        assert {name: (out / name).read_text() for name in kept} == kept
        assert json.loads((out / "generation_config.json").read_text())["repetition_penalty"] == 1.5
        assert (out / "manifest.json").is_file() and (out / "coverage.safetensors").is_file()


def test_a_checkpoint_that_plain_transformers_computes_otherwise_is_not_exported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(source: str, out: Path) -> None:
        shutil.copyfile(source, out)
        if out.name == "model.safetensors":
            tensors = load_file(out)
            save_file({name: one + 1e-3 for name, one in tensors.items()}, out, metadata={"format": "pt"})

    monkeypatch.setattr("shutil.copy2", worse)
    assert_one_line(legolm("export", run, "--to", "hf", "--out", tmp_path / "o"), "computes something else")
    assert not list(tmp_path.iterdir())


def test_sparse_is_half_and_comes_back_exactly(masked: Block, tmp_path: Path) -> None:
    found = export(str(masked.path), "sparse", tmp_path / "s")
    weights = load_file(tmp_path / "s" / "sparse.safetensors")
    matrix = weights["model.layers.0.mlp.up_proj.weight"]
    assert matrix.shape == (96 * 64 // 2,)
    # float32 and a bit: (1/2 · 4 + 1/8) bytes of 4.
    assert (matrix.nbytes + 96 * 64 / 8) / (4 * 96 * 64) == pytest.approx(0.53, abs=0.005)
    model, tokenizer = lg.load(tmp_path / "s")
    assert torch.equal(model(IDS).logits, load_model(masked.path)(IDS).logits)
    assert tokenizer.eos_token == "<|im_end|>" and "the same again" in found.lines[0]
    assert not (tmp_path / "s" / "model.safetensors").exists()
    assert_one_line(legolm("export", tmp_path / "s", "--to", "hf", "--out", tmp_path / "o"), "legolm.load reads its")
    tensors = {name: one[:-1] if one.dim() == 1 and len(one) > 100 else one for name, one in weights.items()}
    save_file(tensors, tmp_path / "s" / "sparse.safetensors")
    with pytest.raises(LegolmError, match=r"sparse\.safetensors: is broken \(.* values for a mask of"):
        lg.load(tmp_path / "s")
    save_file({name: one for name, one in weights.items() if "norm" not in name}, tmp_path / "s" / "sparse.safetensors")
    with pytest.raises(LegolmError) as broken:
        lg.load(tmp_path / "s")
    said = str(broken.value)
    assert said.startswith(f"sparse {tmp_path / 's'}: is broken (model: {tmp_path / 's'}: config.json and the weights")
    assert said.endswith("missing); export the block again") and "legolm-" not in said


def test_sparse_has_the_masks_of_weights_that_lie_transposed(block: Callable[..., Block], tmp_path: Path) -> None:
    found = block("gpt2", method="magnitude", sparsity=0.5)
    export(str(found.path), "sparse", tmp_path / "s")
    assert torch.equal(lg.load(tmp_path / "s")[0](IDS).logits, load_model(found.path)(IDS).logits)


def test_an_adapter_goes_on_the_block_as_it_was_cut(run: Path, tmp_path: Path) -> None:
    export(str(run), "adapter", tmp_path / "a")
    cut = run.parent.parent / "blocks" / "b"
    adapted = PeftModel.from_pretrained(load_model(cut), tmp_path / "a")
    torch.testing.assert_close(adapted(IDS).logits, load_model(run)(IDS).logits, rtol=1e-3, atol=1e-4)
    # And merged again it is what the run merged.
    export(str(cut), "hf", tmp_path / "again", with_adapter=tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    torch.testing.assert_close(again(IDS).logits, load_model(run)(IDS).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", ["llama", "phi3"])
def test_one_gguf_file_serves_many_adapters(
    variant: str, block: Callable[..., Block], make_run: MakeRun, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    run = make_run(tmp_path / "demo", block(variant))
    found = export(str(run), "gguf-adapter", tmp_path / "fr.gguf")
    assert "llama.cpp, f16, with it: error" in found.lines[-1]
    gguf = pytest.importorskip("gguf")
    names = {one.name for one in gguf.GGUFReader(tmp_path / "fr.gguf").tensors}
    assert {"blk.0.attn_q.weight.lora_a", "blk.1.ffn_up.weight.lora_b"} <= names


def test_ollama_is_asked_as_the_chat_template_says(block: Callable[..., Block], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    folder = tmp_path / "an o"
    found = export(str(block("llama").path), "ollama", folder, settings={"quant": "f16"})
    *command, modelfile = shlex.split(found.lines[-1])  # as a shell reads it
    assert command == ["ollama", "create", "NAME", "-f"] and Path(modelfile) == folder / "Modelfile"
    lines = (folder / "Modelfile").read_text()
    assert lines.startswith('FROM ./model.gguf\nPARAMETER num_ctx 512\nPARAMETER stop "<|im_end|>"\n')
    template = re.search(r'TEMPLATE """(.*)"""', lines)
    assert template is not None
    chat = [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")]
    wanted = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in chat) + "<|im_start|>assistant\n"
    assert go(template[1], chat) == wanted
    assert go(template[1], chat[1:]) == wanted.partition("S<|im_end|>\n")[2]


def go(template: str, chat: list[tuple[str, str]]) -> str:
    """What Go makes of such a template, of its few words that are used."""
    (body,) = re.findall(r"^\{\{ range \$i, \$m := \.Messages \}\}(.*)\{\{ end \}\}$", template)
    said = ""
    for place, (role, content) in enumerate(chat):
        stack: list[bool] = []
        for word in re.findall(r"\{\{ (.*?) \}\}", body):
            if word.startswith("if eq $m.Role"):
                stack.append(json.loads(word.rsplit(" ", 1)[1]) == role)
            elif word == "if eq $i 0":
                stack.append(place == 0)
            elif word == "end":
                stack.pop()
            elif all(stack):
                said += content if word == "$m.Content" else json.loads(word)
    return said


def test_names_of_models(run: Path, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = run.parent.parent
    assert find_model(f"{folder}:fr") == run
    assert find_model(str(tiny("llama"))) == tiny("llama")
    for name, says in (
        (f"{folder}:de", "no final model 'de'; known: fr"),
        (str(folder), "no final model ''; known: fr"),
        (str(tmp_path), "has no config.json; give a Hugging Face checkpoint"),
        (f"{tmp_path}:fr", "the run has none yet"),
    ):
        with pytest.raises(LegolmError, match=re.escape(says)):
            find_model(name)


@pytest.mark.parametrize(
    ("to", "of", "more", "says"),
    [
        ("hff", "cut", (), "target 'hff' is not known; did you mean `hf`?"),
        ("hf", "cut", ("--quant", "q8_0"), "unknown key `quant` of target 'hf'; it is gguf and ollama's"),
        ("gguf", "cut", ("--quant", "q3"), "`quant` = 'q3': input should be 'f32', 'f16'"),
        ("adapter", "cut", (), "has no adapter; give one (--adapter DIR), or a run's final model"),
        ("adapter", "whole", (), "has no adapter; give one (--adapter DIR), or a run's final model"),
        ("sparse", "cut", (), "has no bit masks, so nothing to leave out; hf, gguf and onnx can hold it"),
        ("gguf", "opt", (), "family 'opt' cannot be written for llama.cpp"),
        ("hf", "nothing", (), "has no config.json; give a Hugging Face checkpoint"),
        ("hf", "cut", ("--adapter", "of-phi3"), "is not a LoRA factor of a linear layer of 'llama'"),
        ("hf", "final", ("--adapter", "own"), "has what it learned merged already"),
        ("hf", "whole", ("--adapter", "own"), "has shape"),
        ("hf", "cut", ("--push-to-hub", "me/b"), "there is no token"),
    ],
)
def test_bad_exports_are_one_line(
    to: str,
    of: str,
    more: tuple[str, ...],
    says: str,
    run: Path,
    make_run: MakeRun,
    block: Callable[..., Block],
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    cut = run.parent.parent / "blocks" / "b"
    (tmp_path / "nothing").mkdir()
    models = {
        "cut": cut,
        "final": run,
        "opt": tiny("opt"),
        "whole": tiny("llama"),
        "nothing": tmp_path / "nothing",
    }
    if more == ("--adapter", "of-phi3"):
        adapter = make_run(tmp_path / "other", block("phi3")) / "adapter"
        more = ("--adapter", str(adapter))
    elif more == ("--adapter", "own"):
        more = ("--adapter", str(run / "adapter"))
    assert_one_line(legolm("export", models[of], "--to", to, "--out", tmp_path / "o", *more), says)
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob(".*"))


def test_what_must_be_there_and_what_must_not(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "o").mkdir()
    assert_one_line(legolm("export", run, "--to", "hf", "--out", tmp_path / "o"), "is already there; give another one")
    monkeypatch.setattr("legolm.export.target.importlib.util.find_spec", lambda name: None)
    done = legolm("export", run, "--to", "gguf", "--out", tmp_path / "x.gguf")
    assert_one_line(done, "--to gguf: needs gguf, which is not installed; run: pip install 'legolm[gguf]'")
    assert_one_line(legolm("serve", run), "serve: needs gguf, which is not installed; run: pip install 'legolm[gguf]'")
    done = legolm("bench", run, "--runtimes", "transformers,onnxruntime")
    assert_one_line(done, "runtime onnxruntime: needs onnx, which is not installed; run: pip install 'legolm[onnx]'")
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))  # type: ignore[attr-defined]
    assert_one_line(legolm("export", run, "--to", "hf", "--out", tmp_path / "y"), "free some space")


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("/proc/o", "/proc cannot be written to ("),
        ("x" * 300, "cannot be made ([Errno 36] File name too long"),
        ("x" * 250, "cannot be made there ([Errno 36] File name too long"),
        ("file/o", "is a file; give another --out"),
        ("ring/o", "cannot be made"),
        ("gone", "is already there; give another one"),
    ],
)
def test_places_where_nothing_can_be_made(out: str, says: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert_one_line(legolm("export", run, "--to", "hf", "--out", tmp_path / out), says)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "gone", "ring"]


def test_a_checkpoint_without_a_tokenizer_is_one_line(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "m", ignore=lambda folder, names: [one for one in names if "tokenizer" in one])
    for to in ("hf", "gguf"):
        done = legolm("export", tmp_path / "m", "--to", to, "--out", tmp_path / "o")
        assert_one_line(done, "m: has no readable tokenizer")
    assert not (tmp_path / "o").exists()


def test_a_trained_block_of_another_base_is_refused(run: Path, block: Callable[..., Block], tmp_path: Path) -> None:
    other = block("llama-bias")
    with pytest.raises(LegolmError, match=r"was trained on .*, which has other weights"):
        export(str(other.path), "hf", tmp_path / "o", with_adapter=run / "adapter")


def test_an_adapter_of_a_masked_block_is_refused(masked: Block, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", masked)
    for to in ("adapter", "gguf-adapter"):
        assert_one_line(legolm("export", run, "--to", to, "--out", tmp_path / "o"), "works under them only; hf, gguf")


def test_a_target_of_ones_own(shipped: None, run: Path, tmp_path: Path) -> None:
    @exporter("names")
    def names(source: Source, out: Path, *, upper: bool = False) -> list[str]:
        """The names of the modules."""
        text = " ".join(source.coverage.shape.modules)
        out.write_text(text.upper() if upper else text)
        return ["written"]

    found = export(str(run), "names", tmp_path / "n.txt", settings={"upper": True})
    assert found.path.read_text().startswith("SELF_ATTN.Q_PROJ") and found.lines == ["written"]
    assert "names" in EXPORTERS


def test_a_picture_by_hand() -> None:
    shape = Shape("llama", layers=2, hidden=8, neurons=4, kv_groups=2, queries_per_group=1, head_dim=4)
    block = Coverage(shape, (1,), ((0,),), ((0, 1, 3),))
    assert picture(block, block.sparsity).splitlines() == [
        "layer  KV groups (2)  neurons (4)  kept of each matrix",
        "0      cut",
        "1      █              ██ █         ▄▄▄▄▆▆▆",
        "bars: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
        # A layer is 4 · 64 + 3 · 32 weights; half of the one and three quarters of the other are left in one of two.
        f"{(128 + 72) / 704:.1%} of the decoder's linear weights are kept",
    ]


def test_onnx_is_one_graph_that_reads_and_goes_on(block: Callable[..., Block], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    found = export(str(block("gemma3_text").path), "onnx", tmp_path / "o")  # with windows
    assert found.lines[-1].startswith("onnxruntime, float32: error")
    session = onnxruntime.InferenceSession(tmp_path / "o" / "model.onnx")
    names = {one.name for one in session.get_inputs()}
    assert {"input_ids", "input.past_key_values.layers.1.keys"} <= names
    assert (tmp_path / "o" / "tokenizer.json").is_file()


def test_a_served_model_takes_the_adapter_that_a_request_names(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    cut = run.parent.parent / "blocks" / "b"
    asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0, "logprobs": True}

    def logs(server: LlamaCpp, scale: float) -> list[float]:
        found = server.post("/v1/chat/completions", asked | {"lora": [{"id": 0, "scale": scale}]})
        return [one["logprob"] for one in found["choices"][0]["logprobs"]["content"]]

    with serving(str(cut), [f"fr={run / 'adapter'}"], "127.0.0.1", 0, "f16", 1, tmp_path) as (server, numbers):
        assert numbers == {"fr": 0} and server.address.startswith("http://127.0.0.1:")
        bare, adapted = logs(server, 0.0), logs(server, 1.0)
        plain = server.post("/v1/chat/completions", asked)
        assert [one["logprob"] for one in plain["choices"][0]["logprobs"]["content"]] == bare != adapted
        port = int(server.address.rsplit(":", 1)[1])
        assert_one_line(legolm("serve", cut, "--port", port), f"--port {port}: cannot be listened on")
    assert not list(tmp_path.iterdir())
    assert_one_line(legolm("serve", cut, "--port", 0, "--adapter", "x=nowhere"), "there is no nowhere; give NAME=DIR")
    (tmp_path / "x.gguf").write_text("GGUF")
    assert_one_line(legolm("serve", tmp_path / "x.gguf", "--port", 0), "x.gguf: is no GGUF file that can be read")
    assert_one_line(legolm("serve", cut, "--port", 0, "--adapter", tmp_path / "x.gguf"), "--adapter", "is no GGUF file")
    with serving(str(cut), [f"model={run / 'adapter'}"], "127.0.0.1", 0, "f16", 1, tmp_path) as (_, numbers):
        assert numbers == {"model": 0}


def test_serve_looks_at_all_before_it_exports(
    run: Path, masked: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr("legolm.export.server.export", lambda *_, **__: pytest.fail("it is too late"))
    cut, own = run.parent.parent / "blocks" / "b", run / "adapter"
    (tmp_path / "x.gguf").write_text("GGUF")
    for model, more, says in (
        (cut, ("--adapter", f"a={cut}"), "no readable adapter_config.json"),
        (cut, ("--adapter", tmp_path / "x.gguf"), "is no GGUF file"),
        (masked.path, ("--adapter", f"a={own}"), "which does not fit the block"),
        (cut, ("--quant", "q9"), "--quant: `quant` = 'q9': input should be 'f32'"),
        (
            cut,
            ("--adapter", f"a={own}", "--adapter", f"a={cut}", "--adapter", f"z={own}"),
            f"--adapter a={cut}: the name",
        ),
    ):
        assert_one_line(legolm("serve", model, "--port", 0, *more), says)
