"""Document vectors, indexes, search, recommendation, hard negatives."""
