"""Script version of `bigdssm compare_runs`."""

import sys

from bigdssm.commands.compare_runs import main

if __name__ == "__main__":
    sys.exit(main())
