"""Read exported folders: their marker file, and their towers in onnxruntime. Nothing of transformers is imported."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigdssm.checkpoints.checkpoint import check_file
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.loader.batch import Features

EXPORT_FILE = "bigdssm_export.json"


def read_export(folder: Path) -> dict[str, Any]:
    """Read an export's marker and verify its files. Raises CheckpointError: not an export, or a damaged file."""
    try:
        marker: dict[str, Any] = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
        checksums = marker["checksums"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} is not an export of this version with a complete {EXPORT_FILE} ({error!r}); export again"
        ) from None
    for name, checksum in checksums:
        check_file(folder / name, checksum, EXPORT_FILE)
    return marker


def run_onnx(session: Any, features: Features) -> Tensor:
    """Run an onnxruntime session on features of n rows; returns vectors [n, D+1]."""
    return torch.from_numpy(session.run(["vectors"], {name: values.numpy() for name, values in features.items()})[0])


def query_tower(path: Path, model_checksum: str, threads: int = 0) -> Any:
    """Open a query tower, such as EXPORT/query.int8.onnx, in onnxruntime.

    Raises: CheckpointError: a damaged export, or of another model; ConfigError: onnxruntime is not installed.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise ConfigError("--onnx needs onnxruntime: pip install 'bigdssm[onnx]'")
    if not (path.name.startswith("query") and path.suffix == ".onnx" and path.is_file()):
        raise ConfigError(f"--onnx {path}: needs the file of a query tower, such as EXPORT/query.int8.onnx")
    if (theirs := read_export(path.parent).get("model_checksum")) != model_checksum:
        raise CheckpointError(
            f"{path} is the tower of model {str(theirs)[:12]}, --model is {model_checksum[:12]}; export the served "
            "model with bigdssm convert_checkpoint --format onnx"
        )
    if b"DynamicQuantizeLinear" in path.read_bytes():
        raise CheckpointError(
            f"{path} quantizes activations per batch: answers depend on the other requests in it; export the "
            "model again with bigdssm convert_checkpoint --format onnx"
        )
    return onnx_session(path, threads)


def onnx_session(path: Path, threads: int = 0) -> Any:
    """Return an onnxruntime session on the CPU; threads 0: one per core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
