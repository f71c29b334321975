"""The server: the rounds, their stages, who scores what, the gate."""

from legolm.federate.server.asking import ask
from legolm.federate.server.begin import begin, start_factors
from legolm.federate.server.calibrating import asks_clients, calibrate, summed
from legolm.federate.server.dispatch import checked_scores, steps_of
from legolm.federate.server.loop import Rounds
from legolm.federate.server.members import LLM, Members, drawn, is_dense
from legolm.federate.server.placing import place
from legolm.federate.server.protecting import Known, fit
from legolm.federate.server.public import familiar_of, public_examples, seen_in_public
from legolm.federate.server.scoring import server_examples
from legolm.federate.server.secure import check_withheld, roster_of
from legolm.federate.server.whitening import place_frozen, whiten, whitening_text

__all__ = [
    "LLM",
    "Known",
    "Members",
    "Rounds",
    "ask",
    "asks_clients",
    "begin",
    "calibrate",
    "check_withheld",
    "checked_scores",
    "drawn",
    "familiar_of",
    "fit",
    "is_dense",
    "place",
    "place_frozen",
    "public_examples",
    "roster_of",
    "seen_in_public",
    "server_examples",
    "start_factors",
    "steps_of",
    "summed",
    "whiten",
    "whitening_text",
]
