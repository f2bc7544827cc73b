"""Two-tower retrieval (DSSM) training with the Full Product Softmax loss over the global batch."""

from typing import TYPE_CHECKING

from bigdssm.utils.lazy import lazy_attributes

if TYPE_CHECKING:
    from bigdssm.checkpoints.model_folder import push_to_hub
    from bigdssm.config import load_config
    from bigdssm.dataset.dataset import Dataset
    from bigdssm.ingest.api import make_dataset
    from bigdssm.losses import fps_loss
    from bigdssm.models.two_towers import TwoTowers
    from bigdssm.retrieval.index import open_index
    from bigdssm.retrieval.model import from_pretrained, load_model
    from bigdssm.retrieval.request import Event, Request
    from bigdssm.serving.searcher import Searcher
    from bigdssm.training.cached_step import cached_step, pair_batch
    from bigdssm.training.stages import pretrain, sft


__version__ = "0.1.0"
__all__ = [
    "Dataset",
    "Event",
    "Request",
    "Searcher",
    "TwoTowers",
    "cached_step",
    "fps_loss",
    "from_pretrained",
    "load_config",
    "load_model",
    "make_dataset",
    "open_index",
    "pair_batch",
    "pretrain",
    "push_to_hub",
    "sft",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "bigdssm.checkpoints.model_folder": ["push_to_hub"],
        "bigdssm.config": ["load_config"],
        "bigdssm.dataset.dataset": ["Dataset"],
        "bigdssm.ingest.api": ["make_dataset"],
        "bigdssm.losses": ["fps_loss"],
        "bigdssm.models.two_towers": ["TwoTowers"],
        "bigdssm.retrieval.index": ["open_index"],
        "bigdssm.retrieval.model": ["from_pretrained", "load_model"],
        "bigdssm.retrieval.request": ["Event", "Request"],
        "bigdssm.serving.searcher": ["Searcher"],
        "bigdssm.training.stages": ["pretrain", "sft"],
        "bigdssm.training.cached_step": ["cached_step", "pair_batch"],
    },
)
