"""`bigdssm stop_run` as a file."""

import sys

from bigdssm.commands.stop_run import main

if __name__ == "__main__":
    sys.exit(main())
