"""Several models on the same questions, each block with its dense LLM beside it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from legolm.adapter import CONFIG, FACTORS, adapter_config, weights_file
from legolm.block import Block, read_block
from legolm.config import DataConfig, Precision
from legolm.data import Tokens, left_out, prompt_look, take_look, tokenize, unused_tools
from legolm.errors import LegolmError, brief
from legolm.evaluation.figure import Figure
from legolm.evaluation.floors import warnings
from legolm.evaluation.harness import TaskFigures
from legolm.evaluation.kept import Kept, as_json, digest_of, from_json
from legolm.evaluation.paired import Comparison, compare
from legolm.evaluation.questions import NOWHERE, Questions, check_finite, measure, sample, sampled
from legolm.evaluation.speed import tokens_per_second
from legolm.models import (
    Head,
    choose_device,
    count_parameters,
    decoder_layers,
    find_fingerprint,
    find_model,
    folder_bytes,
    hidden_states,
    lean,
    load_config,
    load_model,
    load_tokenizer,
    pack,
    shape_of,
)
from legolm.system import Progress, atomic_write, release_memory, stored_tensors, versions

PROBE = 8
"""Tokens before and after what an adapter waits for, in the text that tries it."""


@dataclass(frozen=True)
class Subject:
    """A model to evaluate: its folder, the adapter on it, and the name of the model that it is compared with.

    `model` is it in memory, where it is not to be loaded from the folder.
    """

    name: str
    path: Path
    block: Block | None = None
    adapter: Path | None = None
    against: str | None = None
    model: Any = None


@dataclass(frozen=True)
class Result:
    """One figure of one model, and its comparison with the model `against`."""

    task: str
    metric: str
    model: str
    figure: Figure
    against: str | None
    comparison: Comparison | None

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        names = {"task": self.task, "metric": self.metric, "model": self.model}
        paired = None if self.comparison is None else {"model": self.against} | asdict(self.comparison)
        return names | self.figure.as_json() | {"against": paired}


@dataclass(frozen=True)
class Size:
    """What a model costs: its stored parameters, bytes of its folder, and tokens a second that it generates here."""

    model: str
    parameters: int
    bytes: int
    tokens_per_s: float


@dataclass(frozen=True)
class Answered:
    """A question of `--data`, the wanted answer, and each model's, by name."""

    question: str
    wanted: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Evaluation:
    """All that `evaluate` found, the models in their order.

    `warnings` are figures that a blind guess would have, and who is asked in another chat template than its own.
    """

    results: list[Result]
    sizes: list[Size]
    answered: list[Answered]
    warnings: list[str]


def line_up(
    models: Sequence[str], base: str | None = None, adapter: Path | None = None, loaded: Mapping[str, Any] | None = None
) -> list[Subject]:
    """The models in order, each block's dense LLM before it, or the model itself before it with its adapter.

    They are named as `find_model` takes them.
    A block's LLM is `base`, or else the one that has the fingerprint in its manifest: of `models`, what
    the block records, and the starter. Blocks and adapters are compared with their LLM, other models with the first.
    `loaded` are those of `models` that are in memory, which may have changed there: none is another one's LLM.
    Raises `LegolmError` for no models, when the LLM is not found or `base` is another, and for an adapter on several
    models.
    """
    if not models:
        raise LegolmError("models: none to evaluate; give at least one")
    names, loaded = list(dict.fromkeys(models)), loaded or {}
    if base is not None and not any((find_model(name) / "manifest.json").is_file() for name in names):
        raise LegolmError(f"--base {base}: is a block's LLM, and none of {', '.join(names)} is a block; leave it out")
    if adapter is not None and len(names) > 1:
        raise LegolmError(f"--adapter {adapter}: goes on one model, not on {len(names)}; evaluate them one by one")
    paths = {name: find_model(str(loaded[name].name_or_path) if name in loaded else name) for name in names}
    _check_unmerged(names[0], paths[names[0]], adapter)
    blocks = {name: read_block(path) for name, path in paths.items() if (path / "manifest.json").is_file()}
    dense = {name: path for name, path in paths.items() if name not in blocks and name not in loaded}
    lineup: dict[str, Subject] = {}
    for name in names:
        block = blocks.get(name)
        llm = name
        if block is not None:
            llm, path = _find_base(name, block, base, dense)
            paths[llm] = dense[llm] = path
        lineup.setdefault(llm, Subject(llm, paths[llm], against=next(iter(lineup), None), model=loaded.get(llm)))
        if block is not None or adapter is not None:
            label = name if adapter is None else f"{name} + {adapter.name}"
            lineup[label] = Subject(label, paths[name], block, adapter, against=llm, model=loaded.get(name))
    for subject in lineup.values():
        shape_of(load_config(subject.path))
    return list(lineup.values())


def alone(name: str, path: Path, adapter: Path | None) -> Subject:
    """A model that is compared with none. Raises `LegolmError` for an adapter that it has already."""
    _check_unmerged(name, path, adapter)
    is_block = adapter is not None and (path / "manifest.json").is_file()  # whose masks the adapter works under
    return Subject(name, path, read_block(path) if is_block else None, adapter)


def _check_unmerged(name: str, path: Path, adapter: Path | None) -> None:
    if adapter is not None and adapter.resolve().parent == path.resolve() and (path / FACTORS).is_file():
        raise LegolmError(
            f"--adapter {adapter}: is merged into {name} already; leave it out, or give the block that it was "
            "trained on"
        )


def evaluate(
    subjects: Sequence[Subject],
    questions: Questions,
    precision: Precision = "fp32",
    parts: Path | None = None,
    prompts: DataConfig | None = None,
) -> Evaluation:
    """Every figure of every model, one model in memory at a time, compared question by question.

    What is found is kept in the folder `parts`, and taken from there. `prompts` says how prompts look; None: as each
    model's own.
    """
    found: dict[str, TaskFigures] = {}
    sizes: dict[str, Size] = {}
    said: dict[str, list[str]] = {}
    looks: list[str] = []
    with Progress().stage("evaluate", len(subjects)) as advance:
        for subject in reversed(subjects):  # an adapter or a block that does not fit shows before the LLM has its turn
            name, path = subject.name, subject.path
            tokenizer, block = load_tokenizer(path, prompts), _first_block(subjects, name)
            look = prompt_look(tokenizer)
            if block is not None:
                asked_look = prompt_look(load_tokenizer(block.path, prompts))
                if asked_look != look:
                    look = asked_look
                    looks.append(f"{name}: is asked in the chat template of {block.name}, not in its own")
            if unused := unused_tools(look[0], sum(bool(one.tools) for one in questions.examples)):
                looks.append(f"{name}: {unused}")
            take_look(tokenizer, look)
            most = load_config(path).max_position_embeddings
            looks += [f"{name}: {note}" for note in left_out([tokenize(questions.examples, tokenizer, most)])]
            kept = NOWHERE
            if parts is not None and subject.model is None:
                used = json.dumps([precision, str(choose_device("auto")), versions(), repr(look)])
                kept = Kept(parts, f"{digest_of(path, subject.adapter)} {used}")
            asked = questions.asked() if kept.folder else ""
            measured = partial(_measured, subject, questions, precision, kept, look, prompts)
            figures, said[name], speed = kept.once(asked, measured)
            found[name] = from_json(figures)
            sizes[name] = Size(name, count_parameters(path), folder_bytes(path), speed)
            advance(1)
    results = []
    for task, metrics in found[subjects[0].name].items():
        for metric in metrics:
            for subject in subjects:
                figure = found[subject.name][task][metric]
                other = None if subject.against is None else found[subject.against][task][metric]
                comparison = None if other is None else compare(figure, other)
                results.append(Result(task, metric, subject.name, figure, subject.against, comparison))
    names = [subject.name for subject in subjects]
    answered = [
        Answered(example.question, example.wanted, {name: said[name][place] for name in names})
        for place, example in enumerate(sampled(questions))
    ]
    wanted = [example.wanted for example in questions.examples]
    guessed = warnings({name: found[name] for name in names}, wanted)
    return Evaluation(results, [sizes[name] for name in names], answered, [*looks, *guessed])


def _first_block(subjects: Sequence[Subject], llm: str) -> Subject | None:
    """The first block that is compared with this LLM: both are asked alike."""
    return next((one for one in subjects if one.block is not None and one.against == llm), None)


def _measured(
    subject: Subject,
    questions: Questions,
    precision: Precision,
    kept: Kept,
    look: tuple[Any, str | None],
    prompts: DataConfig | None,
) -> list[Any]:
    """Figures as JSON, answers and tokens a second of one model, asked with this look of prompts."""
    model, tokenizer = load_subject(subject), load_tokenizer(subject.path, prompts)
    take_look(tokenizer, look)
    found = measure(model, tokenizer, questions, precision, kept)
    check_finite(found, f"model {subject.name}")
    said = sample(model, tokenizer, questions, precision)
    speed = tokens_per_second(model, precision)
    del model
    release_memory()
    return [as_json(found), said, speed]


def write_json(found: Evaluation, questions: Questions, precision: Precision, path: Path) -> None:
    """All figures, one a line, each with what every question gave to it, and how they were got."""
    asked = {name: getattr(questions, name) for name in ("limit", "length", "windows")}
    used = versions() | ({"lm_eval": version("lm_eval")} if questions.tasks else {})
    rest = {
        "models": [asdict(one) for one in found.sizes],
        "answers": [asdict(one) for one in found.answered],
        "warnings": found.warnings,
    }
    head = json.dumps({"precision": precision, **asked, "versions": used, **rest}, indent=1).removesuffix("\n}")
    lines = ",\n  ".join(json.dumps(one.as_json()) for one in found.results)
    atomic_write(path, f'{head},\n "results": [\n  {lines}\n ]\n}}\n')


def load_subject(subject: Subject) -> Any:
    """The model on the machine's best device, its adapter on it; on an unstructured block merged under the mask.

    Raises `LegolmError` for an adapter that does not fit, and weights that are not finite.
    """
    model = load_model(subject.path) if subject.model is None else subject.model
    if any(one.is_floating_point() and one.dtype != torch.float32 for one in model.parameters()):
        model = copy.deepcopy(model).float()  # as one that is read, and the caller's stays as it is
    if subject.adapter is not None:
        model = _with_adapter(model, subject.adapter)
        if subject.block is not None and subject.block.coverage.masks:
            model = model.merge_and_unload()
            _mask(model, subject.block)
    broken = [name for name, tensor in model.named_parameters() if not bool(tensor.isfinite().all())]
    if broken:
        raise LegolmError(f"model {subject.name}: {broken[0]} is not finite; its figures would say nothing")
    return model.to(choose_device("auto")).eval()


def _find_base(name: str, block: Block, base: str | None, dense: dict[str, Path]) -> tuple[str, Path]:
    """Name and folder of the LLM that the block was cut from."""
    recorded = block.details.get("model")
    names = [base] if base is not None else [*dense, *([recorded] if isinstance(recorded, str) else []), "starter"]
    if base is not None:
        find_model(base)  # says why if it cannot be found
    llm, seen = find_fingerprint(block.base_fingerprint, names)
    if llm is not None:
        path = find_model(llm)
        known = [other for other, folder in dense.items() if folder.resolve() == path.resolve()]
        return (known or [llm])[0], path
    have = ", ".join(f"{candidate!r} has {found[:12]}" for candidate, found in seen.items()) or "none is at hand"
    raise LegolmError(
        f"--base: block {name} was cut from an LLM of fingerprint {block.base_fingerprint[:12]}; {have}; "
        "name its LLM with --base MODEL"
    )


def _with_adapter(model: Any, path: Path) -> Any:
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    where = f"--adapter {path}"
    if not (path / CONFIG).is_file():
        raise LegolmError(f"{where}: no {CONFIG}; give the folder of a PEFT adapter")
    adapter_config(path, where)
    names = set(stored_tensors(weights_file(path, where), "--adapter ", "give the folder of a PEFT adapter"))
    try:
        adapted = PeftModel.from_pretrained(model, path).eval()
        known = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except Exception as error:  # PEFT raises a dozen kinds for an adapter that does not fit
        raise LegolmError(f"--adapter {path}: does not fit the model ({brief(error)})") from None
    if adapted.active_peft_config.is_prompt_learning or isinstance(adapted.get_output_embeddings(), BaseTunerLayer):
        raise LegolmError(
            f"{where}: changes the prompt or the head, and eval takes adapters of the decoder's layers; merge it into "
            "the model first"
        )
    if left := sorted(names - known):
        raise LegolmError(f"{where}: the model has no place for {left[0]}; give the adapter of this model")
    if left := sorted(known - names):
        raise LegolmError(f"{where}: lacks {left[0]}, which its config names; give the whole adapter of this model")
    if not _is_in_modules(adapted):
        raise LegolmError(
            f"{where}: PEFT applies it outside the decoder's modules too, where eval does not; merge it into the model "
            "first, if PEFT can"
        )
    return adapted


def _is_in_modules(adapted: Any) -> bool:
    """Whether the forward pass that scores answers, which leaves PEFT's own out, gives the same logits as that."""
    invoked = getattr(adapted.active_peft_config, "alora_invocation_tokens", None) or []
    ids = torch.tensor([*range(PROBE), *invoked, *range(PROBE)], device=adapted.device)
    try:
        with torch.no_grad():
            whole = adapted(input_ids=ids[None]).logits[0].float()
            with lean(adapted, "fp32"):
                hidden = hidden_states(adapted, pack([Tokens(tuple(ids.tolist()), 1)], adapted.device))
                parts = Head.of(adapted, "fp32").logits(hidden)
    except AttributeError:  # PEFT's wrapper of an embedding that is the head too
        return False
    return not bool((whole - parts).abs().max() > 1e-3 * whole.abs().max())  # what is not finite is another error


def _mask(model: Any, block: Block) -> None:
    """Zeros where the block has none of the LLM's weights: a merged adapter fills them."""
    for place, layer in enumerate(block.coverage.layers):
        for module in block.coverage.shape.modules:
            mask = block.coverage.mask(layer, module)
            if mask is not None:
                linear: Any = decoder_layers(model)[place].get_submodule(module)
                linear.weight.data *= mask
