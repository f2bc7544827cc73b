"""The rules of the architecture, read off the source: who imports whom, who may touch which library, who prints.

`violations` is itself checked on planted sources, so that a rule that catches nothing does not pass for one that holds.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A module imports only from lower layers and from its own package. `training` stands over `export` because a stage
# leaves its best weights as a model folder; `schema` stands over `config` because it is the config, fitted.
LAYERS = {
    "bounds": 0,
    "errors": 0,
    "log": 0,
    "source": 0,
    "timing": 0,
    "loss_options": 0,
    "places": 1,
    "cli": 1,  # for launch/ and tools/
    "features": 1,  # declared in configs
    "config": 2,
    "schema": 3,
    "distributed": 3,
    "data": 4,
    "models": 4,
    "losses": 4,
    "checkpoint": 5,
    "retrieval": 6,
    "evaluation": 7,
    "export": 8,
    "serving": 9,  # takes model folders and indexes
    "training": 9,
}

# Library → the only files or folders that may import it.
RESERVED = {
    "deepspeed": ("bigdssm/training/engine.py", "bigdssm/training/portable.py"),
    "webdataset": ("bigdssm/data/",),
    "torch.distributed": ("bigdssm/distributed.py",),
}

# Tools that measure this project against those libraries; they train and serve nothing.
MEASURING = ("tools/bench_", "tools/check_gradients.py")

PRINTERS = ("launch/", "tools/")


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything that `tree` imports, and of every use of torch.distributed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level  # relative
            else:
                for alias in node.names:
                    yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) == ("torch", "distributed"):
                yield node.lineno, "torch.distributed"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def violations(path: str, source: str) -> list[str]:
    """Return one sentence per broken rule in the `source` of the file `path` (relative to the repository)."""
    found = []
    tree = ast.parse(source, path)
    own = path.removesuffix(".py").split("/")[1:2] if path.startswith("bigdssm/") else []
    layer = None if own in ([], ["__init__"]) else own[0]
    if layer is not None and layer not in LAYERS:
        return [f"{path}: {layer} has no place in the layers; give it one in this test and say why"]
    for line, name in imported(tree):
        where = f"{path}:{line}"
        for library, allowed in RESERVED.items():
            if f"{name}.".startswith(f"{library}.") and not path.startswith((*allowed, *MEASURING)):
                found.append(f"{where}: {library} is imported outside {', '.join(allowed)}")
        if f"{name}.".startswith("torch.") and path.startswith("bigdssm/features/"):
            found.append(f"{where}: torch is imported in features/; what a model makes of them is in models/encoders")
        if name.startswith("."):
            found.append(f"{where}: a relative import; write the whole name")
        parts = name.split(".")
        if parts[0] in ("tools", "launch", "tests") and path.startswith(("bigdssm/", "launch/", "tools/")):
            found.append(f"{where}: imports {name}; launch/, tools/ and tests/ are nobody's library")
        other = parts[1] if parts[0] == "bigdssm" and len(parts) > 1 else layer
        if layer is not None and other != layer and LAYERS.get(other or "", -1) >= LAYERS[layer]:
            found.append(f"{where}: {layer} (layer {LAYERS[layer]}) imports {name} (layer {LAYERS[other or '']})")
        if path == "bigdssm/__init__.py" and parts[0] == "bigdssm":
            found.append(f"{where}: the package imports nothing of its own, so that a part is cheap to import")
    if not path.startswith(PRINTERS):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                found.append(f"{path}:{node.lineno}: print outside launch/ and tools/; use bigdssm.log")
    return found


def test_the_source_keeps_the_rules() -> None:
    files = sorted(file for folder in ("bigdssm", "launch", "tools") for file in (ROOT / folder).rglob("*.py"))
    assert len(files) > 10, "the test looks in the wrong place"
    found = [v for file in files for v in violations(file.relative_to(ROOT).as_posix(), file.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("bigdssm/losses/fps.py", "from bigdssm.data.batch import Batch", "losses (layer 4) imports bigdssm.data"),
        ("bigdssm/models/tower.py", "import bigdssm.losses.fps", "models (layer 4) imports bigdssm.losses"),
        ("bigdssm/data/streaming/stream.py", "from bigdssm import training", "data (layer 4) imports bigdssm.training"),
        ("bigdssm/config.py", "def f():\n    from bigdssm.schema import Schema", "config (layer 2) imports"),
        ("bigdssm/features/text.py", "from bigdssm.schema import Schema", "features (layer 1) imports"),
        ("bigdssm/features/text.py", "import torch", "torch is imported in features"),
        ("bigdssm/training/loop.py", "import deepspeed", "deepspeed is imported outside"),
        ("bigdssm/training/loop.py", "from deepspeed.utils import groups", "deepspeed is imported outside"),
        ("bigdssm/training/loop.py", "import importlib\nimportlib.import_module('deepspeed')", "deepspeed is imported"),
        ("tools/make_shards.py", "import webdataset as wds", "webdataset is imported outside"),
        ("bigdssm/losses/fps.py", "import torch.distributed as dist", "torch.distributed is imported outside"),
        ("bigdssm/losses/fps.py", "from torch import distributed", "torch.distributed is imported outside"),
        ("bigdssm/losses/fps.py", "import torch\ntorch.distributed.barrier()", "torch.distributed is imported outside"),
        ("bigdssm/data/streaming/stream.py", "from .batch import Batch", "relative import"),
        ("bigdssm/data/streaming/stream.py", "from tools.make_shards import main", "nobody's library"),
        ("bigdssm/__init__.py", "from bigdssm.config import Config", "imports nothing of its own"),
        ("bigdssm/data/streaming/stream.py", "def f():\n    print('x')", "print outside launch/ and tools/"),
        ("bigdssm/plugins/app.py", "", "no place in the layers"),
    ],
)
def test_a_broken_rule_is_found(path: str, source: str, expected: str) -> None:
    found = violations(path, source)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("bigdssm/data/batch.py", "import webdataset\nimport bigdssm.data.rows\nfrom bigdssm import schema"),
        ("bigdssm/training/engine.py", "import deepspeed\nfrom bigdssm.losses import fps"),
        ("bigdssm/distributed.py", "import torch.distributed as dist\nfrom bigdssm.errors import PeerError"),
        ("tools/search.py", "from bigdssm.retrieval import index\nprint(1)"),
        ("tools/bench_stream.py", "import webdataset"),
        ("bigdssm/losses/fps.py", "import torch\nfrom bigdssm import distributed\nimport webdatasets_of_others"),
    ],
)  # fmt: skip
def test_what_the_rules_allow_passes(path: str, source: str) -> None:
    assert violations(path, source) == []
