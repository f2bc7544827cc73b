"""`bigdssm estimate` as a file."""

import sys

from bigdssm.commands.estimate import main

if __name__ == "__main__":
    sys.exit(main())
