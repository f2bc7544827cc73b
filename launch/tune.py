"""`bigdssm tune` as a file."""

import sys

from bigdssm.commands.tune import main

if __name__ == "__main__":
    sys.exit(main())
