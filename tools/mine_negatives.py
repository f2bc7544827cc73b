"""Script version of `bigdssm mine_negatives`."""

import sys

from bigdssm.commands.mine_negatives import main

if __name__ == "__main__":
    sys.exit(main())
