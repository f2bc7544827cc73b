"""`--format sentence-transformers`: a folder for SentenceTransformer of its standard modules.

A Router sends queries and documents through Transformer → Pooling → Dense …. Cosine models end in Normalize. For dot
models a last Dense adds alpha and beta to the vectors: documents are [alpha * w, beta] and queries [u, 1], so that the
dot product is the training score. For cosine with a beta per document, which Normalize would distort, the folder
contains a custom module (sentence_transformers_module.py): queries are [√alpha * u, 1] and documents
[√alpha * w, beta]. A shared beta does not affect cosine rankings and is dropped.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from textwrap import dedent
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.errors import ConfigError
from bigdssm.export.formats import ExportFormat, Parity, Probe, largest_difference, python_block, register_export
from bigdssm.export.text_tower import (
    Side,
    TextTower,
    alpha,
    beta_weight,
    loading_arguments,
    save_encoder,
    shared_beta,
    text_towers,
)
from bigdssm.models.encoders.transformer import ACTIVATIONS
from bigdssm.utils.atomic import write_json

ROUTES: dict[Side, str] = {"query": "query", "doc": "document"}
# Class names that all releases since 5.0 resolve
MODULE = "sentence_transformers.models"
CODE = Path(__file__).with_name("sentence_transformers_module.py")


@register_export
@dataclass(frozen=True)
class SentenceTransformersExport(ExportFormat):
    """A folder for `SentenceTransformer(FOLDER)`; towers of one text."""

    format: ClassVar[str] = "sentence-transformers"
    library: ClassVar[str] = "sentence-transformers"

    def write(self, model: ModelFolder, out: Path) -> Parity:
        """Write both towers as the routes of one model.

        Raises ConfigError: a tower has features other than one text, or sentence-transformers is not installed.
        """
        query, doc = text_towers(model, self.format)
        if importlib.util.find_spec("sentence_transformers") is None:
            raise ConfigError(
                f"--format {self.format}: needs the package to check the result; pip install 'bigdssm[{self.format}]'"
            )
        assert model.tokenizer_dir is not None
        router = _RouterFolder(out)
        # Shared by both routes if weights and max_tokens are equal: truncation is a setting of the encoder.
        shared = query.encoder is doc.encoder and query.feature.max_tokens == doc.feature.max_tokens
        encoder = ""
        for tower in (query, doc):
            if not (shared and encoder):
                encoder = router.add(tower.side, "Transformer")
                save_encoder(tower, model.tokenizer_dir, out / encoder)
                settings = {"max_seq_length": tower.feature.max_tokens, "do_lower_case": False}
                arguments = loading_arguments(tower)
                write_json(out / encoder / "sentence_bert_config.json", {**settings, "model_args": arguments})
            else:
                router.reuse(tower.side, encoder)
            pooling = router.add(tower.side, "Pooling")
            write_json(out / pooling / "config.json", _pooling(tower))
            layers = _dense_layers(model, tower)
            for number in range(len(layers) + 1):
                if number == tower.normalized_after:
                    router.add(tower.side, "Normalize")
                if number < len(layers):
                    _write_dense(out / router.add(tower.side, "Dense"), *layers[number])
        router.write()
        modules = [("", f"{MODULE}.Router")]
        if needs_custom_code(model):
            modules.append(("1_NormalizeAllButLast", f"{CODE.stem}.NormalizeAllButLast"))
            (out / "1_NormalizeAllButLast").mkdir()
            write_json(out / "1_NormalizeAllButLast" / "config.json", {"scale": sqrt(alpha(model))})
            shutil.copyfile(CODE, out / CODE.name)
        elif not scores_by_dot(model):
            modules.append(("1_Normalize", f"{MODULE}.Normalize"))
            (out / "1_Normalize").mkdir()
        entries = [
            {"idx": idx, "name": str(idx), "path": path, "type": kind} for idx, (path, kind) in enumerate(modules)
        ]
        write_json(out / "modules.json", entries)
        write_json(
            out / "config_sentence_transformers.json",
            {
                "model_type": "SentenceTransformer",
                "prompts": {ROUTES[tower.side]: tower.feature.prompt or "" for tower in (query, doc)},
                "default_prompt_name": None,
                "similarity_fn_name": "dot" if scores_by_dot(model) else "cosine",
            },
        )
        return _parity(model, out)

    def loading(self, model: ModelFolder, name: str) -> str:
        """Return the loading code and a note on the scores."""
        trusted = ", trust_remote_code=True" if needs_custom_code(model) else ""
        code = f"""
            from sentence_transformers import SentenceTransformer

            model = SentenceTransformer("{name}"{trusted})
            queries = model.encode_query(["the text of a query"])
            documents = model.encode_document(["the text of a document"])
            scores = model.similarity(queries, documents)
            """
        scores = (
            "The scores are the training scores: the vectors contain alpha and beta. Search by dot product and do not "
            "normalize the vectors."
            if scores_by_dot(model)
            else "The scores are cosines, <u, w>, without alpha and beta, which do not affect the ranking."
        )
        if trusted:
            scores += (
                f" `trust_remote_code` runs {CODE.name} of this folder, which appends beta to the normalized vector."
            )
        routes = 'The two towers differ, so `encode` needs `task="query"` or `task="document"`.'
        return f"{python_block(dedent(code))}\n\n{scores} {routes}"


def scores_by_dot(model: ModelFolder) -> bool:
    """Return whether the export scores by dot product (the training score), else by cosine."""
    return model.config.model.score == "dot" or beta_weight(model) is not None


def needs_custom_code(model: ModelFolder) -> bool:
    """Return whether the export contains a custom module, which needs trust_remote_code."""
    return scores_by_dot(model) and model.config.model.score == "cosine"


class _RouterFolder:
    """Writes the modules of the routes in Router's layout."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._types: dict[str, str] = {}
        self._structure: dict[str, list[str]] = {route: [] for route in ROUTES.values()}

    def add(self, side: Side, kind: str) -> str:
        """Append a module to a route, create its folder and return the folder's name."""
        name = f"{ROUTES[side]}_{len(self._structure[ROUTES[side]])}_{kind}"
        self._types[name] = f"{MODULE}.{kind}"
        self.reuse(side, name)
        (self._out / name).mkdir()
        return name

    def reuse(self, side: Side, name: str) -> None:
        """Append an existing module of another route."""
        self._structure[ROUTES[side]].append(name)

    def write(self) -> None:
        # Without a default route, `encode` raises if the task is not given
        parameters = {"default_route": None, "allow_empty_key": False}
        content = {"types": self._types, "structure": self._structure, "parameters": parameters}
        write_json(self._out / "router_config.json", content)


def _pooling(tower: TextTower) -> dict[str, object]:
    names = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}
    modes = {f"pooling_mode_{name}": mode == tower.encoder.pooling for name, mode in names.items()}
    others = ("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
    width = tower.encoder.transformer.config.hidden_size
    return {
        "word_embedding_dimension": width,
        **modes,
        **{f"pooling_mode_{name}": False for name in others},
        "include_prompt": not tower.feature.prompt_tokens,
    }


def _dense_layers(model: ModelFolder, tower: TextTower) -> Sequence[tuple[Tensor, Tensor | None, str]]:
    """Return (weight, bias, activation) per layer; dot products need a last one for alpha and beta."""
    layers: list[tuple[Tensor, Tensor | None, str]] = [
        (layer.linear.weight, layer.linear.bias, _dotted(layer.activation)) for layer in tower.layers
    ]
    if scores_by_dot(model):
        dim = model.config.model.dim
        beta = beta_weight(model)
        beta = torch.zeros(1, dim) if beta is None else beta
        is_query = tower.side == "query"
        scale, last, added = (1.0, torch.zeros(1, dim), 1.0) if is_query else (alpha(model), beta, shared_beta(model))
        scale = 1.0 if needs_custom_code(model) else scale  # the custom module applies its square root on both sides
        weight, bias = torch.cat([scale * torch.eye(dim), last]), torch.cat([torch.zeros(dim), torch.tensor([added])])
        layers.append((weight, bias, _dotted("Identity")))
    return layers


def _dotted(activation: str) -> str:
    cls = ACTIVATIONS[activation]
    return f"{cls.__module__}.{cls.__name__}"


def _write_dense(folder: Path, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    out_features, in_features = weight.shape
    config = {"in_features": in_features, "out_features": out_features, "bias": bias is not None}
    write_json(folder / "config.json", {**config, "activation_function": activation})
    tensors = {"linear.weight": weight} | ({} if bias is None else {"linear.bias": bias})
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _parity(model: ModelFolder, out: Path) -> Parity:
    from sentence_transformers import SentenceTransformer  # optional, and slow to import

    loaded = SentenceTransformer(
        str(out), device="cpu", local_files_only=True, trust_remote_code=needs_custom_code(model)
    )
    probe = Probe(model)
    texts = {side: probe.only_text(side) for side in ROUTES}
    ours = {"query": loaded.encode_query(texts["query"]), "doc": loaded.encode_document(texts["doc"])}
    trainers = dict(probe.vectors)
    if needs_custom_code(model):
        scale = torch.tensor([sqrt(alpha(model))] * model.config.model.dim + [1.0])
        trainers = {"query": trainers["query"] * scale, "doc": trainers["doc"] / scale}
    elif not scores_by_dot(model):
        trainers = {"query": trainers["query"][:, :-1], "doc": trainers["doc"][:, :-1] / alpha(model)}
    differences = {side: largest_difference(torch.as_tensor(ours[side]), trainers[side]) for side in ROUTES}
    return Parity(differences["query"], differences["doc"])
