"""From a trained model to documents: vectors, index, search, mined negatives."""
