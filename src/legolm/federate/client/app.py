"""The client as a Flower ClientApp: bytes in, bytes out."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from legolm.errors import LegolmError
from legolm.federate.client.runtime import ClientRuntime
from legolm.federate.client.site import simulated
from legolm.runs import RunDir


def client_app(path: Path) -> ClientApp:
    """All clients of a simulated run, in the run folder `path`."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        content = message.content["request"]["content"]
        assert isinstance(content, bytes)
        try:
            reply = ConfigRecord({"content": _runtime(path).answer(content)})
        except LegolmError as error:
            reply = ConfigRecord({"error": str(error)})
        return Message(RecordDict({"reply": reply}), reply_to=message)

    app.train()(answer)
    return app


@lru_cache(maxsize=1)
def _runtime(path: Path) -> ClientRuntime:
    """Of this process: models and data are loaded once."""
    return ClientRuntime(simulated(RunDir(path)))
