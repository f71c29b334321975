"""From files, hub data sets and the starter data to clients' examples, tokens and calibration text."""

from legolm.data.calibration import calibration_tokens, check_text, prose
from legolm.data.examples import ClientData, Example, Message
from legolm.data.render import Tokens, check_whole, render, render_prompt, render_whole
from legolm.data.sequence import begin, begun, check_tokens, encode, windows
from legolm.data.sources import check_apart, paths_of, read_rows, read_text, to_example, with_system
from legolm.data.split import client_data, data_fingerprint, load_parts
from legolm.data.starter import is_starter
from legolm.data.template import DATE, prompt_look, render_template, set_template, take_look

__all__ = [
    "DATE",
    "ClientData",
    "Example",
    "Message",
    "Tokens",
    "begin",
    "begun",
    "calibration_tokens",
    "check_apart",
    "check_text",
    "check_tokens",
    "check_whole",
    "client_data",
    "data_fingerprint",
    "encode",
    "is_starter",
    "load_parts",
    "paths_of",
    "prompt_look",
    "prose",
    "read_rows",
    "read_text",
    "render",
    "render_prompt",
    "render_template",
    "render_whole",
    "set_template",
    "take_look",
    "to_example",
    "windows",
    "with_system",
]
