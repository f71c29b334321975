"""From files, hub data sets and the starter data to clients' examples, tokens and calibration text."""

from legolm.data.calibration import (
    calibration_tokens,
    check_length,
    check_samples,
    check_text,
    help_tokens,
    is_bundled,
    own_tokens,
)
from legolm.data.examples import Example, Message
from legolm.data.familiar import Familiar, Seen
from legolm.data.files import written
from legolm.data.layouts import Reading, read_examples, to_example, unread, with_system
from legolm.data.prose import read_text, text_tokens
from legolm.data.render import Tokens, render, render_prompt, render_whole
from legolm.data.sequence import begin, begun, check_tokens, encode, special_ids, windows
from legolm.data.sources import check_apart, paths_of, read_rows
from legolm.data.split import client_data, data_fingerprint, load_parts, own_part
from legolm.data.starter import is_starter, public_starter_text
from legolm.data.store import ClientData, Examples
from legolm.data.template import (
    DATE,
    dated_template,
    prompt_look,
    render_template,
    set_template,
    take_look,
    unused_tools,
)
from legolm.data.tokens import TokenRows, Turns, check_whole, left_out, shortened, tokenize, tokens_of

__all__ = [
    "DATE",
    "ClientData",
    "Example",
    "Examples",
    "Familiar",
    "Message",
    "Reading",
    "Seen",
    "TokenRows",
    "Tokens",
    "Turns",
    "begin",
    "begun",
    "calibration_tokens",
    "check_apart",
    "check_length",
    "check_samples",
    "check_text",
    "check_tokens",
    "check_whole",
    "client_data",
    "data_fingerprint",
    "dated_template",
    "encode",
    "help_tokens",
    "is_bundled",
    "is_starter",
    "left_out",
    "load_parts",
    "own_part",
    "own_tokens",
    "paths_of",
    "prompt_look",
    "public_starter_text",
    "read_examples",
    "read_rows",
    "read_text",
    "render",
    "render_prompt",
    "render_template",
    "render_whole",
    "set_template",
    "shortened",
    "special_ids",
    "take_look",
    "text_tokens",
    "to_example",
    "tokenize",
    "tokens_of",
    "unread",
    "unused_tools",
    "windows",
    "with_system",
    "written",
]
