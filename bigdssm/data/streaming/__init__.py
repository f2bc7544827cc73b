"""Which rows a step has, and bringing them: order, lanes, mixtures, loader processes."""
