"""Script version of `bigdssm seeds`."""

import sys

from bigdssm.commands.seeds import main

if __name__ == "__main__":
    sys.exit(main())
