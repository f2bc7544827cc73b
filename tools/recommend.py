"""Script version of `bigdssm recommend`."""

import sys

from bigdssm.commands.recommend import main

if __name__ == "__main__":
    sys.exit(main())
