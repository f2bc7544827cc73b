"""Checkpoints of training, and model folders for inference."""
