"""Common parts of all commands: one-line errors, exit codes, option helpers."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from bigdssm.errors import BigDSSMError, ConfigError, DataError, Preempted
from bigdssm.utils.atomic import WRITERS, is_written_by, real_path
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


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """Wrap `main(argv)` with `run_main`, so that it returns the exit code; a decorator."""

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        return run_main(partial(main, argv))

    return run


def command_parser(about: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help begins with `about`, the docstring of a command, as it is written."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type for integers of at least `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text}, needs at least {least}")
        return int(text)

    return number


def refuse_options(parser: argparse.ArgumentParser, args: argparse.Namespace, options: Sequence[str], why: str) -> None:
    """Raise ConfigError if one of `options` was passed; `why` names the option with or without which it is unused."""
    destinations = {option: option.removeprefix("--").replace("-", "_") for option in options}
    given = [option for option, name in destinations.items() if getattr(args, name) != parser.get_default(name)]
    if given:
        them = "it" if len(given) == 1 else "them"
        raise ConfigError(f"{', '.join(given)} would have no effect {why}; leave {them} out")


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Add the options --model, --index and --data."""
    parser.add_argument("--model", type=Path, required=True, help="model folder, or a folder of model folders")
    parser.add_argument(
        "--index",
        required=True,
        help="index folder, or a vector store as URL#NAME of a collection or alias (default: live)",
    )
    parser.add_argument("--data", help="dataset folder or URL (default: that of the model, if it needs one)")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add the option --overwrite."""
    parser.add_argument("--overwrite", action="store_true", help="replace output that this command did not write")


def add_rules(parser: argparse.ArgumentParser) -> None:
    """Add the option --config, for `open_with_rules`."""
    parser.add_argument(
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
