"""Where this folder is on PYTHONPATH, a Python has small sizes from the start."""

import sizes

import bigdssm.making.interactions
import bigdssm.making.pairs  # noqa: F401, whose sizes they are

sizes.make_small(setattr)
