"""Script version of `bigdssm sample_negatives`."""

import sys

from bigdssm.commands.sample_negatives import main

if __name__ == "__main__":
    sys.exit(main())
