"""A few of the clients' test questions, asked of everyone at the end of a simulation: its losses in words."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

from legolm.adapter import Tensors, merged
from legolm.block import Block
from legolm.config import RunConfig
from legolm.data import Example, client_data, render
from legolm.errors import LegolmError
from legolm.evaluation import generate
from legolm.federate.server.loop import Rounds
from legolm.federate.server.members import LLM
from legolm.models import choose_device, choose_precision, dtype_of, load_model, load_tokenizer
from legolm.runs import RunDir, Sample, Samples, Speaker, dump_sealed, read_sealed
from legolm.system import Progress, atomic_write, release_memory

ASKED = 5
SPARE, MOST = 4, 64
"""Tokens generated: as many as the longest wanted answer has and some to spare, at most so many."""
LONGEST = 1000
"""Letters kept of a question and of a wanted answer: enough to see what was asked."""


def ask(
    folder: RunDir,
    config: RunConfig,
    blocks: Mapping[str, Block],
    block_of: Mapping[str, str],
    rounds: Rounds,
    progress: Progress,
    anew: bool = True,
) -> list[Sample]:
    """Test questions of `ASKED` clients (of fewer, several each) with greedy answers, kept in `answers.json`.

    Nothing where clients' data are their own (`evaluate.scores`), and, without `anew`, where nothing is kept.
    """
    if config.evaluate.scores == "own":
        return []
    path = folder.path / "answers.json"
    stood = [str(rounds.best("validation")), str(rounds.best("llm_validation")), *(r.adapter for r in rounds.records())]
    of = hashlib.sha256(" ".join(stood).encode()).hexdigest()
    if path.exists():
        try:
            known = read_sealed(path, Samples, "it is made again with the final models")
        except LegolmError as error:
            progress.note(str(error))
        else:
            if known.of == of:
                return known.samples
    if not anew:
        return []
    samples = _asked(config, blocks, block_of, rounds, progress)
    atomic_write(path, dump_sealed(Samples(of=of, samples=samples)))
    return samples


def _asked(
    config: RunConfig, blocks: Mapping[str, Block], block_of: Mapping[str, str], rounds: Rounds, progress: Progress
) -> list[Sample]:
    questions = _questions(config)
    if not questions:  # running text asks nothing
        return []
    answers: list[dict[Speaker, str]] = [{} for _ in questions]
    clients = list(dict.fromkeys(id for id, _ in questions))
    jobs = [
        (block_of[ids[0]], speaker, factors, [place for place, (id, _) in enumerate(questions) if id in ids])
        for ids, speaker, factors in _speakers(config, clients, block_of, rounds)
    ]
    if config.federation.mode != "alone":
        jobs.append((LLM, "llm", rounds.final_factors(None), list(range(len(questions)))))
    device = choose_device(config.device)
    # A processor decodes token by token faster in fp32 than by autocast.
    precision = "fp32" if device.type == "cpu" else choose_precision(config.precision, config.device)
    with progress.stage("answer test questions", len(jobs)) as advance:
        for name in dict.fromkeys(job[0] for job in jobs):
            block = blocks[name]
            model = load_model(block.path, dtype_of(precision)).to(device)
            tokenizer = load_tokenizer(block.path, config.data)
            length = min(config.train.max_length, model.config.max_position_embeddings)
            rows = [render(example, tokenizer, length) for _, example in questions]
            most = min(MOST, SPARE + max(len(row.ids) - row.answer for row in rows))
            for _, speaker, factors, asked in (job for job in jobs if job[0] == name):
                with merged(model, block.coverage, factors, config.lora.scaling):
                    said = generate(model, [rows[place] for place in asked], tokenizer, ASKED, precision, most, "…")
                for place, text in zip(asked, said, strict=True):
                    answers[place][speaker] = text.strip()
                advance(1)
            del model
            release_memory()
    return [
        Sample(
            client=id,
            block=block_of[id],
            question=_cut(example.question),
            wanted=_cut(example.wanted),
            answers={speaker: said[speaker] for speaker in get_args(Speaker) if speaker in said},
        )
        for (id, example), said in zip(questions, answers, strict=True)
    ]


def _speakers(
    config: RunConfig, clients: Sequence[str], block_of: Mapping[str, str], rounds: Rounds
) -> Iterator[tuple[list[str], Speaker, Tensors]]:
    """Clients, and what their block had learned before training (at once who holds the same), alone, at the end."""
    rank = {client.id: client.rank for client in config.clients}
    alike: dict[tuple[str, int | None], list[str]] = {}
    for id in clients:
        alike.setdefault((block_of[id], rank[id]), []).append(id)
    yield from ((ids, "before", rounds.adapter(ids[0], 0)) for ids in alike.values())
    yield from (([id], "local", factors) for id in clients if (factors := rounds.alone(id)))
    if config.federation.mode != "alone":
        yield from (([id], "final", rounds.final_factors(id)) for id in clients)


def _questions(config: RunConfig) -> list[tuple[str, Example]]:
    """Client and test question, spread over the clients."""
    data = client_data(config)
    ids = list(data)
    if len(ids) > ASKED:
        ids = [ids[place * len(ids) // ASKED] for place in range(ASKED)]
    turns = [(id, data[id].test[turn]) for turn in range(ASKED) for id in ids if turn < len(data[id].test)]
    turns = [(id, example) for id, example in turns if len(example.messages) > 1]  # a text asks nothing
    return sorted(turns[:ASKED], key=lambda one: ids.index(one[0]))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
