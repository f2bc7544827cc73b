"""Utilities without knowledge of the rest: atomic files, hashing, URLs, timing, bounds."""
