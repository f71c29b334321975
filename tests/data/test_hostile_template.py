"""Chat templates are programs of others: broken, endless and greedy ones give one line, and soon."""

from __future__ import annotations

import copy
import os
import resource
import subprocess
import sys
import time

import pytest
from transformers import PreTrainedTokenizerFast

from legolm.data import Example, Message, render
from legolm.errors import LegolmError

PAIR = Example((Message("user", "Capital of Italy?"), Message("assistant", "Rome")))
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 1 / 0 }}", r"fails \(ZeroDivisionError: division by zero\)"),
        ("{{ nothing.of.this }}", r"fails \('nothing' is undefined\)"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"fails \(RecursionError"),
        ("{% include 'a' %}", "fails"),
        ("{% import 'a' as b %}", "fails"),
        ("{% if", r"fails \(unexpected"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        (ENDLESS, "does not end, or needs too much memory"),
        ("{{ 'x' * 300_000_000 }}", "more than 8000000 characters|too much memory|more than 512 MB"),
        ("{{ 'x' | center(10**11) }}", "needs more than 512 MB"),
        (DOUBLED, "needs more than 512 MB"),
        ("{{ '\\ud800' }}{% for m in messages %}{{ m.content }}\n{% endfor %}", "fails .*surrogates not allowed"),
        ("", "leaves out the answer"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "leaves out the answer",
        ),
        (
            "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}",
            "leaves out the answer, or writes another one",
        ),
        ("{% if messages | length > 1 %}{{ messages[-1].content }}{% endif %}", "writes nothing before the answer"),
        (
            "{% for m in messages %}{% if m.content != 'Rome' %}{{ m.content }}{% endif %}{% endfor %}",
            "nothing of the answer",
        ),
        ("{{ raise_exception('no system') }}", r"refuses the data \(no system\)"),
    ],
)
def test_is_one_line_within_seconds(tokenizer: PreTrainedTokenizerFast, template: str, says: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    with pytest.raises(LegolmError, match=f"^model: .*its chat template .*({says})") as caught:
        render(PAIR, with_template(tokenizer, template), 512)
    assert "\n" not in str(caught.value)
    assert time.process_time() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_one_that_is_endless_for_one_row_alone_is_caught_there(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.chat_template is not None
    hidden = "{% if 'Spain' in messages[0].content %}" + ENDLESS + "{% endif %}" + tokenizer.chat_template
    guarded = with_template(tokenizer, hidden)
    wanted = render(PAIR, tokenizer, 512)
    assert render(PAIR, guarded, 512) == wanted
    with pytest.raises(LegolmError, match="does not end"):
        render(Example((Message("user", "Capital of Spain?"), PAIR.messages[1])), guarded, 512)
    assert render(PAIR, guarded, 512) == wanted


def test_its_process_ends_with_ours() -> None:
    code = (
        "from legolm.data.template import _RENDERER\n"
        "_RENDERER.ask(['{{ 1 }}', {}, [[[], False]]])\n"
        "import os\nprint(_RENDERER._process.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{pid}/stat") as state:  # noqa: PTH123
            if state.read().rpartition(")")[2].split()[0] == "Z":  # nobody waits for it
                return
        time.sleep(0.05)
    pytest.fail("it is still there")
