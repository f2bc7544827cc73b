"""Exports to other formats, each with the code that loads it and its parity with the trainer."""
