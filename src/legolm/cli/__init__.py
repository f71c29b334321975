"""The command `legolm`."""

from legolm.cli.app import main

__all__ = ["main"]
