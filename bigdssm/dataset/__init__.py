"""Reading datasets: partitions, split indexes, catalogue and sequences, local or at a URL."""
