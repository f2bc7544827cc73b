"""The training stages: engine, step, loop."""
