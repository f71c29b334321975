"""HeteAgg (LEGO, arXiv 2410.18287, and its patent application US 2026/0010799 A1, claims 5 and 6) in three forms.

`factor` averages A and B each for itself, `frozen_side` trains and sends one of them, `exact` aggregates products.
With `mask: saliency` a client sends only the (1 − s) largest |Δ| of each tensor, s the sparsity of its block's bit
masks; the saliency mask never enters D.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from legolm.aggregate.exact import RESIDUAL_RANK, ExactForm, Residual
from legolm.aggregate.factors import Denominator, FactorSum
from legolm.aggregate.interface import Scheme, scheme
from legolm.aggregate.redrawn import RedrawnSide


@scheme("heteagg")
def heteagg(
    *,
    form: Literal["factor", "exact", "frozen_side"] = "frozen_side",
    denominator: Denominator = "coverage_mean",
    mask: Literal["structure", "saliency"] = "structure",
    residual: Residual = "feedback",
    residual_rank: Annotated[int, Field(ge=1)] = RESIDUAL_RANK,
    redraw: Annotated[int, Field(ge=0)] = 0,
    whiten: Annotated[str, Field(min_length=1)] | None = None,
) -> Scheme:
    """`denominator`: mean over those who hold an entry, or over all. `residual`, `residual_rank`: the exact form's.

    `redraw`: rounds after which the frozen side is made anew, and what was learned beside it folded; 0: never.
    `whiten`: text that frozen factors which read the hidden state see evenly: public (a starter set, files, hub:...),
    or that of the clients, by their sums (`clients`).
    """
    if whiten is not None and (redraw or form != "frozen_side"):
        raise ValueError("whiten is of a frozen side that stays; take form frozen_side and redraw 0, or leave it out")
    if redraw and form != "frozen_side":
        raise ValueError(f"redraw {redraw} is of form 'frozen_side'; form {form!r} freezes no side")
    if form == "exact":
        if mask == "saliency":
            raise ValueError("mask 'saliency' is on factors; form 'exact' aggregates products: take mask structure")
        return ExactForm(denominator, residual, residual_rank)
    for name, value, usual in (("residual", residual, "feedback"), ("residual_rank", residual_rank, RESIDUAL_RANK)):
        if value != usual:
            raise ValueError(f"{name} {value!r} is of form 'exact'; form {form!r} has none")
    if redraw:
        return RedrawnSide(denominator, mask == "saliency", redraw)
    return FactorSum(denominator, form == "frozen_side", mask == "saliency", whitened=whiten)
