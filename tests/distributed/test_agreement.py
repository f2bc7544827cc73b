"""Ranks that were started with differences fail before anything is written; a signal to one stops all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from . import small_run
from .spawn import Pool, RankFailed


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("agreement"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("config", r"rank 1 on \S+ has another config than rank 0: pretrain.optimizer.lr was 0.01, is 0.02 there"),
        pytest.param(
            "dataset",
            r"rank 1 on \S+ has another dataset than rank 0: fingerprint was \S+, is \S+ there",
            marks=pytest.mark.slow,
        ),
        ("code", r"rank 1 on \S+ has another version than rank 0: code was \w+, is another there"),
        pytest.param(
            "torch",
            r"rank 1 on \S+ has another version than rank 0: torch was \S+, is 1.0 there",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_that_differs_is_named(
    config: Path, tmp_path: Path, pools: dict[int, Pool], setting: str, expected: str
) -> None:
    with pytest.raises(RankFailed, match=expected) as caught:
        pools[2].run(differing, config, tmp_path / "run", setting)
    assert "PeerError: rank 1 stopped: rank 1 on" in str(caught.value) or "ConfigError" in str(caught.value)
    assert not (tmp_path / "run").exists()


def differing(rank: int, world_size: int, config: Path, run_dir: Path, setting: str) -> None:
    """Run with another `setting` on rank 1."""
    from bigdssm.dataset.dataset import Dataset
    from bigdssm.training import checks

    overrides: tuple[str, ...] = ()
    versions, fingerprint = checks.versions, Dataset.fingerprint
    if rank == 1 and setting == "config":
        overrides = ("pretrain.optimizer.lr=0.02",)
    elif rank == 1 and setting == "dataset":
        Dataset.fingerprint = property(lambda self: "other")  # type: ignore[assignment,method-assign]
    elif rank == 1:
        other = {"code": "another", "torch": "1.0"}[setting]
        checks.versions = lambda: {**versions(), setting: other}  # type: ignore[assignment]
    try:
        small_run.run(rank, world_size, config, run_dir, overrides)
    finally:
        checks.versions, Dataset.fingerprint = versions, fingerprint  # type: ignore[assignment,method-assign]


def stop_on_the_last_rank(rank: int, world_size: int) -> tuple[bool, bool, bool]:
    """Return whether the ranks agree to stop, before and after one of them received SIGTERM, and by a step's report."""
    import torch

    from bigdssm.cluster.signals import StopRequest
    from bigdssm.training.step import RankReport, StepResult, exchange_reports

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = StopRequest()
        stop.defer_signals()
        before = stop.any_rank_requested()
        if rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        report = RankReport(stop=float(stop.requested))
        _, _, reports = exchange_reports(torch.ones(1), torch.ones(1), report)()
        by_report = StepResult(1.0, 1.0, reports, True, 0.0, {}, None).stop  # type: ignore[arg-type]
        return before, stop.any_rank_requested(), by_report
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_signal_to_one_rank_stops_all(pools: dict[int, Pool]) -> None:
    assert pools[2].run(stop_on_the_last_rank) == [(False, True, True)] * 2
