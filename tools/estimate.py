"""Script version of `bigdssm estimate`."""

import sys

from bigdssm.commands.estimate import main

if __name__ == "__main__":
    sys.exit(main())
