"""Entry point of the command line: `bigdssm COMMAND …` calls `main` of the module with that name."""

import ast
import difflib
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

from bigdssm import __version__, commands
from bigdssm.cli import run_main
from bigdssm.errors import ConfigError

USAGE = """usage: bigdssm COMMAND …

Two-tower retrieval. `bigdssm COMMAND --help` lists the options of a command."""
GROUPS = {
    "Ingest": ("make_shards", "inspect_shards"),
    "Train": (
        "config", "estimate", "pretrain", "list_candidates", "mine_negatives", "sample_negatives", "embed_teacher",
        "score_pairs", "sft",
    ),
    "Evaluate": ("evaluate", "report", "compare_runs", "compare_models", "plot_run"),
    "Search and serve": ("convert_checkpoint", "embed", "build_index", "publish", "search", "recommend", "serve"),
    "Operate": ("check_cluster", "watch_run", "stop_run", "mirror_run", "replay", "forget"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the command line names and return its exit code; without one, list the commands."""
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    names = [module.name for module in pkgutil.iter_modules(commands.__path__) if not module.name.startswith("_")]
    if command in ("-h", "--help"):
        return run_main(print_commands)
    if command == "--version":
        print(__version__)
        return 0
    if command not in names:
        near = difflib.get_close_matches(command, names, 1, cutoff=0.4)
        meant = f"did you mean {near[0]}?" if near else "`bigdssm --help` lists them"
        sys.stderr.write(f"error: bigdssm has no command {command!r}; {meant}\n")
        return ConfigError.exit_code
    sys.argv[0] = f"bigdssm {command}"  # the name in its --help
    if argv is None:  # the command parses sys.argv; a launcher of ranks repeats the process's command line
        sys.argv[1:] = arguments
    return importlib.import_module(f"bigdssm.commands.{command}").main(None if argv is None else arguments)


def print_commands() -> None:
    """Print the commands by group, each with the first line of its help."""
    print(USAGE)
    for group, names in GROUPS.items():
        print(f"\n{group}:")
        for name in names:
            # Read from the source: imports take seconds.
            source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
            print(f"  {name:<20}{(ast.get_docstring(ast.parse(source)) or '').splitlines()[0]}")


if __name__ == "__main__":
    raise SystemExit(main())
