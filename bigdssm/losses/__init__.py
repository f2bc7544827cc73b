"""Losses: the Full Product Softmax and the fine-tuning losses, over any number of ranks; plain tensors in, no model."""

from bigdssm.losses.fps import fps_loss
from bigdssm.losses.inputs import LossInputError
from bigdssm.losses.output import LossOutput

__all__ = ["LossInputError", "LossOutput", "fps_loss"]
