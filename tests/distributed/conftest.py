from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.siamese import write_dataset

from .spawn import Pool


class Pools(dict[int, Pool]):
    """Pools of ranks by world size, started on first use and restarted after a failure."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        super().__init__()
        self._environment = environment

    def __missing__(self, world_size: int) -> Pool:
        self[world_size] = Pool(world_size, environment=self._environment)
        return self[world_size]

    def __getitem__(self, world_size: int) -> Pool:
        if world_size in self and not super().__getitem__(world_size).alive:
            super().__getitem__(world_size).close()
            del self[world_size]
        return super().__getitem__(world_size)

    def close(self) -> None:
        for pool in self.values():
            pool.close()


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Pool]]:
    made = Pools()
    yield made
    made.close()


@pytest.fixture(scope="session")
def outside_pools() -> Iterator[dict[int, Pool]]:
    """Pools for tests that import `outside`, whose registrations would change other tests."""
    made = Pools()
    yield made
    made.close()


@pytest.fixture(scope="session")
def siamese_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of documents of one domain, whose dataset is made."""
    return write_dataset(tmp_path_factory.mktemp("siamese"))
