"""Measure the gradient bias of in-batch negatives against the full softmax, per sampling correction.

    python tools/bench/bench_sampling.py
    python tools/bench/bench_sampling.py --catalogues 100000 100000000   # time of the correction per step instead

10,000 items with Zipf popularity; positives sampled from p(d|q), which the scores fit only in part; batches of 256. g:
mean gradient of a linear document tower with in-batch negatives; f: the same with the full softmax, over the same
batches. The bias is |g - f| / |f|.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm.cli import at_least
from bigdssm.losses import CountedFrequency, apply_sampling, fps_loss, sample_uniform
from bigdssm.losses.declarations import Corrected, FrequencyCorrection

ITEMS, BATCH, D = 10_000, 256, 8
STEP_ROWS, STEP_DIM = 8192, 128
TASTE = 2.0  # scale of the true preferences relative to the model's scores


@dataclass(frozen=True)
class World:
    """Items [ITEMS, D], queries [500, D] and p(d|q) [500, ITEMS]."""

    items: Tensor
    queries: Tensor
    probability: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=at_least(1), default=200, help="number of batches (default: %(default)s)")
    parser.add_argument(
        "--catalogues", type=at_least(1), nargs="+", default=[], help="time catalogues of these sizes (default: none)"
    )
    args = parser.parse_args()
    if args.catalogues:
        print(
            f"{STEP_ROWS} rows and columns, D = {STEP_DIM}, medians of 9: CPU ms of correction, of correction and loss"
        )
        for num_documents in args.catalogues:
            print(f"{num_documents:>12,} documents  {{:8.2f}}  {{:8.1f}}".format(*correction_ms(num_documents)))
        return
    world = make_world()
    print(f"{ITEMS} items, {args.batches} batches of {BATCH}: relative bias of the gradient")
    print(f"{'none':35s} {gradient_bias(world, None, batches=args.batches):.3f}")
    for sampling in (Corrected(gamma=0.5), Corrected(gamma=1.0)):
        name = f"{sampling.name}, gamma {sampling.gamma}"
        print(f"{name:35s} {gradient_bias(world, sampling, 0, args.batches):.3f}")
    for num in (256, 2048):
        name = f"corrected, and {num} uniform columns"
        print(f"{name:35s} {gradient_bias(world, Corrected(), num, args.batches):.3f}")


def correction_ms(num_documents: int) -> tuple[float, float]:
    """Return the CPU time in ms of a correction, and of a correction with the loss of a step."""
    generator = torch.Generator().manual_seed(0)
    counted = CountedFrequency(torch.ones(num_documents, dtype=torch.float64), STEP_ROWS)
    U, W = (torch.randn(STEP_ROWS, STEP_DIM, generator=generator) for _ in range(2))
    U, W = (torch.nn.functional.normalize(vectors).requires_grad_() for vectors in (U, W))
    alone, whole = [], []
    for _ in range(9):
        documents = torch.randint(num_documents, (STEP_ROWS,), generator=generator)
        started = time.process_time()
        _, neg_bias = apply_sampling(Corrected(), counted.log_expected(documents))
        alone.append(time.process_time() - started)
        fps_loss(U, W, alpha=20.0, doc_ids=documents, neg_bias=neg_bias).loss.backward()
        whole.append(time.process_time() - started)
    return 1e3 * statistics.median(alone), 1e3 * statistics.median(whole)


def make_world() -> World:
    generator = torch.Generator().manual_seed(0)
    popularity = 1.0 / torch.arange(1, ITEMS + 1, dtype=torch.float64)
    items = torch.randn(ITEMS, D, generator=generator, dtype=torch.float64) / math.sqrt(D)
    queries = torch.randn(500, D, generator=generator, dtype=torch.float64)
    return World(items, queries, torch.softmax(TASTE * queries @ items.T + popularity.log(), 1))


def gradient_bias(world: World, sampling: FrequencyCorrection | None, num_uniform: int = 0, batches: int = 12) -> float:
    """Return the relative bias; sampling None: no correction."""
    generator = torch.Generator().manual_seed(1)
    items, probability = world.items, world.probability
    log_expected = CountedFrequency(probability.mean(0) * 1e9, BATCH, num_uniform).log_expected(torch.arange(ITEMS))
    total, exact = torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64)
    for _ in range(batches):
        rows = torch.randint(len(probability), (BATCH,), generator=generator)
        U = world.queries[rows]
        docs = torch.multinomial(probability[rows], 1, generator=generator)[:, 0]
        columns = torch.cat([docs, sample_uniform(num_uniform, ITEMS, generator)])
        W = items[columns].requires_grad_()
        beta, neg_bias = (None, None) if sampling is None else apply_sampling(sampling, log_expected[columns])
        fps_loss(U, W, alpha=1.0, beta=beta, neg_bias=neg_bias, doc_ids=columns).loss.backward()
        assert W.grad is not None
        total += W.grad.T @ items[columns]
        p = torch.softmax(U @ items.T, 1)
        p[torch.arange(BATCH), docs] -= 1
        exact += (p.T @ U).T @ items / BATCH
    return float((total - exact).norm() / exact.norm())


if __name__ == "__main__":
    main()
