"""Where this folder is on PYTHONPATH, a Python has small sizes from the start."""

import sizes

sizes.make_small(setattr)
