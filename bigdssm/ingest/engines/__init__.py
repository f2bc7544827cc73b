"""Engines that run the steps of an ingestion: local processes with DuckDB, or Apache Spark."""
