"""Functions of installed packages as pairs: first paragraph of the docstring → source without the docstring.

Files are parsed, not imported. Vendored copies (`_vendor`, `_vendored`, `vendor`, `third_party`) and repeated sources
are skipped, so that no function occurs in two packages.
"""

from __future__ import annotations

import ast
import filecmp
import gzip
import json
import os
import textwrap
import warnings
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bigdssm.dataset.schema import mix
from bigdssm.errors import DataError
from bigdssm.utils.atomic import put_file, temporary_path
from bigdssm.utils.hashing import hash64
from bigdssm.utils.log import Progress, no_progress

VENDORED = ("_vendor", "_vendored", "vendor", "third_party", "__pycache__")
MIN_WORDS = 5  # per query
MIN_LINES = 3  # per source, without the docstring
MAX_FILE_BYTES = 4 << 20


@dataclass(frozen=True)
class Function:
    """One function."""

    package: str  # top-level package or module
    name: str  # dotted path in the package; duplicates have a line number
    docstring: str  # first paragraph, on one line
    source: str  # without docstring and indentation


def write_functions(
    folder: Path,
    out: Path,
    packages: Collection[str] = (),
    max_per_package: int = 0,
    seed: int = 0,
    progress: Progress = no_progress,
) -> int:
    """Write the functions in `folder` (a site-packages) to `out` (.jsonl.gz) and return their number.

    `packages` (empty: all) selects packages; at most `max_per_package` functions (0: all) are sampled by hash. Raises
    DataError: no such folder or package, or no function with a docstring.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; needs one with Python packages, such as site-packages")
    available = _packages(folder)
    if unknown := [name for name in packages if name not in available]:
        raise DataError(f"{folder} contains no package {unknown[0]!r}")
    seen: set[int] = set()
    count = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = temporary_path(out)
    # mtime 0 and no name: reproducible bytes
    with aside.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        names = [name for name in available if not packages or name in packages]
        for number, name in enumerate(names, 1):
            functions = []
            for function in _functions(available[name]):
                source = hash64(function.source)
                if source not in seen:
                    seen.add(source)
                    functions.append(function)
            for function in _sample(functions, max_per_package, seed):
                file.write((json.dumps(asdict(function), ensure_ascii=False) + "\n").encode())
                count += 1
            progress("parsing packages", number, len(names))
    if out.exists() and filecmp.cmp(aside, out, shallow=False):
        aside.unlink()  # keep the modification time, so that an ingestion of the file can be resumed
    else:
        put_file(aside, out)
    if not count:
        raise DataError(f"{folder}: no function of its packages has a docstring of {MIN_WORDS} words")
    return count


def functions_of(text: str, module: str) -> Iterator[Function]:
    """Yield the functions of a module's source; none if it cannot be parsed."""
    try:
        with warnings.catch_warnings():  # invalid escapes in strings
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = text.splitlines()
    package = module.split(".")[0]
    names: set[str] = set()
    for path, node in _walk(tree, module):
        docstring, source = _first_paragraph(node), _without_docstring(node, lines)
        if docstring and source:
            name = path if path not in names else f"{path}:{node.lineno}"
            names.add(name)
            yield Function(package, name, docstring, source)


FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def _walk(tree: ast.AST, module: str) -> Iterator[tuple[str, FunctionNode]]:
    """Yield functions with their dotted names, outer ones first; iterative, for deeply nested code."""
    waiting = [(tree, module)]
    while waiting:
        node, path = waiting.pop()
        if isinstance(node, FunctionNode):
            yield path, node
        children = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
        for child in reversed(children):  # expressions contain no definitions
            inner = f"{path}.{child.name}" if isinstance(child, ast.ClassDef | FunctionNode) else path
            waiting.append((child, inner))


def _first_paragraph(node: FunctionNode) -> str:
    """Return the first paragraph of the docstring on one line, '' if it has less than MIN_WORDS words."""
    paragraph = (ast.get_docstring(node) or "").strip().split("\n\n")[0]
    words = paragraph.encode("utf-8", "ignore").decode().split()  # an escape can be an unpaired surrogate, "\ud800"
    return " ".join(words) if len(words) >= MIN_WORDS else ""


def _without_docstring(node: FunctionNode, lines: list[str]) -> str:
    """Return the lines of a function without its docstring, '' if less than MIN_LINES remain."""
    first, last = node.body[0].lineno - 1, node.body[0].end_lineno or node.body[0].lineno
    if first == node.lineno - 1:
        return ""  # on one line: the body has no separate lines
    rest = [*lines[node.lineno - 1 : first], *lines[last : node.end_lineno]]
    rest = [line.rstrip() for line in rest if line.strip()]
    return textwrap.dedent("\n".join(rest)) if len(rest) >= MIN_LINES else ""


def _packages(folder: Path) -> dict[str, list[tuple[str, Path]]]:
    """Return (module, file) of all Python files per package, sorted by name."""
    packages: dict[str, list[tuple[str, Path]]] = {}
    for directory, inner, files in os.walk(folder):
        inner[:] = sorted(name for name in inner if name not in VENDORED and not name.endswith("-info"))
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(directory) / name
                parts = path.relative_to(folder).with_suffix("").parts
                module = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
                packages.setdefault(parts[0], []).append((module, path))
    return dict(sorted(packages.items()))


def _functions(modules: list[tuple[str, Path]]) -> Iterator[Function]:
    for module, path in modules:
        if path.stat().st_size <= MAX_FILE_BYTES:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            yield from functions_of(text, module)


def _sample(functions: list[Function], at_most: int, seed: int) -> list[Function]:
    if not at_most or len(functions) <= at_most:
        return functions
    keys = mix(np.array([hash64(function.name) for function in functions], np.int64), "functions", seed)
    return [functions[i] for i in np.sort(np.argsort(keys, kind="stable")[:at_most])]
