"""Script version of `bigdssm embed_teacher`."""

import sys

from bigdssm.commands.embed_teacher import main

if __name__ == "__main__":
    sys.exit(main())
