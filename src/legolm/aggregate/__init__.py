"""Put changes together in the LLM's coordinates: one file a scheme over one small streaming interface."""

from legolm.aggregate import (  # noqa: F401 (each registers itself)
    fedavg,
    fedex_lora,
    flexlora,
    flora,
    heteagg,
    hetlora,
    multi_krum,
    nearest_mixing,
    raflora,
    robust,
)
from legolm.aggregate.exact import ExactForm
from legolm.aggregate.factors import FactorSum
from legolm.aggregate.interface import Scheme, Start, make_scheme, scheme
from legolm.aggregate.rehearsal import rehearse
from legolm.aggregate.share import Weighing, capped
from legolm.aggregate.weight import held_by, holders

__all__ = [
    "ExactForm",
    "FactorSum",
    "Scheme",
    "Start",
    "Weighing",
    "capped",
    "held_by",
    "holders",
    "make_scheme",
    "rehearse",
    "scheme",
]
