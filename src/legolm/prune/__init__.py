"""Cut blocks from the LLM: calibrate, score, carve, recover, write."""

from legolm.prune.build import cut_block
from legolm.prune.manifest import llm_block, read_block
from legolm.prune.target import planned_coverage, target_pattern

__all__ = ["cut_block", "llm_block", "planned_coverage", "read_block", "target_pattern"]
