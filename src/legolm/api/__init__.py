"""The Python face: what a script or a notebook works with. Its public names are those of `legolm` itself."""

from legolm.api.evaluation import Results, evaluate, questions
from legolm.api.federation import Client, Federation, Planned
from legolm.api.models import LLM, cut, read
from legolm.api.run import Plot, Run
from legolm.api.studies import ablate, compare, compose

__all__ = [
    "LLM",
    "Client",
    "Federation",
    "Planned",
    "Plot",
    "Results",
    "Run",
    "ablate",
    "compare",
    "compose",
    "cut",
    "evaluate",
    "questions",
    "read",
]
