"""Script version of `bigdssm inspect_shards`."""

import sys

from bigdssm.commands.inspect_shards import main

if __name__ == "__main__":
    sys.exit(main())
