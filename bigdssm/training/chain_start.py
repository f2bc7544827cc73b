"""Initialize documents and transitions from a factorized Markov chain (FPMC), trained on counts alone.

In: the train events of a dataset. Out: for each item i and action a of the newest event of a history a vector t(i, a),
for each item j a vector w(j), and a common vector h, so that

    softmax over j of <t(i, a) + h, w(j)>  ≈  the share of j among the events that follow i with the action a

where an event counts 2^(-age / half-life). The vectors t are the rows of `TransitionTable`, w those of the documents'
table, and h the bias per document. All counts of 1,024 pairs (i, a) are one step, so that a chain takes seconds where
training on single events takes minutes, and dropout on t + h takes the place of a chain's back-off.

Source: Rendle, Freudenthaler and Schmidt-Thieme 2010, "Factorizing Personalized Markov Chains", without its users.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn

from bigdssm import distributed
from bigdssm.config import WarmStartConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.transitions import QUERIES_AT_ONCE
from bigdssm.errors import DataError
from bigdssm.evaluation.chains import LastItems
from bigdssm.evaluation.counted_events import request_days
from bigdssm.features.history import item_codes
from bigdssm.models import DualEncoder
from bigdssm.models.embedding_tables import TransitionTable, table_name
from bigdssm.models.encoders.history import HistoryEncoder
from bigdssm.utils.log import get_logger

MOST_ITEMS = 20_000  # the cost is quadratic: 20,000 items of width 256 take a quarter of an hour
PASSES, FEWEST_STEPS, CONTEXTS_PER_STEP, WARMUP_STEPS = 24, 200, 1024, 30
LEARNING_RATE, WEIGHT_DECAY, BETAS = 0.01, 0.1, (0.9, 0.98)
START_NORM = 0.5  # of the vectors before the first step
HISTORY_SHARE = 0.05  # of the rest of a history's vector, at first: the gain of its LayerNorm
logger = get_logger(__name__)


@dataclass(frozen=True)
class Counts:
    """Weighted numbers of events by the item and action before them."""

    items: np.ndarray  # int64 [c]: codes of the items before
    actions: np.ndarray  # int64 [c]
    followers: np.ndarray  # int64 [n], ascending: codes of the items of events
    matrix: csr_matrix  # float32 [c, n]


@dataclass(frozen=True)
class ChainVectors:
    """The vectors of a chain, float32."""

    transitions: Tensor  # [items, (1 + actions) · D], as in `TransitionTable`
    documents: Tensor  # [n, D], of `Counts.followers`
    bias: Tensor  # [D]


def initialize_from_chain(model: DualEncoder, dataset: Dataset, config: WarmStartConfig, seed: int) -> None:
    """Initialize a new model from a chain. All ranks must call it; rank 0 computes the vectors.

    Items without events keep their random vectors. Raises DataError, on every rank: no events, or too many items.
    """
    feature = str(model.config.query.history.transition)
    dropout = model.config.query.history.transition_dropout
    (name, table), *_ = model.tables.transitions.items()

    def compute() -> tuple[Counts, ChainVectors]:
        counts = count_followers(dataset, table, feature, config.half_life_days)
        return counts, fitted_chain(counts, table, dropout, seed, has_bias=model.beta_head is not None)

    counts, vectors = distributed.computed_on_main(compute)
    alpha = model.config.alpha_init
    documents = cast(nn.Embedding, model.tables.tables[table_name("doc", table.item)])
    transitions = cast(nn.Embedding, model.tables.tables[name])
    with torch.no_grad():
        documents.weight[torch.from_numpy(counts.followers)] = vectors.documents.to(documents.weight)
        items = torch.from_numpy(np.unique(counts.items))
        transitions.weight[items] = (vectors.transitions[items] / alpha).to(transitions.weight)
        if model.beta_head is not None:
            model.beta_head.weight[0] = vectors.bias.to(model.beta_head.weight)
        for encoder in model.query_tower.encoders.values():
            if isinstance(encoder, HistoryEncoder):
                encoder.norm.weight.fill_(HISTORY_SHARE / alpha)
    logger.info(
        "%s: initialized %d items from a chain of %d items and actions", table.item, len(counts.followers),
        len(counts.items),
    )  # fmt: skip


def count_followers(dataset: Dataset, table: TransitionTable, feature: str, half_life_days: float) -> Counts:
    """Count the train events of `dataset` by the newest event before them. Raises DataError."""
    codes = item_codes(dataset.catalogue.codes(table.item, np.arange(dataset.catalogue.num_docs)))
    contexts, followers, days = [], [], []
    for rows in dataset.iterate("train", QUERIES_AT_ONCE):
        last = LastItems.of(rows, 1, feature)
        is_target = rows.relevance[last.request] > 0
        of_events = last.request[is_target]
        contexts.append(codes[last.item[is_target]] * table.num_values + last.action[is_target])
        followers.append(codes[rows.doc_rows[of_events]])
        days.append(request_days(dataset, rows)[of_events])
    day = np.concatenate(days) if days else np.zeros(0, np.int64)
    if not len(day):
        raise DataError(f"{dataset.dir}: no train event follows another, so warm_start.chain has nothing to count")
    weight = np.exp2((day - day.max()) / half_life_days) if half_life_days else np.ones(len(day))

    context, row = np.unique(np.concatenate(contexts), return_inverse=True)
    follower, column = np.unique(np.concatenate(followers), return_inverse=True)
    if len(follower) > MOST_ITEMS:
        raise DataError(
            f"{dataset.dir}: warm_start.chain: got {len(follower):,} items with events, needs at most {MOST_ITEMS:,}, "
            "as its cost is quadratic; set it to false"
        )
    matrix = csr_matrix((weight.astype(np.float32), (row, column)), (len(context), len(follower)))
    return Counts(context // table.num_values, context % table.num_values, follower, matrix)


def fitted_chain(counts: Counts, table: TransitionTable, dropout: float, seed: int, *, has_bias: bool) -> ChainVectors:
    """Return the vectors of least cross entropy, by AdamW with a cosine decay of the learning rate."""
    random = torch.Generator().manual_seed(seed)
    num_contexts, num_followers = counts.matrix.shape
    std = START_NORM / table.dim**0.5
    of_items = nn.Parameter(std * torch.randn(table.rows, table.dim, generator=random))
    of_actions = nn.Parameter(torch.zeros(table.rows * table.num_values, table.dim))
    documents = nn.Parameter(std * torch.randn(num_followers, table.dim, generator=random))
    bias = nn.Parameter(torch.zeros(table.dim), requires_grad=has_bias)

    parameters = [p for p in (of_items, of_actions, documents, bias) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS)
    item = torch.from_numpy(counts.items)
    pair = item * table.num_values + torch.from_numpy(counts.actions)
    steps_per_pass = -(-num_contexts // CONTEXTS_PER_STEP)
    num_passes = max(PASSES, -(-FEWEST_STEPS // steps_per_pass))
    num_steps = num_passes * steps_per_pass
    step = 0
    for _ in range(num_passes):
        order = torch.randperm(num_contexts, generator=random)
        for part in order.chunk(steps_per_pass):
            decay = (1 + np.cos(np.pi * step / num_steps)) / 2
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * decay
            share = torch.from_numpy(counts.matrix[part.numpy()].toarray())
            vectors = of_items[item[part]] + of_actions[pair[part]]
            retained = torch.rand(vectors.shape, generator=random) >= dropout
            scores = (vectors * retained / (1 - dropout) + bias) @ documents.T
            loss = -(share * scores.log_softmax(dim=1)).sum() / share.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    by_item = torch.cat([of_items.detach(), of_actions.detach().view(table.rows, -1)], dim=1)
    return ChainVectors(by_item, documents.detach(), bias.detach())
