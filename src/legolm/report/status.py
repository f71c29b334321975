"""A run as it goes: its rounds, and each device's state, block, bytes and loss."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from legolm.runs import RunDir, finished, lacking, read_live, read_stages, rounds_of, traffic_alone, validations


def read_status(folder: Path) -> dict[str, Any]:
    """What stands in the run folder now, as JSON has it. Raises `LegolmError` for what is no run."""
    run = RunDir(folder)
    config, lines = run.known(), folder / "metrics.jsonl"
    records, live = read_stages(lines) if lines.exists() else [], read_live(folder).root
    clients, rounds = {}, rounds_of(records)
    sent = [*(record.sent for record in rounds), traffic_alone(records)]
    for one in config.clients:
        last = next((r for r in reversed(rounds) if one.id in {c for held in r.held for c in held.clients}), None)
        held = next((held for held in last.held if one.id in held.clients), None) if last else None
        now = live.get(one.id)
        clients[one.id] = {
            "block": one.named[0] if one.named else one.block,
            "state": now.state if now else None,
            "since": now.since.isoformat() if now else None,
            "updates": sum(one.id in r.accepted for r in rounds),
            "refused": sum(any(no.client == one.id for no in r.refused) for r in rounds),
            "bytes_up": sum(each[one.id].up for each in sent if one.id in each),
            "bytes_down": sum(each[one.id].down for each in sent if one.id in each),
            "validation": held.validation if held else None,
        }
    done, losses = [r for r in rounds if r.round > 0], validations(rounds, lacking(rounds))
    return {
        "run": run.identity().run if run.identity_file.exists() else None,
        "rounds_done": len(done),
        "rounds": config.federation.rounds,
        "finished": finished(folder),
        "validation": [losses.get(r.round) for r in rounds],
        "privacy": next((r.privacy.model_dump() for r in reversed(done) if r.privacy), None),
        "seconds": [r.seconds for r in done],
        "clients": clients,
    }


def show_status(found: dict[str, Any]) -> Group:
    """The same for people."""
    losses = [f"{loss:.3f}" for loss in found["validation"] if loss is not None]
    title = f"round {found['rounds_done']} of {found['rounds']}" + (", finished" if found["finished"] else "")
    if losses:
        title += f"; loss on validation data {' → '.join(losses[-4:])}"
    if found["privacy"]:
        title += f"; epsilon {found['privacy']['epsilon']:.3g} at delta {found['privacy']['delta']:g}"
    columns: dict[str, list[str]] = {"client": list(found["clients"])}
    every = list(found["clients"].values())
    columns |= {
        "block": [one["block"] or "" for one in every],
        "state": [one["state"] or "" for one in every],
        "since": [_ago(one["since"]) for one in every],
        "updates": [str(one["updates"]) for one in every],
        "refused": [str(one["refused"]) for one in every],
        "got, MB": [f"{one['bytes_down'] / 1e6:.2f}" for one in every],
        "sent, MB": [f"{one['bytes_up'] / 1e6:.2f}" for one in every],
        "loss": ["" if one["validation"] is None else f"{one['validation']:.3f}" for one in every],
    }
    there = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table(*there)
    for row in zip(*there.values(), strict=True):
        table.add_row(*row)
    return Group(title, table)


def _ago(since: str | None) -> str:
    if since is None:
        return ""
    seconds = max(0, round((datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds()))
    return f"{seconds} s" if seconds < 120 else f"{seconds // 60} min" if seconds < 7200 else f"{seconds // 3600} h"
