"""Public sets of data, as they are published, as the tables that `make_shards` takes.

A kind is a layout of files. Its reader gives the tables one after another, each as rows that are read while they are
written; what a later one holds may come of an earlier one's rows.
"""
