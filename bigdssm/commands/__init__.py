"""Command lines: each module implements `bigdssm COMMAND …`; its `main(argv)` returns the exit code."""
