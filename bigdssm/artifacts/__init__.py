"""What training leaves: checkpoints, and model folders that can be encoded with."""
