"""Train a sequence model of RecTools on the leave-one-out split of make_shards, and print its curve.

    python -m venv rectools && rectools/bin/pip install "rectools[torch]"
    rectools/bin/python tools/bench/bench_rectools.py --interactions datasets/source/amazon_beauty/interactions.tsv \
      --time-column position --model esasrec --cpu-seconds 7200 --out esasrec.json

RecTools needs another version of NumPy than bigdssm, hence a separate venv; this file does not import bigdssm. The last
item of each user is test, the one before validation. HR@10 and NDCG@10 of validation are computed after every epoch
over the whole catalogue without seen items; test is evaluated once, with the weights of the best epoch. CPU seconds are
those of training only. Models: sasrec (BCE, one negative, as published), sasrec-softmax (over all items), esasrec (LiGR
blocks, sampled softmax) and hstu (relative attention, softmax over all items).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import HSTUModel, SASRecModel
from rectools.models.nn.transformers.ligr import LiGRLayers

K = 10
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sasrec": (SASRecModel, {"loss": "BCE", "n_negatives": 1}),
    "sasrec-softmax": (SASRecModel, {"loss": "softmax"}),
    "esasrec": (
        SASRecModel,
        {"loss": "sampled_softmax", "n_negatives": 256, "transformer_layers_type": LiGRLayers},
    ),
    "hstu": (HSTUModel, {"loss": "softmax", "relative_time_attention": False, "relative_pos_attention": True}),
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "(default: %(default)s)"
    parser.add_argument("--interactions", type=Path, required=True, metavar="TSV", help="user, item and time columns")
    parser.add_argument("--user-column", default="user_id", help=f"column of user ids {default}")
    parser.add_argument("--item-column", default="item_id", help=f"column of item ids {default}")
    parser.add_argument("--time-column", default="timestamp", help=f"column of event times {default}")
    parser.add_argument("--model", choices=MODELS, required=True, help="model to train")
    parser.add_argument("--cpu-seconds", type=float, default=7200, help=f"budget of training {default}")
    parser.add_argument("--epochs", type=int, default=1000, help=f"maximum number of epochs {default}")
    parser.add_argument("--patience", type=int, default=5, help=f"epochs without a better NDCG@10 {default}")
    parser.add_argument("--items", type=int, default=50, help=f"maximum length of a session {default}")
    parser.add_argument("--width", type=int, default=64, help=f"model width {default}")
    parser.add_argument("--blocks", type=int, default=2, help=f"number of blocks {default}")
    parser.add_argument("--heads", type=int, default=2, help=f"attention heads {default}")
    parser.add_argument("--dropout", type=float, default=0.5, help=f"dropout rate {default}")
    parser.add_argument("--rows", type=int, default=128, help=f"sessions per step {default}")
    parser.add_argument("--lr", type=float, default=1e-3, help=f"learning rate {default}")
    parser.add_argument("--seed", type=int, default=0, help=f"random seed {default}")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="file for the results")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    events = read(args)
    from_last = events.groupby(Columns.User).cumcount(ascending=False)
    train, known = events[from_last >= 2], events[from_last >= 1]
    parts = {"validation": (train, events[from_last == 1]), "test": (known, events[from_last == 0])}
    kind, options = MODELS[args.model]
    model = kind(
        n_blocks=args.blocks, n_heads=args.heads, n_factors=args.width, dropout_rate=args.dropout,
        session_max_len=args.items, lr=args.lr, batch_size=args.rows, epochs=1, **options,
    )  # fmt: skip
    targets = sum(min(count - 1, args.items) for count in train.groupby(Columns.User).size() if count > 1)
    history: list[dict[str, float]] = []
    spent, best, weights = 0.0, -1.0, None
    data = Dataset.construct(train)
    for epoch in range(1, args.epochs + 1):
        begun = cpu_seconds()
        model.fit_partial(data, min_epochs=1, max_epochs=1)
        spent += cpu_seconds() - begun
        found = {"epoch": epoch, "cpu_seconds": round(spent, 1), **measure(model, *parts["validation"])}
        history.append(found)
        print(json.dumps(found), flush=True)
        if found["ndcg_at_10"] > best:
            best, weights = found["ndcg_at_10"], copy.deepcopy(model.lightning_model.state_dict())
        if (
            spent >= args.cpu_seconds
            or epoch - max(history, key=lambda row: row["ndcg_at_10"])["epoch"] >= args.patience
        ):
            break
    model.lightning_model.load_state_dict(weights)
    report = {
        "model": args.model,
        "targets_per_cpu_second": round(targets * len(history) / spent, 1),
        "validation": max(history, key=lambda row: row["ndcg_at_10"]),
        "test": measure(model, *parts["test"]),
        "curve": history,
        "options": {name: str(value) for name, value in vars(args).items()},
    }
    args.out.write_text(json.dumps(report, indent=1))
    print(json.dumps({name: report[name] for name in ("model", "targets_per_cpu_second", "validation", "test")}))


def read(args: argparse.Namespace) -> pd.DataFrame:
    """Return the events in RecTools' columns, sorted by user and time; ties keep the order of the table."""
    table = pd.read_csv(args.interactions, sep="\t", dtype=str)
    table.columns = [name.split(":")[0] for name in table.columns]  # RecBole's headers contain types
    times = table[args.time_column].astype(float)
    events = pd.DataFrame({Columns.User: table[args.user_column], Columns.Item: table[args.item_column]})
    events = events.iloc[np.lexsort((times, table[args.user_column]))].reset_index(drop=True)
    events[Columns.Weight] = 1.0
    # RecTools sorts by Datetime only: one second per event preserves the order of simultaneous events
    position = events.groupby(Columns.User).cumcount()
    events[Columns.Datetime] = pd.Timestamp("2000-01-01") + pd.to_timedelta(position, unit="s")
    return events


def measure(model: Any, seen: pd.DataFrame, targets: pd.DataFrame) -> dict[str, float]:
    """Return HR@10 and NDCG@10 with one target per user; 0 for targets outside the training data."""
    results = model.recommend(targets[Columns.User].to_numpy(), Dataset.construct(seen), k=K, filter_viewed=True)
    hit = results.merge(targets[[Columns.User, Columns.Item]], on=[Columns.User, Columns.Item])
    gains = 1 / np.log2(1 + hit[Columns.Rank].to_numpy())
    return {"hr_at_10": round(len(hit) / len(targets), 4), "ndcg_at_10": round(float(gains.sum()) / len(targets), 4)}


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and its children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s")
