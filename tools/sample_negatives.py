"""`bigdssm sample_negatives` as a file."""

import sys

from bigdssm.commands.sample_negatives import main

if __name__ == "__main__":
    sys.exit(main())
