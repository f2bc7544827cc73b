"""`--format model`: a model folder for the other commands' --model."""

from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import ClassVar

from bigdssm.checkpoints.model_folder import ModelFolder, load_model_folder, save_model_folder
from bigdssm.export.formats import ExportFormat, Parity, Probe, python_block, register_export


@register_export
@dataclass(frozen=True)
class ModelExport(ExportFormat):
    """Config, schema, tokenizer and weights, for every command with `--model`."""

    format: ClassVar[str] = "model"
    library: ClassVar[str] = "bigdssm"
    keeps_tables: ClassVar[bool] = True

    def write(self, model: ModelFolder, out: Path) -> Parity:
        """Write a model folder and load it again."""
        save_model_folder(out, model.model, model.config, model.schema, model.tokenizer_dir, model.provenance)
        return Parity.of(Probe(load_model_folder(out)).vectors, Probe(model).vectors)

    def loading(self, model: ModelFolder, name: str) -> str:
        """Return the loading code."""
        code = f"""
            from pathlib import Path
            from bigdssm.checkpoints.model_folder import load_model_folder

            folder = load_model_folder(Path("{name}"))
            folder.model  # a torch module; see also folder.schema, folder.config and folder.tokenizer_dir
            """
        tools = "`bigdssm embed`, `search`, `serve` and `evaluate` accept this folder as `--model`."
        return f"{python_block(dedent(code))}\n\n{tools}"
