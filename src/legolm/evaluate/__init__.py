"""Answers and perplexity."""

from legolm.evaluate.answers import mean_loss, score
from legolm.evaluate.perplexity import perplexity

__all__ = ["mean_loss", "perplexity", "score"]
