"""Changes of earlier rounds, discounted by entry: the asynchronous rounds' mathematics.

A client k that trained from what it received in round r sends its change Δ_k to round t ≥ r, some buffers later
(FedBuff: Nguyen et al., arXiv 2106.06581). There a whole change counts 1/√(1 + t − r). Here blocks differ, and an entry
that few devices hold may not have moved since, however many rounds went by. So each entry e has its own age

    a_ke = #{ r ≤ u < t : in round u somebody's update was added that holds e } ,    s(a) = 1 / √(1 + a)

and round t sums

    N_e = Σ_k n_k s(a_ke) Δ_ke ,    D_e = Σ_k n_k c_ke

with the weights n and coverages c of any round. The discount is in N only: in a mean of changes that are all as old it
would else cancel. An entry that nobody moved since is as fresh as on the first day (s = 1), one that everybody holds
ages by each round: with one block for all this is FedBuff's discount. As coverage is separable (layer; KV group or
neuron; rank row), so are ages: no tensor of the LLM's size is made for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from legolm.adapter import Change
from legolm.aggregate.weight import EntryWeight, Placement
from legolm.block import Coverage
from legolm.models import Shape


def moved(shape: Shape, rank: int, members: Iterable[tuple[Coverage, int]]) -> EntryWeight:
    """Which entries of the LLM's factors a round moved whose added updates were of these (coverage, rank)."""
    weight = EntryWeight(shape, rank)
    for coverage, own in members:
        weight.add(coverage, own, 1.0)
    return weight


def discounted(change: Change, coverage: Coverage, since: Sequence[EntryWeight]) -> Change:
    """The change with each entry times s of its age; `since` are the rounds (`moved`) from its broadcast on."""
    if not since:
        return change
    placement = Placement.of(coverage)
    delta = {}
    for key, tensor in change.delta.items():
        age = torch.stack([one.of(key, tensor) > 0 for one in since]).sum(0)  # of the LLM's units, or one for all
        index = placement.index(key)
        if index is not None:
            age = age.index_select(1 if key.endswith(".A") else 0, index)
        delta[key] = tensor * (1.0 + age).rsqrt()
    return replace(change, delta=delta)
