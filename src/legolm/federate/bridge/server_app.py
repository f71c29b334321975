"""The Flower ServerApp of a run: does on Flower's grid what the run's process asks over a socket, and ends with it."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from .frames import Link, connect

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Until the run's process closes the connection."""
    with connect(str(context.run_config["socket"])) as link:
        while True:
            try:
                header, body = link.receive()
            except OSError:
                return
            {"nodes": _nodes, "push": _push, "pull": _pull}[header["do"]](grid, link, header, body)


def _nodes(grid: Grid, link: Link, header: dict[str, object], body: bytes) -> None:
    """Every node that is online: its id, its registered name, which it cannot choose, and since when."""
    found = grid.get_nodes()  # type: ignore[attr-defined]
    nodes = [[str(node.node_id), node.name, node.last_activated_at] for node in found]
    link.send({"nodes": nodes})


def _push(grid: Grid, link: Link, header: dict[str, object], body: bytes) -> None:
    request = ConfigRecord({"content": body, "welcome": str(header["welcome"])})
    if isinstance(left := header["left_s"], float):
        request["left_s"] = left
    node = int(str(header["node"]))
    sent = list(grid.push_messages([Message(RecordDict({"request": request}), node, MessageType.TRAIN)]))
    link.send({"id": sent[0] if sent else None})


def _pull(grid: Grid, link: Link, header: dict[str, object], body: bytes) -> None:
    """One frame a reply that came, and one that says that there are no more."""
    for reply in grid.pull_messages(header["ids"]):  # type: ignore[arg-type]
        found: dict[str, object] = {"id": reply.metadata.reply_to_message_id}
        content: object = b""
        if reply.has_error():
            found |= {"code": reply.error.code, "error": reply.error.reason or ""}
        else:
            record = reply.content.config_records.get("reply", ConfigRecord())
            content = record.get("content")
            found |= {key: str(record[key]) for key in ("error", "again") if key in record}
            if not isinstance(content, bytes) and len(found) == 1:
                found["error"] = "its message has no reply in it"
        link.send(found, content if isinstance(content, bytes) else b"")
    link.send({})
