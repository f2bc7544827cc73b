"""Encode a dataset's catalogue with a model into a folder of document vectors.

    python tools/embed.py --model MODEL --data DATASET --out VECTORS

VECTORS/vectors.npy is float32 [documents, D+1]: [alpha * w, beta], whose inner product with a query's [u, 1] is the
training score. VECTORS/documents.arrow names the documents, VECTORS/meta.json the model and the dataset.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bigdssm.cli import ProgressBar, run_main
from bigdssm.data import Dataset
from bigdssm.export import load_model_folder
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.index import write_vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--data", required=True, help="dataset folder or URL")
    parser.add_argument("--out", type=Path, required=True, help="folder for the vectors")
    parser.add_argument("--rows-per-chunk", type=int, default=1024, help="documents encoded at once (%(default)s)")
    args = parser.parse_args()
    folder, dataset = load_model_folder(args.model), Dataset.open(args.data)
    folder.check_dataset(dataset)
    encoders = tower_encoders(folder.model, dataset)
    with ProgressBar() as progress:
        meta = write_vectors(
            args.out, encoders, dataset, folder.checksum, rows_per_chunk=args.rows_per_chunk, progress=progress
        )
    print(f"{args.out}: {meta.num_docs} vectors of width {meta.width}")


if __name__ == "__main__":
    sys.exit(run_main(main))
