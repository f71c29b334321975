"""Answers, perplexity and benchmark tasks, with standard errors and paired tests."""

from legolm.evaluate.answers import score
from legolm.evaluate.figure import Figure, digest
from legolm.evaluate.paired import compare
from legolm.evaluate.perplexity import perplexity
from legolm.evaluate.questions import TEXT, Questions, check_finite, measure, read_questions
from legolm.evaluate.side_by_side import Result, evaluate, line_up, write_json

__all__ = [
    "TEXT",
    "Figure",
    "Questions",
    "Result",
    "check_finite",
    "compare",
    "digest",
    "evaluate",
    "line_up",
    "measure",
    "perplexity",
    "read_questions",
    "score",
    "write_json",
]
