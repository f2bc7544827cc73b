"""HTTP serving of a model and its index: a JSON API and a search page."""
