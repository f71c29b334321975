"""From a block to what runs it elsewhere: a file each target, each checked in its runtime before it appears."""

from legolm.export.picking import Candidate, candidates, pick
from legolm.export.server import serving
from legolm.export.source import Source
from legolm.export.sparse import load
from legolm.export.speed import Speed, bench, checked_runtimes
from legolm.export.target import Target, exporter
from legolm.export.write import Exported, check_composed, export, target_of

__all__ = [
    "Candidate",
    "Exported",
    "Source",
    "Speed",
    "Target",
    "bench",
    "candidates",
    "check_composed",
    "checked_runtimes",
    "export",
    "exporter",
    "load",
    "pick",
    "serving",
    "target_of",
]
