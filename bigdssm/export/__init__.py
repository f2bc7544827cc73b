"""Exports to other formats, with loading code and a parity check against the trainer."""
