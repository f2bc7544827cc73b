"""Script version of `bigdssm config`."""

import sys

from bigdssm.commands.config import main

if __name__ == "__main__":
    sys.exit(main())
