"""Compare the averaged gradients of N ranks with those of the whole batch in one process.

    python tools/bench/check_gradients.py --ranks 4

For this project's losses and, if installed (extra [bench]), for open_clip's flag combinations and
sentence-transformers' gather_across_devices. Each row gives the norm of the averaged gradient relative to the exact one
(1.00 is correct) and their cosine, for the towers and the scale parameter; DDP and DeepSpeed apply the mean over ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from bigdssm.cli import at_least
from bigdssm.losses import PairCE, fps_loss, ranking_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
ROWS, D, ALPHA = 48, 16, 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=at_least(1), default=4, help="number of ranks (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print a Markdown table")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (args.ranks, f"file://{folder}/rendezvous", args.table), nprocs=args.ranks)


def _rank(rank: int, ranks: int, rendezvous: str, markdown: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    rows = []
    for name, make in _losses().items():
        averaged = _averaged(make(rank, ranks), rank, ranks)
        single = [dist.new_group([k]) for k in range(ranks)][rank]
        exact = _averaged(make(0, 1, single), 0, 1)
        rows.append((name, *_compare(averaged[:2], exact[:2]), *_compare(averaged[2:], exact[2:])))
    if rank == 0:
        line = "| {:49s} | {:>6} | {:>7} | {:>6} |" if markdown else "{:49s} {:>8} {:>8} {:>8}"
        print(line.format(f"{ranks} ranks, {ROWS} rows", "towers", "cosine", "scale"))
        if markdown:
            print("|---|---|---|---|")
        for name, towers, cosine, scale, _ in rows:
            print(line.format(name, f"{towers:.2f}", f"{cosine:.3f}", f"{scale:.2f}"))
    dist.destroy_process_group()


def _averaged(loss: Loss, rank: int, ranks: int) -> list[Tensor]:
    """Return the gradients of two linear towers and the scale, averaged over ranks."""
    generator = torch.Generator().manual_seed(0)
    query, doc = (nn.Linear(8, D, bias=False) for _ in range(2))
    query.weight.data, doc.weight.data = (torch.randn(D, 8, generator=generator) for _ in range(2))
    alpha = torch.tensor([ALPHA], requires_grad=True)
    q, d = (torch.randn(ROWS, 8, generator=generator).view(ranks, -1, 8)[rank] for _ in range(2))
    U, W = (nn.functional.normalize(x, dim=1) for x in (query(q), doc(d)))
    loss(U, W, alpha).backward()
    gradients = []
    for parameter in (query.weight, doc.weight, alpha):
        assert parameter.grad is not None
        if ranks > 1:
            dist.all_reduce(parameter.grad)
        gradients.append(parameter.grad / ranks)
    return gradients


def _compare(averaged: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """Return (ratio of norms, cosine)."""
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (averaged, exact))
    return float(a.norm() / b.norm()), float(nn.functional.cosine_similarity(a, b, dim=0))


def _losses() -> dict[str, Callable[..., Loss]]:
    """Return, by name, functions (rank, ranks, group) that build a loss."""
    found: dict[str, Callable[..., Loss]] = {}
    for direction in ("q2d", "d2q", "both"):
        found[f"fps_loss {direction}"] = lambda rank, ranks, group=None, direction=direction: (
            lambda U, W, alpha: fps_loss(U, W, alpha=alpha, direction=direction, group=group).loss
        )
    found["ranking_loss pair_ce, in batch"] = lambda rank, ranks, group=None: (
        lambda U, W, alpha: ranking_loss(PairCE(), U, W, alpha=alpha, in_batch=True, group=group).loss
    )
    for others in (_open_clip, _sentence_transformers):
        with contextlib.suppress(ImportError):
            found.update(others())
    return found


def _open_clip() -> dict[str, Callable[..., Loss]]:
    from open_clip.loss import ClipLoss, SigLipLoss

    found: dict[str, Callable[..., Loss]] = {}
    for local in (False, True):
        for gather in (False, True):
            name = f"open_clip local_loss={local} gather_with_grad={gather}"
            found[name] = lambda rank, ranks, group=None, local=local, gather=gather: ClipLoss(
                local_loss=local, gather_with_grad=gather, rank=rank, world_size=ranks
            )
    found["open_clip SigLipLoss"] = lambda rank, ranks, group=None: (
        lambda U, W, alpha: SigLipLoss(rank=rank, world_size=ranks)(U, W, alpha, torch.zeros(1))
    )
    return found


def _sentence_transformers() -> dict[str, Callable[..., Loss]]:
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    def make(rank: int, ranks: int, group: Any = None) -> Loss:
        def loss(U: Tensor, W: Tensor, alpha: Tensor) -> Tensor:
            plain = MultipleNegativesRankingLoss(
                model=nn.Identity(),
                scale=ALPHA,
                gather_across_devices=ranks > 1,
            )
            plain.scale = alpha  # a parameter instead of a number, to obtain its gradient
            return plain.compute_loss_from_embeddings([U, W], None)

        return loss

    return {"sentence-transformers gather_across_devices": make}


if __name__ == "__main__":
    main()
