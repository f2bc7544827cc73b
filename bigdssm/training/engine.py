"""The DeepSpeed engine, configured only by the config.

`backward` takes output vectors of the towers with their gradients in place of a loss.
"""

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from math import prod
from typing import Any, cast

import deepspeed
import numpy as np
import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from bigdssm import distributed
from bigdssm.checkpoints.checkpoint import TensorPiece, even_share
from bigdssm.config import EngineConfig, OptimizerConfig
from bigdssm.errors import ConfigError
from bigdssm.loader.step_plan import NOTHING_PACKED, TokenBudget
from bigdssm.models import (
    DualEncoder,
    Encoded,
    QueryPositions,
    Values,
    compile_layers,
    flash_runs_on,
    use_eager_attention,
    use_packing,
)
from bigdssm.tables.sharded import ShardedTables, WorkingSet
from bigdssm.training.optimizers import parameter_groups
from bigdssm.training.patches import apply_patches, undo_patches
from bigdssm.training.process_group import device, on_device
from bigdssm.utils import timing
from bigdssm.utils.hashing import hash64

CLIP_EPS = 1e-6  # that DeepSpeed adds to the norm
DEVICE_BUCKET = 50_000_000  # gradients; DeepSpeed's default, 10 times as many, takes 4 GB and prevents overlap


def deepspeed_config(engine: EngineConfig, optimizer: OptimizerConfig, rows_per_rank: int) -> dict[str, Any]:
    """Return the DeepSpeed config of a stage; DeepSpeed is configured nowhere else."""
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage > 0 and on_device():
        # reduces gradients during the backward, in buckets that fill up before its end
        zero |= {"overlap_comm": True, "reduce_bucket_size": DEVICE_BUCKET}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rows_per_rank,
        "gradient_accumulation_steps": 1,  # FPS does not decompose over accumulation
        "gradient_clipping": optimizer.gradient_clipping,  # DeepSpeed's own default is 1.0
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # checked by OptimizerConfig.whole_tensors
        "zero_force_ds_cpu_optimizer": False,  # its CPU Adam is compiled on first use
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it synchronizes with the device in every forward
    }
    if engine.precision == "bf16":
        # By itself DeepSpeed also communicates linear layers and their gradients in bfloat16: their mean over the ranks
        # is then rounded, and at ZeRO stage 3 weights differ by when they were last gathered. None of it with `[]`.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    elif engine.precision == "bf16_pure":
        config["bf16"] = {"enabled": True}
    return config


@contextmanager
def partitioned_loading(engine: EngineConfig, optimizer: OptimizerConfig) -> Iterator[None]:
    """A context in which transformers partitions pretrained weights over the ranks as it reads them, at ZeRO stage 3.

    Rank 0 reads the files; no rank has all weights in memory.
    """
    if engine.zero_stage < 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    # transformers has a weak reference to it
    config = HfDeepSpeedConfig(deepspeed_config(engine, optimizer, 1))
    try:
        yield
    finally:
        del config


def trained_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the weights of a checkpoint; the others are those that the stage starts from."""
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


@torch.no_grad()
def set_weights(module: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Set the trained weights of a model without an engine, possibly partitioned, to `read(name)`.

    All ranks must call it.
    """
    for name, parameter in trained_weights(module):
        partition: Tensor | None = getattr(parameter, "ds_tensor", None)
        if partition is None:
            parameter.copy_(read(name))
        else:
            partition.copy_(partition_of(parameter, read(name)))


def frozen_checksum(module: nn.Module) -> int:
    """Return a checksum of all weights that are not trained, the same at any ZeRO stage. All ranks must call it."""
    replicated, partitioned = 0, 0
    parameters: Iterator[tuple[str, Any]] = module.named_parameters()
    for name, parameter in parameters:
        if parameter.requires_grad:
            continue
        partition: Any = getattr(parameter, "ds_tensor", None)
        if partition is not None:  # its padding is not initialized
            size = partition.numel()
            first = size * distributed.rank()
            partition = partition.flatten()[: max(0, min(size, parameter.ds_numel - first))]
        values = parameter if partition is None else partition
        bits = values.detach().contiguous().view(torch.int16 if values.element_size() == 2 else torch.int32)
        number = int(bits.sum(dtype=torch.int64)) * (hash64(name) | 1)
        if partition is None:
            replicated += number
        else:
            partitioned += number
    return (replicated + sum(distributed.all_gather_object(partitioned))) % 2**63


def partition_of(parameter: Any, value: Tensor) -> Tensor:
    """Return this rank's padded partition of a ZeRO-3 parameter."""
    size = parameter.ds_tensor.numel()
    padded = value.new_zeros(size * distributed.world_size())
    padded[: value.numel()] = value.flatten()
    return padded[size * distributed.rank() :][:size]


class DeepSpeedStepEngine:
    """A model under any DeepSpeed engine: forward of one or both towers, backward from vector gradients."""

    def __init__(self, engine: Any, call: Callable[..., Encoded] | None = None) -> None:
        """`call`: encodes by the engine, which by default returns Encoded. Raises ConfigError: accumulated steps."""
        if engine.gradient_accumulation_steps() != 1:
            raise ConfigError(
                f"gradient_accumulation_steps: got {engine.gradient_accumulation_steps()}, needs 1: a softmax over the "
                "batch is no sum of those over its parts; make the batch larger, in chunks"
            )
        self.deepspeed = engine
        self.zero_stage = int(engine.zero_optimization_stage())
        self._call = call or engine

    def forward(
        self,
        query: Mapping[str, Values] | None = None,
        doc: Mapping[str, Values] | None = None,
        **extra_inputs: Tensor | QueryPositions | bool,
    ) -> Encoded:
        """Encode queries, documents, or both, on this rank; see `DualEncoder.forward`."""
        return cast(Encoded, self._call(query=query, doc=doc, **extra_inputs))

    def backward(self, outputs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Back-propagate (output, gradient) pairs, by a surrogate loss: DeepSpeed accepts only scalars."""
        products = [(output.float() * gradient.float()).sum() for output, gradient in outputs if output.requires_grad]
        if products:  # none for a chunk of a frozen tower, on any rank
            self.deepspeed.backward(torch.stack(products).sum())

    @contextmanager
    def single_reduction(self) -> Iterator[None]:
        """A context that accumulates the gradients of several backward passes and reduces them once, at exit."""
        with ExitStack() as accumulation:
            engine = self.deepspeed
            accumulation.enter_context(engine.no_sync() if self.zero_stage == 0 else engine.coalesce_grad_reduction())
            yield
            with timing.span("reduce"):
                accumulation.close()
                if self.zero_stage == 0:
                    engine.allreduce_gradients()

    @property
    def module(self) -> nn.Module:
        """The model."""
        return cast(nn.Module, self.deepspeed.module)


class Engine(DeepSpeedStepEngine):
    """A model under DeepSpeed, configured by the config, and its optimizer step."""

    tables: ShardedTables | None = None  # of the model, sharded by rows
    _working: WorkingSet | None = None  # of the step
    _square: Tensor | None = None  # of the norm of its gradients
    _states_checked = False

    def __init__(
        self, model: nn.Module, config: EngineConfig, optimizer: OptimizerConfig, rows_per_rank: int,
        tables: ShardedTables | None = None,
    ) -> None:  # fmt: skip
        self._state_of, self._clipping, self.tables = optimizer.state_of, optimizer.gradient_clipping, tables
        narrow = config.precision in ("bf16", "bf16_pure")  # `auto` is settled before
        self.product_dtype = torch.bfloat16 if narrow else torch.float32
        self._norm = float("nan")
        if narrow and not on_device():
            use_eager_attention(model)
        if narrow and flash_runs_on(device()):
            use_packing(model)
        packed = model.accepts_packed(training=True) if isinstance(model, DualEncoder) else NOTHING_PACKED
        self.budget = TokenBudget.of(config, packed)
        if config.compile:
            compile_layers(model)
        apply_patches()
        built = deepspeed.initialize(
            model=model.to(device()),
            optimizer=optimizer.build(parameter_groups(model, optimizer)),
            config=deepspeed_config(config, optimizer, rows_per_rank),
        )
        super().__init__(built[0])
        if self.zero_stage > 0:
            self.deepspeed.optimizer.check_grad_overflow = True  # skip steps of non-finite gradients in fp32, too
        if tables is not None:
            cast(DualEncoder, self.module).tables.source = tables
            # DeepSpeed clips, and skips steps, by the norm of all gradients, sharded tables included
            wrapped = self.deepspeed.optimizer
            if self.zero_stage == 3:
                norm_groups = wrapped._get_norm_groups
                wrapped._get_norm_groups = lambda: [self._with_tables(combine_grad_norm_groups(norm_groups()))]
            elif self.zero_stage > 0:
                weight_norm = wrapped.scaled_global_norm
                wrapped.scaled_global_norm = lambda *args, **options: self._with_tables(weight_norm(*args, **options))

    def destroy(self) -> None:
        """Remove the references to DeepSpeed's engine, so that its memory can be freed; undo the patches."""
        undo_patches()
        self.deepspeed.destroy()
        if self.zero_stage == 3:
            parameter_offload.FWD_MODULE_STACK.clear()
            coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
            cached = coordinator._PartitionedParameterCoordinator__params_to_release  # an lru_cache over `self`
            inspect.getclosurevars(cached).nonlocals["func"].cache_clear()

    def fetch(self, table_rows: Mapping[str, np.ndarray]) -> None:
        """Fetch the rows of a step's batch from the sharded tables. All ranks must call it."""
        assert self.tables is not None
        self._working = self.tables.fetch(table_rows)
        cast(DualEncoder, self.module).tables.source = self._working

    def step(self, lr_factor: float) -> bool:
        """Apply the gradients with the base rates times `lr_factor`; return False if the step was skipped.

        It is skipped on all ranks if any gradient is not finite. Rows of sharded tables count in the norm, and are
        clipped, updated or left with the other weights. Raises ConfigError after the first: see `_check_states`.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        if self.tables is not None and self._working is not None:
            self._square = self.tables.reduce(self._working)
            cast(DualEncoder, self.module).tables.source, self._working = self.tables, None
        before = [] if self._states_checked else self._group_values()
        applied = True
        if self.zero_stage == 0:
            # DeepSpeed does not check the norm at stage 0. Gradients are reduced: every rank computes the same norm.
            gradients = [weight.grad for weight in self.module.parameters() if weight.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self._norm = float(norm if self._square is None else (norm.double().square() + self._square).sqrt())
            applied = math.isfinite(self._norm)
            if not applied:
                self.deepspeed.optimizer.zero_grad()
            elif self._square is not None:  # DeepSpeed clips by the norm of its own weights, which is then small enough
                torch._foreach_mul_(gradients, self._clip_coefficient())
        if applied:
            self.deepspeed.step()
            applied = not getattr(self.deepspeed.optimizer, "overflow", False)
        if applied and before:
            self._check_states(before)
            self._states_checked = True
        if self.tables is not None:
            if applied:
                self.tables.commit(self._clip_coefficient(), lr_factor)
            else:
                self.tables.discard()
            self._square = None
        return applied

    def _clip_coefficient(self) -> float | Tensor:
        """Return the factor by which DeepSpeed clips the gradients of the step."""
        norm = self.gradient_norm()
        if not self._clipping:
            return 1.0
        if isinstance(norm, Tensor):
            return ((norm + CLIP_EPS) / self._clipping).clamp(min=1.0).reciprocal()
        return 1.0 / max(1.0, (norm + CLIP_EPS) / self._clipping)

    def _with_tables(self, norm: Tensor) -> Tensor:
        """Return the norm of gradients with those of the sharded tables, infinity if it is not finite."""
        if self._square is None:
            return norm
        total = (norm.double().square() + self._square.to(norm.device)).sqrt()
        return torch.where((norm < 0) | ~total.isfinite(), torch.inf, total).to(norm.dtype)

    def gradient_norm(self) -> float | Tensor:
        """Return the global gradient norm of the last step, before clipping; a tensor if it is still on the device."""
        return self._norm if self.zero_stage == 0 else cast(Tensor, self.deepspeed.get_global_grad_norm())

    def local_pieces(self) -> Iterator[TensorPiece]:
        """Yield this rank's float32 pieces of every trained weight NAME and every optimizer state STATE/NAME.

        They are the partitions that ZeRO assigns to the rank, and an even share of replicated tensors. No collective.
        The pieces are views of tensors in training. Before the first step there are no states.
        """
        has_states = any(len(state) for state in self.base_optimizer.state.values())
        states = self._linked_states() if has_states else {}
        replicated: list[tuple[str, Tensor]] = []
        for name, parameter in trained_weights(self.module):
            names, stored = states.get(parameter, ()), cast(Any, parameter)
            if self.zero_stage == 0:
                replicated.append((name, parameter))
                replicated += [(f"{state}/{name}", self.deepspeed.optimizer.state[parameter][state]) for state in names]
            elif self.zero_stage == 3:  # this rank's partition, without padding, if any
                shape, size = tuple(stored.ds_shape), stored.ds_tensor.numel()
                first = size * distributed.rank()
                count = min(size, prod(shape) - first)
                if count > 0:
                    yield TensorPiece(name, shape, first, safe_get_local_fp32_param(parameter).flatten()[:count])
                    for state in names:
                        values = safe_get_local_optimizer_state(parameter, state)[:count]
                        yield TensorPiece(f"{state}/{name}", shape, first, values)
            elif (mapping := stored._hp_mapping) is not None:  # this rank's fragment, if any
                shape, first = tuple(parameter.shape), mapping.lp_fragment_address.start
                yield TensorPiece(name, shape, first, mapping.get_hp_fragment())
                for state in names:
                    yield TensorPiece(f"{state}/{name}", shape, first, mapping.get_hp_fragment(state))
        for piece in even_share(replicated, distributed.rank(), distributed.world_size()):
            yield replace(piece, values=piece.values.float())

    def restore(self, read: Callable[[str], Tensor], applied_steps: int) -> None:
        """Set master weights and optimizer states from `read(name)`; the model has its weights.

        All ranks must call it. Names are those of `local_pieces`. `applied_steps` becomes the optimizer's step of every
        parameter.
        """
        states: dict[nn.Parameter, tuple[str, ...]] = {}
        if applied_steps > 0:
            # the states that the optimizer would create in its first step, linked in DeepSpeed
            optimizer = self.base_optimizer
            groups = [(group["name"], group["params"]) for group in optimizer.param_groups]
            if self.zero_stage == 3:
                groups = [(groups[0][0], list(self.deepspeed.optimizer.fp32_partitioned_groups_flat))]
            for group, tensors in groups:
                for tensor in tensors:
                    optimizer.state[tensor] = {
                        "step": torch.tensor(float(applied_steps)),
                        **{state: torch.zeros_like(tensor) for state in self._state_of(group)},
                    }
            states = self._linked_states()
        for name, parameter in trained_weights(self.module):
            if self.zero_stage == 3:  # safe_set_full_fp32_param fails if a parameter is not divisible by the world size
                safe_set_local_fp32_param(parameter, partition_of(parameter, read(name)))
            elif self.zero_stage > 0:
                safe_set_full_fp32_param(parameter, read(name).to(parameter.device))
            for state in states.get(parameter, ()):
                value = read(f"{state}/{name}")
                if self.zero_stage == 0:
                    self.deepspeed.optimizer.state[parameter][state].copy_(value)
                elif self.zero_stage == 3:
                    safe_set_local_optimizer_state(parameter, partition_of(parameter, value), state)
                else:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), state)
        if any(group.get("fused") for group in self.base_optimizer.param_groups):
            for tensor, state in self.base_optimizer.state.items():
                if "step" in state:  # a fused optimizer counts steps on the parameter's device
                    state["step"] = state["step"].to(tensor.device)

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer that DeepSpeed wraps."""
        wrapped = self.deepspeed.optimizer
        return cast(torch.optim.Optimizer, wrapped.optimizer if self.zero_stage > 0 else wrapped)

    def _linked_states(self) -> dict[nn.Parameter, tuple[str, ...]]:
        """Return the state names of every trainable parameter; at ZeRO 1 to 3 they are the same for all."""
        if self.zero_stage in (1, 2):  # DeepSpeed links the states of all groups when only the first has stepped
            self.deepspeed.optimizer._hp_optimizer_states_linked = False
            self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()
        groups = self.base_optimizer.param_groups
        if self.zero_stage == 0:
            return {parameter: self._state_of(group["name"]) for group in groups for parameter in group["params"]}
        names = self._state_of(groups[0]["name"])
        return {parameter: names for parameter in self.module.parameters() if parameter.requires_grad}

    def _group_values(self) -> list[dict[str, Any]]:
        """Return the settings of the optimizer's groups that no schedule changes."""
        groups = self.base_optimizer.param_groups
        return [{key: group[key] for key in group if key not in ("params", "lr")} for group in groups]

    def _check_states(self, before: list[dict[str, Any]]) -> None:
        """Compare the optimizer's state after a step with the declared one.

        before: `_group_values` before the step. Raises ConfigError: a checkpoint would lack a part of the state.
        """
        optimizer = self.base_optimizer
        name = f"optimizer {type(optimizer).__name__}"
        group_of = {tensor: group["name"] for group in optimizer.param_groups for tensor in group["params"]}
        for tensor, state in (dict(optimizer.state) or {torch.empty(0): {}}).items():
            got = {key: _form(value) for key, value in state.items() if key != "step"}
            group = group_of.get(tensor, before[0]["name"])  # at ZeRO 1 to 3 the states are the same for all groups
            declared = dict.fromkeys(self._state_of(group), _form(tensor))
            if got != declared:
                raise ConfigError(
                    f"{name}: got the states {got} after a step, needs those of state_of, {declared}, since a "
                    "checkpoint has these alone; return all names from state_of, of tensors of the parameter's shape"
                )
        after = self._group_values()
        changed = {key for old, new in zip(before, after, strict=True) for key in new if new[key] != old.get(key)}
        if changed:
            raise ConfigError(
                f"{name}: got a step that changes {', '.join(sorted(changed))} of a parameter group, needs "
                "this state per parameter, since a checkpoint has no groups; move it to optimizer.state"
            )

    def state_dict(self, names: Collection[str] | None = None, *, on_main: bool = False) -> dict[str, Tensor]:
        """Return the full weights, or those of `names`, in float32 on the CPU. At ZeRO stage 3 all ranks must call it.

        on_main: only rank 0 needs them; the others return an empty dict.
        """
        state: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            if names is not None and name not in names:
                continue
            gathered = deepspeed.zero.GatheredParameters([parameter]) if self.zero_stage == 3 else nullcontext()
            with gathered:
                if not on_main or distributed.is_main():
                    state[name] = parameter.detach().float().cpu().clone()
        return state


def _form(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
