"""What every section of a config is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from legolm.config.registry import Registry, check_numbers
from legolm.errors import nearest

LARGEST = (2**63, 1e37)
"""Of whole numbers and of others: what is made of them (products, loops, files' sizes) must end, in float32 too."""


class Section(BaseModel):
    """A mapping of known keys that does not change once it is read; every number in it is finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_number(cls, value: Any) -> Any:
        if isinstance(value, dict):
            check_numbers(cls, value)
        return value

    @model_validator(mode="after")
    def _bearable(self) -> Self:
        for name, value in self:
            if isinstance(value, int | float) and abs(value) > LARGEST[type(value) is float]:
                raise ValueError(
                    f"`{name}` is larger than any number of its kind; at most {LARGEST[type(value) is float]:.4g}"
                )
        return self


class OpenSection(Section):
    """A section that names a registered thing in its field `named`, and holds that thing's own settings beside it."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    named: ClassVar[str]
    registry: ClassVar[Registry[Any]]
    others: ClassVar[tuple[str, ...]] = ()
    """What the field may name besides: nothing of the registry, and without settings."""

    @property
    def settings(self) -> dict[str, Any]:
        """Of the named thing, all of them."""
        return dict(self.model_extra or {})

    @property
    def registered(self) -> bool:
        """Whether it names something of the registry."""
        return getattr(self, self.named) not in self.others

    @model_validator(mode="before")
    @classmethod
    def _own_settings(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = list(cls.model_fields)
        own = {key: one for key, one in value.items() if key not in known}
        shared = {key: one for key, one in value.items() if key in known}
        name = value.get(cls.named, cls.model_fields[cls.named].default)
        if isinstance(name, str) and name not in cls.others:
            return shared | cls.registry.check(name, own, known, cls.others)
        for key in own:
            raise ValueError(f"unknown key `{key}`;{nearest(str(key), known)}")
        return shared


def _at_home(path: str) -> str:
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ValueError(f"{path!r} is in the home of nobody; write the whole path") from None


LocalPath = Annotated[str, AfterValidator(_at_home)]
"""A file or folder of this machine; `~` is the home folder."""


def _not_reserved(name: str) -> str:
    if name == "llm":
        raise ValueError("`llm` names the base model; choose another name")
    return name


# A name becomes a folder's.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"), AfterValidator(_not_reserved)]


def parse_quantity(text: str) -> int:
    """70M, 150MB, 1.5GB as a number. Raises `ValueError` for what is none."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kmg]?)b?\s*", text.lower())
    if found is None:
        raise ValueError("write a number, with k, M or G and B if you like: 70M, 150MB, 1.5GB")
    return round(float(found[1]) * 1000.0 ** " kmg".index(found[2] or " "))


def _quantity(value: object) -> object:
    return parse_quantity(value) if isinstance(value, str) else value


Quantity = Annotated[int, BeforeValidator(_quantity), Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Layer = Annotated[int, Field(ge=0)]


Layout = Literal["auto", "alpaca", "dolly", "sharegpt", "messages", "pairs", "text"]
LAYOUT_FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("messages",),
    "alpaca": ("instruction", "input", "answer"),
    "dolly": ("instruction", "input", "answer"),
    "pairs": ("instruction", "answer"),
    "text": ("text",),
}
"""What of `Fields` each layout has, in the order in which `auto` looks for them."""


class Fields(Section):
    """Fields of a row by other names than the layout's own: instruction, input (context) and answer; messages; text."""

    instruction: str | None = None
    input: str | None = None
    answer: str | None = None
    messages: str | None = None
    text: str | None = None

    @property
    def given(self) -> dict[str, str]:
        """Those that are named."""
        return {name: field for name, field in self if field is not None}


class RowsConfig(Section):
    """How the rows of a file are read.

    `layout`: alpaca (instruction, input, output), dolly (instruction, context, response), sharegpt (conversations of
    from and value), messages (of role and content), pairs (prompt, completion) and text, which are trained on as they
    stand, without a chat template; `auto` takes each row as its fields say. `fields` names them otherwise.
    """

    layout: Layout = "auto"
    fields: Fields = Fields()
    bad_rows: Literal["refuse", "skip"] = Field(
        "refuse", description="rows without an answer, broken lines: name them all, or leave them out and count them"
    )

    @model_validator(mode="after")
    def _fields_of_one_layout(self) -> Self:
        given = self.fields.given
        if not any(given.keys() <= set(has) for name, has in LAYOUT_FIELDS.items() if self.layout in ("auto", name)):
            takes = "one layout" if self.layout == "auto" else f"layout {self.layout}"
            raise ValueError(f"fields: {', '.join(given)} are not those of {takes}; take out what does not belong")
        return self
