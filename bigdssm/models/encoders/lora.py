"""LoRA adapters of text encoders, by peft: low-rank updates of a frozen transformer. Source: Hu et al. 2021."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bigdssm.errors import ConfigError

ADAPTER = "default"  # peft's name of the only adapter
BASE = ".base_layer."  # in the names of the frozen weights of adapted layers


def add_adapters(model: PreTrainedModel, lora: Mapping[str, Any]) -> None:
    """Freeze a transformer and add adapters to its linear layers. Raises ConfigError: no peft, or no such layers.

    lora: rank, alpha, dropout, and modules (ends of the names of the layers; empty: all linear layers).
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError("text.lora_rank needs peft: pip install 'bigdssm[lora]'") from None
    config = LoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"],
        target_modules=list(lora["modules"]) or "all-linear",
    )  # fmt: skip
    model.requires_grad_(False)
    try:
        inject_adapter_in_model(config, model, ADAPTER)
    except ValueError as error:
        raise ConfigError(f"text.lora_modules={list(lora['modules'])}: {str(error).splitlines()[0]}") from None


def base_name(name: str) -> str:
    """Return the name of a weight without adapters."""
    return name.replace(BASE, ".")


def is_adapter(name: str) -> bool:
    """Return whether a weight belongs to an adapter."""
    return ".lora_" in name


def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the state dict without adapters, under the base model's names, with their updates added to the weights."""
    state = {base_name(name): tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}
    if not any(map(is_adapter, model.state_dict())):  # peft may not be installed
        return state
    from peft.tuners.lora import LoraLayer

    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                update = cast(Any, module).get_delta_weight(ADAPTER)
                state[f"{name}.weight"] = state[f"{name}.weight"] + update
    return state


def save_adapter(model: PreTrainedModel, lora: Mapping[str, Any], base: str, folder: Path) -> None:
    """Write the adapter alone, for `peft.PeftModel.from_pretrained`; `base`: folder or name of the frozen model."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    LoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], base_model_name_or_path=base,
        target_modules=sorted({name.rpartition(".lora_A")[0] for name in model.state_dict() if ".lora_A." in name}),
        task_type="FEATURE_EXTRACTION", inference_mode=True,
    ).save_pretrained(str(folder))  # fmt: skip
    tensors = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if is_adapter(name)
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
