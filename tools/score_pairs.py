"""`bigdssm score_pairs` as a file."""

import sys

from bigdssm.commands.score_pairs import main

if __name__ == "__main__":
    sys.exit(main())
