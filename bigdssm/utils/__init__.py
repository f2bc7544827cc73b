"""Utilities independent of the other packages: atomic files, hashing, URLs, timing, bounds."""
