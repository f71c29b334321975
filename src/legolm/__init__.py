"""Language model building blocks: prune, fine-tune where the data lives, aggregate, compose (arXiv 2410.18287)."""

from legolm.errors import LegolmError

__all__ = ["LegolmError", "__version__"]

__version__ = "0.1.0"
