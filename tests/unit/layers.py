"""The layers of the library."""

from __future__ import annotations

# The packages of the library by layer, lowest first. A module imports only from lower layers and from its own package;
# packages of one layer do not import each other. There are no import cycles within a package.
LAYERS = (
    ("errors",),
    ("utils",),
    ("features",),  # torch-free; configs declare them
    ("config", "distributed", "sources"),  # sources: open and read tables, for ingestion and for commands
    ("dataset", "tables", "stores"),
    ("losses", "models"),
    ("cluster", "checkpoints", "loader"),
    ("retrieval",),
    ("evaluation",),
    ("export",),
    ("serving", "ingest"),  # nothing on the way of a row imports ingest: it reads the dataset that ingest wrote
    ("training",),
    ("cli",),  # options, exit codes and messages of commands
    ("commands",),  # command lines: parse, call one library function, print
    ("__main__",),
)
LAYER_OF = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}
