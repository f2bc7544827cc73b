"""Two-tower retrieval (DSSM) training with the Full Product Softmax loss over the global batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigdssm.checkpoints.hub import push_to_hub
    from bigdssm.config import load_config
    from bigdssm.dataset.dataset import Dataset
    from bigdssm.ingest.api import make_dataset
    from bigdssm.losses import fps_loss
    from bigdssm.retrieval.index import open_index
    from bigdssm.retrieval.model import from_pretrained, load_model
    from bigdssm.retrieval.request import Event, Request
    from bigdssm.serving.searcher import Searcher
    from bigdssm.training.api import pretrain, sft


__version__ = "0.1.0"
__all__ = [
    "Dataset",
    "Event",
    "Request",
    "Searcher",
    "fps_loss",
    "from_pretrained",
    "load_config",
    "load_model",
    "make_dataset",
    "open_index",
    "pretrain",
    "push_to_hub",
    "sft",
]

_HOMES = {
    "Dataset": "bigdssm.dataset.dataset",
    "Event": "bigdssm.retrieval.request",
    "Request": "bigdssm.retrieval.request",
    "Searcher": "bigdssm.serving.searcher",
    "fps_loss": "bigdssm.losses",
    "from_pretrained": "bigdssm.retrieval.model",
    "load_config": "bigdssm.config",
    "load_model": "bigdssm.retrieval.model",
    "make_dataset": "bigdssm.ingest.api",
    "open_index": "bigdssm.retrieval.index",
    "pretrain": "bigdssm.training.api",
    "push_to_hub": "bigdssm.checkpoints.hub",
    "sft": "bigdssm.training.api",
}


def __getattr__(name: str) -> Any:
    """Return a public name, whose module is imported when it is first asked for: torch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bigdssm' has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = value = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
