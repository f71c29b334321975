"""HeteAgg (LEGO, arXiv 2410.18287, and its patent application US 2026/0010799 A1, claims 5 and 6) in three forms.

`factor` averages A and B each for itself, `frozen_side` trains and sends one of them, `exact` aggregates products.
With `mask: saliency` a client sends only the (1 − s) largest |Δ| of each tensor (`wire`); that mask never enters D.
"""

from __future__ import annotations

from legolm.aggregate.exact import ExactForm
from legolm.aggregate.factors import FactorSum
from legolm.aggregate.scheme import SCHEMES

SCHEMES["heteagg"] = lambda config: ExactForm if config.form == "exact" else FactorSum
