"""The manifest of a checkpoint: what stands in its folder, and a checksum of all this."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigdssm.artifacts.shares import FileShare, Place, TensorKind
from bigdssm.errors import CheckpointError
from bigdssm.hashing import json_checksum

MANIFEST = "manifest.json"
# 1 had no checksum of the manifest itself, 2 one of each file as a whole, and no tensor in pieces; in 3 the dataset's
# schema had another fingerprint
FORMAT = 4


class OtherFormatError(CheckpointError):
    """A checkpoint that is whole, but of another version: no damage, and not to be passed over."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose manifest is verified."""

    path: Path
    step: int
    world_size: int
    state: dict[str, Any]  # what is the same on every rank
    tensors: dict[str, TensorKind]  # by name: weights, STATE/… of the optimizer's, and COMMON…
    shares: tuple[FileShare, ...]

    def tensor_shares(self) -> list[FileShare]:
        """Return the shares of all tensors, in the order of their ranks."""
        return [share for share in self.shares if share.file == tensors_file(share.owner)]

    def rank_share(self, rank: int) -> FileShare:
        """Return the share that holds what rank `rank` saved for itself."""
        return next(share for share in self.shares if share.file == rank_file(rank))


def check_sizes(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where a file is missing or has another size."""
    ends: dict[str, int] = {}
    for share in checkpoint.shares:
        ends[share.file] = max(ends.get(share.file, 0), share.range[1])
    for name, end in ends.items():
        file = checkpoint.path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint file {file} is missing")
        if file.stat().st_size != end:
            raise CheckpointError(f"checkpoint file {file} has {file.stat().st_size} bytes, was {end}")


def write_manifest(
    path: Path, step: int, world_size: int, state: dict[str, Any], tensors: dict[str, TensorKind],
    shares: Sequence[FileShare],
) -> None:  # fmt: skip
    """Write the manifest to the folder `path`."""
    number = {name: n for n, name in enumerate(tensors)}
    content = {
        "format": FORMAT, "step": step, "world_size": world_size, "state": state,
        "tensors": [[name, kind.dtype, kind.shape] for name, kind in tensors.items()],
        "shares": [
            {
                "owner": share.owner, "file": share.file, "range": share.range,
                "block": share.block, "xxh3_128": share.xxh3_128,
                "places": [[number[place.name], place.first, place.count, place.at] for place in share.places],
            }
            for share in shares
        ],
    }  # fmt: skip
    content = json.loads(json.dumps(content))  # as it will be read
    (path / MANIFEST).write_text(json.dumps({"checksum": json_checksum(content), **content}), encoding="utf-8")


def read_manifest(path: Path) -> Checkpoint:
    """Return the checkpoint that the manifest of `path` describes; the manifest is verified, the files are not."""
    file = path / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        format_ = content["format"] if "files" not in content else 1  # which did not tell it
        if format_ != 1 and content.pop("checksum") != json_checksum(content):
            raise CheckpointError(f"{file} is damaged: its content does not have the checksum that it tells")
        if format_ != FORMAT:
            raise OtherFormatError(
                f"checkpoint {path} has format {format_}, this version reads {FORMAT}; go on with the version that "
                "wrote it, or begin anew in another run.dir"
            )
        tensors = {name: TensorKind(dtype, tuple(shape)) for name, dtype, shape in content["tensors"]}
        names = list(tensors)
        shares = tuple(
            FileShare(
                s["owner"], s["file"], (s["range"][0], s["range"][1]), s["block"], tuple(s["xxh3_128"]),
                tuple(Place(names[number], first, count, at) for number, first, count, at in s["places"]),
            )
            for s in content["shares"]
        )  # fmt: skip
        checkpoint = Checkpoint(path, content["step"], content["world_size"], content["state"], tensors, shares)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} has no {MANIFEST}: it was never finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from None
    if path.name != name_of(checkpoint.step):
        raise CheckpointError(f"checkpoint {path} was written as {name_of(checkpoint.step)}; give it that name again")
    for what, step in _steps_of(checkpoint.state).items():
        if step != checkpoint.step:
            raise CheckpointError(f"{file} is damaged: the step of its {what} is {step}, its own {checkpoint.step}")
    return checkpoint


def _steps_of(state: dict[str, Any]) -> dict[str, int]:
    """Return the steps that a stage's state tells of; a stream counts from the beginning of its part."""
    progress, stream = state.get("progress", {}), state.get("stream", {})
    steps = {"progress": progress["step"]} if "step" in progress else {}
    return steps | ({"stream": stream["step"] + progress.get("part_step", 0)} if "step" in stream else {})


def name_of(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:08d}"


def tensors_file(rank: int) -> str:
    """Return the name of a rank's share of all tensors."""
    return f"tensors-{rank:05d}.safetensors"


def rank_file(rank: int) -> str:
    """Return the name of what a rank keeps for itself."""
    return f"rank-{rank:05d}.safetensors"
