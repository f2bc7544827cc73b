"""What runs beside a stage: watchdog, launcher, signals, planned faults, the run folder, trackers, alerts."""
