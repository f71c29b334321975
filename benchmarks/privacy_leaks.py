"""What updates give away: section `leaks` of `privacy.py`.

On a tiny model of random weights and rows of random bytes, the worst case: rows have nothing in common. `tokens`: the
span check of DAGER (Petrov et al., NeurIPS 2024) on LoRA gradients and on what AdamW makes of them, by the side that
trains; the gradient of few tokens is the positive control, which must succeed. `membership`: AUC and true positives at
1 % false ones of gradient alignment and of the loss (Yeom et al., 2018), for one update, int8, sums and noise.
`audit`: canaries in one run (Steinke et al., NeurIPS 2023) through the code that clips and adds noise; its bound must
not pass the claim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from legolm.adapter import Change, Tensors, initial_factors, is_frozen
from legolm.aggregate import Start, make_scheme
from legolm.block import Coverage
from legolm.config import AggregateConfig, TrainConfig
from legolm.data import Tokens
from legolm.federate.wire import arrived
from legolm.finetune import Task, fit, lora
from legolm.finetune.loop import _backward
from legolm.finetune.per_example import apart
from legolm.models import Head, answer_losses, hidden_states, lean, pack, shape_of
from legolm.privacy import clipped, gaussian, gaussian_epsilon, norm
from random_model import as_loaded, llama, random_model

VOCABULARY, RANK, SCALE = 257, 8, 2.0
CLIENTS, ROWS, STRANGERS = 64, 16, 512


class Bench:
    """The model, the adapter that all start from, and gradients on it."""

    def __init__(self, seed: int) -> None:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
        config = llama(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
        self.model = as_loaded(random_model(config, "cpu", torch.float32, seed), "fp32")
        self.coverage = Coverage.full(shape_of(self.model.config))
        self.start = initial_factors(self.coverage.shape, None, RANK, seed, True)
        self.frozen = {key for key in self.start if is_frozen(key, self.coverage.shape)}
        self.generator = torch.Generator().manual_seed(seed)

    def rows(self, count: int, length: int = 24) -> list[Tokens]:
        """Random bytes, of which the second half is the answer."""
        ids = torch.randint(0, VOCABULARY - 1, (count, length), generator=self.generator).tolist()
        return [Tokens(tuple(one), length // 2) for one in ids]

    def update(self, rows: Sequence[Tokens], steps: int, seed: int, rate: float = 3e-3) -> Tensors:
        """What a client sends after so many steps."""
        config = TrainConfig(batch_size=min(8, len(rows)), learning_rate=rate)
        task = Task(
            self.model, self.coverage, self.start, SCALE, list(rows), config, "fp32", steps, seed, frozen=self.frozen
        )
        return fit(task)[0]

    def gradient(self, rows: Sequence[Tokens]) -> Tensors:
        """Of the mean loss, by each factor that trains."""
        with self._adapted(self.start) as (parameters, head):
            _backward(self.model, head, rows, 4096)
            return {key: one.grad.clone() for key, one in parameters.items() if one.grad is not None}

    def each(self, rows: Sequence[Tokens]) -> Tensor:
        """(rows, entries) unit gradients."""
        found = []
        with self._adapted(self.start) as (parameters, head):
            for at in range(0, len(rows), 32):
                packing = pack(rows[at : at + 32], self.model.device)  # equally long: they stay in order
                with apart(packing.lengths) as parts:
                    answer_losses(
                        hidden_states(self.model, packing)[packing.predict], head, packing.labels
                    ).sum().backward()  # type: ignore[no-untyped-call]
                found.append(torch.cat([one.flatten(1) for one in parts.of(list(parameters.values()))], 1))
        return torch.nn.functional.normalize(torch.cat(found), dim=1)

    def losses(self, rows: Sequence[Tokens], delta: Tensors) -> Tensor:
        """(rows,) mean losses with this change."""
        factors = {key: one + delta[key] if key in delta else one for key, one in self.start.items()}
        found = []
        with self._adapted(factors) as (_, head), torch.no_grad():
            for at in range(0, len(rows), 64):
                packing = pack(rows[at : at + 64], self.model.device)
                losses = answer_losses(hidden_states(self.model, packing)[packing.predict], head, packing.labels)
                found.append(losses.view(len(packing.lengths), -1).mean(1))
        return torch.cat(found)

    def _adapted(self, factors: Tensors) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def go() -> Any:
            with (
                lora(self.model, self.coverage, factors, SCALE, frozen=self.frozen) as parameters,
                lean(self.model, "fp32"),
            ):
                yield parameters, Head.of(self.model, "fp32")

        return go()

    def inputs(self, sequences: Tensor, module: str) -> Tensor:
        """(sequences, length, in): what a linear layer of the first decoder layer gets; the product B A is zero."""
        seen: list[Tensor] = []
        linear = self.model.get_decoder().layers[0].get_submodule(module)
        hook = linear.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
        with torch.no_grad():
            self.model(sequences)
        hook.remove()
        return seen[0]


def outside(span: Tensor, candidates: Tensor) -> Tensor:
    """Share of each candidate's length outside the row space of `span`."""
    _, sizes, rows = torch.linalg.svd(span.double(), full_matrices=False)
    rows = rows[sizes > 1e-5 * sizes[0]]
    candidates = torch.nn.functional.normalize(candidates.double(), dim=-1)
    left: Tensor = torch.linalg.vector_norm(candidates - candidates @ rows.T @ rows, dim=-1)
    return left


def tokens(bench: Bench, length: int, steps: int) -> dict[str, float]:
    """Recovered share of a row's tokens: as a set from v_proj (its B trains), in order from down_proj (its A does)."""
    everything = torch.arange(VOCABULARY)[:, None]
    found: dict[str, list[float]] = {
        "v_proj exact": [],
        "v_proj ranked": [],
        "down_proj exact": [],
        "down_proj ranked": [],
    }
    for turn in range(8):
        row = bench.rows(1, length)[0]
        change = bench.gradient([row]) if not steps else bench.update([row], steps, turn)
        seen = row.ids[:-1]  # nothing is predicted behind the last one
        a = bench.start["layers.0.self_attn.v_proj.A"]
        far = outside(change["layers.0.self_attn.v_proj.B"], bench.inputs(everything, "self_attn.v_proj")[:, 0] @ a.T)
        near = set((far < 1e-3).nonzero()[:, 0].tolist())
        true = set(seen)
        # All within the tolerance must be tokens of the row: a span of everything names everything.
        found["v_proj exact"].append(len(near & true) / len(true) if len(near) <= 2 * len(true) else 0.0)
        best = set(far.argsort()[: len(true)].tolist())
        found["v_proj ranked"].append(len(best & true) / len(true))
        exact = ranked = 0
        going = True
        for place, token in enumerate(seen):
            tried = torch.cat([torch.tensor(seen[:place], dtype=torch.long).expand(VOCABULARY, -1), everything], 1)
            far = outside(change["layers.0.mlp.down_proj.A"], bench.inputs(tried, "mlp.down_proj")[:, place])
            # Where the first token comes again its inputs are the same, so that two may fit.
            hit = int((far < far[token]).sum()) < 2
            going = going and float(far[token]) < 1e-3 and int((far < 1e-3).sum()) <= 2
            exact, ranked = exact + going, ranked + hit
        found["down_proj exact"].append(exact / len(seen))
        found["down_proj ranked"].append(ranked / len(seen))
    return {name: round(sum(one) / len(one), 3) for name, one in found.items()}


def judged(members: Tensor, strangers: Tensor) -> dict[str, Any]:
    """AUC and true positives at 1 % false ones, each with a 95 % interval (bootstrap over rows)."""

    def both(inside: Tensor, out: Tensor) -> tuple[float, float]:
        order = torch.cat([inside, out]).argsort().argsort().double()
        rank = float(order[: len(inside)].sum()) - len(inside) * (len(inside) - 1) / 2
        return rank / (len(inside) * len(out)), float((inside > out.quantile(0.99)).double().mean())

    generator = torch.Generator().manual_seed(0)
    again = []
    for _ in range(300):
        again.append(
            both(*(one[torch.randint(0, len(one), (len(one),), generator=generator)] for one in (members, strangers)))
        )
    low, high = (torch.tensor(again).double().quantile(at, dim=0).tolist() for at in (0.025, 0.975))
    auc, hits = both(members, strangers)
    return {
        "auc": round(auc, 3),
        "auc_95": [round(low[0], 3), round(high[0], 3)],
        "tpr_at_1_fpr": round(hits, 3),
        "tpr_95": [round(low[1], 3), round(high[1], 3)],
    }


def membership(bench: Bench) -> dict[str, Any]:
    rows = [bench.rows(ROWS) for _ in range(CLIENTS)]
    strangers = bench.rows(STRANGERS)
    updates = [bench.update(own, 8, client) for client, own in enumerate(rows)]
    gradients, other = [bench.each(own) for own in rows], bench.each(strangers)
    bound = sorted(norm(one) for one in updates)[CLIENTS // 2]
    keys = sorted(updates[0])
    before = bench.losses(strangers, {})
    found: dict[str, Any] = {}
    for name, size, codec, noise in (
        ("one update", 1, "none", 0.0),
        ("one update, int8", 1, "int8", 0.0),
        ("sum of 3", 3, "none", 0.0),
        ("sum of 8", 8, "none", 0.0),
        ("sum of 64", 64, "none", 0.0),
        ("sum of 8, noise 1", 8, "none", 1.0),
        ("sum of 64, noise 1", 64, "none", 1.0),
    ):
        by: dict[str, tuple[list[Tensor], list[Tensor]]] = {"alignment": ([], []), "loss": ([], [])}
        for at in range(0, min(CLIENTS - size + 1, 16 * size), size):
            group = range(at, at + size)
            total: Tensors = {key: torch.zeros_like(one) for key, one in updates[0].items()}
            for client in group:
                sent = arrived(updates[client], "int8") if codec == "int8" else updates[client]
                for key, one in (clipped(sent, bound) if noise else sent).items():
                    total[key] += one
            if noise:
                total = {key: (one + noise * bound * gaussian(one.shape)).float() for key, one in total.items()}
            # As the parts of gradients stand: by sorted key.
            flat = torch.cat([total[key].flatten() for key in keys])
            inside = torch.cat([gradients[client] for client in group]) @ -flat
            mean = {key: one / size for key, one in total.items()}
            own = [row for client in group for row in rows[client]]
            drop = bench.losses(own, {}) - bench.losses(own, mean)
            for kind, members, out in (
                ("alignment", inside, other @ -flat),
                ("loss", drop, before - bench.losses(strangers, mean)),
            ):
                centre, spread = out.mean(), out.std()
                by[kind][0].append((members - centre) / spread)
                by[kind][1].append((out - centre) / spread)
        found[name] = {kind: judged(torch.cat(one), torch.cat(two)) for kind, (one, two) in by.items()}
        print(f"{name}: {found[name]}", flush=True)
    return found


def audit(seed: int, multiplier: float, canaries: int = 400, delta: float = 1e-5) -> dict[str, float]:
    """A lower bound on ε (95 %) from one round: random directions of the clipping norm, each in with a half."""
    bench = Bench(seed)
    scheme = make_scheme(AggregateConfig(weight="equal"))
    scheme.begin(Start(bench.coverage.shape, lambda: dict(bench.start), RANK, seed))
    like = scheme.payload(bench.coverage, RANK)
    generator = torch.Generator().manual_seed(seed)
    coins = torch.rand(canaries, generator=generator) < 0.5
    directions: list[Tensors] = []
    for there in coins.tolist():
        drawn = {key: torch.randn(one.shape, generator=generator) for key, one in like.items()}
        one = {key: 10 * tensor / norm(drawn) for key, tensor in drawn.items()}
        directions.append(one)
        delta_ = dict(clipped(one, 1.0)) if there else {}
        scheme.add(Change(delta_, like, 1, RANK), bench.coverage)
    scheme.disturb(lambda shape: multiplier * gaussian(shape))
    scheme.finish()
    moved = {key: one - like[key] for key, one in scheme.payload(bench.coverage, RANK).items()}
    score = torch.tensor([sum(float((one[key] * moved[key]).sum()) for key in like) for one in directions])
    order, guesses = score.argsort(), canaries // 2
    right = int(coins[order[-guesses // 2 :]].sum()) + int((~coins[order[: guesses // 2]]).sum())
    return {
        "noise_multiplier": multiplier,
        "claimed_epsilon": round(gaussian_epsilon([multiplier], delta), 3),
        "audit_epsilon": round(lower_bound(right, guesses, canaries, delta), 3),
        "right_guesses": right / guesses,
    }


def lower_bound(right: int, guesses: int, canaries: int, delta: float) -> float:
    """The largest ε that so many right guesses refute: P[Bin(guesses, e^ε / (1 + e^ε)) ≥ right] + 2 m δ ≤ 0.05."""
    from scipy.stats import binom  # type: ignore[import-untyped]

    found = 0.0
    for step in range(1, 2000):
        epsilon = step / 200
        chance = float(binom.sf(right - 1, guesses, 1 / (1 + math.exp(-epsilon))))
        if chance + 2 * canaries * delta > 0.05:
            return found
        found = epsilon
    return found


def leaks(seeds: int) -> dict[str, Any]:
    """All three; `seeds` audits of each noise."""
    bench = Bench(0)
    recovered = {}
    for name, length, steps in (
        ("gradient of 6 tokens (control)", 7, 0),
        ("gradient of 19 tokens", 20, 0),
        ("AdamW, 1 step, 6 tokens", 7, 1),
        ("AdamW, 8 steps, 6 tokens", 7, 8),
        ("AdamW, 8 steps, 19 tokens", 20, 8),
    ):
        recovered[name] = tokens(bench, length, steps)
        print(f"{name}: {recovered[name]}", flush=True)
    audits = [audit(seed, multiplier) for multiplier in (0.5, 1.0, 2.0) for seed in range(seeds)]
    print(audits, flush=True)
    return {"tokens_recovered": recovered, "membership": membership(bench), "audit": audits}
