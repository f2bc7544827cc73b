"""Script version of `bigdssm forget`."""

import sys

from bigdssm.commands.forget import main

if __name__ == "__main__":
    sys.exit(main())
