"""What does one server hold of devices that wait? A guarded SuperLink, and devices that ask it as Flower's nodes do.

    python benchmarks/scale.py [--devices 200] [--polls 10]

Each device has a TLS connection and a key, asks for messages every 3 s and beats every 30 s, as SuperNodes do. They ask
here as fast as they can; what counts is the processor time that the SuperLink takes for a request, and the memory that
it has more with each device: both say how many one server holds, and do not depend on what else this machine does.
Where regions stand behind relays, each relay is one device to the server. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

MANY = 10_000
POLL_S = 3.0
"""Flower's SuperNode waits so long where there was no message (start_client_internal.py)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--polls", type=int, default=10)
    options = parser.parse_args()
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
    from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
    from flwr.proto.node_pb2 import Node
    from flwr.supercore.interceptors.http import RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    from legolm.system import Helpers, free_port
    from legolm.trust import CA, KEY, add_device, make_authority, make_key, make_server, server_files

    with tempfile.TemporaryDirectory(prefix="legolm-scale-") as temporary, ExitStack() as stack:
        folder, port = Path(temporary), free_port()
        home = folder / "federation"
        make_authority(home)
        make_server(home, ["127.0.0.1"])
        keys: list[ec.EllipticCurvePrivateKey] = []
        for number in range(options.devices):
            device = folder / "devices" / f"d{number:05d}"
            add_device(home, device.name, make_key(device))
            key = load_ssh_private_key((device / KEY).read_bytes(), None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            keys.append(key)
        ca, certificate, private = map(str, server_files(home))
        helpers = stack.enter_context(Helpers(folder / "flower", {"FLWR_TELEMETRY_ENABLED": "0"}))
        command = [sys.executable, "-m", "legolm.federate.bridge.guard", str(home), str(folder / "blocks")]
        command += ["--ssl-ca-certfile", ca, "--ssl-certfile", certificate, "--ssl-keyfile", private]
        command += ["--host", "127.0.0.1", "--port", str(port), "--isolation", "process", "--enable-supernode-auth"]
        helpers.start("superlink", [*command, "--database", str(folder / "superlink.db")])
        until_there(port)
        (process,) = (one for one in psutil.Process().children() if "bridge.guard" in " ".join(one.cmdline()))

        def spent() -> float:
            times = process.cpu_times()
            return float(times.user + times.system)

        def rss() -> float:
            return float(process.memory_info().rss) / 1e6

        clients, nodes, memory = [], list[Node](), dict[int, float]()
        for number, key in enumerate(keys, 1):
            client = FleetHttpClient.from_server_address(
                f"127.0.0.1:{port}",
                insecure=False,
                root_certificates=str(home / CA),
                interceptors=[
                    RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                    NodeAuthHttpInterceptor(key, key.public_key()),
                ],
            )
            clients.append(stack.enter_context(client))
            public = public_key_to_bytes(key.public_key())
            request = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
            nodes.append(Node(node_id=client.ActivateNode(request).node_id))
            if number in (options.devices // 4, options.devices):
                memory[number] = rss()
        (few, before), (many, after) = memory.items()
        began = spent()
        for _ in range(options.polls):
            for client, node in zip(clients, nodes, strict=True):
                client.PullMessages(PullMessagesRequest(node=node))
        poll_ms = 1e3 * (spent() - began) / (options.polls * options.devices)
        began = spent()
        for client, node in zip(clients, nodes, strict=True):
            client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL))
        beat_ms = 1e3 * (spent() - began) / options.devices
    share = (poll_ms / POLL_S + beat_ms / HEARTBEAT_DEFAULT_INTERVAL) / 1e3
    each = (after - before) / (many - few)
    print(
        json.dumps(
            {
                "devices": options.devices,
                "poll_cpu_ms": round(poll_ms, 3),
                "heartbeat_cpu_ms": round(beat_ms, 3),
                "core_share_each": round(share, 6),
                "devices_per_core": round(1 / share),
                "rss_mb": round(after, 1),
                "kb_each": round(1e3 * each, 1),
                "for_10000": {"cores": round(MANY * share, 1), "rss_mb": round(after + each * (MANY - many))},
                "with_100_relays": {"cores_of_server": round(100 * share, 2), "cores_of_each": round(100 * share, 2)},
            }
        )
    )


def until_there(port: int, patience_s: float = 600.0) -> None:
    """Wait for who listens there."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError("the SuperLink did not begin")


if __name__ == "__main__":
    main()
