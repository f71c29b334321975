"""Chat templates are programs of others: they run in a process of their own, in bounded time and memory."""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from legolm.config import DataConfig
from legolm.data.sequence import begin
from legolm.errors import LegolmError, brief
from legolm.system import read_bounded

PROGRAM = Path(__file__).with_name("template_process.py")
Turn = dict[str, Any]
WAY_OUT = "mend chat_template.jinja (or tokenizer_config.json) there, or take another checkpoint"
MAX_BYTES = 1 << 20
"""Of a template's file: a hundred times the longest."""
DATE = "template_date"
"""Where a tokenizer's config keeps the day that its template takes for today."""
DAY = "2024-07-26"
"""The day where it keeps none."""
_ASKS_DAY = re.compile(r"""strftime_now\(\s*(['"])([^'"]*)\1\s*\)""")
_ROLE, _CONTENT = "message['role']", "message['content']"
BUILT_IN = {
    # Taori et al., https://github.com/tatsu-lab/stanford_alpaca; a system message stands for its preamble.
    "alpaca": (
        "{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\\n\\n' }}"
        "{%- else %}{{- 'Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\\n\\n' }}{%- endif %}"
        "{%- for message in messages %}"
        f"{{%- if {_ROLE} == 'user' %}}{{{{- '### Instruction:\\n' + {_CONTENT} + '\\n\\n' }}}}"
        f"{{%- elif {_ROLE} == 'assistant' %}}{{{{- '### Response:\\n' + {_CONTENT} + eos_token + '\\n\\n' }}}}"
        f"{{%- elif {_ROLE} != 'system' or not loop.first %}}"
        "{{- raise_exception('alpaca has messages of user and assistant, and of system at the start') }}{%- endif %}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}"
    ),
    "chatml": (
        "{%- for message in messages %}"
        f"{{{{- '<|im_start|>' + {_ROLE} + '\\n' + {_CONTENT} + END + '\\n' }}}}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
}
"""`data.template` by name, without what the tokenizer begins a text with; END is what ends a turn."""


class _Renderer:
    """The process, started when it is first needed and again after it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._owner = 0

    def ask(self, request: Any) -> dict[str, Any] | None:
        """Its reply; None when it was ended."""
        with self._lock:
            if self._process is None or self._owner != os.getpid():  # never that of a process which this is a fork of
                self._process, self._owner = self._started(), os.getpid()
            process = self._process
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                reply: dict[str, Any] = json.loads(process.stdout.readline())
                return reply
            except (BrokenPipeError, json.JSONDecodeError):
                self._end()
                return None
            except BaseException:  # an interruption: its reply would be taken for that of the next request
                self._end()
                raise

    @staticmethod
    def _started() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM)],  # -P: modules beside it are none of its own
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "USE_TORCH": "0"},
            start_new_session=True,  # Ctrl-C is for those who can say how to go on
        )

    def _end(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None


_RENDERER = _Renderer()
atexit.register(_RENDERER._end)


def set_template(tokenizer: Any, data: DataConfig) -> None:
    """Give the tokenizer the chat template and the day of a config; it is saved with both.

    One of ours begins as the tokenizer begins a text, a file's as it says. Raises `LegolmError` for a file that cannot
    be read.
    """
    if data.template in BUILT_IN:
        end = "<|im_end|>"
        known = tokenizer.convert_tokens_to_ids(end) not in (None, tokenizer.unk_token_id)
        body = BUILT_IN[data.template].replace("END", f"'{end}'" if known else "eos_token")
        first = "".join(tokenizer.convert_ids_to_tokens(begin(tokenizer)))
        there = not first or f"'{first}'" in body[: body.index("+")]
        tokenizer.chat_template = body if there else f"{{{{- {json.dumps(first, ensure_ascii=False)} }}}}{body}"
    elif data.template != "model":
        path = Path(data.template)
        try:
            tokenizer.chat_template = read_bounded(path, MAX_BYTES).decode("utf-8-sig")
        except (OSError, ValueError) as error:
            raise LegolmError(
                f"data.template: {data.template!r} is neither model, {', '.join(BUILT_IN)} nor a file with a Jinja "
                f"template that can be read ({brief(error)})"
            ) from None
        tokenizer.template_file = path
    if writes_date(tokenizer):
        tokenizer.init_kwargs[DATE] = data.date.isoformat()


def writes_date(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template asks for the day."""
    return "strftime_now" in str(tokenizer.chat_template)


def dated_template(tokenizer: Any) -> tuple[str | None, list[str]]:
    """The chat template with its day written out, for programs that would write today's; what is to be said of that.

    It is the day that `render_template` writes. Raises `LegolmError` for a template that computes how it writes a day.
    """
    if not tokenizer.chat_template:
        return None, []
    template = str(tokenizer.get_chat_template())
    if not writes_date(tokenizer):
        return template, []
    day = date.fromisoformat(tokenizer.init_kwargs.get(DATE, DAY))
    template = _ASKS_DAY.sub(lambda found: json.dumps(day.strftime(found[2]), ensure_ascii=False), template)
    if "strftime_now(" in template.replace(" ", ""):
        raise template_error(tokenizer, "computes how it writes the day", "write the format into strftime_now(...)")
    return template, [f"the chat template has {day} for today, as the model was trained"]


def prompt_look(tokenizer: Any) -> tuple[Any, str | None]:
    """What decides how prompts look: the chat template, and the day that it writes."""
    return tokenizer.chat_template, tokenizer.init_kwargs.get(DATE)


def take_look(tokenizer: Any, look: tuple[Any, str | None]) -> None:
    """Let the tokenizer's prompts look as another's do (`prompt_look`)."""
    tokenizer.chat_template = look[0]
    tokenizer.init_kwargs.pop(DATE, None)
    tokenizer.init_kwargs |= {DATE: look[1]} if look[1] else {}


def unused_tools(template: Any, count: int) -> str:
    """A sentence where so many chats have tools, and the chat template has no place for them; else nothing."""
    if not count or "tools" in str(template):
        return ""
    return f"The chat template has no place for tools: nothing uses those of {count:,} chats."


def render_template(tokenizer: Any, wanted: Sequence[tuple[Sequence[Turn], bool, str]]) -> list[str]:
    """What the tokenizer's chat template makes of each conversation; the bool: begin an answer at its end; the text:
    tools as a JSON list, or nothing.

    Raises `LegolmError` for a template that refuses the messages, is broken, or takes too much time or memory.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several, and none is the default
        raise template_error(tokenizer, f"cannot be chosen ({brief(error)})") from None
    today = {"today": tokenizer.init_kwargs[DATE]} if DATE in tokenizer.init_kwargs else {}
    reply = _RENDERER.ask([template, tokenizer.special_tokens_map | today, wanted])
    if reply is None:
        raise template_error(tokenizer, "does not end, or needs too much memory")
    if reply.get("refused"):
        why = f"refuses the data ({brief(reply['error'])})"
        raise template_error(tokenizer, why, "mend `data.system` or the messages")
    if "error" in reply:
        raise template_error(tokenizer, f"fails ({brief(reply['error'])})")
    texts: list[str] = reply["texts"]
    return texts


def template_error(tokenizer: Any, fault: str, way_out: str = WAY_OUT) -> LegolmError:
    """What is wrong with the tokenizer's chat template."""
    if file := getattr(tokenizer, "template_file", None):
        return LegolmError(f"data.template: {file}: it {fault}; {way_out if way_out != WAY_OUT else 'mend it'}")
    return LegolmError(f"model: {tokenizer.name_or_path}: its chat template {fault}; {way_out}")
