"""DeepSpeed: one training step, and a state that fits any number of workers.

No other module knows DeepSpeed.
"""

import contextlib
import os
import resource
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipelines.config.schema import TrainConfig

# DeepSpeed's kernel builders look for CUDA, on machines without a GPU too.
os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
MOMENTS = ("exp_avg", "exp_avg_sq")
# In parameters. Above DeepSpeed's default threshold of 1e5 a LoRA matrix would be gathered at every
# step. Its default bucket would take 2 GB of each GPU for gradients of a few million.
PERSISTENT_PARAMETER = 10_000_000
REDUCE_BUCKET = 50_000_000
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's default


class EngineState(NamedTuple):
    """Trainable parameters and their optimizer moments by name, gathered from all workers.

    Batch normalisation's running statistics count as parameters. Both are empty except on rank 0.
    """

    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]


def deepspeed_settings(train: TrainConfig, stage: int, *, full: bool) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    Adapters stay fp32 beside a bf16 base, so DeepSpeed's own bf16 is for `full` training alone.
    """
    halved = full and train.precision == "bf16"
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": REDUCE_BUCKET}
    if halved:
        # Without ZeRO, DeepSpeed hides its fp32 copies and moments, and `Engine.state` needs them.
        zero["stage"] = max(stage, 1)
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT_PARAMETER
        zero["stage3_max_live_parameters"] = LIVE_PARAMETERS
        if train.deepspeed.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
    if stage > 0 and train.deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        # DeepSpeed only multiplies this number. Our batches come from the streams.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": halved},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


class Engine:
    """A module under DeepSpeed with AdamW on its trainable parameters."""

    def __init__(self, module: nn.Module, settings: dict[str, Any], world_size: int) -> None:
        import deepspeed

        # The shared-memory exchange is compiled at first use, and needs a compiler. gloo does not.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        trainable = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0, fused=True)
        self.engine: Any = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )[0]
        if world_size == 1 and settings["zero_optimization"]["stage"] == 0:
            # One worker has nothing to reduce, and DeepSpeed would copy all gradients twice.
            self.engine.enable_backward_allreduce = False
        self.module = module
        self.device: torch.device = self.engine.device
        # DeepSpeed divides by accumulation and workers. Our losses already are shares of the mean
        # over the step.
        self._undo_mean = float(settings["gradient_accumulation_steps"] * world_size)

    def __call__(self, *inputs: Any) -> Any:
        """Run the module's forward."""
        return self.engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this worker's share of the loss."""
        self.engine.backward(loss * self._undo_mean)

    def step(self, learning_rate: float) -> None:
        """End a micro-batch. The last one of a step updates the parameters."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()

    def state(self, *, with_moments: bool) -> EngineState:
        """Gather the trainable parameters on rank 0, and their moments `with_moments`.

        Every worker must call it. One parameter at a time is gathered, to save memory.
        """
        parameters: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        is_first = torch.distributed.get_rank() == 0
        for name, parameter in self._trainable():
            value = self._full(parameter, None)
            if is_first:
                parameters[name] = value.detach().float().cpu().clone()
            for moment in MOMENTS if with_moments else ():
                value = self._full(parameter, moment)
                if is_first:
                    moments[f"{name}.{moment}"] = value.detach().float().cpu().clone()
        for name, statistic in self._batch_statistics():
            mean = statistic.clone()  # each worker's come from its own rows
            torch.distributed.all_reduce(mean)
            if is_first:
                parameters[name] = (mean / torch.distributed.get_world_size()).cpu()
        return EngineState(parameters, moments)

    def place(self, values: dict[str, Tensor]) -> None:
        """Set trainable parameters by name. Every worker passes the unpartitioned tensors."""
        for name, parameter in self._trainable():
            if name in values:
                self._set_full(parameter, None, values[name])
        for name, statistic in self._batch_statistics():
            if name in values:
                statistic.copy_(values[name])

    def load(self, state: EngineState, step: int) -> None:
        """Set parameters, moments and the number of steps. Every worker passes the same state.

        AdamW creates its states in its first step, so a step at learning rate 0 must come before.
        """
        self.place(state.parameters)
        for name, parameter in self._trainable():
            for moment in MOMENTS:
                self._set_full(parameter, moment, state.moments[f"{name}.{moment}"])
        for values in self._torch_optimizer().state.values():
            values["step"] = torch.tensor(float(step))

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    def _batch_statistics(self) -> Iterator[tuple[str, Tensor]]:
        """Yield batch normalisation's running statistics, where it updates them."""
        for name, module in self.module.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                for kind in ("running_mean", "running_var"):
                    yield f"{name}.{kind}", getattr(module, kind)

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        # DeepSpeed wraps an optimizer once for ZeRO and once for bf16.
        wrapper = self.engine.optimizer
        while not isinstance(wrapper, torch.optim.AdamW):
            wrapper = wrapper.optimizer
        return wrapper

    def _full(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        from deepspeed import utils

        if not self._is_wrapped(parameter):
            if moment is None:
                return parameter
            return self._torch_optimizer().state[parameter][moment]
        if moment is None:
            value = utils.safe_get_full_fp32_param(parameter)
        else:
            value = utils.safe_get_full_optimizer_state(parameter, moment)
        assert value is not None
        return value

    def _set_full(self, parameter: nn.Parameter, moment: str | None, value: Tensor) -> None:
        from deepspeed import utils

        value = value.to(self.device)
        if self._is_wrapped(parameter):
            if moment is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, moment)
        elif moment is not None:
            self._torch_optimizer().state[parameter][moment].copy_(value)
        if moment is None:
            # DeepSpeed's call sets its fp32 copy alone, and the forward reads the parameter.
            with whole(parameter), torch.no_grad():
                parameter.copy_(value)

    @staticmethod
    def _is_wrapped(parameter: nn.Parameter) -> bool:
        return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def whole(parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
    """Gather a parameter that ZeRO-3 has partitioned, in a context. Rank 0's changes persist."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def zero3_loading(settings: dict[str, Any]) -> Any:
    """Return the object by which transformers partitions weights as it loads them under ZeRO-3.

    The caller must hold it while `from_pretrained` runs: transformers has a weak reference to it,
    and would otherwise load the full model on every worker. None below stage 3.
    """
    if settings["zero_optimization"]["stage"] < 3:
        return None
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(settings)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the largest peak of any worker: GPU memory, or resident memory on CPUs.

    Resident memory counts what the worker has read in Ray's object store, which it shares with all
    processes of its node.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    largest = torch.tensor(float(peak), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)
