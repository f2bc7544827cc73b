"""What every command line shares: one-sentence errors, exit codes, a progress bar."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial, wraps
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from bigdssm.errors import BigDSSMError, ConfigError, DataError, Preempted
from bigdssm.utils.log import is_first_rank, setup_logging

PLUGINS = "bigdssm.plugins"
MISSING_PATH = FileNotFoundError, IsADirectoryError, NotADirectoryError  # of data, such as a link whose file has gone
INTERRUPTED_EXIT_CODE = 130  # what shells give for Ctrl-C


def run_main(main: Callable[[], int | None]) -> int:
    """Run `main` and return its exit code; an error a user can act on becomes `error: <sentence>` on stderr."""
    try:
        setup_logging()
        load_plugins()
        return main() or 0
    except Preempted as stopped:  # no error; all ranks stop by the same sentence
        if is_first_rank():
            sys.stderr.write(f"{stopped}\n")
        return stopped.exit_code
    except BigDSSMError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except UnicodeEncodeError as error:  # a word of the command line that is no UTF-8, or half of an escape in a file
        sys.stderr.write(f"error: {error.object!a:.80} has bytes that are not UTF-8, or half a character\n")
        return ConfigError.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return INTERRUPTED_EXIT_CODE
    except subprocess.CalledProcessError as error:  # a command that this one runs, which has said why
        sys.stderr.write(f"error: `{shlex.join(map(str, error.cmd))}` ended with exit code {error.returncode}\n")
        return error.returncode if error.returncode > 0 else BigDSSMError.exit_code
    except BrokenPipeError:  # the reader of our output, such as `head`, has what it wanted
        sys.stderr.close()
        return 0
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        sys.stderr.write(f"error: {error.strerror or error}{where}\n")
        return DataError.exit_code if isinstance(error, MISSING_PATH) else BigDSSMError.exit_code


def load_plugins() -> None:
    """Import what installed packages name as entry points of PLUGINS: types of features, losses, optimizers …

    Raises ConfigError naming one that cannot be imported.
    """
    for plugin in entry_points(group=PLUGINS):
        try:
            plugin.load()
        except Exception as error:  # whatever a stranger's module raises
            raise ConfigError(
                f"the plugin {plugin.name} ({plugin.value}) cannot be imported: {' '.join(repr(error).split())}; mend "
                "or uninstall its package"
            ) from None


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """Make `main(argv)` return its exit code, as `run_main` does; a decorator."""

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        return run_main(partial(main, argv))

    return run


def at_least(least: int) -> Callable[[str], int]:
    """Return what argparse takes as the type of an option: whole numbers from `least` on."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text}, needs at least {least}")
        return int(text)

    return number


def refuse_options(parser: argparse.ArgumentParser, args: argparse.Namespace, options: Sequence[str], why: str) -> None:
    """Raise ConfigError where one of `options` was given; `why` says with or without what it is not read."""
    destinations = {option: option.removeprefix("--").replace("-", "_") for option in options}
    given = [option for option, name in destinations.items() if getattr(args, name) != parser.get_default(name)]
    if given:
        them = "it" if len(given) == 1 else "them"
        raise ConfigError(f"{', '.join(given)} would have no effect {why}; leave {them} out")


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name what is asked: a model, its index, and the dataset."""
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--index", type=Path, required=True, help="index folder")
    parser.add_argument("--data", help="dataset folder or URL (by default the one that the model was trained on)")


def check_file_to_write(option: str, path: Path | None) -> None:
    """Raise ConfigError, before the work is done, where no file can be written at `path`."""
    if path is None:
        return
    if path.exists() and not path.is_file():
        raise ConfigError(f"{option} {path} is {'a folder' if path.is_dir() else 'a device or pipe'}; name a file")
    if files := [folder for folder in path.parents if folder.exists() and not folder.is_dir()]:
        raise ConfigError(f"{option} {path}: {files[0]} is no folder; choose another place")


def check_width(option: str, width: int, dim: int) -> None:
    """Raise ConfigError where a model's vectors of `dim` numbers cannot be cut to `width`."""
    if not 1 <= width <= dim:
        raise ConfigError(f"{option} {width}: the model's vectors are {dim} wide, needs 1 to {dim}")


class ProgressBar:
    """A rich progress bar of rank 0 on stderr that appears once the work has taken `delay_s`; none off a terminal.

    Call it as `progress(phase, done, total)`; total None is unknown. A new phase starts a new bar.
    """

    def __init__(self, delay_s: float = 2.0) -> None:
        self._delay_s = delay_s
        self._started = time.monotonic()
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._phase = ""

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()

    @property
    def is_live(self) -> bool:
        """Return True once the bar is on the terminal."""
        return self._progress is not None

    def __call__(self, phase: str, done: int, total: int | None = None, note: str = "") -> None:
        """Show that `done` of `total` is finished in `phase`, with a `note` behind it."""
        if self._progress is None:
            hidden = not self._console.is_terminal or not is_first_rank()
            if hidden or time.monotonic() - self._started < self._delay_s:
                return
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn())
            note_column = TextColumn("{task.fields[note]}")
            self._progress = Progress(*columns, TimeRemainingColumn(), note_column, console=self._console)
            self._progress.start()
            self._console.show_cursor()  # a watchdog that ends the process would leave it hidden
        if phase != self._phase:
            self._phase = phase
            self._task = self._progress.add_task(phase, total=total, note=note)
        self._progress.update(self._task, completed=done, total=total, note=note)
