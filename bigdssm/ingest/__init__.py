"""Ingestion: build a dataset from tables; an interrupted ingestion continues where it stopped."""
