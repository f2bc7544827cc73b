"""Config keys of sequence blocks and text encoders; torch is imported when one is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bigdssm.config import (
    HISTORY_BLOCKS,
    TEXT_ENCODERS,
    HistoryEncoderConfig,
    TextEncoderConfig,
    TextInputs,
)
from bigdssm.config.components import MAX_WIDTH
from bigdssm.errors import ConfigError
from bigdssm.utils.components import bounded

if TYPE_CHECKING:
    from torch import nn

register_block = HISTORY_BLOCKS.register
register_text_encoder = TEXT_ENCODERS.register


@register_block
@dataclass(frozen=True)
class Sasrec(HistoryEncoderConfig):
    """LayerNorm, attention and a feed-forward layer (Kang and McAuley 2018)."""

    block: str = "sasrec"
    feedforward: int = bounded(2, 1, 64)  # width of the feed-forward layer, as a multiple of the item vectors'

    def build(self, dim: int) -> nn.Module:
        """Return SASRec's layer."""
        from bigdssm.models.blocks import SasrecBlock

        return SasrecBlock(dim, self.heads, self.feedforward, self.dropout)


@register_block
@dataclass(frozen=True)
class Gated(Sasrec):
    """RMSNorm, attention and SwiGLU, each with a sigmoid gate, as in LiGR and eSASRec."""

    block: str = "gated"

    def build(self, dim: int) -> nn.Module:
        """Return the gated layer."""
        from bigdssm.models.blocks import GatedBlock

        return GatedBlock(dim, self.heads, self.feedforward, self.dropout)


@register_block
@dataclass(frozen=True)
class LowPass(Sasrec):
    """Post-norm attention mixed with a moving average of the events, in place of BSARec's Fourier filter."""

    softmax_attention: ClassVar[bool] = False  # the average has no kernel for packed histories
    pair_products: ClassVar[int] = 3

    block: str = "lowpass"
    filter_share: float = bounded(0.7, 0, at_most=1)  # weight of the average; attention has 1 − filter_share
    filter_decay: float = bounded(0.9, 0, below=1)  # weight of an event over that of the next one

    def build(self, dim: int) -> nn.Module:
        """Return the layer with a filter."""
        from bigdssm.models.blocks import LowPassBlock

        return LowPassBlock(dim, self.heads, self.feedforward, self.dropout, self.filter_share, self.filter_decay)


@register_text_encoder
@dataclass(frozen=True)
class Transformer(TextEncoderConfig):
    """A transformer of Hugging Face: pretrained, of any family, or a small BERT from scratch."""

    type: str = "transformer"
    # folder, or name on the Hugging Face Hub, of a model of transformers or sentence-transformers; layers, hidden and
    # heads are then the model's
    init: str | None = None
    keep_layers: int = bounded(0, 0, 1024)  # with init: number of its first layers to keep, for a lighter tower; 0: all
    layers: int = bounded(2, 1, 1024)
    hidden: int = bounded(128, 1, MAX_WIDTH)
    heads: int = bounded(2, 1, 1024)
    # of the token vectors; auto: that of a sentence-transformers folder, else last for decoders and mean for encoders
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    lora_rank: int = bounded(0, 0, 4096)  # of LoRA adapters on a frozen `init`, 0 to train all weights; needs peft
    lora_alpha: float = bounded(16.0, at_most=10_000, above=0)  # updates are scaled by lora_alpha / lora_rank
    lora_dropout: float = bounded(0.0, 0, below=1)  # on the adapters' inputs
    lora_modules: tuple[str, ...] = ()  # ends of the names of adapted layers, such as q_proj; empty: all linear layers

    def check(self, key: str) -> None:
        """Raise ConfigError: keep_layers or lora_rank without init, or heads that do not divide the width."""
        if self.init is None and self.lora_rank:
            raise ConfigError(f"{key}.lora_rank: got {self.lora_rank}, needs {key}.init, the model that is frozen")
        if self.init is None and self.keep_layers:
            raise ConfigError(f"{key}.keep_layers: got {self.keep_layers}, needs {key}.init; without it, set `layers`")
        if self.init is None and self.hidden % self.heads:
            raise ConfigError(f"{key}.hidden: got {self.hidden}, needs a multiple of {key}.heads={self.heads}")

    @property
    def is_pretrained(self) -> bool:
        """Return whether all weights of `init` are trained; adapters have weights of their own."""
        return self.init is not None and not self.lora_rank

    def check_tokenizer(self, key: str, tokenizer: Path | None) -> None:
        """Raise ConfigError unless the tokenizer of `init`, if it has one, gives the dataset's tokens."""
        if self.init is None:
            return
        from bigdssm.features.tokenizer import locate, token_difference

        try:
            folder = locate(self.init, download=False)
        except ConfigError:  # a model of the Hub that has not been downloaded
            return
        difference = "trained on its texts" if tokenizer is None else token_difference(folder, tokenizer)
        if difference is not None:
            raise ConfigError(
                f"{key}.init={self.init} belongs to another tokenizer than {tokenizer or 'that of the dataset'} "
                f"({difference}), so its vectors of tokens would be those of other words; build the dataset with "
                f"data.tokenizer.path={folder}"
            )

    def architecture(self, inputs: TextInputs) -> Any:
        """Return a PretrainedConfig: the pretrained model's, or that of a small BERT."""
        if self.init is None:
            from bigdssm.models.encoders.transformer import new_architecture

            pooling = "mean" if self.pooling == "auto" else self.pooling
            return new_architecture(inputs, self.layers, self.hidden, self.heads, self.dropout, pooling)
        from bigdssm.models.encoders.pretrained import pretrained_architecture

        architecture = pretrained_architecture(
            self.init, inputs, keep_layers=self.keep_layers, dropout=self.dropout, pooling=self.pooling
        )
        architecture.bigdssm["lora"] = self.lora
        return architecture

    @property
    def lora(self) -> dict[str, Any] | None:
        """Return the options of the adapters in the form of `architecture.bigdssm["lora"]`; None without adapters."""
        if not self.lora_rank:
            return None
        return {
            "rank": self.lora_rank, "alpha": self.lora_alpha, "dropout": self.lora_dropout,
            "modules": list(self.lora_modules),
        }  # fmt: skip

    def build(self, architecture: Any) -> nn.Module:
        """Return an encoder with new weights."""
        from bigdssm.models.encoders.transformer import TransformerEncoder

        return TransformerEncoder(architecture)

    def build_pretrained(self, architecture: Any) -> nn.Module:
        """Return an encoder with the weights of `init`, or new ones without it."""
        if self.init is None:
            return self.build(architecture)
        from bigdssm.models.encoders.pretrained import build_pretrained

        return build_pretrained(architecture, self.init)

    def write_architecture(self, architecture: Any, folder: Path) -> None:
        """Write the config file of transformers."""
        architecture.save_pretrained(folder)

    def read_architecture(self, folder: Path) -> Any:
        """Return the PretrainedConfig of a folder."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
