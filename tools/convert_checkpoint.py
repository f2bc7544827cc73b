"""`bigdssm convert_checkpoint` as a file."""

import sys

from bigdssm.commands.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
