"""Script version of `bigdssm replay`."""

import sys

from bigdssm.commands.replay import main

if __name__ == "__main__":
    sys.exit(main())
