"""What `benchmarks/privacy.py` reckons with, by hand and on its smallest case."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from privacy_leaks import audit, judged, lower_bound, outside


def test_the_span_check_by_hand() -> None:
    span = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    found = outside(span, torch.tensor([[3.0, -4.0, 0], [0, 0, 2.0], [1.0, 0, 1.0]]))
    assert found.tolist() == pytest.approx([0, 1, math.sqrt(0.5)])


def test_scores_that_tell_nothing_and_everything() -> None:
    some = torch.arange(200.0)
    assert judged(some + 1000, some)["auc"] == 1
    assert judged(some + 1000, some)["tpr_at_1_fpr"] == 1
    assert judged(some + 0.5, some)["auc"] == pytest.approx(0.5, abs=0.01)


def test_an_audit_refutes_no_more_than_was_claimed() -> None:
    assert lower_bound(50, 100, 200, 1e-5) == 0
    # All of 100 right: refuted are those with (1 / (1 + e^-ε))^100 ≤ 0.05 − 2 · 200 · 1e-5.
    assert lower_bound(100, 100, 200, 1e-5) == pytest.approx(-math.log(0.046**-0.01 - 1), abs=0.01)
    found = audit(0, 1.0, canaries=40)
    assert found["audit_epsilon"] < found["claimed_epsilon"]
