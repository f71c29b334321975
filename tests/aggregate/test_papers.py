"""The peers do what their papers, and the code published with them, do: one test a finding, in numbers."""

from __future__ import annotations

import pytest
import torch
from rounds import FULL, RANK, add, client, new

from legolm.config import AggregateConfig

UP = "layers.0.mlp.up_proj"


@pytest.mark.parametrize("name", ["flexlora", "raflora"])
def test_directions_that_a_round_leaves_empty_learn_again(name: str) -> None:
    scheme = new(AggregateConfig(scheme=name))
    low = client(scheme, FULL, 1, 4, seed=0)
    add(scheme, low)
    scheme.finish()
    for key, a in scheme.payload(FULL, RANK).items():
        if key.endswith(".A"):  # all rows orthonormal, as a full SVD's are; B is zero where σ is
            torch.testing.assert_close(a @ a.T, torch.eye(RANK), rtol=0, atol=1e-6)
            assert not scheme.payload(FULL, RANK)[f"{key[:-1]}B"][:, 1:].any()
    one = client(scheme, FULL, RANK, 4, seed=1)
    one.delta = {key: tensor if key.endswith(".B") else 0 * tensor for key, tensor in one.delta.items()}
    add(scheme, one)
    scheme.finish()
    # What B learned beside all rows of A is there: three directions, not one.
    after = scheme.payload(FULL, RANK)
    product = after[f"{UP}.B"].double() @ after[f"{UP}.A"].double()
    torch.testing.assert_close(product, one.ended(f"{UP}.B") @ one.ended(f"{UP}.A"), rtol=1e-5, atol=1e-5)
    assert int(torch.linalg.matrix_rank(product.float(), atol=1e-3)) == RANK
