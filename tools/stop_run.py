"""Script version of `bigdssm stop_run`."""

import sys

from bigdssm.commands.stop_run import main

if __name__ == "__main__":
    sys.exit(main())
