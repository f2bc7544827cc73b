"""Two-tower retrieval (DSSM) training with the Full Product Softmax loss over the global batch."""

__version__ = "0.1.0"
