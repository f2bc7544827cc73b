"""Script version of `bigdssm plot_run`."""

import sys

from bigdssm.commands.plot_run import main

if __name__ == "__main__":
    sys.exit(main())
