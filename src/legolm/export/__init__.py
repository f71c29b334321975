"""From a block to what runs it elsewhere: a file each target, each checked in its runtime before it appears."""

from legolm.export.serving import serving
from legolm.export.source import Source, find_model
from legolm.export.sparse import load
from legolm.export.speed import Speed, bench
from legolm.export.target import Target, exporter
from legolm.export.write import Exported, export

__all__ = ["Exported", "Source", "Speed", "Target", "bench", "export", "exporter", "find_model", "load", "serving"]
