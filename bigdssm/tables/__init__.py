"""Source tables as streams of Arrow batches (delimited, JSON lines, Parquet, WebDataset, BEIR); keys and splits."""
