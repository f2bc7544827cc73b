"""Script version of `bigdssm build_index`."""

import sys

from bigdssm.commands.build_index import main

if __name__ == "__main__":
    sys.exit(main())
