"""Command lines: each module implements `bigdssm TOOL …`; its `main(argv)` returns the exit code."""
