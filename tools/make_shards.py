"""`bigdssm make_shards` as a file."""

import sys

from bigdssm.commands.make_shards import main

if __name__ == "__main__":
    sys.exit(main())
