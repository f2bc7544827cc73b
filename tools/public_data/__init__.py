"""Convert public datasets in their published formats to tables for `make_shards`.

A kind is a layout of files. Its reader yields the tables in order, with lazily read rows; a later table may depend on
the rows of an earlier one.
"""
