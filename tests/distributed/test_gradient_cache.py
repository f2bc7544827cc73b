"""Encoding in chunks, on 1, 2 and 3 ranks: it changes no result."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigdssm.retrieval import embed

from . import small_run
from .spawn import Pool


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("small"))


def test_validation_in_uneven_chunks_measures_the_same(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    """Under ZeRO 3 a forward is a collective: a rank with fewer chunks makes up for them."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pools[1].run(small_run.run, config, whole)
    pools[3].run(in_small_chunks, config, cut)
    assert small_run.validations(cut)[-1] == pytest.approx(small_run.validations(whole)[-1], abs=1e-9)


def in_small_chunks(rank: int, world_size: int, config: Path, run_dir: Path) -> None:
    """Run at ZeRO 3, every rank encoding in chunks of another size."""
    usual, embed.CHUNK_TOKENS_CPU = embed.CHUNK_TOKENS_CPU, 12 * (rank + 1)
    try:
        small_run.run(rank, world_size, config, run_dir, ("engine.zero_stage=3",))
    finally:
        embed.CHUNK_TOKENS_CPU = usual
