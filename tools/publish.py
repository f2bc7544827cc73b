"""Script version of `bigdssm publish`."""

import sys

from bigdssm.commands.publish import main

if __name__ == "__main__":
    sys.exit(main())
