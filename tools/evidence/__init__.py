"""Controlled experiments for claims: training cells that differ in a few keys, their results, and the page."""
