"""Script version of `bigdssm make_shards`."""

import sys

from bigdssm.commands.make_shards import main

if __name__ == "__main__":
    sys.exit(main())
