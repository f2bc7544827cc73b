"""The configuration of a run: keys, validation and loading.

A YAML file has the sections `run`, `data`, `model`, `engine`, `pretrain` and (optionally) `sft`. Unknown keys are
rejected with the most similar name; every message contains the dotted key, the value and the requirement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigdssm.utils.lazy import lazy_attributes

if TYPE_CHECKING:
    from bigdssm.config.checks import check_config, check_history_lengths, check_many_queries
    from bigdssm.config.components import (
        DISTILLATIONS,
        LOSSES,
        OPTIMIZERS,
        SAMPLINGS,
        SCORERS,
        TABLE_OPTIMIZERS,
        DistillationConfig,
        FrequencyCorrection,
        LossConfig,
        OptimizerConfig,
        SamplingConfig,
        ScorerConfig,
        StageName,
        TableOptimizerConfig,
    )
    from bigdssm.config.keys import (
        ARCHITECTURE_FILE,
        DEFAULT_CACHE_BYTES,
        HISTORY_BLOCKS,
        TEXT_ENCODERS,
        Config,
        DataConfig,
        DebugConfig,
        DocumentsConfig,
        EngineConfig,
        HistoryEncoderConfig,
        MiningConfig,
        ModelConfig,
        NegativesConfig,
        RunConfig,
        SourceConfig,
        StageConfig,
        TextEncoderConfig,
        TextInputs,
        TokenizerConfig,
        TowerConfig,
        WarmStartConfig,
    )
    from bigdssm.config.loading import config_from, config_of, load_config, load_written_config, read_config
    from bigdssm.config.yaml_files import differences, first_difference

__all__ = [
    "ARCHITECTURE_FILE",
    "DEFAULT_CACHE_BYTES",
    "DISTILLATIONS",
    "HISTORY_BLOCKS",
    "LOSSES",
    "OPTIMIZERS",
    "SAMPLINGS",
    "SCORERS",
    "TABLE_OPTIMIZERS",
    "TEXT_ENCODERS",
    "Config",
    "DataConfig",
    "DebugConfig",
    "DistillationConfig",
    "DocumentsConfig",
    "EngineConfig",
    "FrequencyCorrection",
    "HistoryEncoderConfig",
    "LossConfig",
    "MiningConfig",
    "ModelConfig",
    "NegativesConfig",
    "OptimizerConfig",
    "RunConfig",
    "SamplingConfig",
    "ScorerConfig",
    "SourceConfig",
    "StageConfig",
    "StageName",
    "TableOptimizerConfig",
    "TextEncoderConfig",
    "TextInputs",
    "TokenizerConfig",
    "TowerConfig",
    "WarmStartConfig",
    "check_config",
    "check_history_lengths",
    "check_many_queries",
    "config_from",
    "config_of",
    "differences",
    "first_difference",
    "load_config",
    "load_written_config",
    "read_config",
]

# Lazy: losses import the config base classes without importing omegaconf and yaml.
__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "bigdssm.config.checks": ["check_config", "check_many_queries", "check_history_lengths"],
        "bigdssm.config.components": [
            "DISTILLATIONS",
            "LOSSES",
            "OPTIMIZERS",
            "SAMPLINGS",
            "SCORERS",
            "TABLE_OPTIMIZERS",
            "DistillationConfig",
            "FrequencyCorrection",
            "LossConfig",
            "OptimizerConfig",
            "SamplingConfig",
            "ScorerConfig",
            "StageName",
            "TableOptimizerConfig",
        ],
        "bigdssm.config.keys": [
            "ARCHITECTURE_FILE",
            "DEFAULT_CACHE_BYTES",
            "HISTORY_BLOCKS",
            "TEXT_ENCODERS",
            "Config",
            "DataConfig",
            "DebugConfig",
            "DocumentsConfig",
            "EngineConfig",
            "HistoryEncoderConfig",
            "MiningConfig",
            "ModelConfig",
            "NegativesConfig",
            "RunConfig",
            "SourceConfig",
            "StageConfig",
            "TextEncoderConfig",
            "TextInputs",
            "TokenizerConfig",
            "TowerConfig",
            "WarmStartConfig",
        ],
        "bigdssm.config.loading": ["config_from", "config_of", "load_config", "load_written_config", "read_config"],
        "bigdssm.config.yaml_files": ["differences", "first_difference"],
    },
)
