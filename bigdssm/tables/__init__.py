"""Embedding tables whose rows are divided over the ranks, in addition to the weights that ZeRO shards."""
