"""From files, hub data sets and the starter data to clients' examples, tokens and calibration text."""

from legolm.data.calibration import calibration_tokens, check_text
from legolm.data.examples import ClientData, Example, Message
from legolm.data.render import Tokens, check_whole, render, render_whole
from legolm.data.sources import check_apart, read_rows, read_text, to_example, with_system
from legolm.data.split import client_data, data_fingerprint, load_parts, own_part
from legolm.data.starter import is_starter

__all__ = [
    "ClientData",
    "Example",
    "Message",
    "Tokens",
    "calibration_tokens",
    "check_apart",
    "check_text",
    "check_whole",
    "client_data",
    "data_fingerprint",
    "is_starter",
    "load_parts",
    "own_part",
    "read_rows",
    "read_text",
    "render",
    "render_whole",
    "to_example",
    "with_system",
]
