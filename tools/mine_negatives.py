"""`bigdssm mine_negatives` as a file."""

import sys

from bigdssm.commands.mine_negatives import main

if __name__ == "__main__":
    sys.exit(main())
