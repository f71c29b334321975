"""How near to the LLM is a block that was only cut? By how much text the cut is fitted on, and how the fit is held.

    python benchmarks/calibration.py [--samples 24 96]

Two thirds of the starter model's neurons, fitted on conversations of `starter-dates` of 128 tokens each: with the ridge
that follows the number of tokens, and with the smallest one alone, as it was before. KL(LLM ‖ block) in nats per token
is the mean of 16 windows of other public text of the same kind. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from legolm.config import BlockConfig, CalibrationConfig, RecoverConfig
from legolm.models import fingerprint, resolve
from legolm.prune import cut_blocks, select
from legolm.system import Progress

STILL = RecoverConfig(steps=4, batch_size=4, learning_rate=1e-9)
"""Looks, and moves nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[24, 96])
    path, found = resolve("starter"), {}
    digest, share = fingerprint(path), select.RIDGE
    for samples in parser.parse_args().samples:
        for name, ridge in (("by_tokens", share), ("smallest", 0.0)):
            select.RIDGE = ridge
            began = time.perf_counter()
            kl = divergence(path, digest, samples)
            found[f"{samples}_{name}"] = {"kl": round(kl, 3), "seconds": round(time.perf_counter() - began, 1)}
            print(f"{samples} samples, ridge {name}: {found[f'{samples}_{name}']}", flush=True)
    print(json.dumps(found))


def divergence(path: Path, digest: str, samples: int) -> float:
    """Of a block that was cut with so many samples."""
    text = CalibrationConfig(text="starter-dates", samples=samples, length=128)
    spec = BlockConfig(name="b", method="structured", intermediate_size=1024, calibration=text, recover=STILL)
    with tempfile.TemporaryDirectory() as folder:
        (block,) = cut_blocks(path, digest, [(spec, Path(folder) / "b")], 0, "fp32", Progress(), "starter")
    return float(block.details["recover"]["kl_first"])


if __name__ == "__main__":
    main()
