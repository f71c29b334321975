"""The command `legolm`."""

from legolm.cli.main import main

__all__ = ["main"]
