"""Process-level services of a run: launcher, watchdog, signals, fault injection, run folder, metrics."""
