"""Script version of `bigdssm watch_run`."""

import sys

from bigdssm.commands.watch_run import main

if __name__ == "__main__":
    sys.exit(main())
