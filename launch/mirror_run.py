"""Script version of `bigdssm mirror_run`."""

import sys

from bigdssm.commands.mirror_run import main

if __name__ == "__main__":
    sys.exit(main())
