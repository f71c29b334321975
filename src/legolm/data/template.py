"""Chat templates are programs of others: they run in a process of their own, in bounded time and memory."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from legolm.errors import LegolmError, brief

PROGRAM = Path(__file__).with_name("template_process.py")
Turn = dict[str, Any]
WAY_OUT = "mend chat_template.jinja (or tokenizer_config.json) there, or take another checkpoint"


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


def render_template(tokenizer: Any, wanted: Sequence[tuple[Sequence[Turn], bool]]) -> list[str]:
    """What the tokenizer's chat template makes of each conversation; the bool: begin an answer at its end.

    Raises `LegolmError` for a template that refuses the messages, is broken, or takes too much time or memory.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several, and none is the default
        raise template_error(tokenizer, f"cannot be chosen ({brief(error)})") from None
    reply = _RENDERER.ask([template, tokenizer.special_tokens_map, wanted])
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
    return LegolmError(f"model: {tokenizer.name_or_path}: its chat template {fault}; {way_out}")
