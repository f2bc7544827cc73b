"""`bigdssm fetch_movielens` as a file."""

import sys

from bigdssm.commands.fetch_movielens import main

if __name__ == "__main__":
    sys.exit(main())
