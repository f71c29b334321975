"""Cut blocks from the LLM: calibrate, choose a shape, prune, recover, write."""

from legolm.prune.build import cut_blocks
from legolm.prune.manifest import llm_block, read_block
from legolm.prune.target import Base, planned_coverage, target_pattern

__all__ = ["Base", "cut_blocks", "llm_block", "planned_coverage", "read_block", "target_pattern"]
