"""The Flower ClientApp of a device: gives a request to the resident process, and its answer back."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from .frames import connect

app = ClientApp()


@app.train()
def answer(message: Message, context: Context) -> Message:
    """The request's bytes go as they came, and the seconds left; `again` in the reply asks for the same again later."""
    request = message.content["request"]
    try:
        with connect(str(context.node_config["socket"])) as link:
            header = {"welcome": str(request["welcome"]), "left_s": request.get("left_s")}
            link.send(header, bytes(request["content"]))  # type: ignore[arg-type]
            header, body = link.receive()
    except OSError as error:
        header, body = {"again": f"its legolm client does not answer ({error})"}, b""
    reply = ConfigRecord({"content": body} if not header else {key: str(value) for key, value in header.items()})
    return Message(RecordDict({"reply": reply}), reply_to=message)
