"""Answers, perplexity and benchmark tasks, with standard errors and paired tests."""

from legolm.evaluation.answers import Answers, score, score_each
from legolm.evaluation.by_input import OTHERWISE, save_familiar
from legolm.evaluation.figure import Figure, digest
from legolm.evaluation.greedy import answer_rows, generate
from legolm.evaluation.harness import run_tasks
from legolm.evaluation.kept import kept_beside
from legolm.evaluation.paired import compare
from legolm.evaluation.perplexity import perplexity
from legolm.evaluation.questions import TEXT, Questions, check_finite, measure, read_questions
from legolm.evaluation.side_by_side import (
    Evaluation,
    Result,
    Subject,
    alone,
    evaluate,
    line_up,
    load_subject,
    write_json,
)
from legolm.evaluation.speed import tokens_per_second
from legolm.evaluation.stream import answer_ends, reply
from legolm.evaluation.tasks import load_tasks

__all__ = [
    "OTHERWISE",
    "TEXT",
    "Answers",
    "Evaluation",
    "Figure",
    "Questions",
    "Result",
    "Subject",
    "alone",
    "answer_ends",
    "answer_rows",
    "check_finite",
    "compare",
    "digest",
    "evaluate",
    "generate",
    "kept_beside",
    "line_up",
    "load_subject",
    "load_tasks",
    "measure",
    "perplexity",
    "read_questions",
    "reply",
    "run_tasks",
    "save_familiar",
    "score",
    "score_each",
    "tokens_per_second",
    "write_json",
]
