"""`bigdssm watch_run` as a file."""

import sys

from bigdssm.commands.watch_run import main

if __name__ == "__main__":
    sys.exit(main())
