"""Exact ranks over the full catalogue, metrics with intervals, and baselines."""
