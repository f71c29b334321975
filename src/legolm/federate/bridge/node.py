"""Flower's node on a device, with what starts a ClientApp for each message.

Flower's own executor is one more process, and starts a command for each message, which imports for two seconds of a
core, on a weak device many more. Here a message's process is forked from one that has imported what all need.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing import forkserver

from legolm.federate.bridge.child import end_with_parent

APP = "flwr.supernode.runtime.run_clientapp"
LOOK_S = 1.0
"""From one look for messages to the next, as Flower's executor."""


def main() -> None:
    """`python -m legolm.federate.bridge.node ADDRESS [options]`: a `flower-supernode` that ends with its parent.

    ADDRESS is of the node's Runtime API, on this machine only.
    """
    from flwr.supernode.cli.flower_supernode import flower_supernode

    end_with_parent()
    address = sys.argv.pop(1)
    host, _, port = address.rpartition(":")
    sys.argv += ["--isolation", "process", "--host", host, "--port", port]
    threading.Thread(target=_start_apps, args=(address,), daemon=True).start()
    flower_supernode()


def _start_apps(address: str) -> None:
    """For the messages that the node takes; without that it ends, and is started again."""
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.runtime import RuntimeHttpClient

    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload([APP, "legolm.system"])
    try:
        forkserver.ensure_running()  # before a message is taken that it could not serve
        node = RuntimeHttpClient.from_server_address(
            server_address=address,
            insecure=True,
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")],
            retry_invoker=make_simple_http_retry_invoker(),
        )
        while True:
            found = node.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
            if found.HasField("task") and found.token:
                # A daemon of `multiprocessing`: it ends with the node, which waits for any other.
                forked.Process(target=_run_app, args=(address, found.token, os.getpid()), daemon=True).start()
            time.sleep(LOOK_S)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def _run_app(address: str, token: str, parent: int) -> None:
    from flwr.supernode.runtime.run_clientapp import run_clientapp

    from legolm.system import end_with_parent as end_with_node

    end_with_node()  # Flower's own watch interrupts the main thread, which hears of it when the resident has answered
    run_clientapp(address, token, insecure=True, parent_pid=parent)


if __name__ == "__main__":
    main()
