"""Script version of `bigdssm report`."""

import sys

from bigdssm.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
