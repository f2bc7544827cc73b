"""`bigdssm tune` with the further baselines: `python -m tools.evidence.tune --baseline ease …`."""

import sys

import tools.evidence.baselines  # noqa: F401, which registers them
from bigdssm.commands.tune import main

if __name__ == "__main__":
    sys.exit(main())
