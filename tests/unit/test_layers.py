"""Architecture rules, checked on the source: imports between packages, use of libraries, printing.

`violations` is tested on sources with planted violations.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.layers import LAYER_OF

ROOT = Path(__file__).resolve().parents[2]


# Library → the only files or folders that may import it.
RESERVED = {
    "deepspeed": tuple(f"bigdssm/training/{name}.py" for name in ("engine", "patches", "process_group")),
    "webdataset": ("bigdssm/sources/", "bigdssm/loader/"),
    "torch.distributed": ("bigdssm/distributed.py",),
    "triton": ("bigdssm/losses/kernels/triton_kernels.py",),  # imported by launches on a GPU only
}

# Tools that measure this project against those libraries; they train and serve nothing.
MEASURING = ("tools/bench/",)

# Packages of tools, each importing the library and itself; `python -m tools.NAME` in a checkout.
LABORATORY = ("tools/evidence/", "tools/public_data/")

PRINTERS = ("bigdssm/commands/", "launch/", "tools/")


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
    if path == "bigdssm/__init__.py":  # followed by type checkers only
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    own = path.removesuffix(".py").split("/")[1:2] if path.startswith("bigdssm/") else []
    package = None if own in ([], ["__init__"]) else own[0]
    if package is not None and package not in LAYER_OF:
        return [f"{path}: {package} has no layer; add it to LAYERS in tests/unit/layers.py"]
    for line, name in imported(tree):
        where = f"{path}:{line}"
        for library, allowed in RESERVED.items():
            if f"{name}.".startswith(f"{library}.") and not path.startswith((*allowed, *MEASURING)):
                found.append(f"{where}: {library} is imported outside {', '.join(allowed)}")
        if f"{name}.".startswith("torch.") and package in ("features", "dataset"):
            found.append(f"{where}: torch is imported in {package}/; encoders are in models/, tensors in loader/")
        if name.startswith("."):
            found.append(f"{where}: a relative import; use the absolute name")
        parts = name.split(".")
        itself = any(path.startswith(own) and "/".join(parts).startswith(own) for own in LABORATORY)
        measured = path.startswith(MEASURING) and f"{'/'.join(parts[:2])}/" in LABORATORY
        outside = parts[0] in ("tools", "launch", "tests") and not itself and not measured
        if outside and path.startswith(("bigdssm/", "launch/", "tools/")):
            found.append(f"{where}: imports {name}; launch/, tools/ and tests/ are not libraries")
        other = parts[1] if parts[0] == "bigdssm" and len(parts) > 1 else package
        if package is not None and other != package and LAYER_OF.get(other or "", -1) >= LAYER_OF[package]:
            found.append(
                f"{where}: {package} (layer {LAYER_OF[package]}) imports {name} (layer {LAYER_OF[other or '']})"
            )
        if path == "bigdssm/__init__.py" and parts[0] == "bigdssm" and parts[1:3] != ["utils", "lazy"]:
            found.append(f"{where}: __init__.py must not import modules of the package, so that imports stay cheap")
    if not path.startswith(PRINTERS):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                found.append(
                    f"{path}:{node.lineno}: print outside commands/, launch/ and tools/; use bigdssm.utils.log"
                )
    return found


def test_the_source_keeps_the_rules() -> None:
    files = sorted(file for folder in ("bigdssm", "launch", "tools") for file in (ROOT / folder).rglob("*.py"))
    assert len(files) > 10, "the test looks in the wrong place"
    found = [v for file in files for v in violations(file.relative_to(ROOT).as_posix(), file.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        (
            "bigdssm/losses/contrastive.py",
            "from bigdssm.loader.batch import Batch",
            "losses (layer 5) imports bigdssm.loader",
        ),
        (
            "bigdssm/models/dual_encoder.py",
            "import bigdssm.losses.contrastive",
            "models (layer 5) imports bigdssm.losses",
        ),
        (
            "bigdssm/loader/stream.py",
            "from bigdssm import training",
            "loader (layer 6) imports bigdssm.training",
        ),
        (
            "bigdssm/config/keys.py",
            "def f():\n    from bigdssm.dataset.schema import Schema",
            "config (layer 3) imports",
        ),
        ("bigdssm/dataset/dataset.py", "from bigdssm.loader.order import Order", "dataset (layer 4) imports"),
        ("bigdssm/sources/base.py", "from bigdssm.loader import order", "sources (layer 3) imports"),
        ("bigdssm/loader/plain_stream.py", "from bigdssm.ingest import api", "loader (layer 6) imports bigdssm.ingest"),
        ("bigdssm/retrieval/index.py", "def f():\n    from bigdssm.cli import command", "retrieval (layer 7) imports"),
        ("bigdssm/serving/app.py", "from bigdssm.ingest import api", "serving (layer 10) imports bigdssm.ingest"),
        ("bigdssm/features/text.py", "from bigdssm.dataset.schema import Schema", "features (layer 2) imports"),
        ("bigdssm/features/text.py", "import torch", "torch is imported in features"),
        ("bigdssm/dataset/catalogue.py", "from torch import Tensor", "torch is imported in dataset"),
        ("bigdssm/training/step.py", "import deepspeed", "deepspeed is imported outside"),
        ("bigdssm/training/step.py", "from deepspeed.utils import groups", "deepspeed is imported outside"),
        (
            "bigdssm/training/trainer.py",
            "import importlib\nimportlib.import_module('deepspeed')",
            "deepspeed is imported",
        ),
        ("tools/make_shards.py", "import webdataset as wds", "webdataset is imported outside"),
        ("bigdssm/commands/embed.py", "import deepspeed", "deepspeed is imported outside"),
        (
            "bigdssm/evaluation/comparison.py",
            "from bigdssm.commands import embed",
            "evaluation (layer 8) imports bigdssm.commands",
        ),
        ("bigdssm/losses/contrastive.py", "import torch.distributed as dist", "torch.distributed is imported outside"),
        ("bigdssm/losses/contrastive.py", "from torch import distributed", "torch.distributed is imported outside"),
        (
            "bigdssm/losses/contrastive.py",
            "import torch\ntorch.distributed.barrier()",
            "torch.distributed is imported outside",
        ),
        ("bigdssm/losses/kernels/torch_passes.py", "import triton.language as tl", "triton is imported outside"),
        ("bigdssm/loader/stream.py", "from .batch import Batch", "relative import"),
        ("bigdssm/loader/stream.py", "from tools.make_shards import main", "are not libraries"),
        ("bigdssm/evaluation/evaluate.py", "from tools.evidence.claims import Claim", "are not libraries"),
        ("tools/evidence/claims.py", "from tools.make_shards import main", "are not libraries"),
        ("tools/evidence/claims.py", "from tools.public_data import files", "are not libraries"),
        ("bigdssm/__init__.py", "from bigdssm.config import Config", "must not import modules of the package"),
        ("bigdssm/loader/stream.py", "def f():\n    print('x')", "print outside commands/, launch/ and tools/"),
        ("bigdssm/plugins/app.py", "", "has no layer"),
    ],
)
def test_a_violated_rule_is_reported(path: str, source: str, expected: str) -> None:
    found = violations(path, source)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("bigdssm/loader/stream.py", "import webdataset\nimport bigdssm.dataset.rows\nfrom bigdssm import schema"),
        ("bigdssm/training/engine.py", "import deepspeed\nfrom bigdssm.losses import fps"),
        ("bigdssm/distributed.py", "import torch.distributed as dist\nfrom bigdssm.errors import PeerError"),
        ("bigdssm/__init__.py", "if TYPE_CHECKING:\n    from bigdssm.losses import fps_loss"),
        ("tools/search.py", "from bigdssm.retrieval import index\nprint(1)"),
        ("tools/evidence/page.py", "from tools.evidence.claims import Claim\nimport bigdssm.cli\nprint(1)"),
        ("bigdssm/commands/search.py", "from bigdssm.reports import estimate\nprint(1)"),
        ("tools/bench/bench_stream.py", "import webdataset\nfrom tools.public_data import debian"),
        ("bigdssm/losses/masks.py", "import torch\nfrom bigdssm import distributed\nimport webdatasets_of_others"),
    ],
)  # fmt: skip
def test_allowed_imports_pass(path: str, source: str) -> None:
    assert violations(path, source) == []


def import_cycle(imports: dict[str, set[str]]) -> list[str] | None:
    """Return an import cycle, or None; `imports` by module."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for other in sorted(imports.get(module, ())):
            if found := walk(other, [*path, module]):
                return found
        done.add(module)
        return None

    return next(filter(None, (walk(module, []) for module in sorted(imports))), None)


def imports_of_modules() -> dict[str, set[str]]:
    """Return the imports by module of the library and the tools' packages, in functions, too."""
    files = {
        file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): file
        for folder in ("bigdssm", *LABORATORY)
        for file in (ROOT / folder).rglob("*.py")
    }
    imports: dict[str, set[str]] = {}
    for module, file in files.items():
        names = [name for _, name in imported(ast.parse(file.read_text("utf-8"))) if "." in name]
        imports[module] = {name if name in files else name.rpartition(".")[0] for name in names} & set(files)
        if module == "bigdssm":  # its attributes are imported by their first use
            imports[module] = set()
    return imports


def test_no_modules_import_each_other_in_a_circle() -> None:
    imports = imports_of_modules()
    assert len(imports) > 100 and "bigdssm.utils.hashing" in imports["bigdssm.loader.order"]
    assert "bigdssm.losses.distillation" in imports["bigdssm.losses.declarations"], "an import in a function"
    assert import_cycle(imports) is None
    imports["bigdssm.dataset.catalogue"].add("bigdssm.dataset.dataset")
    assert "bigdssm.dataset.catalogue" in (import_cycle(imports) or ())


def is_misplaced(test: Path) -> bool:
    """Return whether a unit test's folder is no package, or its name does not begin with a module or the package."""
    package = ROOT / "bigdssm" / test.relative_to(ROOT / "tests/unit").parent
    names = {package.name, *(path.stem for path in package.glob("[a-z]*"))}
    topic = test.stem.removeprefix("test_")
    return not package.is_dir() or not any(topic == name or topic.startswith(f"{name}_") for name in names)


def test_unit_tests_have_the_name_of_their_module() -> None:
    tests = list((ROOT / "tests/unit").glob("*/**/test_*.py"))
    assert len(tests) > 100 and not [test for test in tests if is_misplaced(test)]
    assert is_misplaced(ROOT / "tests/unit/loader/test_streams.py")
    assert is_misplaced(ROOT / "tests/unit/data/test_stream.py")


MOST_LINES = 40  # of a test, which has one idea


def test_a_test_has_few_lines() -> None:
    long = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_LINES:
                    long.append(f"{file.relative_to(ROOT)}::{node.name} has {lines} lines")
    assert not long
