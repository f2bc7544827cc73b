"""The one command: `bigdssm TOOL …` calls `main` of the module of that name."""

from __future__ import annotations

import ast
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from bigdssm import __version__, commands
from bigdssm.errors import ConfigError

USAGE = """usage: bigdssm TOOL …

Two-tower retrieval: make a dataset, train, index, search, measure. `bigdssm TOOL --help` says everything a tool takes.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool that the command line names and return its exit code; without one, say which there are."""
    tool, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    names = [module.name for module in pkgutil.iter_modules(commands.__path__) if not module.name.startswith("_")]
    if tool in ("-h", "--help"):
        print(USAGE)
        for name in names:
            print(f"  {name:<20}{_about(name)}")
        return 0
    if tool == "--version":
        print(__version__)
        return 0
    if tool not in names:
        near = difflib.get_close_matches(tool, names, 1, cutoff=0.4)
        meant = f"did you mean {near[0]}?" if near else "`bigdssm --help` lists them"
        sys.stderr.write(f"error: bigdssm has no tool {tool!r}; {meant}\n")
        return ConfigError.exit_code
    sys.argv[0] = f"bigdssm {tool}"  # what its --help calls it
    code: int = importlib.import_module(f"bigdssm.commands.{tool}").main(arguments)
    return code


def _about(name: str) -> str:
    """Return the first line of a tool's help, read off its source: imports take seconds."""
    source = Path(str(getattr(find_spec(f"bigdssm.commands.{name}"), "origin", ""))).read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
