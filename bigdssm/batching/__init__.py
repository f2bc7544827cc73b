"""From rows to batches: tensors of both sides, documents once each, and chunks of a token budget."""
