from __future__ import annotations

import sys

import pytest

from legolm.data import ClientData, Example
from legolm.data.starter import (
    CLIENT_LANGUAGES,
    CLIENT_MONTHS,
    PUBLIC_LANGUAGES,
    public_starter_text,
    starter_parts,
)
from legolm.errors import LegolmError


@pytest.fixture(scope="module")
def parts() -> dict[str, ClientData]:
    return starter_parts("starter", seed=0)


def question(example: Example) -> str:
    return example.messages[0].content


def answer(example: Example) -> str:
    return example.messages[-1].content


def entity(example: Example) -> str:
    """The English name in `What is the French name of the country NAME?`"""
    return question(example).split(" of the ", 1)[1].split(" ", 1)[1].removesuffix("?")


def entities(parts: dict[str, ClientData], split: str) -> set[str]:
    return {entity(example) for data in parts.values() for example in getattr(data, split)}


def test_one_part_a_client_language_of_useful_size(parts: dict[str, ClientData]) -> None:
    assert tuple(parts) == CLIENT_LANGUAGES
    for data in parts.values():
        total = len(data.train) + len(data.validation) + len(data.test)
        assert len(data.train) / total == pytest.approx(0.7, abs=0.03)
        assert len(data.validation) / total == pytest.approx(0.1, abs=0.03)
        assert total > 700


def test_known_questions_and_answers_are_there(parts: dict[str, ClientData]) -> None:
    def asked(language: str) -> dict[str, str]:
        data = parts[language]
        return {question(example): answer(example) for example in (*data.train, *data.validation, *data.test)}

    assert asked("fr")["What is the French name of the country Germany?"] == "Allemagne"
    assert asked("de")["What is the German name of the language Turkish?"] == "Türkisch"
    assert asked("pl")["What is the Polish name of the currency Swiss Franc?"] == "frank szwajcarski"


def test_no_entity_is_in_two_splits_of_any_clients(parts: dict[str, ClientData]) -> None:
    train, validation, test = (entities(parts, split) for split in ("train", "validation", "test"))
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_a_qualifier_in_brackets_does_not_part_an_entity(parts: dict[str, ClientData]) -> None:
    francs = {"Belgian Franc", "Belgian Franc (convertible)", "Belgian Franc (financial)"}
    assert sum(bool(francs & entities(parts, split)) for split in ("train", "validation", "test")) == 1


def test_answers_differ_from_english_and_codes_that_name_nothing_are_left_out(
    parts: dict[str, ClientData],
) -> None:
    examples = [e for data in parts.values() for e in (*data.train, *data.validation, *data.test)]
    assert all(answer(example) != entity(example) for example in examples)
    names = {entity(example) for example in examples}
    assert not names & {"Unknown Region", "Pseudo-Accents", "Unknown language", "Unknown Currency", "Africa"}


def test_seed_decides_the_order_only(parts: dict[str, ClientData]) -> None:
    other = starter_parts("starter", seed=1)["fr"]
    assert starter_parts("starter", seed=0) == parts
    assert other.train != parts["fr"].train
    assert set(other.train) == set(parts["fr"].train)


def test_public_text_shares_no_language_and_no_held_out_entity_with_clients(
    parts: dict[str, ClientData],
) -> None:
    public = public_starter_text("starter")
    assert not set(CLIENT_LANGUAGES) & set(PUBLIC_LANGUAGES)
    assert not {entity(e) for e in public} & (entities(parts, "validation") | entities(parts, "test"))
    assert not {question(e) for e in public} & {question(e) for data in parts.values() for e in data.train}
    assert len(public) > 5000


def test_missing_babel_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "babel", None)
    with pytest.raises(LegolmError, match=r"pip install 'legolm\[starter\]'"):
        starter_parts("starter", seed=0)


@pytest.fixture(scope="module")
def dates() -> dict[str, ClientData]:
    return starter_parts("starter-dates", seed=0)


def month(example: Example) -> int:
    """Of `Write the date YEAR-MONTH-DAY in French.`"""
    return int(question(example).split("-")[1])


def test_a_client_has_the_dates_of_its_months_and_each_month_lies_with_four(dates: dict[str, ClientData]) -> None:
    names = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
    for part, data in dates.items():
        first, last = (names.index(name) for name in part.split("-"))
        held = {month(example) for example in data.train}
        assert held == {month(example) for example in data.test} == set(CLIENT_MONTHS[part])
        assert held == {(first + place) % 12 + 1 for place in range((last - first) % 12 + 1)}
    assert all(sum(one in months for months in CLIENT_MONTHS.values()) == 4 for one in range(1, 13))


def test_dates_are_written_as_cldr_has_them(dates: dict[str, ClientData]) -> None:
    found = {question(e): answer(e) for data in dates.values() for e in (*data.train, *data.validation, *data.test)}
    asked = next(one for one in found if "-03-2" in one)
    year, _, day = asked.removeprefix("Write the date ").removesuffix(" in French.").split("-")
    assert found[asked] == f"{int(day)} mars {year}"


def test_no_date_is_in_two_splits_and_public_ones_are_in_other_languages(dates: dict[str, ClientData]) -> None:
    def asked(split: str) -> set[str]:
        return {question(example) for data in dates.values() for example in getattr(data, split)}

    train, validation, test = (asked(split) for split in ("train", "validation", "test"))
    assert not train & validation
    assert not (train | validation) & test
    public = public_starter_text("starter-dates")
    assert not any("French" in question(example) for example in public)
    assert len(public) > 2000


def test_each_client_has_the_dates_of_one_language() -> None:
    parts = starter_parts("starter-languages", seed=0)
    assert set(parts) == set(CLIENT_LANGUAGES)
    assert all("in German." in question(one) for one in parts["de"].train)
    assert {month(one) for one in parts["de"].train} == set(range(1, 13))
    assert public_starter_text("starter-languages") == public_starter_text("starter-dates")
