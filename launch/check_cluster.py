"""Script version of `bigdssm check_cluster`."""

import sys

from bigdssm.commands.check_cluster import main

if __name__ == "__main__":
    sys.exit(main())
