"""Data loading: order of rows, loader processes, batches and the plan of a step."""
