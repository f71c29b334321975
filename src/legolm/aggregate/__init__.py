"""Put updates together in the LLM's coordinates: one file a scheme over one small streaming interface."""

from legolm.aggregate import (  # noqa: F401 (each registers itself)
    centralized,
    fedavg,
    fedex_lora,
    fedprox,
    flexlora,
    flora,
    heteagg,
    hetlora,
    local_only,
    median,
    raflora,
    trimmed_mean,
)
from legolm.aggregate.exact import ExactForm
from legolm.aggregate.scheme import SCHEMES, Scheme, Start, make_scheme, scheme_class
from legolm.aggregate.weight import EntryWeight

__all__ = ["SCHEMES", "EntryWeight", "ExactForm", "Scheme", "Start", "make_scheme", "scheme_class"]
