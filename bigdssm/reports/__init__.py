"""What people ask about: a dataset, a run before it begins, runs beside each other."""
