"""Source tables, read in parts as Arrow batches, whatever their format and place; BEIR; keys and splits."""
