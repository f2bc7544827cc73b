"""`bigdssm list_documents` as a file."""

import sys

from bigdssm.commands.list_documents import main

if __name__ == "__main__":
    sys.exit(main())
