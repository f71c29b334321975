"""The server: the rounds, their stages, who scores what, the gate."""

from legolm.federate.server.begin import start_factors
from legolm.federate.server.loop import Rounds, best_round, scores_of

__all__ = ["Rounds", "best_round", "scores_of", "start_factors"]
