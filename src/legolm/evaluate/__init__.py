"""Answers, perplexity and benchmark tasks, with standard errors and paired tests."""

from legolm.evaluate.answers import score
from legolm.evaluate.figure import Figure, RatioFigure, ratio_figure
from legolm.evaluate.paired import Comparison, compare
from legolm.evaluate.perplexity import perplexity
from legolm.evaluate.questions import Questions, measure, read_questions
from legolm.evaluate.tasks import load_tasks, run_tasks

__all__ = [
    "Comparison",
    "Figure",
    "Questions",
    "RatioFigure",
    "compare",
    "load_tasks",
    "measure",
    "perplexity",
    "ratio_figure",
    "read_questions",
    "run_tasks",
    "score",
]
