"""`--format sentence-transformers`: a folder for SentenceTransformer of its standard modules.

Queries and documents go through Transformer → Pooling → Dense …. If both sides are the same modules, they are those of
the model, else the routes of a Router; an encoder of both is written once. Cosine models end in one Normalize. For dot
models a last Dense adds alpha and beta to the vectors: documents are [alpha * w, beta] and queries [u, 1], so that the
dot product is the training score. For cosine with a beta per document, which Normalize would distort, the folder
contains a custom module (sentence_transformers_module.py): queries are [√alpha * u, 1] and documents
[√alpha * w, beta].
"""

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from textwrap import dedent
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.errors import ConfigError
from bigdssm.export.formats import ExportFormat, Parity, Probe, python_block, register_export
from bigdssm.export.text_tower import (
    Side,
    TextTower,
    beta_weight,
    loading_arguments,
    save_encoder,
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
        """Write both towers as one model.

        Raises ConfigError: a tower has features other than one text, or sentence-transformers is not installed.
        """
        query, doc = text_towers(model, self.format)
        if importlib.util.find_spec("sentence_transformers") is None:
            raise ConfigError(
                f"--format {self.format}: needs the package to check the result; pip install 'bigdssm[{self.format}]'"
            )
        assert model.tokenizer_dir is not None
        same = are_one_module(model, query, doc)
        types: dict[str, str] = {}  # class by folder of a module
        routes: dict[Side, list[str]] = {side: [] for side in ROUTES}  # folders of modules

        def add(side: Side, kind: str) -> str:
            """Append a module to a route, create its folder and return the folder's name."""
            name = f"{len(routes[side])}_{kind}"
            if not same:
                name = f"{ROUTES[side]}_{name}"
            elif not types:  # in the export's folder itself, as most models have their first module
                name = ""
            types[name] = f"{MODULE}.{kind}"
            routes[side].append(name)
            (out / name).mkdir(exist_ok=True)
            return name

        by_side = {f"{ROUTES[tower.side]}_length": tower.feature.max_tokens for tower in (query, doc)}
        lengths = by_side if query.feature.max_tokens != doc.feature.max_tokens else {}
        shared = query.encoder is doc.encoder and (not lengths or _has_lengths())
        encoder = None
        for tower in (doc,) if same else (query, doc):
            if encoder is None or not shared:
                encoder = add(tower.side, "Transformer")
                longest = max(query, doc, key=lambda tower: tower.feature.max_tokens) if shared else tower
                save_encoder(longest, model.tokenizer_dir, out / encoder)
                settings = {"max_seq_length": longest.feature.max_tokens, "do_lower_case": False}
                settings |= lengths if shared else {}
                arguments = loading_arguments(tower)
                write_json(out / encoder / "sentence_bert_config.json", {**settings, "model_args": arguments})
            else:
                routes[tower.side].append(encoder)
            pooling = add(tower.side, "Pooling")
            write_json(out / pooling / "config.json", _pooling(tower))
            layers = _dense_layers(model, tower)
            for number in range(len(layers) + 1):
                is_last = number == len(layers) and not scores_by_dot(model)  # the model's own Normalize follows
                if number == tower.normalized_after and not is_last:
                    add(tower.side, "Normalize")
                if number < len(layers):
                    weight, bias, activation = layers[number]
                    folder = out / add(tower.side, "Dense")
                    size = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": bias is not None}
                    write_json(folder / "config.json", {**size, "activation_function": activation})
                    tensors = {"linear.weight": weight} | ({} if bias is None else {"linear.bias": bias})
                    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
                    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        modules = list(types.items())
        if not same:
            modules = [("", f"{MODULE}.Router")]
            # Without a default route, `encode` raises if the task is not given
            parameters = {"default_route": None, "allow_empty_key": False}
            structure = {ROUTES[side]: folders for side, folders in routes.items()}
            write_json(out / "router_config.json", {"types": types, "structure": structure, "parameters": parameters})
        if needs_custom_code(model):
            modules.append(("1_NormalizeAllButLast", f"{CODE.stem}.NormalizeAllButLast"))
            (out / "1_NormalizeAllButLast").mkdir()
            write_json(out / "1_NormalizeAllButLast" / "config.json", {"scale": sqrt(model.alpha)})
            shutil.copyfile(CODE, out / CODE.name)
        elif not scores_by_dot(model):
            modules.append((f"{len(modules)}_Normalize", f"{MODULE}.Normalize"))
            (out / modules[-1][0]).mkdir()
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

        # The vectors of the folder as the package loads it, against the trainer's without what it leaves out.
        from sentence_transformers import SentenceTransformer  # optional, and slow to import

        loaded = SentenceTransformer(
            str(out), device="cpu", local_files_only=True, trust_remote_code=needs_custom_code(model)
        )
        probe = Probe(model)
        texts = {side: probe.only_text(side) for side in ROUTES}
        ours: dict[Side, Any] = {
            "query": loaded.encode_query(texts["query"]),
            "doc": loaded.encode_document(texts["doc"]),
        }
        trainers = dict(probe.vectors)
        if needs_custom_code(model):
            scale = torch.tensor([sqrt(model.alpha)] * model.config.model.dim + [1.0])
            trainers = {"query": trainers["query"] * scale, "doc": trainers["doc"] / scale}
        elif not scores_by_dot(model):
            dim = model.config.model.dim
            trainers = {"query": trainers["query"][:, :dim], "doc": trainers["doc"][:, :dim] / model.alpha}
        return Parity.of({side: torch.as_tensor(vectors) for side, vectors in ours.items()}, trainers)

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
        query, doc = text_towers(model, self.format)
        routes = 'The two towers differ, so `encode` needs `task="query"` or `task="document"`.'
        if are_one_module(model, query, doc):
            routes = f"Both towers are the same modules. {_without_task(query, doc)}"
        return f"{python_block(dedent(code))}\n\n{scores} {routes}"


def are_one_module(model: ModelFolder, query: TextTower, doc: TextTower) -> bool:
    """Return whether both sides are the same modules, up to prompts and `max_tokens`."""
    modules = [(tower.encoder, tower.layers, _pooling(tower)) for tower in (query, doc)]
    lengths = {tower.feature.max_tokens for tower in (query, doc)}
    return modules[0] == modules[1] and not scores_by_dot(model) and (len(lengths) == 1 or _has_lengths())


def _without_task(query: TextTower, doc: TextTower) -> str:
    """Return a note on `encode` of a plain model: it adds no prompt, and truncates at the larger `max_tokens`."""
    longest = max(tower.feature.max_tokens for tower in (query, doc))
    same, others = [], []
    for tower in (query, doc):
        feature, method = tower.feature, f"`encode_{ROUTES[tower.side]}`"
        steps = []
        if feature.prompt:
            steps.append(f"adds the prompt {feature.prompt!r}")
        if feature.max_tokens < longest:
            steps.append(f"truncates at {feature.max_tokens} tokens in place of {longest}")
        if steps:
            others.append(f"{method} {' and '.join(steps)}")
        else:
            same.append(method)
    vectors = f"`encode` returns the vectors of {' and '.join(same)}" if same else "`encode` is for neither side"
    return ". ".join([f"{vectors}; {others[0]}" if others else vectors, *others[1:]]) + "."


def _has_lengths() -> bool:
    """Return whether Transformer truncates queries and documents at different lengths (from release 6 on)."""
    from sentence_transformers.models import Transformer  # optional, and slow to import

    return "query_length" in Transformer.config_keys


def scores_by_dot(model: ModelFolder) -> bool:
    """Return whether the export scores by dot product (the training score), else by cosine."""
    return model.config.model.score == "dot" or beta_weight(model) is not None


def needs_custom_code(model: ModelFolder) -> bool:
    """Return whether the export contains a custom module, which needs trust_remote_code."""
    return scores_by_dot(model) and model.config.model.score == "cosine"


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
        (linear.weight, linear.bias, _dotted(activation)) for linear, activation in tower.layers
    ]
    is_query, dim = tower.side == "query", model.config.model.dim
    beta = beta_weight(model)
    if scores_by_dot(model) and beta is None:
        if not is_query:
            layers.append((model.alpha * torch.eye(dim), None, _dotted("Identity")))
    elif beta is not None:
        scale, last, added = (1.0, torch.zeros(1, dim), 1.0) if is_query else (model.alpha, beta, 0.0)
        scale = 1.0 if needs_custom_code(model) else scale  # the custom module applies its square root on both sides
        weight, bias = torch.cat([scale * torch.eye(dim), last]), torch.cat([torch.zeros(dim), torch.tensor([added])])
        layers.append((weight, bias, _dotted("Identity")))
    return layers


def _dotted(activation: str) -> str:
    cls = ACTIVATIONS[activation]
    return f"{cls.__module__}.{cls.__name__}"
