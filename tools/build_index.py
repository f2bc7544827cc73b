"""`bigdssm build_index` as a file."""

import sys

from bigdssm.commands.build_index import main

if __name__ == "__main__":
    sys.exit(main())
