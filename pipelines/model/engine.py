"""DeepSpeed, and nothing else knows it: one training step, and a resume point that fits any number of workers."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipelines.config.schema import TrainConfig

os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
MOMENTS = ("exp_avg", "exp_avg_sq")
# In parameters. LoRA matrices above DeepSpeed's default of 1e5 would be gathered at every step; its default bucket
# would take 2 GB of each GPU for gradients of a few million; the last one is its default.
PERSISTENT_PARAMETER, REDUCE_BUCKET, LIVE_PARAMETERS = 10_000_000, 50_000_000, 1_000_000_000


class EngineState(NamedTuple):
    """Trainable parameters (and batch normalisation's statistics) and their optimizer moments by name, gathered from
    all workers; empty but on rank 0."""

    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]


def deepspeed_settings(train: TrainConfig, stage: int, *, full: bool) -> dict[str, Any]:
    """DeepSpeed's configuration. Adapters stay fp32 beside a bf16 base: its own bf16 is for `full` training."""
    halved = (
        full and train.precision == "bf16"
    )  # without ZeRO the fp32 copies and moments would be out of reach
    zero: dict[str, Any] = {
        "stage": max(stage, 1) if halved else stage,
        "reduce_bucket_size": REDUCE_BUCKET,
    }
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT_PARAMETER
        zero["stage3_max_live_parameters"] = LIVE_PARAMETERS
        if train.deepspeed.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
    if stage > 0 and train.deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only multiplies it; our batches come from the shards
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

        # The shared-memory exchange would be compiled at first use, and needs a compiler; gloo serves as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        trainable = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0, fused=True)
        self.engine: Any = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )[0]
        if world_size == 1 and settings["zero_optimization"]["stage"] == 0:
            self.engine.enable_backward_allreduce = False  # spares two copies of all gradients
        self.module = module
        self.device: torch.device = self.engine.device
        # DeepSpeed divides by accumulation and workers; our losses are already shares of the whole step's mean.
        self._undo_mean = float(settings["gradient_accumulation_steps"] * world_size)

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward."""
        return self.engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this worker's share of the loss."""
        self.engine.backward(loss * self._undo_mean)

    def step(self, learning_rate: float) -> None:
        """Close a micro-batch; with the last one of a step, update the parameters."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()

    def state(self, *, with_moments: bool) -> EngineState:
        """Gather what is trained, parameter by parameter. Every worker calls it; rank 0 gets the result."""
        parameters: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        keep = torch.distributed.get_rank() == 0
        for name, parameter in self._trainable():
            value = self._full(parameter, None)
            if keep:
                parameters[name] = value.detach().float().cpu().clone()
            for moment in MOMENTS if with_moments else ():
                value = self._full(parameter, moment)
                if keep:
                    moments[f"{name}.{moment}"] = value.detach().float().cpu().clone()
        for name, statistic in self._batch_statistics():
            mean = statistic.clone()  # every worker has seen its own rows
            torch.distributed.all_reduce(mean)
            if keep:
                parameters[name] = (mean / torch.distributed.get_world_size()).cpu()
        return EngineState(parameters, moments)

    def place(self, values: dict[str, Tensor]) -> None:
        """Set trainable parameters, by name, to whole tensors that every worker passes."""
        for name, parameter in self._trainable():
            if name in values:
                self._set_full(parameter, None, values[name])
        for name, statistic in self._batch_statistics():
            if name in values:
                statistic.copy_(values[name])

    def load(self, state: EngineState, step: int) -> None:
        """Take over parameters and moments after one backward and step at learning rate 0 has made the optimizer's
        states; every worker passes the whole state."""
        self.place(state.parameters)
        for name, parameter in self._trainable():
            for moment in MOMENTS:
                self._set_full(parameter, moment, state.moments[f"{name}.{moment}"])
        for values in self._torch_optimizer().state.values():
            values["step"] = torch.tensor(float(step))

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    def _batch_statistics(self) -> Iterator[tuple[str, Tensor]]:
        """What batch normalisation learns besides its parameters, where it learns."""
        for name, module in self.module.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                for kind in ("running_mean", "running_var"):
                    yield f"{name}.{kind}", getattr(module, kind)

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        wrapper = self.engine.optimizer
        while not isinstance(wrapper, torch.optim.AdamW):
            wrapper = wrapper.optimizer
        return wrapper

    def _full(self, parameter: nn.Parameter, moment: str | None) -> Tensor:
        from deepspeed import utils

        if self._is_wrapped(parameter):
            value = (
                utils.safe_get_full_fp32_param(parameter)
                if moment is None
                else utils.safe_get_full_optimizer_state(parameter, moment)
            )
            assert value is not None
            return value
        return parameter if moment is None else self._torch_optimizer().state[parameter][moment]

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
            with whole(parameter), torch.no_grad():
                parameter.copy_(value)

    @staticmethod
    def _is_wrapped(parameter: nn.Parameter) -> bool:
        return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def whole(parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
    """The whole parameter where ZeRO-3 has partitioned it; rank 0's change is kept."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def zero3_loading(settings: dict[str, Any]) -> Any:
    """Hold the returned object while `from_pretrained` runs, or every worker loads the whole model under ZeRO-3."""
    if settings["zero_optimization"]["stage"] < 3:
        return None
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(settings)
