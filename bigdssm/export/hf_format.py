"""`--format hf`: transformer and tokenizer per tower for AutoModel and AutoTokenizer, and its projection.

OUT/query/, OUT/document/   config.json, model.safetensors, tokenizer files; projection.safetensors, projection.json
"""

from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import ClassVar

from safetensors.torch import save_file
from torch import Tensor

from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.export.formats import (
    ExportFormat,
    Parity,
    Probe,
    python_block,
    register_export,
    source_of,
)
from bigdssm.export.hf_loading import load_tower
from bigdssm.export.text_tower import (
    Side,
    beta_weight,
    loading_arguments,
    save_encoder,
    shared_beta,
    text_towers,
)
from bigdssm.utils.atomic import write_json

FOLDERS = {"query": "query", "doc": "document"}


@register_export
@dataclass(frozen=True)
class HuggingFaceExport(ExportFormat):
    """AutoModel, AutoTokenizer and projection per tower; towers of one text."""

    format: ClassVar[str] = "hf"
    library: ClassVar[str] = "transformers"

    def write(self, model: ModelFolder, out: Path) -> Parity:
        """Write both towers. Raises ConfigError: a tower has features other than one text."""
        assert model.tokenizer_dir is not None
        probe, vectors = Probe(model), dict[Side, Tensor]()
        for tower in text_towers(model, self.format):
            folder = out / FOLDERS[tower.side]
            save_encoder(tower, model.tokenizer_dir, folder)
            weights: dict[str, Tensor] = {}
            for number, (linear, _) in enumerate(tower.layers):
                weights[f"layers.{number}.weight"] = linear.weight.detach().contiguous()
                if linear.bias is not None:
                    weights[f"layers.{number}.bias"] = linear.bias.detach().contiguous()
            beta = beta_weight(model)
            if tower.side == "doc" and beta is not None:
                weights["beta"] = beta.contiguous()
            save_file(weights, folder / "projection.safetensors", metadata={"format": "pt"})
            head = {
                "side": tower.side,
                "max_tokens": tower.feature.max_tokens,
                "prompt": tower.feature.prompt or "",
                "prompt_tokens": tower.feature.prompt_tokens,  # that are not pooled
                "pooling": tower.encoder.pooling,
                "activations": [activation for _, activation in tower.layers],
                "normalized_after": tower.normalized_after,
                "score": model.config.model.score,
                "alpha": model.alpha,
                "beta": shared_beta(model) if model.model.has_beta else None,  # unless beta is per document
                "loading_arguments": loading_arguments(tower),
            }
            write_json(folder / "projection.json", head)
            vectors[tower.side] = load_tower(folder)(probe.only_text(tower.side))
        return Parity.of(vectors, probe.vectors)

    def loading(self, model: ModelFolder, name: str) -> str:
        """Return the loading code and a note on the scores."""
        example = f"""
            encode_query, encode_document = load_tower("{name}/query"), load_tower("{name}/document")
            scores = encode_query(["the text of a query"]) @ encode_document(["the text of a document"]).T
            """
        code = python_block(f"{source_of('hf_loading.py')}\n\n{dedent(example)}")
        return f"{code}\n\nThe scores are the training scores."
