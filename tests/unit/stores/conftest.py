"""A PostgreSQL server, an empty store of each scheme, and vectors of two models."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from bigdssm.dataset.dataset import Dataset
from bigdssm.stores.base import STORES, Store, open_store
from tests.postgres import Server, running_server
from tests.unit.stores.shop import embedded, new_url


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    yield from running_server()


@pytest.fixture(scope="module")
def memory_store() -> Iterator[None]:
    """Register the store of a module from outside the package, and none of its other components."""
    path, module = Path(__file__).parents[2] / "distributed/outside.py", ModuleType("outside_store")
    tree = ast.parse(path.read_text("utf-8"))
    definitions = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    constants = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.Assign)]
    tree.body = [*constants, *(definitions[name] for name in ("StoredRow", "matches", "MemoryStore"))]
    sys.modules[module.__name__] = module
    exec(compile(tree, path, "exec"), module.__dict__)
    yield
    del STORES.classes["memory"], sys.modules[module.__name__]


@pytest.fixture(params=["postgresql", "memory", "file", "qdrant"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return new_url(request.param, request, tmp_path)


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url)


@pytest.fixture
def postgres_store(server: Server) -> Store:
    return open_store(server.new_database())


@pytest.fixture(scope="module")
def vectors_dir(model_dir: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded(model_dir, dataset, tmp_path_factory.mktemp("vectors") / "first")


@pytest.fixture(scope="module")
def other_vectors_dir(other_model_dir: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded(other_model_dir, dataset, tmp_path_factory.mktemp("vectors") / "second")
