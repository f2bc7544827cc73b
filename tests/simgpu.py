"""A simulated device: CPU tensors that report an accelerator and count its operations.

    with simgpu.Device() as device, simgpu.ranks(64):
        U = device.put(torch.randn(m, D)).requires_grad_()
        device.reset()
        fps_loss(U, W, alpha=20.0).loss.backward()
    device.launches, device.waits, device.uploads, device.mixed, device.collectives

Values are real, computed on the CPU, so that code which reads them works and results can be compared. `launches` are
kernels, by rough numbers for composite operations; `waits` are reads by the host; `uploads` are copies from pageable
memory, for which the host waits too; `mixed` are operations that a device would refuse, as their tensors are on both
sides. All are counted by operation and line of the library. In `ranks` every rank has the tensors of this one, through
`bigdssm.distributed`, the one module that touches torch.distributed.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from bigdssm import distributed

PACKAGE = f"{Path(distributed.__file__).parent}/"
_setup_privateuseone_for_python_backend("simgpu")
BACKEND: Any = torch.get_device_module("simgpu")
BACKEND.get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
# the device exists within a `Device` context alone: libraries of later tests in this process ask torch for one
BACKEND.is_available = staticmethod(lambda: Device.current is not None)
PLACE = torch.device("simgpu", 0)

# no kernel
VIEWS = frozenset((
    "view", "_unsafe_view", "reshape", "slice", "select", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze",
    "detach", "alias", "as_strided", "split", "split_with_sizes", "unbind", "narrow", "lift_fresh", "_reshape_alias",
    "empty", "new_empty", "empty_like", "empty_strided", "diagonal", "unfold", "set_", "resize_",
))  # fmt: skip
# the size of the result, or the result itself, is the host's
WAITS = frozenset((
    "_local_scalar_dense", "nonzero", "unique_dim", "_unique2", "unique_consecutive", "masked_select", "equal",
    "is_nonzero", "bincount",
))  # fmt: skip
KERNELS = {
    "_unique2": 8, "sort": 4, "argsort": 4, "nonzero": 3, "index_put_": 3, "index_put": 3, "_index_put_impl_": 3,
    "cumsum": 2, "bincount": 4, "repeat_interleave": 3, "topk": 4, "logsumexp": 6, "unique_dim": 20,
}  # fmt: skip
INDEXING = frozenset(("index", "index_put_", "index_put", "_index_put_impl_"))
_tensor = torch.tensor
_pin_memory = torch.Tensor.pin_memory


class Device(TorchDispatchMode):
    """A context in which tensors can be on the device, which has `memory` bytes."""

    current: Device | None = None

    def __init__(self, memory: int = 64 << 30) -> None:
        super().__init__()
        self.memory = memory
        self.reset()

    def reset(self) -> None:
        self.operations, self.waits, self.uploads, self.mixed = (collections.Counter[str]() for _ in range(4))
        self.collectives: list[tuple[str, str, int]] = []  # name, backend, bytes of the result on a rank

    @property
    def launches(self) -> int:
        return sum(self.operations.values())

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        return SimTensor(tensor.detach())

    def put_module(self, module: torch.nn.Module) -> None:
        """Put its parameters and buffers there, each once."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = torch.nn.Parameter(self.put(parameter), parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = self.put(buffer)

    def __enter__(self) -> Device:
        Device.current = self
        BACKEND.get_device_properties = lambda device: SimpleNamespace(total_memory=self.memory)
        torch.tensor, torch.Tensor.pin_memory = _new_tensor, _pinned  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.tensor, torch.Tensor.pin_memory = _tensor, _pin_memory  # type: ignore[method-assign]
        Device.current = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Count an operation, run it on the CPU, and mark the device of its result."""
        name = func._schema.name.split("::")[1]
        if func is torch.ops.prim.device.default:
            return PLACE
        flat, _ = pytree.tree_flatten((args, kwargs))
        here = any(isinstance(x, SimTensor) for x in flat)
        there = any(isinstance(x, torch.Tensor) and not isinstance(x, SimTensor) and x.dim() > 0 for x in flat)
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        stays = here
        if name == "copy_":
            stays = isinstance(args[0], SimTensor)
            if stays != isinstance(args[1], SimTensor):
                self._crossed(args[1], down=not stays)
        elif name in ("_to_copy", "to"):
            if asked is not None and (asked == "simgpu") != here:
                self._crossed(args[0], down=here)
                stays = not here
        elif asked is not None:
            stays = asked == "simgpu"
        elif here and there:
            self.mixed[f"{name} {where()}"] += 1
        if here and name in WAITS:
            self.waits[f"{name} {where()}"] += 1
        if here and name in INDEXING and any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args[1]):
            self.waits[f"index by bool {where()}"] += 1
        if (here or stays) and name not in VIEWS and name != "_local_scalar_dense":
            self.operations[f"{name} {where()}"] += KERNELS.get(name, 1)
        args, kwargs = pytree.tree_map(_host, (args, kwargs))
        if func is torch.ops.aten.mm.dtype:  # not a CPU's
            A, B, dtype = args
            func, args = torch.ops.aten.mm.default, (A.to(dtype), B.to(dtype))
        result = func(*args, **kwargs)
        mutated = [x for x in flat if isinstance(x, SimTensor) and x.elem is result]
        if mutated:  # in place, or `out`
            return mutated[0]
        return pytree.tree_map(lambda x: SimTensor(x) if isinstance(x, torch.Tensor) and stays else x, result)

    def _crossed(self, source: torch.Tensor, down: bool) -> None:
        if down:
            self.waits[f"to the host {where()}"] += 1
        elif not getattr(source, "pinned", False):
            self.uploads[where()] += 1


class SimTensor(torch.Tensor):
    """`elem`, as if on the device."""

    elem: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> SimTensor:
        made: SimTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            device="meta", dispatch_device=True, requires_grad=False,
        )  # fmt: skip
        made.elem = elem
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert Device.current is not None, "a tensor of a simulated device outlived it"
        return Device.current.run(func, args, kwargs or {})

    def _read(self, what: str) -> torch.Tensor:
        assert Device.current is not None, "a tensor of a simulated device outlived it"
        Device.current.waits[f"{what} {where()}"] += 1
        return self.elem

    def item(self) -> Any:
        return self._read("item").item()

    def __int__(self) -> int:
        return int(self._read("int"))

    def __float__(self) -> float:
        return float(self._read("float"))

    def __bool__(self) -> bool:
        return bool(self._read("bool"))

    def __index__(self) -> int:
        return self._read("index").__index__()

    def tolist(self) -> Any:
        return self._read("tolist").tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("a device's tensor is no numpy array")

    def new_tensor(self, data: Any, **kwargs: Any) -> torch.Tensor:
        return _new_tensor(data, **{"dtype": self.dtype, "device": PLACE, **kwargs})

    def __repr__(self, **_: Any) -> str:
        return f"SimTensor({self.elem!r})"


@contextmanager
def ranks(world_size: int, rank: int = 0) -> Iterator[None]:
    """Simulate a process group in which every rank has the tensors of this one."""

    def note(name: str, tensor: torch.Tensor) -> None:
        if Device.current is not None:
            backend = "nccl" if isinstance(tensor, SimTensor) else "gloo"
            Device.current.collectives.append((name, backend, tensor.numel() * tensor.element_size()))

    class Group:
        """torch.distributed with the calls of the library's hot paths replaced."""

        def __getattr__(self, name: str) -> Any:
            return getattr(dist, name)

        def get_backend(self, group: Any = None) -> str:
            return "nccl"

        def all_reduce(self, tensor: torch.Tensor, op: Any = None, group: Any = None) -> None:
            note("all_reduce", tensor)
            if op in (None, dist.ReduceOp.SUM):
                _host(tensor).mul_(world_size)

        def all_gather_into_tensor(
            self, out: torch.Tensor, tensor: torch.Tensor, group: Any = None, async_op: bool = False
        ) -> Any:
            note("all_gather", out)
            _host(out).view(world_size, *tensor.shape).copy_(_host(tensor).expand(world_size, *tensor.shape))
            return SimpleNamespace(wait=lambda: None)

        def all_to_all_single(
            self, out: torch.Tensor, tensor: torch.Tensor, received: list[int], sent: list[int], group: Any = None
        ) -> None:
            """Receive the rows for this rank from every rank, repeated where it expects more."""
            note("all_to_all", out)
            first = sum(sent[:rank])
            mine = _host(tensor)[first : first + sent[rank]]
            _host(out).zero_()
            for part in _host(out).split(received) if len(mine) else ():
                part.copy_(mine[torch.arange(len(part)) % len(mine)])

        def all_gather_object(self, values: list[Any], value: Any, group: Any = None) -> None:
            note("all_gather_object", torch.empty(0))
            values[:] = [value] * world_size

    def reduce_scatter(out: torch.Tensor, whole: torch.Tensor, group: Any = None) -> None:
        note("reduce_scatter", whole)
        _host(out).copy_(_host(whole).view(world_size, *out.shape)[rank] * world_size)

    with mock.patch.multiple(
        distributed, dist=Group(), _reduce_scatter=reduce_scatter, is_distributed=lambda: True,
        rank=lambda group=None: rank, world_size=lambda group=None: world_size,
    ):  # fmt: skip
        yield


def where() -> str:
    """Return the innermost line of the library that is being run."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def _host(x: Any) -> Any:
    if isinstance(x, SimTensor):
        return x.elem
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "simgpu" else x


def _new_tensor(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> torch.Tensor:
    made = _tensor(data, dtype=dtype)
    if device is not None and torch.device(device).type == "simgpu":
        assert Device.current is not None
        Device.current.uploads[f"tensor {where()}"] += 1
        made = SimTensor(made)
    return made.requires_grad_() if requires_grad else made


def _pinned(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    pinned: Any = tensor.clone()
    pinned.pinned = True
    return pinned
