"""`bigdssm evidence` as a file."""

import sys

from bigdssm.commands.evidence import main

if __name__ == "__main__":
    sys.exit(main())
