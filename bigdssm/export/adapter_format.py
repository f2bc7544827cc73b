"""`--format adapter`: the LoRA adapters of the text encoders alone, for peft; and models with their adapters merged.

OUT/NAME/   adapter_config.json, adapter_model.safetensors of the text encoder NAME (shared, query or doc)
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import dedent
from typing import Any, ClassVar, cast

import torch

from bigdssm.checkpoints.model_folder import ModelFolder, dense_tables, model_checksum
from bigdssm.config import TowerConfig
from bigdssm.errors import ConfigError
from bigdssm.export.formats import ExportFormat, Parity, Probe, python_block, register_export
from bigdssm.models import DualEncoder
from bigdssm.models.declarations import Transformer
from bigdssm.models.encoders import text_configs


@register_export
@dataclass(frozen=True)
class AdapterExport(ExportFormat):
    """The adapters of the text encoders alone, in megabytes; for peft."""

    format: ClassVar[str] = "adapter"
    library: ClassVar[str] = "peft"
    keeps_adapters: ClassVar[bool] = True
    keeps_tables: ClassVar[bool] = True

    def write(self, model: ModelFolder, out: Path) -> Parity:
        """Write the adapters, load them on their base models, and compare.

        Raises ConfigError: the model has no adapters, or frozen weights that differ from those of `text.init`.
        """
        from peft import PeftModel
        from transformers import AutoModel

        from bigdssm.models.encoders.lora import base_name, save_adapter
        from bigdssm.models.encoders.pretrained import PretrainedFolder
        from bigdssm.models.encoders.transformer import TransformerEncoder, without_pooler

        adapted = adapted_texts(model)
        if not adapted:
            raise ConfigError(f"--format {self.format}: the model has no adapters; train one with text.lora_rank")
        tables, model.model.tables.source = model.model.tables.source, None  # files are not copied
        probed = copy.deepcopy(model.model)
        model.model.tables.source = probed.tables.source = tables
        for key, config in adapted.items():
            encoder = cast(TransformerEncoder, model.model.text[key])
            base, lora = str(config.init), encoder.architecture.bigdssm["lora"]
            save_adapter(encoder.transformer, lora, base, out / key)
            reloaded = AutoModel.from_pretrained(
                PretrainedFolder(base).transformer, config=encoder.transformer.config, local_files_only=True,
                use_safetensors=True, trust_remote_code=False,
            )  # fmt: skip
            frozen = {base_name(name): weight for name, weight in encoder.transformer.state_dict().items()}
            theirs = without_pooler(reloaded).state_dict().items()
            if not all(torch.equal(weight.float(), frozen[name].float()) for name, weight in theirs):
                raise ConfigError(
                    f"--format {self.format}: the frozen weights differ from text.init={base}: an earlier stage has "
                    "trained them, or engine.precision=bf16_pure has rounded them; use another --format, which merges "
                    "the adapters"
                )
            cast(Any, probed.text[key]).transformer = PeftModel.from_pretrained(reloaded, str(out / key)).eval()
        return Parity.of(Probe(replace(model, model=probed)).vectors, Probe(model).vectors)

    def loading(self, model: ModelFolder, name: str) -> str:
        """Return the loading code and the limits of the folder."""
        (key, config), *_ = adapted_texts(model).items()
        layers = f", num_hidden_layers={config.keep_layers}" if config.keep_layers else ""
        code = f"""
            from peft import PeftModel
            from transformers import AutoModel

            encoder = AutoModel.from_pretrained("{config.init}"{layers})
            encoder = PeftModel.from_pretrained(encoder, "{name}/{key}")
            """
        lacks = "The folder has the adapters of the text encoders alone, without pooling and the towers' MLPs."
        return f"{python_block(dedent(code))}\n\n{lacks}"


def adapted_texts(folder: ModelFolder) -> dict[str, Transformer]:
    """Return the configs of the text encoders with adapters, by name."""
    configs = text_configs(folder.config.model, folder.schema)
    return {name: text for name, text in configs.items() if isinstance(text, Transformer) and text.lora_rank}


def without_adapters(folder: ModelFolder) -> ModelFolder:
    """Return the model with the updates of its adapters added to the weights; itself if it has none.

    Raises CheckpointError: its vectors differ from those with adapters.
    """
    adapted = adapted_texts(folder)
    if not adapted:
        return folder
    from bigdssm.models.encoders.lora import merged_state

    architectures, state = {}, folder.model.state_dict()
    for name, encoder in folder.model.text.items():
        architectures[name] = copy.deepcopy(cast(Any, encoder).architecture)
        if name in adapted:
            prefix = f"text.{name}.transformer."
            state = {key: tensor for key, tensor in state.items() if not key.startswith(prefix)}
            state |= {prefix + key: tensor for key, tensor in merged_state(cast(Any, encoder).transformer).items()}
            architectures[name].bigdssm["lora"] = None

    def without(tower: TowerConfig) -> TowerConfig:
        text = tower.text
        return replace(tower, text=replace(text, lora_rank=0) if isinstance(text, Transformer) else text)

    towers = folder.config.model
    config = replace(folder.config, model=replace(towers, query=without(towers.query), doc=without(towers.doc)))
    model = DualEncoder(config.model, folder.schema, architectures, dense=dense_tables(state))
    model.load_state_dict(state)
    model.tables.source = folder.model.tables.source
    checksum = model_checksum(model, config, folder.schema, folder.tokenizer_dir, folder.provenance)
    merged = replace(folder, model=model.eval(), config=config, checksum=checksum)
    Parity.of(Probe(merged).vectors, Probe(folder).vectors).check("the model with merged adapters")
    return merged
