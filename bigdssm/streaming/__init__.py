"""The order of rows, a pure function of seed and step, and the rows themselves, read by loader processes."""
