"""From files, hub data sets and the starter data to clients' examples, tokens and calibration text."""

from legolm.data.calibration import calibration_tokens, check_text
from legolm.data.render import Tokens, check_whole, render, render_whole
from legolm.data.sources import Row, read_rows, read_text, to_example, with_system
from legolm.data.split import data_fingerprint, load_parts
from legolm.data.starter import CLIENT_LANGUAGES, PUBLIC_LANGUAGES, public_starter_text, starter_parts

__all__ = [
    "CLIENT_LANGUAGES",
    "PUBLIC_LANGUAGES",
    "Row",
    "Tokens",
    "calibration_tokens",
    "check_text",
    "check_whole",
    "data_fingerprint",
    "load_parts",
    "public_starter_text",
    "read_rows",
    "read_text",
    "render",
    "render_whole",
    "starter_parts",
    "to_example",
    "with_system",
]
