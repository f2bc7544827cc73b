"""Write the vectors of exported folders, computed with the libraries of their users: probe_exports.py FOLDER.

FOLDER contains st (sentence-transformers, whose Transformer folders AutoModel loads) and onnx; vectors are written
to FOLDER/*.npy.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

TEXTS = ["river stone bridge", "lantern", "", "copper meadow signal harbor winter violet engine mirror saddle basket"]


def main(folder: Path) -> None:
    model = SentenceTransformer(str(folder / "st"), device="cpu")
    np.save(folder / "st_queries.npy", model.encode_query(TEXTS))
    np.save(folder / "st_documents.npy", model.encode_document(TEXTS))
    for tower in sorted(path.parent for path in (folder / "st").rglob("tokenizer.json")):
        tokens = AutoTokenizer.from_pretrained(tower, trust_remote_code=False)(
            TEXTS, padding=True, truncation=True, max_length=8, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = AutoModel.from_pretrained(tower, trust_remote_code=False).eval()(**tokens).last_hidden_state
        np.save(folder / f"transformer_{tower.name}.npy", hidden.numpy())
    for path in sorted((folder / "onnx").glob("*.onnx")):
        session = onnxruntime.InferenceSession(str(path))
        inputs = {one.name: _values(one) for one in session.get_inputs()}
        np.save(folder / f"onnx_{path.stem}.npy", session.run(None, inputs)[0])


def _values(one: "onnxruntime.NodeArg") -> np.ndarray:
    """Return small fixed values of an input's type and shape; dynamic sizes are 4 rows and 3 elements."""
    shape = [size if isinstance(size, int) else (4, 3)[axis] for axis, size in enumerate(one.shape)]
    values = np.arange(np.prod(shape)).reshape(shape)
    if "float" in one.type:
        return (values / 8).astype(np.float32)
    return np.ones(shape, bool) if "bool" in one.type else 1 + values % 3


if __name__ == "__main__":
    main(Path(sys.argv[1]))
