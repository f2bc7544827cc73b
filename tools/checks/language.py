"""Find names and docstrings that are not standard technical English.

    python tools/checks/language.py [FOLDER …]

Checks the names of modules, public classes, functions, arguments and fields for words that have a standard term, and
the first lines of docstrings for "what" clauses and personification; in bigdssm/ also private names, local
variables and SQL views. Findings are suggestions; review each one.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("bigdssm", "launch", "tools")

WORDS = {  # in a name → the standard term
    "anew": "rebuild, re-rank", "asked": "requested", "beside": "sibling, extra",
    "found": "matched, result", "gate": "limits", "judge": "teacher", "judged": "scored", "judges": "teachers",
    "kept": "retained", "listed": "candidates", "making": "ingestion", "met": "matched", "mined": "hard (negatives)",
    "moment": "time", "moments": "times", "place": "position, row, offset, path", "places": "positions, rows, offsets",
    "said": "reported", "sight": "mask, context", "spans": "bounds", "told": "explicit, reported", "wanted": "required",
}  # fmt: skip
LOCAL_WORDS = WORDS.keys() - {"gate", "spans"} | {"aside", "its"}  # gates of a network, spans of a timeline
LOCAL_NAMES = {"at", "fits", "how", "some", "whole"}
VIEWS = re.compile(r"\b(?:VIEW|TABLE|WITH|WITH RECURSIVE)\s+(asked|dated|divided|drawn|found|kept|told|wanted)\b", re.I)
CLAUSE = re.compile(
    r"^(Return|Yield|Say|Tell|Note|Write|Read|Check|Find)s? (what|whatever|whether or not|how it|of)\b", re.I
)
PEOPLE = re.compile(
    r"\b(tells?|told|says?|said|asks?|asked|knows?|knew|wants?|wanted|meets?|met|looks? at|forgives?|anew|beside|"
    r"stands?|stood|what|whatever|so many|as ever)\b",
    re.I,
)


def words(name: str) -> list[str]:
    """Split an identifier in snake_case or CamelCase into lower-case words."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)]


def findings(source: str, *, private: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line, sentence) for each finding in a module's source; `private`: also in private and local names."""
    tree = ast.parse(source)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    fields = [each.target for node in classes for each in node.body if isinstance(each, ast.AnnAssign)]
    for node in ast.walk(tree):
        if private and node not in fields:
            yield from _private_findings(node)
        for name in _public_names(node):
            for word in sorted(set(words(name)) & WORDS.keys()):
                yield getattr(node, "lineno", 1), f"name {name}: use {WORDS[word]} in place of {word!r}"
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            found = CLAUSE.search(first) or PEOPLE.search(first)
            if found:
                yield getattr(node, "lineno", 1), f"docstring {first!r}: {found.group()!r}"


def _private_findings(node: ast.AST) -> Iterator[tuple[int, str]]:
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
            is_public = False
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Attribute(attr=name, ctx=ast.Store()):
            is_public = not name.startswith("_")
        case ast.Constant(value=str(text)):
            for view in VIEWS.finditer(text):
                yield node.lineno, f"view {view[1]}: use a noun"
            return
        case _:
            return
    for word in [] if is_public else sorted(set(words(name)) & LOCAL_WORDS | {name} & LOCAL_NAMES):
        yield node.lineno, f"name {name}: use {WORDS.get(word, 'a noun')} in place of {word!r}"


def _public_names(node: ast.AST) -> list[str]:
    match node:
        case ast.FunctionDef(name=name, args=arguments) if not name.startswith("_"):
            return [name, *(each.arg for each in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])]
        case ast.ClassDef(name=name, body=body) if not name.startswith("_"):
            fields = [
                each.target.id for each in body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
            ]
            return [name, *(each for each in fields if not each.startswith("_"))]
        case _:
            return []


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if there are findings, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="*", type=Path, default=[ROOT / name for name in FOLDERS], help="folders of modules"
    )
    count = 0
    for folder in parser.parse_args(argv).folders:
        for path in sorted(folder.rglob("*.py")):
            for word in sorted(set(words(path.stem)) & WORDS.keys()):
                print(f"{path}: module: use {WORDS[word]} in place of {word!r}")
                count += 1
            for line, sentence in findings(path.read_text(), private=folder.resolve() == ROOT / "bigdssm"):
                print(f"{path}:{line}: {sentence}")
                count += 1
    print(f"{count} findings", file=sys.stderr)
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main())
