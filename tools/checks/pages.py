#!/usr/bin/env python
r"""Run the commands and the code of pages as written.

    python tools/checks/pages.py README.md docs/tutorials/shop.md
    python tools/checks/pages.py README.md $(find docs -name '*.md')      # all pages: about 6 hours on 2 cores
    python tools/checks/pages.py --steps 8 docs/fine_tuning.md            # a stage ends after 8 steps

Each page is run in a new folder, build/pages/PAGE, with links to the files of the repository, block by block:

    ```bash                     commands; exported variables and a server remain until the end of the page
    ```python                   statements; names remain until the end of the page
    ```yaml title="my.yaml"     a file of this name, in any language
    <!-- given                  commands (`given python`: statements) that are not displayed: what the page presupposes
    <!-- not run: REASON -->    the next displayed block is not run

Other blocks are not run. The first failure ends a page. `bigdssm serve` runs in the background, and curl fails if the
status is an error. Packages are installed into the environment of this Python, or into one that the page makes in its
folder; a page that writes to a tracked folder changes the repository. Data sets are read from ../shared. --steps
applies to `bigdssm pretrain` and `bigdssm sft`, except on pages that kill a run. At the end, the tool prints the
result and the seconds of each block; it exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ROOT / "build/pages"
BLOCK = re.compile(
    r"""^<!--\ not\ run:\ (?P<reason>.*)\ -->\n
    |^(?P<open>```|<!--\ given)\ *(?P<language>\w*)(?:\ title="(?P<title>.*)")?\n(?P<code>(?s:.*?))^(?:```|-->)$""",
    re.MULTILINE | re.VERBOSE,
)
KILLS = "\nkill -KILL "  # in a page that waits for a checkpoint, which a few steps do not write
SHELL = r"""
set -eo pipefail
[ ! -e .exported ] || . ./.exported
trap 'export -p > .exported' EXIT
titled() { # FILE PAGE: the block of another page with this title
    sed -n "/^\`\`\`.* title=\"$1\"/,/^\`\`\`\$/p" "$2" | sed '1d;$d' > "$1"
    [ -s "$1" ]
}
curl() { command curl --fail-with-body "$@"; }
pip() { # an editable installation is that of the repository
    case " $* " in *' -e '*) (cd -P bigdssm/.. && command pip "$@") ;; *) command pip "$@" ;; esac
}
bigdssm() {
    if [ "$1" = serve ]; then # in the background, in place of the server before
        [ ! -e .server ] || { kill "$(cat .server)"; tail --pid "$(cat .server)" -f /dev/null; }
        command bigdssm "$@" &
        echo $! > .server
        until command curl -sf localhost:8000/readyz; do kill -0 $!; sleep 1; done
    elif [ -n "$PAGE_STEPS" ] && [[ $1 =~ ^(pretrain|sft)$ ]]; then
        command bigdssm "$@" "$1.steps=$PAGE_STEPS" "$1.optimizer.warmup_steps=0"
    else
        command bigdssm "$@"
    fi
}
"""


def code_of(text: str) -> list[str]:
    """Return the code of the displayed blocks of a page."""
    return [block["code"] for block in BLOCK.finditer(text) if block["open"] == "```"]


def run_page(page: Path, steps: int | None) -> Iterator[str]:
    """Run the blocks of a page in a new folder; yield a line per block."""
    name = page.relative_to(ROOT)
    folder = FOLDERS / "-".join(name.with_suffix("").parts)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for entry in {path.split("/")[0] for path in tracked.splitlines()}:
        (folder / entry).symlink_to(ROOT / entry)
    os.chdir(folder)
    text, reason = page.read_text("utf-8"), ""
    os.environ["PAGE_STEPS"] = str(steps or "") if KILLS not in text else ""
    names, shells = dict[str, object](), list[subprocess.Popen[bytes]]()
    try:
        for block in BLOCK.finditer(text):
            if block["reason"]:
                reason = block["reason"]
                continue
            at = f"{name}:{text.count(chr(10), 0, block.start()) + 1}"
            displayed, language, title = block["open"] == "```", block["language"], block["title"]
            if displayed and reason:
                yield f"not run         {at}  {reason}"
                reason = ""
                continue
            if displayed and not title and language not in ("bash", "python"):
                continue
            print(f"\n\033[1m{at}\033[0m\n{block['code']}", flush=True)
            started = time.monotonic()
            try:
                if title:
                    Path(title).write_text(block["code"], "utf-8")
                elif language == "python":
                    Path(".block.py").write_text(block["code"], "utf-8")
                    names = runpy.run_path(".block.py", names, "page")
                else:
                    shells.append(subprocess.Popen(["bash", "-c", SHELL + block["code"]], start_new_session=True))
                    if shells[-1].wait():
                        raise RuntimeError(f"exit code {shells[-1].returncode}")
            except (Exception, SystemExit):
                traceback.print_exc()
                yield f"failed {time.monotonic() - started:6.0f} s  {at}"
                break
            yield f"passed {time.monotonic() - started:6.0f} s  {at}"
    finally:
        for shell in shells:  # end what runs in the background
            with suppress(ProcessLookupError):
                while True:
                    os.killpg(shell.pid, signal.SIGTERM)
                    time.sleep(1)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the commands and the code of pages as written.")
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE", help="a Markdown file of the repository")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of a stage (default: those of the page)")
    args = parser.parse_args()
    pages = [page.resolve() for page in args.pages]
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    FOLDERS.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (FOLDERS / "shared").symlink_to(ROOT.parent / "shared")
    lines = [line for page in pages for line in run_page(page, args.steps)]
    print("", *lines, sep="\n")
    return int(any(line.startswith("failed") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
