"""Script version of `bigdssm embed`."""

import sys

from bigdssm.commands.embed import main

if __name__ == "__main__":
    sys.exit(main())
