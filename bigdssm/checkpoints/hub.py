"""Model folders on the Hugging Face Hub, or on any server of its API that HF_ENDPOINT names.

Only the files of a model folder travel, and its checksums are verified on both ends. HF_TOKEN says who you are;
HF_HUB_OFFLINE=1 takes what was fetched before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, errors, snapshot_download

from bigdssm.checkpoints.model_folder import (
    CONFIG_FILE,
    META_FILE,
    TEXT_DIR,
    TOKENIZER_DIR,
    WEIGHTS_FILE,
    load_model_folder,
)
from bigdssm.dataset.schema import SCHEMA_FILE, VOCABULARIES
from bigdssm.errors import CheckpointError
from bigdssm.utils.arguments import checked

FOLDERS = (VOCABULARIES, TOKENIZER_DIR, TEXT_DIR)
FILES = [META_FILE, CONFIG_FILE, WEIGHTS_FILE, SCHEMA_FILE, *(f"{folder}/*" for folder in FOLDERS), "README.md"]


@checked
def push_to_hub(folder: str | Path, repo_id: str, *, revision: str | None = None, private: bool = False) -> str:
    """Return the URL of the commit that holds the model folder in the repository OWNER/NAME, made where it is missing.

    README.md, the model card, goes along where `bigdssm convert_checkpoint` wrote the folder; `revision` is a branch
    that exists, main by default. Raises CheckpointError: no whole model folder, no such owner, no right to write, no
    network.
    """
    load_model_folder(Path(folder))
    with _errors_of(repo_id):
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        message = "A model folder of bigdssm"
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, allow_patterns=FILES, commit_message=message
        )
    return done.commit_url


def fetch_from_hub(repo_id: str, revision: str | None = None) -> Path:
    """Return the folder in the Hub's cache that holds the model of a repository, at a branch, tag or commit.

    Raises CheckpointError: no such repository or revision, no right to read it, no network and nothing in the cache.
    """
    with _errors_of(repo_id):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=FILES))


@contextmanager
def _errors_of(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one sentence."""
    try:
        yield
    except (errors.HTTPError, OSError, errors.HFValidationError) as error:  # HTTPError: of what the client speaks with
        first = next(iter(str(error).strip().splitlines()), repr(error))
        raise CheckpointError(f"the Hub has refused {repo_id}, or could not be reached: {first}") from None
