"""Script version of `bigdssm pretrain`."""

import sys

from bigdssm.commands.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
