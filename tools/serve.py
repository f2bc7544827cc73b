"""Script version of `bigdssm serve`."""

import sys

from bigdssm.commands.serve import main

if __name__ == "__main__":
    sys.exit(main())
