"""Numbers of a config: none without end, whatever section and field it stands in."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from legolm.config import CRITERIA, SCHEMES, TRAINERS, load
from legolm.config.section import Section
from legolm.errors import LegolmError


def sections(kind: type[Section] = Section) -> Iterator[type[Section]]:
    for one in kind.__subclasses__():
        yield one
        yield from sections(one)


def numbers(annotation: Any) -> bool:
    """Whether a float may stand there."""
    return annotation is float or any(numbers(one) for one in get_args(annotation))


FLOATS = {
    (one.__name__, name): one for one in sections() for name, f in one.model_fields.items() if numbers(f.annotation)
}


def test_there_are_such_fields() -> None:
    assert {("TrainConfig", "learning_rate"), ("BlockConfig", "sparsity"), ("DataConfig", "validation")} <= set(FLOATS)


@pytest.mark.parametrize("field", FLOATS, ids=".".join)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "1e999", ".nan"])
def test_every_float_of_every_section_is_finite(field: tuple[str, str], value: object) -> None:
    section, name = FLOATS[field], field[1]
    if isinstance(value, str) and name in ("validation", "test"):  # a path
        return
    with pytest.raises(ValidationError) as caught:
        section.model_validate({name: value} | ({"action": "clip"} if name == "factor" else {}))
    assert [one for one in caught.value.errors() if one["loc"][:1] == (name,)], caught.value


@pytest.mark.parametrize("registry", [SCHEMES, CRITERIA, TRAINERS], ids=lambda registry: registry.kind)
def test_so_is_every_setting_of_what_is_registered(registry: Any, shipped: None) -> None:
    for name in registry:
        settings = registry.entry(name).settings
        for field, found in settings.model_fields.items():
            if numbers(found.annotation):
                with pytest.raises(ValidationError, match="finite number"):
                    settings.model_validate({field: math.inf})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("train.learning_rate=.inf", "`train.learning_rate` = inf: input should be a finite number"),
        ("train.learning_rate=1e999", "`train.learning_rate` = '1e999': input should be a finite number"),
        ("train.learning_rate=.nan", "`train.learning_rate` = nan: input should be a finite number"),
        ("seed=.inf", "`seed` = inf"),
        ("blocks.0.recover.minutes=1e308", "`minutes` is larger than any number of its kind"),
        ("federation.rounds=1000000000000", "`federation.rounds` = 1000000000000: input should be less than or equal"),
        ("lora.rank=100000000000000000000", "`rank` is larger than any number of its kind"),
        (f"blocks.0={{name: a, method: structured, params: '{'9' * 400}'}}", "write a number"),
    ],
)
def test_an_override_is_refused_by_field(tmp_path: Path, change: str, says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("blocks: [{name: a, method: dense}]\nclients: [{id: fr, block: a}]\n")
    assert load(path).blocks[0].name == "a"
    with pytest.raises(LegolmError, match=re.escape(says)):
        load(path, [change])
