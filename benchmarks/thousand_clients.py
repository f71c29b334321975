"""Does the server's memory stay flat? A thousand simulated clients of a tiny model, through the Flower engine.

    python benchmarks/thousand_clients.py [--clients 1000] [--rounds 3]

The model is made here: random, 2 layers, hidden 64, one token a byte. Two blocks, four examples a client, one training
step a client and round, the local stage before and a personal step after; scoring, which is the clients' work, is left
out (`overhead.py` has it). The server's resident memory is read after every training of all clients, in the order of
the stages; `rss_growth` is the last one's over the first one's. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import psutil

CHATML = (
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


class Enough(Exception):
    """The rounds are done; a thousand final checkpoints are not what this measures."""


def make_model(path: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHATML,
    )
    config = AutoConfig.for_model(
        "llama",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from legolm import pipeline
    from legolm.config import RunConfig, validate
    from legolm.federate.transport import Exchange, Reply, Request
    from legolm.federate.transport.engine import Body
    from legolm.federate.transport.flower import run_flower
    from legolm.federate.wire import messages as wire
    from legolm.runs import RunDir, Score, read_stages, rounds_of

    memory: list[float] = []

    def unscored(requests: Iterable[Request]) -> Iterator[Reply]:
        for index, request in enumerate(requests):
            asked, _ = wire.unpack(request.content, wire.EvaluateRequest)
            scores = wire.ScoreReply(scores=[Score(loss=1.0, exact_match=0.0, tokens=1, examples=1)] * len(asked.sets))
            yield Reply(index, wire.pack(scores, {}))

    def engine(run: RunDir, config: RunConfig, actors: int, body: Body) -> None:
        def watched(exchange: Exchange) -> Exchange:
            def send(requests: Iterable[Request], deadline_s: float | None = None) -> Iterator[Reply]:
                queue = iter(requests)
                first = next(queue)
                every = chain([first], queue)
                if wire.kind_of(first.content) == "evaluate":
                    yield from unscored(every)
                    return
                yield from exchange(every, deadline_s)
                memory.append(psutil.Process().memory_info().rss / 1e6)
                print(f"training {len(memory)}: {memory[-1]:.1f} MB", flush=True)

            return send

        run_flower(run, config, actors, lambda exchange: body(watched(exchange)))
        raise Enough

    with tempfile.TemporaryDirectory(prefix="legolm-thousand-") as temporary:
        folder = Path(temporary)
        make_model(folder / "model")
        rows = [{"instruction": f"Say {i}", "output": "abc"[i % 3] * 2} for i in range(4 * options.clients)]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        raw = {
            "model": str(folder / "model"),
            "data": {"train": str(folder / "data.jsonl"), "validation": 0.25, "test": 0.25, "split": {"by": "iid"}},
            "blocks": [
                {"name": "dense", "method": "dense"},
                {"name": "half", "method": "structured", "intermediate_size": 48, "calibration": {"samples": 2}},
            ],
            "clients": [{"id": f"c{i:04d}", "block": ("dense", "half")[i % 2]} for i in range(options.clients)],
            "lora": {"rank": 4},
            "aggregate": {"form": "factor"},
            "train": {"steps": 1, "batch_size": 2, "learning_rate": 0.01},
            "federation": {"engine": "flower", "rounds": options.rounds, "personal_steps": 1, "personal": "last"},
        }
        began = time.perf_counter()
        with contextlib.suppress(Enough):
            pipeline.run(validate(RunConfig, raw, "benchmark"), folder / "run", engine=engine)
        wall = time.perf_counter() - began
        stages = rounds_of(read_stages(folder / "run" / "metrics.jsonl"))[1:]
        seconds = [record.seconds for record in stages]
        accepted = [len(record.accepted) for record in stages]
    print(
        json.dumps(
            {
                "clients": options.clients,
                "rounds": options.rounds,
                "rss_mb": [round(value, 1) for value in memory],
                "rss_growth": round(memory[-1] / memory[0], 4),
                "rounds_per_minute": round(60 * len(seconds) / sum(seconds), 3),
                "accepted": accepted,
                "wall_s": round(wall, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
