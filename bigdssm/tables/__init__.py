"""Embedding tables whose rows are divided over the ranks, beside the weights that ZeRO shards."""
