"""The command lines: each module is a tool of `bigdssm TOOL …`, and its `main(argv)` returns the exit code."""
