"""`bigdssm make_tables` as a file."""

import sys

from bigdssm.commands.make_tables import main

if __name__ == "__main__":
    sys.exit(main())
