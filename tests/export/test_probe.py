"""How far a runtime is from the checkpoint, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from legolm.export.probe import Reference, measure


def test_perplexities_and_the_error_of_their_ratio_by_hand() -> None:
    """Two tokens of odds 1/2 each; the runtime gives the first 1/2, the second 1/4."""
    logits = torch.log(torch.full((2, 2), 0.5))
    given = {1: 0.5, 2: 0.25}
    found = measure(
        Reference([0, 1, 1], 1, logits),
        lambda ids, token: (
            math.log(given[len(ids)]),
            {0: math.log(1 - given[len(ids)]), 1: math.log(given[len(ids)])},
        ),
    )
    assert found.reference == pytest.approx(2)
    assert found.perplexity == pytest.approx(math.sqrt(8))
    # Differences by token are 0 and log 2: their deviation is half of log 2, and the mean's that over √2.
    assert found.stderr == pytest.approx(math.sqrt(2) * math.log(2) / 2 / math.sqrt(2))
    assert f"({found.ratio:.4f} ± {found.stderr:.4f} of the checkpoint's 2)" in found.said()
