"""Save, load and identify model folders, also on the Hugging Face Hub.

Files: config.yaml, schema.json, vocabularies/, tokenizer/, text/, model.safetensors, bigdssm.json; frozen.safetensors
with the weights that were not trained, if there are any, which successive folders of a stage share by a hard link;
tables/ with the rows of sharded tables (see tables/files.py), which are memory-mapped.
A folder is sufficient for encoding: it includes the architecture of a pretrained text encoder (text/<key>/config.json),
so that the pretrained folder may be removed. Nothing in it is unpickled or executed.

Its checksum identifies the model in vectors, indexes and exports. It covers everything that affects scores: weights,
schema, tokenizer, architectures and the config's model section. Other config keys may be edited, such as
data.dir after a dataset was moved.

On the Hub, only the files of a model folder are transferred; its checksums are verified before the upload and when the
model is loaded. HF_TOKEN authenticates; HF_HUB_OFFLINE=1 uses only the local cache.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
import xxhash
import yaml
from huggingface_hub import HfApi, errors, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from bigdssm.checkpoints.checkpoint import (
    CHECKPOINTS,
    COMMON,
    TRAINED_CODES,
    check_file,
    folder_checksums,
    open_tensors,
    read_manifest,
)
from bigdssm.config import (
    ARCHITECTURE_FILE,
    Config,
    ModelConfig,
    StageName,
    load_written_config,
)
from bigdssm.dataset.dataset import TOKENIZER_FILE, Dataset, open_dataset, tokenizer_hash
from bigdssm.dataset.schema import SCHEMA_FILE, VOCABULARIES, Schema
from bigdssm.errors import BigDSSMError, CheckpointError
from bigdssm.features.tokenizer import TextTokenizer
from bigdssm.models import ALPHA_MAX, DualEncoder, new_model
from bigdssm.models.declarations import Transformer
from bigdssm.models.encoders import TextEncoder, text_configs
from bigdssm.tables.files import MappedTables, RowFile
from bigdssm.utils.arguments import checked
from bigdssm.utils.atomic import hidden_version, link_or_copy, new_folder, real_path, write_json
from bigdssm.utils.hashing import file_checksum, json_checksum

FORMAT = 1
META_FILE, CONFIG_FILE = "bigdssm.json", "config.yaml"
WEIGHTS_FILE, FROZEN_FILE = "model.safetensors", "frozen.safetensors"
TOKENIZER_DIR, TEXT_DIR, TABLES_DIR = "tokenizer", "text", "tables"
RUN_MODEL_DIRS = ("sft/best", "pretrain/best", "best")  # suggested if the path is a run or a stage
BEST = "best"


@dataclass(frozen=True)
class ModelFolder:
    """A loaded model folder."""

    model: DualEncoder  # in evaluation mode, on the CPU
    config: Config
    schema: Schema
    tokenizer_dir: Path | None
    provenance: dict[str, Any]
    checksum: str  # covers everything that affects scores; identifies the model in indexes and reports

    @property
    def doc_checksum(self) -> str:
        """Identifies the document vectors: those of another model if it was trained against them."""
        return doc_checksum({"identity": self.checksum, "provenance": self.provenance})

    @cached_property
    def tokenizer(self) -> TextTokenizer | None:
        """The tokenizer of text features; None without one."""
        return None if self.tokenizer_dir is None else TextTokenizer(self.tokenizer_dir)

    @property
    def alpha(self) -> float:
        """Return the score's scale."""
        return float(self.model.log_alpha.detach().exp().clamp(max=ALPHA_MAX))

    @property
    def index_width(self) -> int:
        """Return the width of index vectors: D + 1, or D without beta."""
        return self.config.model.dim + self.model.has_beta

    def view(self, dataset: Dataset) -> Dataset:
        """Return a view of `dataset` in which values added after the model's training are out of vocabulary.

        Raises CheckpointError unless the model was trained on this dataset, or on an earlier state of it.
        """
        dataset_schema = dataset.whole.schema
        schema = replace(self.schema, title=dataset_schema.title)  # titles are no inputs
        difference = schema.difference(dataset_schema)
        if difference is None and dataset_schema.cut(schema.vocabulary_sizes()) != schema:
            difference = "the vocabulary or normalization differs in more than values added by appended partitions"
        if difference is None and self.tokenizer_dir and tokenizer_hash(self.tokenizer_dir) != dataset.tokenizer_hash:
            difference = "the tokenizer differs"
        if difference is not None:
            raise CheckpointError(
                f"the model's schema differs from that of the dataset {dataset.dir}: {difference}; use the model's "
                f"dataset, build this one with bigdssm make_shards … --like {self.config.data.dir}, or train on it"
            )
        rules = replace(dataset.rules, item_rows=self.config.model.query.history.items != "id")
        return dataset.with_rules(rules).with_schema(schema)


def save_model_folder(
    folder: Path,
    model: DualEncoder,
    config: Config,
    schema: Schema,
    tokenizer_dir: Path | None,
    provenance: Mapping[str, Any],
    *,
    state: Mapping[str, Tensor] | None = None,
    frozen: Path | None = None,
    tables: Path | None = None,
) -> None:
    """Write the model folder atomically, replacing an existing one.

    `state` contains the full weights; it is required if the model is sharded. It may lack those that are not trained
    if `frozen` is a file of them, which is linked. tables: a folder of the row files of sharded tables, which is moved;
    by default those of the model are copied. Raises CheckpointError: `folder` exists and is not a model folder.
    """
    folder = real_path(folder)
    if folder.exists() and not (folder / META_FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not a model folder; nothing was written; choose another folder")
    with new_folder(folder) as unfinished:
        _write_all_but_weights(unfinished, model, config, schema, tokenizer_dir)
        for name, content in _weights_files(model, model.state_dict() if state is None else state).items():
            (unfinished / name).write_bytes(content)
        written_checksums = {}
        if frozen is not None:
            link_or_copy(frozen, unfinished / FROZEN_FILE)
            # as written, before any damage
            written_checksums = {FROZEN_FILE: read_model_meta(frozen.parent)["checksums"][FROZEN_FILE]}
        if tables is not None:
            os.replace(tables, unfinished / TABLES_DIR)
        elif model.tables.sharded:
            cast(MappedTables, model.tables.source).write(unfinished / TABLES_DIR)
        meta = {
            "format": FORMAT,
            "provenance": dict(provenance),
            "checksums": _checksums(unfinished, written_checksums),
            "config_checksum": _config_checksum(config.to_dict()),
        }
        write_json(unfinished / META_FILE, meta)


def keep_model_folder(source: Path, folder: Path, config: Config, provenance: Mapping[str, Any]) -> None:
    """Write the model folder `source` again as `folder`, which may be the same, with the files and the checksum it has.

    config: of the stage that keeps these weights; its model section is that of `source`.
    """
    folder = real_path(folder)
    meta = read_model_meta(source)
    written = yaml.safe_load((source / CONFIG_FILE).read_text(encoding="utf-8"))
    content = {**config.to_dict(), "model": written.get("model")}
    with new_folder(folder) as unfinished:
        for name in meta["checksums"]:
            target = unfinished / name
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(source / name, target)
        (unfinished / CONFIG_FILE).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        write_json(unfinished / META_FILE, {**meta, "provenance": dict(provenance)})


def weight_names(folder: Path) -> set[str]:
    """Return the names of the weights in a model folder, rows of sharded tables excepted."""
    names: set[str] = set()
    for file in (WEIGHTS_FILE, FROZEN_FILE):
        if (folder / file).is_file():
            with safe_open(folder / file, "pt") as content:
                names.update(content.keys())
    return names


def load_model_folder(folder: Path, device: torch.device | str = "cpu") -> ModelFolder:
    """Load the model in `folder` to a device and verify its checksums.

    Raises CheckpointError: no such folder, a missing or damaged file, or weights that do not match config and schema.
    """
    meta = read_model_meta(folder)
    for name, checksum in meta["checksums"].items():
        check_file(folder / name, checksum, META_FILE, stored_checksum)
    try:
        config, schema = load_written_config(folder / CONFIG_FILE), Schema.load(folder)
        written = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if _config_checksum(written) != meta["config_checksum"]:
            raise CheckpointError(
                f"the model section of {CONFIG_FILE} differs from the model's training; undo the edit, "
                "or copy the folder again (only other keys, such as data.dir, may change)"
            )
        texts: dict[str, Any] = {}
        for key, text in text_configs(config.model, schema).items():
            name = f"{TEXT_DIR}/{key}/{ARCHITECTURE_FILE}"
            if name not in meta["checksums"]:  # a file without a checksum was added later
                raise CheckpointError(f"{META_FILE} does not list {name}, which the config requires")
            try:
                texts[key] = text.read_architecture(folder / TEXT_DIR / key)
            except Exception as error:  # transformers and its libraries raise various exceptions for invalid values
                raise CheckpointError(f"{name} is not an architecture: {error}") from None
        weights = load_file(folder / WEIGHTS_FILE)
        if FROZEN_FILE in meta["checksums"]:
            weights |= load_file(folder / FROZEN_FILE)
        dense = dense_tables(weights)
        with torch.device("meta"):  # reject a model larger than the file before its memory is allocated
            _check_weights(weights, DualEncoder(config.model, schema, texts, dense=dense).state_dict())
        # Frozen weights, such as those under adapters, stay in the file, which is mapped: ranks share its pages.
        mapped = FROZEN_FILE in meta["checksums"]
        empty: AbstractContextManager[Any] = nullcontext()
        if mapped:  # parameters of new modules take no memory
            from accelerate import init_empty_weights

            empty = init_empty_weights(include_buffers=False)
        with empty:
            model = DualEncoder(config.model, schema, texts, dense=dense)
        model.load_state_dict(weights, assign=mapped)
        row_files = sorted(name for name in meta["checksums"] if name.startswith(f"{TABLES_DIR}/"))
        open_tables(model, [[folder / name] for name in row_files])
    except (
        RuntimeError, SafetensorError, OSError, ValueError, BigDSSMError,
        ArithmeticError, AttributeError, LookupError, TypeError,  # raised by transformers for a damaged architecture
    ) as error:  # fmt: skip
        raise CheckpointError(f"the model folder {folder} does not load: {' '.join(str(error).split())}") from None
    model.to(device).eval()
    has_tokenizer = f"{TOKENIZER_DIR}/{TOKENIZER_FILE}" in meta["checksums"]
    if schema.has_text and not has_tokenizer:
        raise CheckpointError(f"{folder}: {META_FILE} does not list {TOKENIZER_DIR}/{TOKENIZER_FILE}; copy it again")
    return ModelFolder(
        model,
        config,
        schema,
        folder / TOKENIZER_DIR if has_tokenizer else None,
        meta["provenance"],
        model_identity(meta),
    )


def model_checksum(
    model: DualEncoder, config: Config, schema: Schema, tokenizer_dir: Path | None, provenance: Mapping[str, Any]
) -> str:
    """Compute the checksum of a folder of this model, without writing the weights."""
    with tempfile.TemporaryDirectory() as folder:
        _write_all_but_weights(Path(folder), model, config, schema, tokenizer_dir)
        if model.tables.sharded:
            cast(MappedTables, model.tables.source).write(Path(folder) / TABLES_DIR)
        checksums = _checksums(Path(folder))
    files = _weights_files(model, model.state_dict())
    checksums |= {name: xxhash.xxh3_128_hexdigest(content) for name, content in files.items()}
    config_checksum = _config_checksum(config.to_dict())
    return model_identity({"checksums": checksums, "config_checksum": config_checksum})


def open_tables(model: DualEncoder, files: Sequence[Sequence[Path]]) -> None:
    """Open row files, a chain per rank, as the source of a model's sharded tables, if any.

    Raises CheckpointError: they do not match.
    """
    if model.tables.sharded:
        model.tables.source = MappedTables(files, model.tables.sharded)


def dense_tables(names: Iterable[str]) -> frozenset[str]:
    """Return the embedding tables among weights, by the names of the weights."""
    return frozenset(name.split(".")[2] for name in names if name.startswith("tables.tables."))


def holds_weights(file: Path, weights: Mapping[str, Tensor]) -> bool:
    """Return True if `file` has exactly the names and shapes of `weights`, which are not empty."""
    if not weights or not file.is_file():
        return False
    with safe_open(file, "pt") as content:
        shapes = {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118, no mapping
    return shapes == {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in weights.items()}


def is_model_folder(folder: Path) -> bool:
    """Return True if `folder` has the metadata file of a model folder."""
    return (folder / META_FILE).is_file()


def model_folders(folder: Path) -> list[Path]:
    """Return `folder` if it is a model folder, else the model folders in it by name, without the `best` of a stage."""
    if is_model_folder(folder):
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{META_FILE}") if path.parent.name != BEST)


def model_metas(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield `model_folders` with their metas, without damaged ones: another one may be complete."""
    for path in model_folders(folder):
        with suppress(CheckpointError):
            yield path, read_model_meta(path)


def _write_all_but_weights(
    folder: Path, model: DualEncoder, config: Config, schema: Schema, tokenizer_dir: Path | None
) -> None:
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
    schema.save(folder)
    if tokenizer_dir is not None:
        shutil.copytree(tokenizer_dir, folder / TOKENIZER_DIR)
    for key, text in text_configs(config.model, schema).items():
        text.write_architecture(cast(TextEncoder, model.text[key]).architecture, folder / TEXT_DIR / key)


def model_identity(meta: Mapping[str, Any]) -> str:
    """Return the checksum of everything that affects scores, as of before a deletion of users or items."""
    return str(meta.get("identity") or json_checksum([meta["checksums"], meta["config_checksum"]]))


def doc_checksum(meta: Mapping[str, Any]) -> str:
    """Return the checksum of the model of the document vectors, see `ModelFolder.doc_checksum`."""
    return str(meta["provenance"].get("documents") or model_identity(meta))


def _config_checksum(written: Mapping[str, Any]) -> str:
    """Return the checksum of the config keys that affect scores.

    `written` is the content of the file: model keys that later versions add do not change its checksum.
    """
    return json_checksum([written.get("model"), ()])  # the empty tuple is part of the format


def _weights_files(model: DualEncoder, state: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the contents of the files of a state, by name: trained weights, and those that are not, if any."""
    names = model.frozen_weights().keys() & state.keys()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    parts = {
        WEIGHTS_FILE: {name: tensor for name, tensor in tensors.items() if name not in names},
        FROZEN_FILE: {name: tensors[name] for name in names},
    }
    return {file: save(part, metadata={"format": "pt"}) for file, part in parts.items() if part or file == WEIGHTS_FILE}


def read_model_meta(folder: Path) -> dict[str, Any]:
    """Read the metadata of a model folder. Raises CheckpointError: no model folder, damaged, or another format."""
    path = folder / META_FILE
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise CheckpointError(f"{path} is damaged: it is not a file")
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise CheckpointError(
                f"{folder} is a model folder of format {meta['format']}, this version reads format {FORMAT}; "
                "train again, or use the version that wrote it"
            )
        missing = {"provenance", "checksums", "config_checksum"} - set(meta)
    except (FileNotFoundError, NotADirectoryError):
        inside = [path for name in RUN_MODEL_DIRS if is_model_folder(path := folder / name)]
        hint = f"; did you mean {inside[0]}?" if inside else hidden_version(folder)
        raise CheckpointError(f"{folder} is not a model folder: it has no {META_FILE}{hint}") from None
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
            raise CheckpointError(f"{WEIGHTS_FILE}: {name} holds NaN or inf; use the model of an earlier checkpoint")


def _checksums(folder: Path, computed: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Return the checksum of every file except the config, of which only some keys affect scores; `known` by name."""
    checksums = folder_checksums(folder, lambda path: computed.get(path.name) or stored_checksum(path))
    checksums.pop(CONFIG_FILE)
    return checksums


def stored_checksum(path: Path) -> str:
    """Return the checksum of a file; rows of tables are left out, as they are verified when they are read."""
    return RowFile(path).checksum if path.parent.name == TABLES_DIR else file_checksum(path)


def load_initial_model(path: Path, config: ModelConfig) -> ModelFolder:
    """Load the model that a stage starts from, a model folder or a checkpoint.

    Text encoders that were trained without adapters get those of `config`, whose update is zero. Raises
    CheckpointError; ConfigError: the adapters cannot be added.
    """
    is_checkpoint = path.is_dir() and path.parent.name == CHECKPOINTS  # intact or not
    load = load_checkpoint_model if is_checkpoint else load_model_folder
    return _with_adapters(load(path), config)


def _with_adapters(folder: ModelFolder, config: ModelConfig) -> ModelFolder:
    """Add the adapters of `config` to the text encoders without any."""
    model, towers = folder.config.model, {}
    for side in ("query", "doc"):
        text, configured = getattr(model, side).text, getattr(config, side).text
        if isinstance(text, Transformer) and isinstance(configured, Transformer) and not text.lora_rank:
            text = replace(text, **{key: value for key, value in vars(configured).items() if key.startswith("lora_")})
        towers[side] = replace(getattr(model, side), text=text)
    adapted = replace(model, **towers)
    before = text_configs(model, folder.schema)
    for key, text in text_configs(adapted, folder.schema).items():
        if isinstance(text, Transformer) and text.lora != cast(Transformer, before[key]).lora:
            cast(Any, folder.model.text[key]).add_adapters(text.lora)
    folder.model.eval()
    return replace(folder, config=replace(folder.config, model=adapted))


def load_checkpoint_model(path: Path) -> ModelFolder:
    """Load the model of the checkpoint `path` in a stage's folder.

    It has the trained weights; the others are those of best/, or of the model that the stage starts from. Raises
    CheckpointError: it is damaged.
    """
    stage_dir = path.parent.parent
    read = open_tensors(path)
    state = read.weights()
    documents: dict[str, Any] = {}  # in the provenance
    best = stage_dir / BEST
    if is_model_folder(best) and _has_vocabularies(best, read_manifest(path).state["stream"]):
        # contains schema and architecture: the dataset is not needed
        folder = load_model_folder(best)
        model, config, schema, tokenizer_dir = folder.model, folder.config, folder.schema, folder.tokenizer_dir
        documents = {key: value for key, value in folder.provenance.items() if key == "documents"}
    elif not (stage_dir / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{path} has only the weights: {stage_dir} has neither {BEST}/ nor {CONFIG_FILE}; copy one of them too"
        )
    else:
        config = load_written_config(stage_dir / CONFIG_FILE)
        dataset, stream = open_dataset(config.data), read_manifest(path).state["stream"]
        schema, tokenizer_dir = dataset.schema, dataset.tokenizer_dir
        if "vocabularies" in stream:  # they may have grown since
            schema = schema.cut(stream["vocabularies"])
        if (schema.fingerprint(), dataset.tokenizer_hash) != (stream["schema"], stream["tokenizer"]):
            raise CheckpointError(
                f"{path} was trained with another vocabulary, normalization or tokenizer than {config.data.dir} has "
                f"now; restore the dataset, or copy {BEST}/ of the stage too"
            )
        stage = cast(StageName, stage_dir.name)
        source = config.initial_model(stage)
        model = new_model(config.model, schema, dataset.vocab_size, dense=dense_tables(state))
        if source is not None and (missing := model.state_dict().keys() - state.keys()):
            start = load_initial_model(source, config.model).model.state_dict()
            model.load_state_dict({name: start[name] for name in missing & start.keys()}, strict=False)
        if (fixed := config.stage(stage).documents.model) is not None:
            doc_model = load_model_folder(Path(fixed))
            model.freeze_documents(doc_model.model.state_dict())
            documents = {"documents": doc_model.doc_checksum}
    codes = read.with_prefix(COMMON + TRAINED_CODES)
    schema = schema.with_trained({name: tensor.numpy() for name, tensor in codes.items()})
    open_tables(model, read_manifest(path).table_files())
    try:
        state = {name: weight for name, weight in model.state_dict().items() if name not in state} | state
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the weights in {path} do not fit the stage's config and schema: {reason}") from None
    provenance = {"stage": stage_dir.name, "checkpoint": path.name, **documents}
    checksum = model_checksum(model, config, schema, tokenizer_dir, provenance)
    return ModelFolder(model.eval(), config, schema, tokenizer_dir, provenance, checksum)


def _has_vocabularies(folder: Path, stream: Mapping[str, Any]) -> bool:
    """Return whether a model folder has the vocabularies of a checkpoint: a kept initial model may lack values."""
    sizes = stream.get("vocabularies")
    return sizes is None or Schema.load(folder).vocabulary_sizes() == sizes


FOLDERS = (VOCABULARIES, TOKENIZER_DIR, TEXT_DIR, TABLES_DIR)
FILES = [META_FILE, CONFIG_FILE, WEIGHTS_FILE, FROZEN_FILE, SCHEMA_FILE, "README.md"]
PATTERNS = [*FILES, *(f"{folder}/*" for folder in FOLDERS)]


@checked
def push_to_hub(folder: str | Path, repo_id: str, *, revision: str | None = None, private: bool = False) -> str:
    """Upload a model folder to the repository OWNER/NAME, created if missing; return the commit's URL.

    The model card README.md, if `bigdssm convert_checkpoint` wrote one, is included. `revision` is an existing branch,
    main by default. Raises CheckpointError: no complete model folder, unknown owner, no write permission, no network.
    """
    load_model_folder(Path(folder))
    with _errors_of(repo_id):
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        message = "Upload a bigdssm model folder"
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, allow_patterns=PATTERNS,
            delete_patterns=[f"{TABLES_DIR}/*"], commit_message=message,
        )  # fmt: skip
    return done.commit_url


def fetch_from_hub(repo_id: str, revision: str | None = None) -> Path:
    """Download the model of a repository at a branch, tag or commit; return its folder in the Hub's cache.

    Raises CheckpointError: unknown repository or revision, no read permission, no network and not cached.
    """
    with _errors_of(repo_id):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=PATTERNS))


@contextmanager
def _errors_of(repo_id: str) -> Iterator[None]:
    """Convert errors of the Hub client to a CheckpointError with a one-line message."""
    try:
        yield
    except (errors.HTTPError, OSError, errors.HFValidationError) as error:  # HTTPError: base class of the HTTP library
        first = next(iter(str(error).strip().splitlines()), repr(error))
        raise CheckpointError(f"the Hub rejected the request for {repo_id}, or cannot be reached: {first}") from None
