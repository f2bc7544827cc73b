"""`bigdssm evaluate` as a file."""

import sys

from bigdssm.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
