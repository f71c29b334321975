"""Whether a client's questions are told from others' by their tokens: `python benchmarks/familiar.py`, some minutes.

`data.Familiar` on test questions: what part of its own each client knows, and of the others' sends away, where so many
of its own may go to the global update, and where one in a thousand may. In the folder that holds the data
(`examples/flan/mixed.yaml`) with FLAN, else without. The last line is one JSON object.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from legolm import config as configs
from legolm.block import llm_block
from legolm.config import RunConfig
from legolm.data import Familiar, client_data, tokens_of
from legolm.federate.server import seen_in_public
from legolm.federate.server.mixture import AWAY
from legolm.models import fingerprint, load_tokenizer, resolve
from legolm.system import machine

EXAMPLES = Path(__file__).parent.parent / "examples"
FLAN = "data/FedDPA/data/dataset2/8/local_training_[01234].json"


def main() -> None:
    languages = yaml.safe_load((EXAMPLES / "compare" / "languages.yaml").read_text("utf-8"))["run"]
    asked: list[tuple[str, Any, str]] = [
        ("languages", languages, "starter-languages"),
        ("languages", languages, "starter"),
    ]
    asked += [("months", EXAMPLES / "dates.yaml", "starter-dates")]
    if Path("data/FedDPA").is_dir():
        asked += [("flan", EXAMPLES / "flan" / "mixed.yaml", public) for public in (FLAN, "starter")]
    rows = []
    for name, given, public in asked:
        change = [f"federation.public={public}"]
        config = (
            configs.load(given, change)
            if isinstance(given, Path)
            else configs.validate(RunConfig, given | {"federation": given["federation"] | {"public": public}}, name)
        )
        for let_go in (AWAY, 0.001):
            rows.append({"bench": name, "public": public, "let_go": let_go, **told(config, let_go)})
            print(json.dumps(rows[-1]), flush=True)
    print(json.dumps({"machine": machine(), "rows": rows}))


def told(config: RunConfig, let_go: float) -> dict[str, float]:
    """Means over clients."""
    path, most, data = resolve(config.model), config.train.max_length, client_data(config)
    tokenizer, seen = load_tokenizer(path, config.data), seen_in_public(config, llm_block(path, fingerprint(path)))
    tests = {id: list(tokens_of(rows.test, tokenizer, most)) for id, rows in data.items()}
    known, away = [], []
    for id, rows in data.items():
        familiar = Familiar.of(tokens_of(rows.train, tokenizer, most), seen, let_go)
        known.append(fmean(familiar.knows(one) for one in tests[id]))
        away.append(fmean(not familiar.knows(one) for other in tests if other != id for one in tests[other]))
    return {"known": round(fmean(known), 4), "away": round(fmean(away), 4)}


if __name__ == "__main__":
    main()
