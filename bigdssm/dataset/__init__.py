"""Reading datasets: partitions of shards, split indexes, the document catalogue, sequences; local or at a URL."""
