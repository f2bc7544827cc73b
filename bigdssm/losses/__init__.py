"""Losses: the Full Product Softmax and the fine-tuning losses, over any number of ranks; plain tensors in, no model."""

from bigdssm.losses.fps import DIRECTIONS, fps_loss
from bigdssm.losses.inputs import LossInputError
from bigdssm.losses.output import LossOutput
from bigdssm.losses.ranking import RANKING_NAMES, ranking_loss

__all__ = ["DIRECTIONS", "RANKING_NAMES", "LossInputError", "LossOutput", "fps_loss", "ranking_loss"]
