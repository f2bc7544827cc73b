"""A progress bar on the terminal."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from bigdssm.utils.log import is_first_rank


class ProgressBar:
    """A progress bar of rank 0 on stderr, displayed after `delay_s` seconds if stderr is a terminal.

    Call it as `progress(phase, done, total)`; total None: unknown. A new phase starts a new bar.
    """

    def __init__(self, delay_s: float = 2.0) -> None:
        self._delay_s = delay_s
        self._started = time.monotonic()
        self._console = Console(stderr=True, force_jupyter=False)  # a notebook shows the lines of the log
        self._progress: Progress | None = None
        self._phase = ""

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    @property
    def is_live(self) -> bool:
        """Return whether the bar is displayed."""
        return self._progress is not None

    def __call__(self, phase: str, done: int, total: int | None = None, note: str = "") -> None:
        """Display `done` of `total` in `phase`, followed by `note`."""
        if self._progress is None:
            hidden = not self._console.is_terminal or not is_first_rank()
            if hidden or time.monotonic() - self._started < self._delay_s:
                return
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn())
            note_column = TextColumn("{task.fields[note]}")
            self._progress = Progress(*columns, TimeRemainingColumn(), note_column, console=self._console)
            self._progress.start()
            self._console.show_cursor()  # it would stay hidden if the watchdog ends the process
        if phase != self._phase:
            self._phase = phase
            self._task = self._progress.add_task(phase, total=total, note=note)
        self._progress.update(self._task, completed=done, total=total, note=note)
