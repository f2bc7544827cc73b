"""Script version of `bigdssm score_pairs`."""

import sys

from bigdssm.commands.score_pairs import main

if __name__ == "__main__":
    sys.exit(main())
