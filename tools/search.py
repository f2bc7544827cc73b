"""Script version of `bigdssm search`."""

import sys

from bigdssm.commands.search import main

if __name__ == "__main__":
    sys.exit(main())
