"""Process-level services of a run: launcher, watchdog, signals, run folder, metrics."""
