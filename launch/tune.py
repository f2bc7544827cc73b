"""Script version of `bigdssm tune`."""

import sys

from bigdssm.commands.tune import main

if __name__ == "__main__":
    sys.exit(main())
