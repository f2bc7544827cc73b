"""The dual encoder: two towers and the scalars of the score S = alpha * <u, w> + beta."""

import math
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from bigdssm.config import ModelConfig
from bigdssm.dataset.schema import REQUEST, Schema
from bigdssm.errors import ConfigError
from bigdssm.features import PADDING, Age, Categorical, Feature, age_of, histories_of, timestamp_of
from bigdssm.features.base import OUT_OF_VOCABULARY, REQUEST_PREFIX
from bigdssm.models.age import AgeCoordinates
from bigdssm.models.embedding_tables import INIT_STD, EmbeddingTables, table_name
from bigdssm.models.encoders import (
    BuildContext,
    Encoder,
    TextEncoder,
    build_encoder,
    text_architectures,
    text_configs,
    text_keys,
)
from bigdssm.models.encoders.base import SideSize, checked_output, linear_flops
from bigdssm.models.encoders.history import HistoryEncoder
from bigdssm.models.packed import Packed, PackedLists, QueryPositions, Values

ALPHA_MAX = 100.0
MIN_NORM = 1e-12  # a missing value has a vector of zeros
DOCUMENT_WEIGHTS = ("doc_tower.", "text.doc.", "tables.tables.doc_", "beta", "log_alpha")  # beginnings of their names


def query_head(U: Tensor, has_beta: bool) -> Tensor:
    """Return the query factor of the score: [u, 1], float32 [m, D+1], or without beta u, float32 [m, D]."""
    U = U.float()
    return torch.cat([U, torch.ones_like(U[:, :1])], dim=1) if has_beta else U


def document_head(W: Tensor, alpha: Tensor | float, beta: Tensor | None) -> Tensor:
    """Return the document factor of the score: [alpha * w, beta], or without beta alpha * w; as `query_head`."""
    W = alpha * W.float()
    return W if beta is None else torch.cat([W, beta.float().unsqueeze(1)], dim=1)


class _ByFeature(nn.ModuleDict):
    """Modules by feature; unlike nn.ModuleDict, names such as `type` or `items` are allowed."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


class Tower(nn.Module):
    """One side of the dual encoder."""

    def __init__(self, features: Mapping[str, Feature], context: BuildContext, dim: int) -> None:
        super().__init__()
        self.residual, self.residual_limit = context.config.residual, context.config.residual_limit
        of_event = replace(context, side="event")
        self.request = _ByFeature({name: build_encoder(context.event[name], of_event) for name in context.request})
        request_dim = sum(cast(Encoder, encoder).dim for encoder in self.request.values())
        context = replace(context, request_dim=request_dim)
        encoders = {name: build_encoder(feature, context) for name, feature in features.items()}
        self.encoders = _ByFeature({name: e for name, e in encoders.items() if not e.is_shared})
        self._shared_encoders = ({name: e for name, e in encoders.items() if e.is_shared},)  # not modules of the tower
        widths = {name: encoder.dim for name, encoder in self._all().items()}
        if self.residual is not None and self.residual not in widths:
            raise ConfigError(
                f"model.{context.side}.residual={self.residual} is no {context.side} feature, "
                f"needs one of {list(widths)}"
            )
        if self.residual is not None and widths[self.residual] != dim:
            of_age = f" has {dim} without the {context.age_dim} of age" if context.age_dim else ""
            raise ConfigError(
                f"model.{context.side}.residual={self.residual} has width {widths[self.residual]}, but "
                f"model.dim={dim + context.age_dim}{of_age}; set both to the same (embedding_dim of model.doc for "
                f"categorical features and histories)"
            )
        width = request_dim + sum(width for name, width in widths.items() if name != self.residual)
        if self.residual_limit is not None:
            feature, where = features.get(self.residual or ""), f"model.{context.side}.residual"
            if not isinstance(feature, Categorical) or feature.multi or width == 0:
                raise ConfigError(
                    f"{where}_limit={self.residual_limit} needs a single-valued categorical residual and other "
                    f"features; got {where}={self.residual} of {list(widths)}"
                )
            if table_name(context.side, feature.name) in context.tables.sharded:
                raise ConfigError(
                    f"{where}_limit={self.residual_limit}: the table of {context.side}.{feature.name} is sharded; set "
                    "model.tables.replicated"
                )
        self.mlp: nn.Sequential | None = None
        if width == 0:
            return
        layers: list[nn.Module] = [nn.Dropout(context.config.dropout)]
        for hidden in context.config.mlp:
            layers += [nn.Linear(width, hidden), nn.GELU(), nn.Dropout(context.config.dropout)]
            width = hidden
        head = nn.Linear(width, dim)
        if self.residual:  # starts as a small addition to the residual
            nn.init.normal_(head.weight, std=INIT_STD)
            nn.init.zeros_(head.bias)
        self.mlp = nn.Sequential(*layers, head)

    def forward(self, features: Mapping[str, Values], query_positions: QueryPositions | None = None) -> Tensor:
        """Return [R, D] for one side's features of R rows, or [m, D] for queries at `query_positions` of them.

        Features of requests, `request.NAME`, have one value per query.
        """
        parts = {}
        if self.residual_limit is not None and self.residual is not None:  # unknown ids add nothing
            codes = cast(Tensor, features[self.residual])
            features = {**features, self.residual: codes.masked_fill(codes == OUT_OF_VOCABULARY, PADDING)}
        if self.request:
            # A dummy chunk (loader/step_plan.py) has a row of features, but no queries.
            number = None if query_positions is None else len(query_positions.row)
            requests = [encoder(features[REQUEST_PREFIX + name][:number]) for name, encoder in self.request.items()]
            parts[REQUEST] = torch.cat(requests, dim=1)
            features = {**features, REQUEST: parts[REQUEST]}
        for name, encoder in self._all().items():
            values = features[name]
            if query_positions is None:
                # shape[0], not len(): an export would fix the number of rows
                number = values.num_rows if isinstance(values, Packed) else values.shape[0]
                vectors = encoder(encoder.inputs(name, features))
            else:
                number = len(query_positions.row)
                vectors = encoder.at_positions(encoder.inputs(name, features), query_positions)
            parts[name] = checked_output(encoder, vectors, (number, encoder.dim))
        residual = parts.pop(self.residual) if self.residual else None
        if self.mlp is None:
            assert residual is not None
            return residual
        output: Tensor = self.mlp(torch.cat(list(parts.values()), dim=1))
        if residual is not None and self.residual_limit is not None:
            limit = self.residual_limit * output.detach().norm(dim=1, keepdim=True)
            residual = residual * (limit / residual.norm(dim=1, keepdim=True).clamp(min=MIN_NORM)).clamp(max=1)
        return output if residual is None else output + residual

    def accepts_packed(self, training: bool) -> frozenset[str]:
        """Return the features whose lists may be packed."""
        return frozenset(name for name, encoder in self._all().items() if encoder.accepts_packed(training))

    def flops(self, size: SideSize) -> float:
        """Return the operations of a forward's matrix products over one side of a batch, without padding."""
        mlp_flops = 0.0 if self.mlp is None else size.vectors * linear_flops(self.mlp)
        return mlp_flops + sum(encoder.flops(name, size) for name, encoder in self._all().items())

    def _all(self) -> dict[str, Encoder]:
        """Return the encoders by feature, shared ones last: the order of the concatenation."""
        return {**self.encoders, **self._shared_encoders[0]}  # type: ignore[dict-item]


class Encoded(NamedTuple):
    """The result of one forward; a side that was not requested is None. A tuple: ZeRO-3 hooks search tuples only."""

    U: Tensor | None  # [m, D]
    W: Tensor | None  # [n, D]
    beta: Tensor | None  # [n]
    alpha: Tensor  # [1]


class DualEncoder(nn.Module):
    """Query tower, document tower (one tower for a siamese schema), alpha, and beta per document.

    The last dimensions of both vectors are those of age, if a document feature is of this type (`models.age`).

    Weights are new, with `pretrained` except those of pretrained folders in `config`; `texts` are the architectures
    of the text encoders, by `text_keys`; `dense` are embedding tables that are not sharded. Source: Huang et al. 2013
    (DSSM); Radford et al. 2021 (CLIP) for the learned scale.
    """

    def __init__(
        self,
        config: ModelConfig,
        schema: Schema,
        texts: Mapping[str, Any],
        *,
        pretrained: bool = False,
        dense: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.config = config
        self.schema = schema
        self.tables = EmbeddingTables(schema, config, dense)
        keys, configs = text_keys(config, schema), text_configs(config, schema)
        self.text = nn.ModuleDict(
            {
                key: text.build_pretrained(texts[key]) if pretrained else text.build(texts[key])
                for key, text in configs.items()
            }
        )
        age = age_of(schema.doc)
        self.tower_dim = config.dim if age is None else config.dim - age.width
        doc_features = {name: feature for name, feature in schema.doc.items() if not isinstance(feature, Age)}
        if not schema.siamese:
            self.query_tower = Tower(schema.query, self._build_context("query", keys.get("query")), self.tower_dim)
        self.doc_tower = Tower(doc_features, self._build_context("doc", keys.get("doc")), self.tower_dim)
        if schema.siamese:  # a plain attribute: parameters and state have the tower once
            object.__setattr__(self, "query_tower", self.doc_tower)
        self.beta_head: nn.Linear | None = None
        if config.beta == "document":
            self.beta_head = nn.Linear(self.tower_dim, 1, bias=False)  # a common bias has no gradient in a softmax
            nn.init.zeros_(self.beta_head.weight)
        self.age: AgeCoordinates | None = None
        if age is not None:
            self.age = AgeCoordinates(age.periods)
            self._age_features = age.name, f"{REQUEST_PREFIX}{timestamp_of(schema.event)}"
        # Shape (1,): a 0-dim parameter breaks DeepSpeed's bf16 broadcast over gloo.
        self.log_alpha = nn.Parameter(torch.full((1,), math.log(config.alpha_init)), requires_grad=config.alpha_learned)

    @property
    def has_beta(self) -> bool:
        """Return whether the score has a document bias, and index vectors a last number for it."""
        return self.config.beta != "none"

    @property
    def content_ids(self) -> list[str]:
        """Return the document features that identify the items of histories that read contents; empty without any."""
        histories = histories_of(self.schema.query).values()
        return [] if self.config.query.history.items == "id" else [str(feature.of) for feature in histories]

    def set_contents(self, contents: Tensor) -> Tensor:
        """Set the contents of items [1 + documents, D] that histories read, and return the previous ones.

        The first row is zero.
        """
        previous = contents
        for encoder in self.query_tower.encoders.values():
            if isinstance(encoder, HistoryEncoder):
                previous, encoder.contents = encoder.contents, contents
        return previous

    def forward(
        self,
        query: Mapping[str, Values] | None = None,
        doc: Mapping[str, Values] | None = None,
        query_positions: QueryPositions | None = None,
    ) -> Encoded:
        """Encode queries, documents, or both; alpha is always returned (ZeRO-3 hides it outside the forward).

        Without `query_positions`, a row of `query` is one query with its whole history. With them, there are m queries,
        each with a prefix of its row's history: histories are encoded in one pass, other features once per row.
        """
        alpha: Tensor = _ClampAbove.apply(self.log_alpha.float().exp(), ALPHA_MAX)
        U = W = beta = None
        if query is not None:
            U = self._normalized(self.query_tower(query, query_positions))
            if self.age is not None:
                times = cast(Tensor, query[self._age_features[1]])[: U.shape[0]]  # a dummy chunk has no queries
                U = torch.cat([U, self.age(times).to(U.dtype)], dim=1)
        if doc is not None:
            output = self.doc_tower(doc)
            W = self._normalized(output)
            if self.age is not None:
                arrivals = cast(Tensor, doc[self._age_features[0]])
                W = torch.cat([W, self.age.of_documents(arrivals).to(W.dtype)], dim=1)
            if self.beta_head is not None:
                beta = self.beta_head(output).squeeze(1)
        return Encoded(U, W, beta, alpha)

    @torch.no_grad()
    def freeze_documents(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Exclude document tower, alpha and beta from training, with the weights in a model's `state` if given."""
        names = {} if state is None else {name.replace("text.shared.", "text.doc.", 1): name for name in state}
        for name, parameter in self.named_parameters():
            if name.startswith(DOCUMENT_WEIGHTS):
                parameter.requires_grad_(False)
                if state is not None:
                    value = state[names[name]]
                    parameter[: len(value)] = value
                    if len(parameter) > len(value):  # ids that the model did not have
                        parameter[len(value) :] = value[OUT_OF_VOCABULARY]

    def frozen_weights(self) -> dict[str, nn.Parameter]:
        """Return the weights that are not trained: those under adapters, and those of fixed documents."""
        return {name: p for name, p in self.named_parameters() if not p.requires_grad and p is not self.log_alpha}

    def checkpoint_activations(self) -> None:
        """Recompute the activations of the transformers in the backward."""
        for module in self.modules():
            if isinstance(module, Encoder):
                module.checkpoint_activations()

    def accepts_packed(self, training: bool) -> PackedLists:
        """Return the features of both sides whose lists may be packed."""
        return PackedLists(self.query_tower.accepts_packed(training), self.doc_tower.accepts_packed(training))

    def flops(self, query: SideSize, doc: SideSize) -> float:
        """Return the operations of matrix products in one forward over both sides of a batch, without padding.

        This is a lower bound; a backward takes twice as many. A linear layer takes 2 · inputs · outputs per row or
        token, attention over t tokens 4 · t² · width per layer.
        """
        return self.query_tower.flops(query) + self.doc_tower.flops(doc)

    def _normalized(self, vectors: Tensor) -> Tensor:
        if self.config.score != "cosine":
            return vectors
        if not torch.is_autocast_enabled(vectors.device.type):
            return nn.functional.normalize(vectors, dim=1)
        # autocast would round the norms to its dtype: the same error in all scores of a vector
        with torch.autocast(vectors.device.type, enabled=False):
            return nn.functional.normalize(vectors.float(), dim=1)

    def _build_context(self, side: str, text_key: str | None) -> BuildContext:
        text = None if text_key is None else cast(TextEncoder, self.text[text_key])
        width, tower = self.config.doc.embedding_dim, self.config.tower(side)
        time, of_request = timestamp_of(self.schema.event), self.schema.request if side == "query" else ()
        event = {name: feature for name, feature in self.schema.event_inputs.items() if name != time}
        request = tuple(name for name in of_request if name != time)
        return BuildContext(
            side,
            tower,
            self.tables,
            width,
            text,
            event,
            request,
            time=time,
            request_time=time in of_request,
            content_dim=self.tower_dim,
            age_dim=self.config.dim - self.tower_dim,
        )


def new_model(
    config: ModelConfig, schema: Schema, vocab_size: int = 0, *,
    loading: AbstractContextManager[None] | None = None, dense: Collection[str] = (),
) -> DualEncoder:  # fmt: skip
    """Return a model to train, with new weights and those of the pretrained folders in `config`.

    `vocab_size` is the tokenizer's (0 without text features). loading: a context to read pretrained weights in. Raises
    ConfigError: a folder that does not fit.
    """
    texts = text_architectures(config, schema, vocab_size)
    with loading or nullcontext():
        return DualEncoder(config, schema, texts, pretrained=True, dense=dense)


class _ClampAbove(torch.autograd.Function):
    """min(x, top) that keeps gradients that lower x: with a plain clamp, x would stay at the top."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float) -> Tensor:
        ctx.save_for_backward(x >= top)
        return x.clamp(max=top)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (at_top,) = ctx.saved_tensors
        (gradient,) = gradients
        return torch.where(at_top & (gradient < 0), torch.zeros_like(gradient), gradient), None
