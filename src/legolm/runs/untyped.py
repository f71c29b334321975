"""What the server's loop gives untyped, typed. To go as soon as it gives records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from legolm.runs.records import AnyStage, Global, StageRecord


def typed(records: Iterable[Mapping[str, object]]) -> list[StageRecord]:
    """Of `Rounds.records()`."""
    return [AnyStage.model_validate(one).root for one in records]


def typed_scores(record: Mapping[str, object]) -> Global:
    """Of `Rounds.score_global()`."""
    return Global.model_validate(record)
