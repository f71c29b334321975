"""Benchmark tasks of lm-evaluation-harness, read and checked: its own, and those of YAML files."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, meta

from legolm.errors import LegolmError
from legolm.evaluation.figure import digest
from legolm.system import hub_answers, wants_offline

NEEDED = ("dataset_path", "doc_to_text", "doc_to_target")
TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice")
SPLITS = ("test_split", "validation_split")
PLACES = ("dataset_path", "dataset_kwargs", "metadata")
"""Where a task's files lie: the same questions from elsewhere are the same questions."""


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks with their questions, for any number of models; `loaded` is what the harness's evaluator takes.

    `parts` are the same by the names that were asked for.
    """

    loaded: Any
    parts: tuple[Any, ...] = ()

    def each(self) -> list[Tasks]:
        """What can be measured by itself: each name that was asked for, where no task is in two of them."""
        apart = sum(len(part["tasks"]) for part in self.parts) == len(self.loaded["tasks"])
        return [Tasks(part) for part in self.parts] if self.parts and apart else [self]

    def asked(self, limit: int | None) -> str:
        """Digest of what the first `limit` questions of each task are asked, and how; of all groups too."""
        found: list[object] = [sorted(self.loaded["groups"])]
        for name, task in sorted(self.loaded["tasks"].items()):
            config = {key: value for key, value in task.dump_config().items() if key not in PLACES}
            # Where a function has no source its text has an address, which is another one in each process.
            found.append((name, re.sub(" at 0x[0-9a-f]+", "", str(sorted(config.items(), key=str)))))
            shown = task.fewshot_docs() if task.get_config("num_fewshot") else ()
            docs = [*shown, *(doc for _, doc in task.doc_iterator(limit=limit))]
            found += [json.dumps(doc, sort_keys=True, default=str) for doc in docs]
        return digest(found)


def load_tasks(names: Sequence[str], include: Path | None = None, limit: int | None = None) -> Tasks:
    """Tasks, groups or tags by name: from the YAML files below the folder `include`, else the harness's own.

    A relative `data_files` of a YAML is looked for beside it, then, as the harness does, in the working directory. A
    task's YAML may name Python functions in files beside it, which run: include only folders that you trust.

    Raises `LegolmError` when the harness is not installed, for an unknown name (with the nearest), a YAML that is
    broken or lacks a field, data that are missing or would have to come from the hub while offline, and a right choice,
    among the first `limit` questions of a YAML task, that is none of the choices.
    """
    manager_of = _need_harness()
    if include is not None:
        _check_files(include)
    manager = manager_of(include_path=include and str(include), include_defaults=False)
    own = list(manager.all_tasks)
    files = {name: entry.yaml_path for name, entry in manager.task_index.items()}
    index = manager.task_index
    wanted = _reached(names, index)
    index |= {name: _beside_its_yaml(index[name]) for name in wanted if name in index}
    if not set(wanted) <= set(own):
        for name, entry in _harness_index(manager_of).items():
            index.setdefault(name, entry)
    for name in names:
        if name not in index:
            raise LegolmError(_unknown(name, list(index), own, include))
    for name in wanted:
        if name not in own:
            _need_hub(f"task {name!r}")
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    parts = []
    for name in names:
        with _one_line(name, files.get(name), index[name].cfg), quiet():
            found = manager.load([name])
        for task_name, task in found["tasks"].items():
            if task_name in files:
                with _one_line(task_name, files[task_name], index[task_name].cfg):
                    _check_fields(task, files[task_name])
                    _check_golds(task, files[task_name], limit)
        if not found["tasks"]:
            raise LegolmError(f"task {name!r}: holds no task; give its YAML a list `task`")
        parts.append({part: found.get(part, {}) for part in loaded})
        for part in loaded:
            loaded[part] |= parts[-1][part]
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed=1234)
    return Tasks(loaded, tuple(parts))


def _need_harness() -> Any:
    """The harness's `TaskManager`. Raises `LegolmError` when the extra is not installed."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise LegolmError("--tasks needs lm-evaluation-harness; run: pip install 'legolm[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Its bootstrap would fork a process that holds a model and threads, for a second of work.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    return TaskManager


def _check_files(include: Path) -> None:
    """Raises `LegolmError` for YAML that the harness would pass over without a word."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    if not include.is_dir():
        raise LegolmError(f"--include {include}: no such folder; give one with YAML tasks")
    for path in sorted(include.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except (yaml.YAMLError, ValueError, OSError) as error:
            raise LegolmError(f"task file {path}: not a task ({line(error)})") from None


@lru_cache
def _harness_index(manager_of: Any) -> dict[str, Any]:
    """The harness's own tasks: it reads 14,000 files, some ten seconds."""
    return dict(manager_of().task_index)


def _reached(names: Sequence[str], index: dict[str, Any]) -> list[str]:
    """The names, and those that groups and tags of `index` among them hold, in `index` or not."""
    from lm_eval.tasks._index import Kind

    found: dict[str, None] = {}
    left = list(names)
    while left:
        name = left.pop()
        if name in found:
            continue
        found[name] = None
        entry = index.get(name)
        if entry is not None and entry.kind is Kind.TAG:
            left += entry.tags
        elif entry is not None and entry.kind is Kind.GROUP:
            left += _members(entry.cfg.get("task"))
    return list(found)


def _members(listed: Any) -> list[str]:
    """Names of the tasks and groups in a group's list; a group in the list has its own."""
    if not isinstance(listed, list):
        return []
    found: list[str] = []
    for one in listed:
        inner = one.get("task") or one.get("group") if isinstance(one, dict) else one
        found += _members(inner) if isinstance(inner, list) else [str(inner)]
    return found


def _beside_its_yaml(entry: Any) -> Any:
    """A task of the user's, its fields checked, its relative data files looked for beside its YAML."""
    from lm_eval.tasks._index import Kind
    from lm_eval.tasks._yaml_loader import load_yaml

    path = entry.yaml_path
    if entry.kind is not Kind.TASK:
        for one in (entry.cfg or {}).get("task") or ():
            if isinstance(one, dict) and "dataset_path" in one:
                raise LegolmError(f"task file {path}: holds a task within a group; give it a file of its own")
        return entry
    try:
        config = load_yaml(path)
    except Exception as error:  # its functions' files run here
        raise LegolmError(f"task file {path}: {line(error)}") from None
    missing = [field for field in NEEDED if config.get(field) is None]
    if "custom_dataset" in config or "use_prompt" in config:
        missing = []
    if not any(config.get(split) for split in SPLITS):
        missing.append(" or ".join(SPLITS))
    if config.get("output_type") == "multiple_choice" and "doc_to_choice" not in config:
        missing.append("doc_to_choice")
    if missing:
        raise LegolmError(f"task file {path}: no field `{missing[0]}`; add it")
    options = config.get("dataset_kwargs") or {}
    if "data_files" not in options:
        if "custom_dataset" not in config and not Path(str(config["dataset_path"])).exists():
            _need_hub(f"task file {path}")
        return entry
    options = options | {"data_files": _located(options["data_files"], path)}
    _check_splits(config, options["data_files"], path)
    # Without the path the harness takes the fields from the entry instead of reading the file again.
    return replace(entry, yaml_path=None, cfg=config | {"dataset_kwargs": options})


def _need_hub(place: str) -> None:
    """Raise `LegolmError` at once when the hub does not answer. Told to be offline, its clients ask their cache."""
    if not wants_offline() and not hub_answers():
        raise LegolmError(
            f"{place}: its data come from the hub, which does not answer; go online, set HF_HUB_OFFLINE=1 to use what "
            "was downloaded before, or give a YAML task on files of your own (--include)"
        )


def _located(files: Any, yaml_path: Path) -> Any:
    if isinstance(files, dict):
        return {split: _located(one, yaml_path) for split, one in files.items()}
    if isinstance(files, list):
        return [_located(one, yaml_path) for one in files]
    name = str(files)
    if "://" in name or Path(name).is_absolute():
        return name
    for folder in (yaml_path.parent, Path.cwd()):
        if any(folder.glob(name)):
            return str(folder / name)
    raise LegolmError(f"task file {yaml_path}: data_files names {name}, which is neither beside it nor in {Path.cwd()}")


def _unknown(name: str, known: Sequence[str], own: Sequence[str], include: Path | None) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    said = f"--tasks: no task {name!r}"
    if include is not None and not own:
        said += f", and no YAML below {include} has a field `task`"
    return said + (f"; nearest: {', '.join(close)}" if close else "; list them: lm-eval ls tasks")


@contextlib.contextmanager
def _one_line(name: str, path: Path | None, config: Any) -> Iterator[None]:
    """What the harness raises for a task's templates, functions and data, as one line."""
    place = f"task {name!r}" if path is None else f"task file {path}"
    try:
        yield
    except ConnectionError as error:
        raise LegolmError(
            f"{place}: its data are not on this machine ({line(error)}); go online once, or give a YAML task on "
            "files of your own (--include)"
        ) from None
    except IndexError as error:  # the harness tries the first question
        raise LegolmError(
            f"{place}: {line(error)}; is a choice of question 1 empty, or its right choice none of its choices?"
        ) from None
    except LegolmError:
        raise
    except Exception as error:  # whatever the user's own functions raise
        named = sorted(_fields_of(config or {}))
        wants = f"; its templates want the data's fields {', '.join(named)}" if named else ""
        raise LegolmError(f"{place}: {line(error)}{wants}") from None


def _check_fields(task: Any, path: Path) -> None:
    """The harness takes a field that the data have not for a constant text, and every answer for wrong."""
    for key in TEMPLATES:
        field = task.get_config(key)
        if isinstance(field, str) and field.isidentifier() and field not in task.features:
            have = ", ".join(task.features)
            raise LegolmError(f"task file {path}: {key} names the field `{field}`; the data have {have}")


def _check_golds(task: Any, path: Path, limit: int | None) -> None:
    """The harness takes a right choice that is none of the choices for a wrong answer, whatever the model says."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.get_config("process_results"):
        return
    for number, doc in task.doc_iterator(limit=limit):
        try:
            choices = task.doc_to_choice(doc)
            gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        except Exception as error:  # whatever the user's own functions raise
            raise LegolmError(f"task file {path}: question {number + 1}: {line(error)}") from None
        many = isinstance(gold, list)  # of places; the harness cannot look up several texts
        for one in (gold or [None]) if many else [gold]:
            if one not in (range(len(choices)) if many or isinstance(one, int) else choices):
                raise LegolmError(
                    f"task file {path}: question {number + 1}: the right choice is {one!r}, and it has choices 0 to "
                    f"{len(choices) - 1}; correct its data or doc_to_target"
                )


def _check_splits(config: dict[str, Any], files: Any, path: Path) -> None:
    """Raise `LegolmError` for a split that the data files do not make."""
    made = list(files) if isinstance(files, dict) else ["train"]
    for field in SPLITS:
        split = config.get(field)
        if split and str(split).partition("[")[0] not in made:
            raise LegolmError(f"task file {path}: {field} is {split!r}; its data_files make {', '.join(made)}")


def _fields_of(config: dict[str, Any]) -> set[str]:
    """The data's fields that a task's templates name."""
    found = set()
    for text in map(config.get, TEMPLATES):
        if not isinstance(text, str):
            continue
        with contextlib.suppress(TemplateError):
            found |= {text} if text.isidentifier() else meta.find_undeclared_variables(Environment().parse(text))
    return found


def line(error: Exception) -> str:
    """What the error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def quiet() -> AbstractContextManager[Any]:
    """No progress bars of the harness where nobody watches."""
    if sys.stderr.isatty():
        return contextlib.nullcontext()
    return contextlib.redirect_stderr(io.StringIO())
