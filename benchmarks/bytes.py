"""How few bytes a round can take, and what that costs: the starter model, four languages, three different blocks.

    python benchmarks/bytes.py [--out DIR] [--rounds 2]

Four runs on one process and one thread: FedIT in fp32 with everyone dense; HeteAgg's factor form in fp32 on mixed
blocks; the default, frozen side, on the same blocks; and the smallest: the same in int8 with error feedback.
Bytes are those of the messages, headers included, a client and round, both ways. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

CLIENTS = {"fr": "mlp-1024", "de": "heads-2-mlp-1024", "es": "layers-26", "it": "mlp-1024"}


def study(rounds: int) -> dict[str, object]:
    text = {"text": "starter", "samples": 16, "length": 128}
    shapes = {
        "mlp-1024": {"intermediate_size": 1024},
        "heads-2-mlp-1024": {"num_key_value_heads": 2, "intermediate_size": 1024},
        "layers-26": {"num_hidden_layers": 26},
    }
    blocks = [{"name": n, "method": "structured", "calibration": text} | shape for n, shape in shapes.items()]
    run = {
        "model": "starter",
        "precision": "bf16",
        "data": {
            "train": "starter", "system": "Answer with the name only.",
            "limit_train": 64, "limit_validation": 4, "limit_test": 10,
        },
        "blocks": [*blocks, {"name": "dense", "method": "dense"}],
        "clients": [{"id": id, "block": block} for id, block in CLIENTS.items()],
        "train": {"steps": 4, "batch_size": 8, "learning_rate": 0.003, "max_length": 128},
        "federation": {"engine": "local", "rounds": rounds},
        "evaluate": {"batch_size": 12},
    }  # fmt: skip
    return {
        "run": run,
        "variants": [
            {"name": "fedit-fp32", "block": "dense", "set": {"aggregate.scheme": "fedavg"}},
            {"name": "factor-fp32", "set": {"aggregate.form": "factor"}},
            {"name": "default"},
            {"name": "default-int8", "set": {"federation.codec": "int8"}},
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep the runs here; an earlier call's are gone on with")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    from legolm.report import print_comparison
    from legolm.study import compare

    out = options.out or Path(tempfile.mkdtemp(prefix="legolm-bytes-"))
    out.mkdir(parents=True, exist_ok=True)
    path = out / "study.yaml"
    path.write_text(json.dumps(study(options.rounds)))
    found = compare(path, out)
    print_comparison(found, out)
    rows = {row["name"]: row for row in found.model_dump()["rows"]}
    both = {name: row["bytes_up"] + row["bytes_down"] for name, row in rows.items()}
    print(
        json.dumps(
            {
                "bytes_ratio_vs_fedit": {
                    "default": round(both["default"] / both["fedit-fp32"], 4),
                    "smallest": round(both["default-int8"] / both["fedit-fp32"], 4),
                },
                "loss_ratio_vs_fp32": round(rows["default-int8"]["llm"] / rows["default"]["llm"], 4),
                "bytes": {name: round(value) for name, value in both.items()},
                "llm_loss": {name: round(row["llm"], 4) for name, row in rows.items()},
                "llm_loss_before": round(rows["default"]["llm_before"], 4),
                "own_loss": {name: round(row["own"], 4) for name, row in rows.items()},
                "others_loss": {name: round(row["others"], 4) for name, row in rows.items()},
                "rounds": options.rounds,
            }
        )
    )


if __name__ == "__main__":
    main()
