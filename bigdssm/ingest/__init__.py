"""Ingestion: build a dataset from tables.

An interrupted ingestion continues where it stopped.
"""
