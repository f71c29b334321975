"""What runs in Flower's own processes, without torch: the two apps, which pass bytes to a local socket, and the guard.

The apps travel as Flower's bundle (`APP`): they import nothing of legolm, and each other relatively.
"""

from pathlib import Path

from .frames import Link, connect, listen

APP = ("__init__.py", "frames.py", "client_app.py", "server_app.py")
"""Files of this folder that a Flower app is made of."""
FOLDER = Path(__file__).parent
PIECE = 4 << 20
"""Bytes of a block's file that a device asks for at once."""

__all__ = ["APP", "FOLDER", "PIECE", "Link", "connect", "listen"]
