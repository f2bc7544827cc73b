"""Script version of `bigdssm compare_models`."""

import sys

from bigdssm.commands.compare_models import main

if __name__ == "__main__":
    sys.exit(main())
