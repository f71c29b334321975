"""README and docs say what is so: snippets load or run, commands have their options, links and tables are right."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import legolm as lg
from helpers import legolm
from legolm import config as configs
from legolm.aggregate import Scheme, make_scheme
from legolm.cli.app import app
from legolm.config import SCHEMES, AggregateConfig

HERE = Path(__file__).parents[2]
PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def snippets(language: str) -> list[Any]:
    return [
        pytest.param(page, code, id=f"{page.name}-{number}")
        for page in PAGES
        for number, code in enumerate(blocks(page, language))
    ]


@pytest.fixture
def module(tmp_path: Path, shipped: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Write the page's `mine.py`, where it has one, into the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(page: Path) -> None:
        sys.modules.pop("mine", None)
        for code in blocks(page, "python"):
            if code.startswith("# mine.py\n"):
                (tmp_path / "mine.py").write_text(code)

    yield write
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(("page", "code"), snippets("yaml"))
def test_configs_load(page: Path, code: str, module: Callable[[Path], None], tmp_path: Path) -> None:
    module(page)
    shown = yaml.safe_load(code)
    blocks = [{"name": "a", "method": "dense"}, *shown.get("blocks", [])]
    whole = {"clients": [{"id": "fr", "block": "a"}]} | shown | {"blocks": blocks}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(whole))
    found = configs.load(tmp_path / "run.yaml").model_dump(mode="json")
    for name, section in shown.items():
        if isinstance(section, dict) and name != "data":
            assert shared(found[name], section) == section


def shared(found: Any, wanted: Any) -> Any:
    """Of what was found, the fields that are wanted."""
    return {key: shared(found[key], wanted[key]) for key in wanted} if isinstance(wanted, dict) else found


@pytest.mark.parametrize(("page", "code"), snippets("python"))
def test_what_python_code_names_is_there(page: Path, code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            home = importlib.import_module(node.module or "")
            for name in node.names:
                assert hasattr(home, name.name), name.name
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lg":
            assert node.attr in lg.__all__


@pytest.mark.parametrize("name", ["aggregation", "pruning", "training"])
def test_plugins_run(
    name: str,
    module: Callable[[Path], None],
    three_clients: Callable[..., dict[str, Any]],
    corpus: Path,
    tmp_path: Path,
) -> None:
    page = HERE / "docs" / f"{name}.md"
    module(page)
    raw = three_clients(tmp_path / "clients", ("dense", "wide", "wide"), federation={"engine": "local", "rounds": 1})
    shown = next(found for found in map(yaml.safe_load, blocks(page, "yaml")) if "plugins" in found)
    for one in shown.get("blocks", []):
        one["calibration"] = {"text": str(corpus), "samples": 4, "length": 64}
    shown["blocks"] = raw["blocks"] + shown.get("blocks", [])
    if name == "pruning":
        raw["clients"][0]["block"] = shown["blocks"][-2]["name"]
    shown["evaluate"] = {"local_only": False}
    (tmp_path / "run.yaml").write_text(json.dumps(raw | shown))
    done = legolm("run", tmp_path / "run.yaml", "--out", "runs/demo")
    assert done.returncode == 0, done.stderr
    (figures,) = [code for code in blocks(HERE / "docs" / "evaluation.md", "python") if "to_frame" in code]
    scope: dict[str, Any] = {}
    exec(figures, scope)
    assert list(scope["rounds"]["round"]) == [0, 1]


def test_an_entry_point_as_the_page_declares_it() -> None:
    (code,) = blocks(HERE / "docs" / "aggregation.md", "toml")
    assert tomllib.loads(code)["project"]["entry-points"] == {SCHEMES._group: {"bounded_mean": "mine:bounded_mean"}}


def test_commands_have_their_options() -> None:
    command: Any = typer.main.get_command(app)
    found = 0
    for page in PAGES:
        for line in re.findall(r"^legolm .*$", "\n".join(blocks(page, "")), re.MULTILINE):
            words = shlex.split(re.sub(r"[\[\]]|\.\.\.", " ", line), comments=True)[1:]
            used_one = command.commands[words[0]]
            for word in words[1:2] if isinstance(used_one, typer.core.TyperGroup) else ():
                used_one = used_one.commands[word]
            known = {option for one in used_one.params for option in one.opts}
            used = {word for word in words if word.startswith("--")}
            assert used <= known, line
            found += len(used)
    assert found > 20


@pytest.mark.parametrize("page", [*PAGES, HERE / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, part = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if part else []
        assert not part or part in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


def test_the_table_of_schemes_is_what_they_say() -> None:
    text = (HERE / "docs" / "aggregation.md").read_text()
    rows = {}
    for line in re.findall(r"^\| `.*$", text.partition("## Schemes")[2].partition("\n## ")[0], re.MULTILINE):
        first, _, *said = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"`(\w+)`", first):
            form = re.findall(r"`form: (\w+)`", first)
            rows[(name, *form)] = tuple(said)
    schemes = {(name,): AggregateConfig(scheme=name) for name in SCHEMES if SCHEMES.entry(name).module[:7] == "legolm."}
    del schemes["heteagg",]
    for form in ("frozen_side", "factor", "exact"):
        schemes["heteagg", form] = AggregateConfig(form=form)  # type: ignore[call-arg]
    assert rows == {key: row(make_scheme(config)) for key, config in schemes.items()}


def row(scheme: Scheme) -> tuple[str, ...]:
    """The table's cells for a scheme."""
    folded = {0: "", 120: "Σ r_k", 123: "Σ r_k + r"}[scheme.fold_rank([100, 20], 3)]
    adapter = "" if scheme.fresh else "one factor" if scheme.frozen_side else "adapter"
    told = (scheme.dense, scheme.streams, scheme.sums, scheme.folds)
    unequal = scheme.unequal.replace("no", "nothing")
    return unequal, *("yes" if one else "no" for one in told), ", ".join(part for part in (adapter, folded) if part)
