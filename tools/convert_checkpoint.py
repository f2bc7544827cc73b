"""Script version of `bigdssm convert_checkpoint`."""

import sys

from bigdssm.commands.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
