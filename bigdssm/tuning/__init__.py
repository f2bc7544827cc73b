"""The search for a config's values, or a baseline's options, by what they reach on validation."""
