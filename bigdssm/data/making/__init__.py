"""Making a dataset folder of tables: rows and documents through spools on disk into shards, whole or not at all."""
