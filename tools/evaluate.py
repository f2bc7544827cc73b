"""Script version of `bigdssm evaluate`."""

import sys

from bigdssm.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
