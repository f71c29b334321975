"""The machine and its files: whole writes, memory, the hub, progress, seeds."""

from legolm.system.files import (
    LOCK,
    DiskFullError,
    appearing,
    atomic_folder,
    atomic_write,
    cache_folder,
    check_new,
    check_room,
    disk_full,
    file_hash,
    held_bytes,
    link,
    locked,
    read_bounded,
    read_json,
    reading,
    scratch_folder,
    unreadable,
    writing,
)
from legolm.system.hub import hub_answers, wants_offline
from legolm.system.machine import machine, versions
from legolm.system.memory import available_bytes, keep_freed_memory, release_memory, total_bytes, trim, uncollected
from legolm.system.processes import Helpers, Spawning, end_with_parent, free_port
from legolm.system.progress import Progress
from legolm.system.seeds import derive_seed
from legolm.system.sockets import sockets_place
from legolm.system.tensors import Stored, file_state, open_tensors, stored_tensors, strict_decoder, strict_json

__all__ = [
    "LOCK",
    "DiskFullError",
    "Helpers",
    "Progress",
    "Spawning",
    "Stored",
    "appearing",
    "atomic_folder",
    "atomic_write",
    "available_bytes",
    "cache_folder",
    "check_new",
    "check_room",
    "derive_seed",
    "disk_full",
    "end_with_parent",
    "file_hash",
    "file_state",
    "free_port",
    "held_bytes",
    "hub_answers",
    "keep_freed_memory",
    "link",
    "locked",
    "machine",
    "open_tensors",
    "read_bounded",
    "read_json",
    "reading",
    "release_memory",
    "scratch_folder",
    "sockets_place",
    "stored_tensors",
    "strict_decoder",
    "strict_json",
    "total_bytes",
    "trim",
    "uncollected",
    "unreadable",
    "versions",
    "wants_offline",
    "writing",
]
