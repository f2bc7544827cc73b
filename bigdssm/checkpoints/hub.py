"""Model folders on the Hugging Face Hub, or on another server with its API (HF_ENDPOINT).

Only the files of a model folder are transferred; its checksums are verified before the upload and when the model is
loaded. HF_TOKEN authenticates; HF_HUB_OFFLINE=1 uses only the local cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, errors, snapshot_download

from bigdssm.checkpoints.model_folder import (
    CONFIG_FILE,
    FROZEN_FILE,
    META_FILE,
    TABLES_DIR,
    TEXT_DIR,
    TOKENIZER_DIR,
    WEIGHTS_FILE,
    load_model_folder,
)
from bigdssm.dataset.schema import SCHEMA_FILE, VOCABULARIES
from bigdssm.errors import CheckpointError
from bigdssm.utils.arguments import checked

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
