"""Copy a run to an object store while it trains, and back before it resumes elsewhere.

    bigdssm mirror_run push RUN s3://bucket/run --every-s 60    # beside the ranks, one process
    bigdssm mirror_run pull s3://bucket/run RUN    # before the ranks start

A checkpoint is copied once, its manifest last: a copy without a manifest is incomplete, and is not read. After SIGTERM,
push waits for the ranks to save, copies the rest, and exits. pull verifies a checkpoint before it becomes part of RUN.
"""

import argparse
import shutil
import threading
from pathlib import Path
from signal import SIGINT, SIGTERM, signal

from bigdssm.checkpoints.checkpoint import CHECKPOINTS, MANIFEST, checkpoints_in, verify
from bigdssm.checkpoints.model_folder import META_FILE
from bigdssm.cli import at_least, command, option
from bigdssm.cluster.run_folder import RUNNING_FILE, STOP_FILE, is_locked
from bigdssm.errors import ConfigError
from bigdssm.utils.atomic import temporary_path
from bigdssm.utils.log import get_logger
from bigdssm.utils.urls import (
    download_file,
    download_folder,
    exists,
    is_url,
    join,
    list_names,
    remove_folder,
    upload_file,
    upload_folder,
)

STAGES, BEST = ("pretrain", "sft"), "best"
LOCAL_FILES = {RUNNING_FILE, STOP_FILE}  # of the processes on these machines
POLL_S = 0.5
logger = get_logger(__name__)


@command(
    option("direction", choices=("push", "pull"), help="push: from RUN to the URL; pull: back"),
    option("source", metavar="FROM", help="run folder; for pull a URL"),
    option("target", metavar="TO", help="URL; for pull a run folder"),
    option("--every-s", type=at_least(1), help="seconds between copies; without it, copy once"),
    option("--keep", type=at_least(1), default=2, help="checkpoints of a stage to keep at the URL (default: 2)"),
)
def main(args: argparse.Namespace) -> None:
    """Run the command line."""
    url, folder = (args.target, args.source) if args.direction == "push" else (args.source, args.target)
    if not is_url(url) or is_url(folder):
        order = "RUN URL" if args.direction == "push" else "URL RUN"
        raise ConfigError(f"{args.direction} {args.source} {args.target}: needs {args.direction} {order}")
    run = Path(folder)
    if args.direction == "pull":
        pull(url, run)
        return
    stopped = threading.Event()
    if args.every_s is not None:
        for number in (SIGTERM, SIGINT):
            signal(number, lambda *_: stopped.set())
        while not stopped.wait(args.every_s):
            push(run, url, args.keep)
        while any(is_locked(run / stage) for stage in STAGES):
            threading.Event().wait(POLL_S)
    push(run, url, args.keep)


def push(run: Path, url: str, keep: int) -> None:
    """Copy new files of a run folder; remove checkpoints beyond the newest `keep`."""
    for stage in STAGES:
        folder, to = run / stage, join(url, stage)
        if not folder.is_dir():
            continue
        copied = complete_checkpoints(to)
        for path in checkpoints_in(folder / CHECKPOINTS)[-keep:]:
            if path.name in copied:
                continue
            try:
                upload_folder(path, join(to, f"{CHECKPOINTS}/{path.name}"), last=MANIFEST)
            except FileNotFoundError:  # the run has removed it, because newer ones exist
                logger.info("%s was removed during its copy", path)
                continue
            copied.append(path.name)
            logger.info("%s: copied to %s", path, to)
        if (folder / BEST / META_FILE).is_file():
            upload_folder(folder / BEST, join(to, BEST), last=META_FILE)
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.name not in LOCAL_FILES and not file.name.startswith("."):
                upload_file(file, join(to, file.name))
        for name in copied[:-keep]:
            remove_folder(join(to, f"{CHECKPOINTS}/{name}"))


def pull(url: str, run: Path) -> None:
    """Copy the newest complete checkpoint of each stage that has none in the run folder.

    Raises CheckpointError: a copy is damaged.
    """
    for stage in STAGES:
        folder, remote = run / stage, join(url, stage)
        names = complete_checkpoints(remote)
        if not names:
            continue
        if checkpoints_in(folder / CHECKPOINTS):
            logger.info("%s has checkpoints: nothing is copied", folder)
            continue
        for file in names_in(remote):
            if file not in (CHECKPOINTS, BEST):
                download_file(join(remote, file), folder / file)
        newest = folder / CHECKPOINTS / names[-1]
        incoming = temporary_path(folder / CHECKPOINTS)
        shutil.rmtree(incoming, ignore_errors=True)
        unfinished = incoming / newest.name  # verify compares the name with the manifest's
        download_folder(join(remote, f"{CHECKPOINTS}/{newest.name}"), unfinished)
        verify(unfinished)
        if exists(join(remote, f"{BEST}/{META_FILE}")):
            download_folder(join(remote, BEST), folder / BEST)
        newest.parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(newest)  # last: a folder with a checkpoint has all other files
        incoming.rmdir()
        logger.info("%s: copied from %s", newest, remote)


def complete_checkpoints(url: str) -> list[str]:
    """Return the names of the checkpoints of a stage that have a manifest, by step."""
    names = [name for name in names_in(join(url, CHECKPOINTS)) if exists(join(url, f"{CHECKPOINTS}/{name}/{MANIFEST}"))]
    return sorted(names, key=lambda name: int(name.removeprefix("step-")))


def names_in(url: str) -> list[str]:
    """Return the names of a folder's entries; none if it does not exist."""
    try:
        return list_names(url)
    except FileNotFoundError:
        return []


if __name__ == "__main__":
    raise SystemExit(main())
