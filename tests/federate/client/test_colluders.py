"""What a device lets be opened is its own matter."""

from __future__ import annotations

from pathlib import Path

import pytest

from legolm.block import Coverage
from legolm.errors import LegolmError
from legolm.federate.client.secure import Keeping, keys
from legolm.federate.wire import KeysReply, KeysRequest, unpack
from legolm.models import Shape
from legolm.privacy import Session

SHAPE = Shape("llama", layers=1, hidden=8, neurons=4, kv_groups=1, queries_per_group=1, head_dim=8)


@pytest.mark.parametrize(("k", "colluders", "takes_part"), [(3, 1, True), (3, 2, False), (4, 2, True), (4, 3, False)])
def test_a_sum_that_its_colluders_could_open_is_refused(
    k: int, colluders: int, takes_part: bool, tmp_path: Path
) -> None:
    session = Session(run="r", round=1, k=k, targets=["up_proj"], rank=2, frozen_side=True)
    request = KeysRequest(
        run="r",
        client="fr",
        block="b",
        base_fingerprint="f",
        coverage_hash="c",
        rank=2,
        scale=1.0,
        session=session,
        layers=None,
    )
    kept: list[bytes] = []
    keeping = Keeping(bytes(range(32)), {"fr": "00" * 32}, lambda: b"", kept.append, tmp_path / "opened", colluders)
    if takes_part:
        assert unpack(keys(request, keeping, Coverage.full(SHAPE), 5), KeysReply)[0].advert.client == "fr" and kept
    else:
        with pytest.raises(LegolmError, match=f"open with {k} holders, and this device reckons with {colluders}"):
            keys(request, keeping, Coverage.full(SHAPE), 5)
        assert not kept


def test_a_round_that_was_opened_and_those_before_it_stay_closed(tmp_path: Path) -> None:
    """Whatever was asked in between, and after a new start."""
    opened = tmp_path / "opened"

    def asked(number: int) -> None:
        session = Session(run="r", round=number, k=3, targets=["up_proj"], rank=2, frozen_side=True)
        request = KeysRequest(
            run="r", client="fr", block="b", base_fingerprint="f", coverage_hash="c", rank=2, scale=1.0,
            session=session, layers=None,
        )  # fmt: skip
        keys(request, Keeping(bytes(range(32)), {"fr": "00" * 32}, lambda: b"", len, opened), Coverage.full(SHAPE), 5)

    asked(5)
    opened.write_text("5")
    asked(6)
    for number in (4, 5):
        with pytest.raises(LegolmError, match="fr has opened round 5 already"):
            asked(number)
    opened.write_text("x")
    with pytest.raises(LegolmError, match="opened is broken"):
        asked(7)
