"""What aggregation costs the server: CPU seconds and peak memory of every scheme and of Flower's FedAvg.

    python benchmarks/aggregate.py [--quick]

Updates are those of SmolLM2-135M at rank 8, all seven modules, 2.44 M parameters. Each row is a process of its own with
one thread. Ours starts from the reply's bytes: parse, check (header, shapes, finiteness), add, finish; the next one is
made when the last is gone. Flower's starts from its own reply messages, whose arrays are serialized bytes too, and runs
`FedAvg.aggregate_train`, which needs all of them at once. Making replies is not timed. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

RANK, SCALE = 8, 2.0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STREAMING = ("heteagg factor", "heteagg frozen_side", "heteagg exact", "mixed blocks factor")
OTHERS = ("fedavg", "hetlora", "flexlora", "flora", "fedex_lora", "raflora", "median", "trimmed_mean")


def shape() -> Any:
    from legolm.models import Shape

    return Shape("llama", layers=30, hidden=576, neurons=1536, kv_groups=3, queries_per_group=3, head_dim=64)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(name: str, clients: int) -> dict[str, float]:
    import torch

    from legolm.adapter import initial_factors
    from legolm.aggregate import Start, make_scheme
    from legolm.block import Coverage
    from legolm.config import AggregateConfig, TrainConfig
    from legolm.federate import wire

    sizes = shape()
    scheme_name, _, form = name.removeprefix("mixed blocks ").partition(" ")
    if name.startswith("mixed"):
        scheme_name, form = "heteagg", "factor"
    config = AggregateConfig.model_validate({"scheme": scheme_name} | ({"form": form} if form else {}))
    scheme = make_scheme(config)
    scheme.begin(Start(sizes, lambda: initial_factors(sizes, TARGETS, RANK, 0, scheme.frozen_side), RANK))
    coverages = [Coverage.full(sizes)]
    if name.startswith("mixed"):
        every = tuple(range(30))
        narrow = Coverage(sizes, every, ((0, 1, 2),) * 30, (tuple(range(0, 1536, 3)),) * 30)
        heads = Coverage(sizes, every, ((0, 2),) * 30, (tuple(range(1024)),) * 30)
        shallow = Coverage(sizes, every[:26], ((0, 1, 2),) * 26, (tuple(range(1536)),) * 26)
        coverages = [*coverages, narrow, heads, shallow]
    torch.manual_seed(0)
    sent, replies = [], []
    metrics = {"loss_first": 1.0, "loss_last": 1.0, "steps": 1.0, "tokens": 1.0, "seconds": 1.0}
    settings = wire.TrainSettings(
        targets=TARGETS, run_rank=RANK, ranks={}, dropout=0.0, train=TrainConfig(), precision="fp32",
        frozen_side=scheme.frozen_side, derived_seed=scheme.derived_seed, proximal=0.0, codec="none", keep=1.0,
        error_feedback=False,
    )  # fmt: skip
    request = wire.TrainRequest(
        run="r", client="c", block="b", base_fingerprint="f", coverage_hash="h", rank=RANK, scale=SCALE, phase="round",
        round=1, steps=1, done=0, total=1, seed=0, settings=settings,
    )  # fmt: skip
    for coverage in coverages:
        sent.append(wire.write(settings, coverage, RANK, scheme.payload(coverage, RANK), scheme.fold(coverage, 0)))
        made = []
        for _ in range(2):
            delta = {key: 1e-3 * torch.randn(shape) for key, shape in sent[-1].trained.shapes.items()}
            made.append(wire.answer(request, sent[-1].content, delta, 50, metrics, {})[0])
        replies.append(made)
    before, began = peak_mb(), time.process_time()
    for k in range(clients):
        which = k % len(coverages)
        reply = replies[which][k // len(coverages) % 2]
        if not scheme.streams:
            reply = bytes(bytearray(reply))  # what is held must be a reply of its own
        scheme.add(wire.accept(reply, request, sent[which]).change, coverages[which])
    spent = time.process_time() - began
    began = time.process_time()
    scheme.finish()
    finish = time.process_time() - began
    return {"cpu_s": spent + finish, "finish_s": finish, "rss_mb": peak_mb(), "rss_before_mb": before}


def flower(clients: int) -> dict[str, float]:
    import torch
    from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore.task_identity import TaskIdentity

    from legolm.adapter import initial_factors

    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1  # else a message needs a running server
    like = initial_factors(shape(), TARGETS, RANK, 0)
    before = peak_mb()
    replies = []
    for _ in range(clients):
        arrays = ArrayRecord({key: 1e-3 * torch.randn(tensor.shape) for key, tensor in like.items()})  # type: ignore[arg-type]
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 50})})
        replies.append(Message(content, 1, MessageType.TRAIN))
    strategy = FedAvg()
    began = time.process_time()
    arrays_out, _ = strategy.aggregate_train(1, replies)
    spent = time.process_time() - began
    assert arrays_out is not None
    return {"cpu_s": spent, "finish_s": spent, "rss_mb": peak_mb(), "rss_before_mb": before}


def exact_against_full_svd(clients: int = 8) -> dict[str, float]:
    """The same mean product of `clients`, to rank 8: stacked factors against dense products and full SVDs (float32)."""
    import torch

    from legolm.aggregate.lowrank import ProductSum

    torch.manual_seed(0)
    sizes = shape()
    modules = [sizes.matrix(module) for _ in range(sizes.layers) for module in sizes.modules]
    data = [
        [(torch.randn(rows, RANK) * 1e-2, torch.randn(RANK, cols) * 1e-1) for _ in range(clients)]
        for rows, cols in modules
    ]
    began = time.process_time()
    ours_ = []
    for (rows, cols), pairs in zip(modules, data, strict=True):
        total = ProductSum(rows, cols)
        for b, a in pairs:
            total.add(b.double() / clients, a)
        ours_.append(total.best(RANK))
    fast = time.process_time() - began
    began = time.process_time()
    for pairs in data:
        dense = sum(b @ a for b, a in pairs) / clients
        torch.linalg.svd(dense, full_matrices=False)
    slow = time.process_time() - began
    worst = 0.0
    for index in range(len(sizes.modules)):
        whole = sum(b.double() @ a.double() for b, a in data[index]) / clients
        s = torch.linalg.svdvals(whole)
        u, sigma, v = ours_[index]
        worst = max(worst, float((whole - (u * sigma) @ v).norm() / s[RANK:].norm()) - 1)
    return {"exact_s": fast, "full_svd_s": slow, "excess_error": worst}


def child(kind: str, *arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--row", kind, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only 8 and 64 clients")
    parser.add_argument("--row", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        import torch

        torch.set_num_threads(1)
        kind, *rest = options.row
        rows_of = {"svd": lambda: exact_against_full_svd(), "flower": lambda: flower(int(rest[0]))}
        found = rows_of.get(kind, lambda: ours(kind, int(rest[0])))()
        print(json.dumps(found))
        return
    rows: dict[str, dict[int, dict[str, float]]] = {}
    print(f"{'scheme':24}{'clients':>8}{'CPU s':>9}{'of it finish':>14}{'peak MB':>9}{'grown MB':>10}")
    for name in ("flower", *STREAMING, *OTHERS):
        # What holds its round at rank 8 and 512 clients needs 5 GB and more: Flower's FedAvg is shown as the example.
        counts = [8, 64] if options.quick or name in OTHERS else [8, 64, 512]
        for count in counts:
            found = child(name, str(count))
            rows.setdefault(name, {})[count] = {key: round(value, 3) for key, value in found.items()}
            grown = found["rss_mb"] - found["rss_before_mb"]
            print(
                f"{name:24}{count:8}{found['cpu_s']:9.2f}{found['finish_s']:14.2f}{found['rss_mb']:9.0f}{grown:10.0f}",
                flush=True,
            )
    svd = child("svd")
    factor, last = rows["heteagg factor"], 64 if options.quick else 512
    print(
        json.dumps(
            {
                f"rss_{last}_over_8": round(factor[last]["rss_mb"] / factor[8]["rss_mb"], 3),
                "ratio_vs_flower_fedavg_64": round(rows["flower"][64]["cpu_s"] / factor[64]["cpu_s"], 2),
                "exact_vs_full_svd_speedup": round(svd["full_svd_s"] / svd["exact_s"], 1),
                "exact_s": round(svd["exact_s"], 3),
                "full_svd_s": round(svd["full_svd_s"], 2),
                "exact_excess_error": svd["excess_error"],
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
