"""Put updates together in the LLM's coordinates: one file a scheme over one small streaming interface."""

from legolm.aggregate import heteagg  # noqa: F401 (registers itself)
from legolm.aggregate.scheme import SCHEMES, Scheme, make_scheme

__all__ = ["SCHEMES", "Scheme", "make_scheme"]
