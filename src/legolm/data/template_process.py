"""The process that renders chat templates: a program of its own, without legolm, that ends when its input does.

A line in: `[template, variables, [[messages, add_generation_prompt, tools], ...]]`. A line out: `{"texts": [...]}`, or
`{"error": ...}`, with `refused` where the template itself refuses the messages. What takes more time or memory than one
may is ended by the system. The variable `today` (YYYY-MM-DD) is the day that `strftime_now` knows.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template

SECONDS = 1.5
"""CPU time of one conversation."""
MEMORY = 1 << 29
"""Bytes of address space over what the process has once it is ready."""
SIZES = Path("/proc/self/statm")
LONGEST = 8_000_000
"""Characters of what a template makes of a conversation."""


class Clock(datetime):
    """What `strftime_now` asks: it is always the start of one day."""

    held = datetime(2024, 7, 26)

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        """The start of the day."""
        return cls.held


def answer(line: str) -> dict[str, Any]:
    """What goes out for a line that came in."""
    template, variables, wanted = json.loads(line)
    try:
        Clock.held = datetime.fromisoformat(variables.pop("today", "2024-07-26"))
        texts = []
        for messages, prompt, tools in wanted:
            (text,), _ = render_jinja_template(
                [messages],
                tools=json.loads(tools) if tools else None,
                chat_template=template,
                add_generation_prompt=prompt,
                **variables,
            )
            texts.append(text)
            text.encode()  # half a character, which no tokenizer takes
            if len(text) > LONGEST:
                return {"error": f"it makes more than {LONGEST} characters of a conversation"}
        return {"texts": texts}
    except TemplateError as error:
        return {"error": str(error), "refused": type(error) is TemplateError}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MB"}
    except Exception as error:  # it is a program: whatever such a one raises
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer until the input ends."""
    chat_template_utils.datetime = Clock  # type: ignore[misc]
    if SIZES.exists():  # other systems than Linux do not keep such a limit
        held = int(SIZES.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the process, also in the middle of C code
        reply = json.dumps(answer(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(f"{reply}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
