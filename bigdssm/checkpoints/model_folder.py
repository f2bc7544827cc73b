"""The model folder: config.yaml, schema.json, vocabularies/, tokenizer/, text/, model.safetensors and bigdssm.json.

It holds all that is needed to encode: a text encoder that started from a pretrained folder brings its architecture
along (text/<key>/config.json), so that this folder need not exist any more. Nothing in it is ever unpickled or run.

Its checksum names the model in vectors, indexes and exports, and covers all that changes a score: weights, schema,
tokenizer, architectures, the config's model section and what may score in place of the product. The rest of the config
may be edited, such as data.dir where a dataset moves.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from bigdssm.checkpoints.checkpoint import check_file, consolidated_state_dict, folder_checksums
from bigdssm.config import ARCHITECTURE_FILE, Config, ScorerConfig, StageName, TextEncoderConfig, load_written_config
from bigdssm.dataset.cache import FileCache
from bigdssm.dataset.dataset import TOKENIZER_FILE, Dataset, tokenizer_hash
from bigdssm.dataset.schema import SCHEMA_FILE, Schema
from bigdssm.errors import BigDSSMError, CheckpointError
from bigdssm.models import DualEncoder, Scorer, new_model
from bigdssm.models.encoders import TextEncoder, text_configs
from bigdssm.utils.atomic import new_folder, real_path, write_json
from bigdssm.utils.hashing import json_checksum

FORMAT = 1
META_FILE, CONFIG_FILE, WEIGHTS_FILE = "bigdssm.json", "config.yaml", "model.safetensors"
TOKENIZER_DIR, TEXT_DIR = "tokenizer", "text"
INSIDE_A_RUN = ("sft/best", "pretrain/best", "best")  # looked at where a run or a stage was given


@dataclass(frozen=True)
class ModelFolder:
    """A loaded model folder."""

    model: DualEncoder  # in evaluation mode, on the CPU
    config: Config
    schema: Schema
    tokenizer_dir: Path | None
    provenance: dict[str, Any]
    checksum: str  # of all that changes a score: names the model in indexes and reports

    @property
    def pad_token_id(self) -> int:
        """Return the token that pads texts, 0 without text features."""
        ids = [cast(TextEncoder, encoder).pad_token_id for encoder in self.model.text.values()]
        return ids[0] if ids else 0

    def view(self, dataset: Dataset) -> Dataset:
        """Return `dataset` as the model encodes it: values that later partitions added are out of vocabulary.

        Raises CheckpointError unless the model was trained on this dataset, or on an earlier state of it.
        """
        whole = dataset.whole.schema
        difference = self.schema.difference(whole)
        if difference is None and whole.cut(self.schema.vocabulary_sizes()) != self.schema:
            difference = "another vocabulary or normalisation, which partitions that were appended since do not explain"
        if difference is None and self.tokenizer_dir and tokenizer_hash(self.tokenizer_dir) != dataset.tokenizer_hash:
            difference = "another tokenizer"
        if difference is not None:
            raise CheckpointError(
                f"the model's schema is not that of the dataset {dataset.dir}: {difference}; use the model's own "
                f"dataset, make this one with bigdssm make_shards … --like {self.config.data.dir}, or train on this one"
            )
        return dataset.limited_to(self.schema)


def save_model_folder(
    folder: Path,
    model: DualEncoder,
    config: Config,
    schema: Schema,
    tokenizer_dir: Path | None,
    provenance: Mapping[str, Any],
    *,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the model folder in one step: whoever looks finds the old one or the new one whole.

    `state` holds the full weights where the model's own are sharded. Raises CheckpointError where `folder` exists and
    is not a model folder.
    """
    folder = real_path(folder)
    if folder.exists() and not (folder / META_FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not a model folder; nothing was written, choose another --out")
    with new_folder(folder) as aside:
        _write_all_but_weights(aside, model, config, schema, tokenizer_dir)
        (aside / WEIGHTS_FILE).write_bytes(_serialised(model.state_dict() if state is None else state))
        meta = {
            "format": FORMAT,
            "provenance": dict(provenance),
            "checksums": _checksums(aside),
            "config_checksum": _config_checksum(config.to_dict(), _scorer(config, provenance)),
        }
        write_json(aside / META_FILE, meta)


def load_model_folder(folder: Path, *, scorer: ScorerConfig | None = None) -> ModelFolder:
    """Return the model in `folder`, its files checked against their checksums.

    `scorer`: a new one that is to be trained, where the model has none.
    Raises CheckpointError: no such folder, a file missing or damaged, or weights that do not fit config and schema.
    """
    meta = _read_meta(folder)
    for name, checksum in meta["checksums"].items():
        check_file(folder / name, checksum, META_FILE)
    try:
        config, schema = load_written_config(folder / CONFIG_FILE), Schema.load(folder)
        own = _scorer(config, meta["provenance"])
        written = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if _config_checksum(written, own) != meta["config_checksum"]:
            raise CheckpointError(
                f"the model section of {CONFIG_FILE}, or sft.scorer, is not what the model was trained with; undo "
                "the edit, or copy the folder again (only other keys, such as data.dir, may change)"
            )
        texts = {
            key: _architecture(folder, key, text, meta["checksums"])
            for key, text in text_configs(config.model, schema).items()
        }
        weights = load_file(folder / WEIGHTS_FILE)
        with torch.device("meta"):  # so that a model that is larger than the file is refused before it takes memory
            _check_weights(weights, DualEncoder(config.model, schema, texts, own).state_dict())
        model = DualEncoder(config.model, schema, texts, own or scorer)
        load = model.load_state_dict if own and not scorer else model.load_towers
        load(weights)
    except (
        RuntimeError, SafetensorError, OSError, ValueError, BigDSSMError,
        ArithmeticError, AttributeError, LookupError, TypeError,  # what a damaged architecture raises in transformers
    ) as error:  # fmt: skip
        raise CheckpointError(f"the model folder {folder} does not load: {' '.join(str(error).split())}") from None
    model.eval()
    listed = f"{TOKENIZER_DIR}/{TOKENIZER_FILE}" in meta["checksums"]
    if schema.has_text and not listed:
        raise CheckpointError(f"{folder}: {META_FILE} does not list {TOKENIZER_DIR}/{TOKENIZER_FILE}; copy it again")
    return ModelFolder(
        model, config, schema, folder / TOKENIZER_DIR if listed else None, meta["provenance"], _identity(meta)
    )


def model_checksum(
    model: DualEncoder, config: Config, schema: Schema, tokenizer_dir: Path | None, provenance: Mapping[str, Any]
) -> str:
    """Return the checksum that a folder of this model has, without writing the weights of one."""
    with tempfile.TemporaryDirectory() as made:
        _write_all_but_weights(Path(made), model, config, schema, tokenizer_dir)
        checksums = _checksums(Path(made))
    checksums[WEIGHTS_FILE] = weights_checksum(model)
    config_checksum = _config_checksum(config.to_dict(), _scorer(config, provenance))
    return _identity({"checksums": checksums, "config_checksum": config_checksum})


def weights_checksum(model: DualEncoder) -> str:
    """Return the checksum of the weights' file that a folder of this model has."""
    return xxhash.xxh3_128_hexdigest(_serialised(model.state_dict()))


def is_model_folder(folder: Path) -> bool:
    """Return True where `folder` claims to be a model folder."""
    return (folder / META_FILE).is_file()


def _write_all_but_weights(
    folder: Path, model: DualEncoder, config: Config, schema: Schema, tokenizer_dir: Path | None
) -> None:
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
    schema.save(folder)
    if tokenizer_dir is not None:
        shutil.copytree(tokenizer_dir, folder / TOKENIZER_DIR)
    for key, text in text_configs(config.model, schema).items():
        text.write_architecture(cast(TextEncoder, model.text[key]).architecture, folder / TEXT_DIR / key)


def _identity(meta: Mapping[str, Any]) -> str:
    """Return the checksum of all that changes a score."""
    return json_checksum([meta["checksums"], meta["config_checksum"]])


def _config_checksum(written: Mapping[str, Any], scorer: ScorerConfig | None) -> str:
    """Return the checksum of what a config says about scores, as it is written: keys that come later change nothing."""
    return json_checksum([written.get("model"), () if scorer is None else asdict(scorer)])


def _serialised(weights: Mapping[str, Tensor]) -> bytes:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return save(tensors, metadata={"format": "pt"})


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META_FILE
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{path} is damaged: it is no file")
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} is a model folder of format {meta['format']}, this version reads format {FORMAT}; "
                "train again, or use the version that wrote it"
            )
        missing = {"provenance", "checksums", "config_checksum"} - set(meta)
    except (FileNotFoundError, NotADirectoryError):
        inside = [path for name in INSIDE_A_RUN if is_model_folder(path := folder / name)]
        meant = f"; did you mean {inside[0]}?" if inside else ""
        raise CheckpointError(f"{folder} is no model folder: it holds no {META_FILE}{meant}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from None
    if missing:
        raise CheckpointError(f"{path} is damaged: it lacks {sorted(missing)}")
    if not isinstance(meta["checksums"], dict) or not isinstance(meta["provenance"], dict):
        raise CheckpointError(f"{path} is damaged: checksums and provenance need to be objects")
    if unnamed := {SCHEMA_FILE, WEIGHTS_FILE} - set(meta["checksums"]):
        raise CheckpointError(f"{path} is damaged: it has no checksum of {sorted(unnamed)}")
    return meta


def _check_weights(weights: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless `weights` have the names, shapes and kinds of `needed`, and are finite."""
    if other := set(weights) ^ set(needed):
        raise CheckpointError(f"{WEIGHTS_FILE} and the config differ in the tensor {min(other)}; copy the folder again")
    for name, tensor in weights.items():
        expected = needed[name]
        if tensor.shape != expected.shape or tensor.is_floating_point() != expected.is_floating_point():
            raise CheckpointError(
                f"{WEIGHTS_FILE}: {name} is {tensor.dtype} {list(tensor.shape)}, needs {expected.dtype} "
                f"{list(expected.shape)}"
            )
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{WEIGHTS_FILE}: {name} holds NaN or inf; take an earlier checkpoint's model")


def _scorer(config: Config, provenance: Mapping[str, Any]) -> ScorerConfig | None:
    """Return the scorer that the stage trained, if it did."""
    return config.sft.scorer if config.sft is not None and provenance.get("stage") == "sft" else None


def _architecture(folder: Path, key: str, text: TextEncoderConfig, listed: Mapping[str, str]) -> Any:
    name = f"{TEXT_DIR}/{key}/{ARCHITECTURE_FILE}"
    if name not in listed:  # whatever else stands there was not written with the folder
        raise CheckpointError(f"{META_FILE} does not list {name}, which the config asks for")
    try:
        return text.read_architecture(folder / TEXT_DIR / key)
    except Exception as error:  # transformers and its libraries have errors of their own for values
        raise CheckpointError(f"{name} is no architecture: {error}") from None


def _checksums(folder: Path) -> dict[str, str]:
    """Return the checksum of every file but the config, of which only a part changes scores."""
    checksums = folder_checksums(folder)
    checksums.pop(CONFIG_FILE)
    assert SCHEMA_FILE in checksums
    return checksums


BEST = "best"


def load_checkpoint_model(path: Path, scorer: ScorerConfig | None = None) -> ModelFolder:
    """Return the model of the checkpoint `path` in a stage's folder, with a new `scorer` where given.

    Raises CheckpointError where it is damaged, or has a scorer of its own where a new one is given.
    """
    stage_dir = path.parent.parent
    state = consolidated_state_dict(path)
    own = bool(Scorer.weights_in(state))
    if is_model_folder(stage_dir / BEST):  # knows schema and architecture even where the dataset has gone
        folder = load_model_folder(stage_dir / BEST, scorer=None if own else scorer)
        model, config, schema, tokenizer_dir = folder.model, folder.config, folder.schema, folder.tokenizer_dir
    elif not (stage_dir / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{path} has only the weights: what model they are of stands in {stage_dir}, which has neither {BEST}/ nor "
            f"{CONFIG_FILE}; copy one of them too"
        )
    else:
        config = load_written_config(stage_dir / CONFIG_FILE)
        dataset = Dataset.open(config.data.dir, cache=FileCache.of(config.data))
        schema, tokenizer_dir = dataset.schema, dataset.tokenizer_dir
        trained = config.stage(cast(StageName, stage_dir.name)).scorer if own else scorer
        model = new_model(config.model, schema, dataset.pad_token_id, dataset.vocab_size, trained)
    try:
        (model.load_state_dict if own and scorer is None else model.load_towers)(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the weights in {path} do not fit the stage's config and schema: {reason}") from None
    provenance = {"stage": stage_dir.name, "checkpoint": path.name}
    checksum = model_checksum(model, config, schema, tokenizer_dir, provenance)
    return ModelFolder(model.eval(), config, schema, tokenizer_dir, provenance, checksum)
