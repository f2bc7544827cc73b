"""Script version of `bigdssm list_candidates`."""

import sys

from bigdssm.commands.list_candidates import main

if __name__ == "__main__":
    sys.exit(main())
