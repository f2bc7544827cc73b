"""The configuration of a run: its keys, what they must be together, and reading them.

A YAML file has the sections `run`, `data`, `model`, `engine`, `pretrain` and (optionally) `sft`. Unknown keys are
rejected with the nearest name; every message names the dotted key, what it got and what it needs.
"""

from bigdssm.config.checks import check_config, check_many_queries, check_pieces
from bigdssm.config.keys import (
    ARCHITECTURE_FILE,
    DEFAULT_CACHE_BYTES,
    HISTORY_BLOCKS,
    OPTIMIZERS,
    TEXT_ENCODERS,
    Config,
    DataConfig,
    DebugConfig,
    EngineConfig,
    HistoryEncoderConfig,
    LossConfig,
    MiningConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScorerConfig,
    SourceConfig,
    StageConfig,
    StageName,
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
    "HISTORY_BLOCKS",
    "OPTIMIZERS",
    "TEXT_ENCODERS",
    "Config",
    "DataConfig",
    "DebugConfig",
    "EngineConfig",
    "HistoryEncoderConfig",
    "LossConfig",
    "MiningConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScorerConfig",
    "SourceConfig",
    "StageConfig",
    "StageName",
    "TextEncoderConfig",
    "TextInputs",
    "TokenizerConfig",
    "TowerConfig",
    "WarmStartConfig",
    "check_config",
    "check_many_queries",
    "check_pieces",
    "config_from",
    "config_of",
    "differences",
    "first_difference",
    "load_config",
    "load_written_config",
    "read_config",
]
