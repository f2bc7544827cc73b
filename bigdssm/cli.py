"""Common parts of all commands: one-line errors, exit codes, option helpers."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigdssm.errors import BigDSSMError, ConfigError, DataError, Preempted
from bigdssm.utils.atomic import WRITERS, is_written_by, real_path
from bigdssm.utils.components import Registry
from bigdssm.utils.log import is_first_rank, setup_logging

if TYPE_CHECKING:
    from bigdssm.dataset.dataset import Dataset

PLUGINS = "bigdssm.plugins"
MISSING_PATH = FileNotFoundError, IsADirectoryError, NotADirectoryError  # missing data, such as a broken link
INTERRUPTED_EXIT_CODE = 130  # the exit code of Ctrl-C in shells


def run_main(main: Callable[[], int | None]) -> int:
    """Run `main` and return its exit code; errors that a user can fix are printed as `error: <sentence>`."""
    try:
        setup_logging()
        load_plugins()
        return main() or 0
    except Preempted as stopped:  # not an error; all ranks have the same message
        if is_first_rank():
            sys.stderr.write(f"{stopped}\n")
        return stopped.exit_code
    except BigDSSMError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except UnicodeEncodeError as error:  # an argument that is not UTF-8, or an escaped surrogate in a file
        sys.stderr.write(f"error: {error.object!a:.80} has bytes that are not UTF-8, or half a character\n")
        return ConfigError.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return INTERRUPTED_EXIT_CODE
    except subprocess.CalledProcessError as error:  # of a subcommand, which has printed its error
        sys.stderr.write(f"error: `{shlex.join(map(str, error.cmd))}` ended with exit code {error.returncode}\n")
        return error.returncode if error.returncode > 0 else BigDSSMError.exit_code
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        sys.stderr.close()
        return 0
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        sys.stderr.write(f"error: {error.strerror or error}{where}\n")
        return DataError.exit_code if isinstance(error, MISSING_PATH) else BigDSSMError.exit_code


def load_plugins() -> None:
    """Import the entry points of PLUGINS, which register feature types, losses, optimizers …

    Raises ConfigError: a plugin cannot be imported.
    """
    for plugin in entry_points(group=PLUGINS):
        try:
            plugin.load()
        except Exception as error:  # a plugin may raise anything
            raise ConfigError(
                f"the plugin {plugin.name} ({plugin.value}) cannot be imported: {' '.join(repr(error).split())}; fix "
                "or uninstall its package"
            ) from None


Declaration = Callable[[Any], object]
"""Adds arguments to a parser, or to a group of one."""


def option(*names: str, **settings: Any) -> Declaration:
    """Declare an argument, with the parameters of `ArgumentParser.add_argument`."""
    return lambda parser: parser.add_argument(*names, **settings)


def one_of(*options: Declaration) -> Declaration:
    """Declare options of which exactly one is required."""
    return lambda parser: add_options(parser.add_mutually_exclusive_group(required=True), options)


def option_group(title: str, *options: Declaration) -> Declaration:
    """Declare options with a title of their own in the help."""
    return lambda parser: add_options(parser.add_argument_group(title), options)


def component_option(name: str, what: str, registry: Registry[Any], default: str) -> Declaration:
    """Declare an option for the name of a component; the help lists those of plugins, too."""
    return lambda parser: parser.add_argument(
        name, default=default, help=f"{what}: {', '.join(registry.names())} (default: %(default)s)"
    )


def add_options(container: Any, options: Sequence[Declaration]) -> None:
    """Add declared options to a parser, or to a group of one."""
    for declare in options:
        declare(container)


def command_parser(about: str | None, *options: Declaration) -> argparse.ArgumentParser:
    """Return a parser of `options` whose help begins with `about`, the docstring of a command, as it is written."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, options)
    return parser


def command(*options: Declaration) -> Callable[[Callable[[argparse.Namespace], int | None]], Callable[..., int]]:
    """Make `main(args)` a command line with these options, which returns the exit code; a decorator.

    The help begins with the docstring of the module. `args.changed_options` contains the names of the options whose
    values are not the defaults.
    """

    def decorate(main: Callable[[argparse.Namespace], int | None]) -> Callable[..., int]:
        @wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            return run_main(partial(parse_and_run, argv))

        def parse_and_run(argv: Sequence[str] | None) -> int | None:
            parser = command_parser(sys.modules[main.__module__].__doc__, *options)
            args = parser.parse_intermixed_args(argv)  # key=value may be anywhere
            args.command_line = list(sys.argv[1:] if argv is None else argv)
            args.changed_options = {name for name, value in vars(args).items() if value != parser.get_default(name)}
            return main(args)

        return run

    return decorate


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type for integers of at least `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text}, needs at least {least}")
        return int(text)

    return number


def refuse_options(args: argparse.Namespace, options: Sequence[str], why: str) -> None:
    """Raise ConfigError if one of `options` was passed; `why` names the option with or without which it is unused."""
    given = [option for option in options if option.removeprefix("--").replace("-", "_") in args.changed_options]
    if given:
        them = "it" if len(given) == 1 else "them"
        raise ConfigError(f"{', '.join(given)} would have no effect {why}; leave {them} out")


RERANKING = option_group(
    "re-ranking",
    option("--rerank", type=at_least(2), default=0, metavar="K", help="re-rank the top K documents (default: none)"),
    option("--reranker", type=Path, metavar="FOLDER", help="a cross-encoder of sentence-transformers"),
)
SEARCH_OPTIONS = (
    option("--model", type=Path, required=True, help="model folder, or a folder of model folders"),
    option(
        "--index",
        required=True,
        help="index folder, or a vector store as URL#NAME of a collection or alias (default: live)",
    ),
    option("--data", help="dataset folder or URL (default: that of the model, if it needs one)"),
)
DATA = option("--data", required=True, help="dataset folder or URL")
OVERWRITE = option("--overwrite", action="store_true", help="replace output that this command did not write")
RULES = option(  # for `open_with_rules`
    "--config", type=Path, help="config of the run, if it has data.targets or data.visit, which determine its rows"
)


def open_with_rules(data: str, config: Path | None) -> "Dataset":
    """Open a dataset with the rules on events of a run's config, if given. Raises: ConfigError, DataError: invalid."""
    from bigdssm.config import load_config
    from bigdssm.dataset.dataset import Dataset
    from bigdssm.dataset.rows import EventRules

    dataset = Dataset.open(data)
    return dataset if config is None else dataset.with_rules(EventRules.of(load_config(config).data))


def check_file_to_write(option: str, path: Path | None, command: str, *, overwrite: bool) -> None:
    """Raise ConfigError if `command` cannot write a file at `path`, or would replace another one; call it before work.

    A command may replace the file that it wrote itself (`atomic.put_file` notes it).
    """
    if path is None:
        return
    if path.exists() and not path.is_file():
        raise ConfigError(f"{option} {path} is {'a folder' if path.is_dir() else 'a device or pipe'}; name a file")
    if files := [folder for folder in path.parents if folder.exists() and not folder.is_dir()]:
        raise ConfigError(f"{option} {path}: {files[0]} is no folder; choose another path")
    if not overwrite and path.exists() and not is_written_by(path, command):
        raise ConfigError(
            f"{option} {path} exists, and is not the file that bigdssm {command} wrote there; choose another path, or "
            "--overwrite it"
        )
    WRITERS[real_path(path)] = command
