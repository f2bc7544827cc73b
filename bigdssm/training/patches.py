"""The changes of DeepSpeed's functions for an engine of this package.

They are applied for the life of an engine, and while ranks join: no other engine runs with them. `apply_patches` and
`undo_patches` may be called repeatedly.
"""

import importlib
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

from deepspeed.runtime import compiler, zero
from deepspeed.runtime.zero import partitioned_param_coordinator, stage3, stage_1_and_2
from torch import Tensor

MUON = "deepspeed.runtime.zero.muon"
_applied = ExitStack()


def apply_patches() -> None:
    """Replace functions of DeepSpeed until `undo_patches`."""
    undo_patches()

    # The shared-memory all-reduce is compiled on first use: it takes 45 s and a compiler, and ranks race for it. If one
    # is killed meanwhile, all later runs wait for its lock.
    _replace(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)

    # When DeepSpeed's Muon, which is not used here, is imported, its functions are compiled: 3 s at every start.
    if f"{MUON}.muon_optimizer" not in sys.modules:
        with ExitStack() as importing:
            _replace(compiler, "compile", lambda: lambda function: function, importing)
            importlib.import_module(f"{MUON}.muon_optimizer")
        _applied.callback(_forget_muon)

    # At ZeRO stage 3 ranks compare the order of modules after every pass that differs from the previous one, by two
    # synchronizing broadcasts. Chunks of alternating sides trigger most of them, but all ranks have the same chunks.
    _replace(partitioned_param_coordinator, "assert_ints_same_as_other_ranks", lambda ints: None)

    # The norm, a new tensor in each step, is then read from the device once, not once per parameter group.
    _replace(stage_1_and_2, "is_invalid_grad_norm", lru_cache(maxsize=1)(stage_1_and_2.is_invalid_grad_norm))
    for stage in (stage_1_and_2, stage3):
        _replace(stage, "mask_nan_or_inf_with_val_inplace", _mark)


def undo_patches() -> None:
    """Restore the functions that `apply_patches` has replaced."""
    _applied.close()


def _replace(module: Any, name: str, function: Callable[..., Any], until: ExitStack = _applied) -> None:
    until.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, function)


def _mark(norm: Tensor, device: Any = None, val: float = -1.0) -> None:
    """Replace a non-finite norm by `val`, as DeepSpeed does, but without an upload from host memory."""
    norm.masked_fill_(~norm.isfinite(), val)


def _forget_muon() -> None:
    """Remove the modules whose functions are not compiled; a later import compiles them."""
    for name in [name for name in sys.modules if name == MUON or name.startswith(f"{MUON}.")]:
        del sys.modules[name]
    vars(zero).pop("muon", None)
