"""Training stages: engine, step, loop."""
