"""Write what exported folders compute, with the libraries that users load them with: probe_exports.py FOLDER.

FOLDER has st (sentence-transformers), hf (a transformers model for each tower) and onnx; vectors become FOLDER/*.npy.
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
    for tower in sorted(path.parent for path in (folder / "hf").rglob("config.json")):
        tokens = AutoTokenizer.from_pretrained(tower, trust_remote_code=False)(
            TEXTS, padding=True, truncation=True, max_length=8, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = AutoModel.from_pretrained(tower, trust_remote_code=False).eval()(**tokens).last_hidden_state
        np.save(folder / f"hf_{tower.name}.npy", hidden.numpy())
    for path in sorted((folder / "onnx").glob("*.onnx")):
        session = onnxruntime.InferenceSession(str(path))
        inputs = {one.name: _values(one) for one in session.get_inputs()}
        np.save(folder / f"onnx_{path.stem}.npy", session.run(None, inputs)[0])


def _values(one: "onnxruntime.NodeArg") -> np.ndarray:
    """Return small fixed values of an input's type: 4 rows, 3 of each in lists of any length."""
    shape = [size if isinstance(size, int) else (4, 3)[place] for place, size in enumerate(one.shape)]
    values = np.arange(np.prod(shape)).reshape(shape)
    if "float" in one.type:
        return (values / 8).astype(np.float32)
    return np.ones(shape, bool) if "bool" in one.type else 1 + values % 3


if __name__ == "__main__":
    main(Path(sys.argv[1]))
