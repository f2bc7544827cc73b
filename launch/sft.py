"""Script version of `bigdssm sft`."""

import sys

from bigdssm.commands.sft import main

if __name__ == "__main__":
    sys.exit(main())
