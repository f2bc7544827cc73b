"""A dataset on disk: partitions of shards, their index, the catalogue of documents, sequences; at a path or a URL."""
