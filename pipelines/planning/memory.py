"""What a run will need, before money is spent: memory of a worker by part and ZeRO stage, and time.

Nothing is loaded. One step runs on torch's meta device, where tensors have shapes and no content; a tally of what is
alive gives the activations' peak, and torch's counter the arithmetic. What DeepSpeed adds is reckoned from how it lays
its parts out. Every token counts as an answer's, and every row is as long as `data.max_tokens`: the plan is the most
that a step can take.

Shapes: B rows, T tokens, S places, D features, V vocabulary or classes.
"""

import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface

from pipelines.config.schema import UnlearnConfig
from pipelines.model.engine import LIVE_PARAMETERS, PERSISTENT_PARAMETER, REDUCE_BUCKET
from pipelines.model.load import image_shape
from pipelines.training.strength import TRIALS
from rfa.adapters import lora_layers
from rfa.batch import Row, UnlearnBatch, collate
from rfa.blocks import BlockRunner
from rfa.objective import ResidualAlignment
from rfa.solver import RETAINED_SETS, input_width
from rfa.targets import ModuleTarget, Targets

ADAMW_BYTES = 8  # two fp32 moments a parameter
PRECISION_BYTES = {"fp32": 4, "bf16": 2}


class Parts(NamedTuple):
    """Bytes that a worker's device holds at most, by what for, and in all: statistics and the optimizer's states are
    not there together, the solver is done when training begins."""

    weights: int
    adapters: int
    optimizer: int
    activations: int
    statistics: int
    total: int


class Step(NamedTuple):
    """A worker's micro-batch: bytes of what is alive at its peak, beyond the model, and floating-point operations."""

    activations: int
    operations: float


class Layout(NamedTuple):
    """How a worker does its work; what the configuration says, or what may be recommended instead."""

    stage: int
    checkpointing: bool
    accumulation: int
    offload_parameters: bool

    @classmethod
    def of(cls, cfg: UnlearnConfig, stage: int) -> "Layout":
        """As configured, in a ZeRO stage."""
        train = cfg.train
        return cls(
            stage,
            train.activation_checkpointing,
            train.accumulation,
            train.deepspeed.offload_parameters,
        )

    def changes(self, cfg: UnlearnConfig, auto_stage: int) -> list[str]:
        """What must be written on the command line to have it."""
        own = Layout.of(cfg, auto_stage)
        keys = (
            "deepspeed.stage",
            "activation_checkpointing",
            "accumulation",
            "deepspeed.offload_parameters",
        )
        pairs = zip(keys, self, own, strict=True)
        return [
            f"train.{key}={json.dumps(wanted)}"
            for key, wanted, present in pairs
            if wanted != present
        ]


class Planner:
    """Plans a run of a model that has its adapters and no content.

    Args:
        cfg: the run's configuration.
        model: the model with LoRA on the meta device, in the precision of the run.
        workers: how many share the work.
    """

    def __init__(self, cfg: UnlearnConfig, model: PeftModel, workers: int) -> None:
        self.cfg, self.model, self.workers = cfg, model, workers
        base: Any = model.get_base_model()
        base.set_attn_implementation("planned")
        self._each = PRECISION_BYTES[cfg.train.precision]
        self._sizes = [
            parameter.numel() for parameter in model.parameters() if not parameter.requires_grad
        ]
        self._adapter = sum(
            parameter.numel() for parameter in model.parameters() if parameter.requires_grad
        )
        self._steps: dict[tuple[Any, ...], Step] = {}

    def parts(self, layout: Layout) -> Parts:
        """Memory of a worker's device."""
        weights, adapters, optimizer = self._weights(layout), 4 * self._adapter, 0
        if self.cfg.train.steps:
            shared = 1 if layout.stage == 0 else self.workers
            optimizer = ADAMW_BYTES * self._adapter // shared
            adapters += 4 * self._adapter // (self.workers if layout.stage >= 2 else 1)  # gradients
            if layout.stage:
                bucket = min(REDUCE_BUCKET, self._adapter) if layout.stage == 1 else REDUCE_BUCKET
                adapters += (
                    4 * self._adapter // self.workers + 4 * bucket
                )  # DeepSpeed's own copy; a bucket of gradients
            if self.cfg.train.deepspeed.offload_optimizer and layout.stage:
                optimizer = 0
        solving = self.solve_step().activations if self.cfg.solve.mode != "off" else 0
        training = self.train_step(layout).activations if self.cfg.train.steps else 0
        total = weights + adapters + max(solving + self.statistics(), training + optimizer)
        return Parts(weights, adapters, optimizer, max(solving, training), self.statistics(), total)

    def _weights(self, layout: Layout) -> int:
        if layout.stage < 3:
            return self._each * sum(self._sizes)
        kept = sum(size for size in self._sizes if size <= PERSISTENT_PARAMETER)
        shared = sum(self._sizes) - kept
        gathered = min(LIVE_PARAMETERS, shared)
        return self._each * (
            kept + gathered + (0 if layout.offload_parameters else -(-shared // self.workers))
        )

    def statistics(self) -> int:
        """Bytes of the solver's sums on a worker, while it collects them."""
        if self.cfg.solve.mode == "off":
            return 0
        return 4 * len(RETAINED_SETS) * sum(width * columns for width, columns in self._widths())

    def _widths(self) -> Iterator[tuple[int, int]]:
        solve = self.cfg.solve
        for _, layer in lora_layers(self.model):
            width = input_width(layer)
            yield width, width if width <= solve.exact_width else min(width, solve.sketch_columns)

    def train_step(self, layout: Layout) -> Step:
        """One micro-batch forward and backward."""
        train = self.cfg.train
        retain, forget = (
            max(1, -(-rows // (self.workers * layout.accumulation)))
            for rows in (train.retain_batch_size, train.forget_batch_size)
        )
        return self._step(retain, forget, layout.checkpointing, backward=True)

    def solve_step(self) -> Step:
        """One batch of the rows whose statistics are collected."""
        rows = max(1, -(-self.cfg.train.retain_batch_size // self.workers))
        step = self._step(rows, 0, checkpointing=False, backward=False)
        tokens = rows * self._tokens()
        return step._replace(
            operations=step.operations
            + tokens * sum(2 * w * columns for w, columns in self._widths())
        )

    def _tokens(self) -> int:
        return 1 if self.cfg.task == "image_classification" else self.cfg.data.max_tokens

    def _step(self, retain: int, forget: int, checkpointing: bool, *, backward: bool) -> Step:
        key = (retain, forget, checkpointing, backward)
        if key not in self._steps:
            batch = _blank_batch(self.cfg, self.model.config, retain, forget)
            alignment = ResidualAlignment(self.model, self.cfg.objective.settings())
            alignment.targets = _blank_targets(alignment, batch)
            tally, counter = Tally(self.model), FlopCounterMode(display=False)
            for watch in (
                tally,
                counter,
            ):  # one after the other: torch's counter keeps tensors alive
                with _recomputing(self.model, checkpointing), watch:
                    if backward:
                        alignment(batch).total.backward()
                    else:
                        alignment.feature_sums(batch, sample_tokens=0)
            alignment.hooks.close()
            self.model.zero_grad(set_to_none=True)
            self._steps[key] = Step(tally.peak, float(counter.get_total_flops()))
        return self._steps[key]

    @property
    def weight_bytes(self) -> int:
        """The frozen model's, whole."""
        return self._each * sum(self._sizes)

    def operations(self, layout: Layout, rows: Mapping[str, int | None]) -> float:
        """Of one worker, in all: the solver's passes and the steps. `rows` of each set; None counts as 1,000."""
        cfg, counts = (
            self.cfg,
            {name: 1000 if number is None else number for name, number in rows.items()},
        )
        total = 0.0
        if cfg.solve.mode != "off":
            one, batch = self.solve_step().operations, cfg.train.retain_batch_size
            searched = cfg.solve.strength == "auto"
            kept = counts.get("retain", 0) + counts.get("utility", 0)
            tried = (
                (counts.get("forget", 0) * 2 + counts.get("holdout", 0)) * TRIALS
                if searched
                else counts["forget"]
            )
            total += one * (kept + tried) / batch
        return total + cfg.train.steps * layout.accumulation * (
            self.train_step(layout).operations if cfg.train.steps else 0.0
        )

    def recommend(self, budget: int, stage: int) -> Layout | None:
        """The fastest layout that fits in so many bytes, from what is configured on: a higher ZeRO stage,
        recomputation, smaller micro-batches, parameters in CPU memory. None where nothing fits."""
        own = Layout.of(self.cfg, stage)
        most = (
            max(self.cfg.train.retain_batch_size, self.cfg.train.forget_batch_size) // self.workers
        )
        stages = [(stage, own.offload_parameters)]
        if self.workers > 1:
            stages += [(3, False), (3, True)]
        for chosen, offload in stages:
            for checkpointing in dict.fromkeys(
                [own.checkpointing, True] if self.cfg.train.steps else [own.checkpointing]
            ):
                accumulation = own.accumulation
                while True:
                    layout = Layout(chosen, checkpointing, accumulation, offload)
                    if self.parts(layout).total <= budget:
                        return layout
                    if 2 * accumulation > most or not self.cfg.train.steps:
                        break
                    accumulation *= 2
        return None


class Tally(TorchDispatchMode):
    """Counts the bytes of tensors that come to be within, while they are alive; `peak` is the most at once.

    A model's own parameters do not count. Gradients of its adapters do not either: they have a line of their own.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: Any = weakref.WeakSet()
        for tensor in (*model.parameters(), *model.buffers()):
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    self._seen.add(storage)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._gone, storage.nbytes())
        return result

    def _gone(self, size: int) -> None:
        self.live -= size


def _fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    **_settings: Any,
) -> tuple[Tensor, None]:
    """Attention in one kernel, as on the devices that train; the meta device would write its scores out."""
    if query.shape[1] != key.shape[1]:
        key, value = (
            own.repeat_interleave(query.shape[1] // own.shape[1], 1) for own in (key, value)
        )
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value)[0].transpose(1, 2), None


AttentionInterface.register("planned", _fused_attention)


class _Blank(UnlearnBatch):
    """A batch whose masks and labels are real, on the CPU, and whose inputs have no content, on the meta device.

    Tensors are selected by mask, which needs the masks' content.
    """

    def model_inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Return the inputs of a padded batch's forward, with a mask that no library looks into."""
        if self.pixels_BCHW is not None:
            return super().model_inputs(dtype)
        rows, tokens = self.input_ids_BT.shape
        mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device="meta")
        inputs = {"input_ids": self.input_ids_BT.to("meta"), "attention_mask": mask}
        return inputs if self.classified else {**inputs, "use_cache": False}


def _blank_batch(cfg: UnlearnConfig, model_config: Any, retain: int, forget: int) -> _Blank:
    """Return rows of `data.max_tokens` whose tokens all belong to the answer, or images."""
    image = cfg.task == "image_classification"
    row = Row(
        [0] * (1 if image else cfg.data.max_tokens),
        answer_start=1,
        classified=cfg.task != "causal_lm",
        pixels_CHW=torch.empty(image_shape(model_config), device="meta") if image else None,
    )
    return _Blank(*collate([row] * retain, [row] * forget, pad_token_id=0))


def _blank_targets(alignment: ResidualAlignment, batch: UnlearnBatch) -> Targets:
    """Return targets without content, of as many centres as the objective's own may have."""
    objective = alignment.objective
    centres = {"class_mean": 2, "cluster_mean": objective.clusters}.get(objective.target, 1)
    with torch.no_grad(), alignment.hooks.recording() as features:
        alignment.run(batch, None, 0, alignment.hooks.last_block + 1)
    targets: dict[str, ModuleTarget] = {}
    for name, feature_BSD in features.items():
        centre_KD = feature_BSD.new_empty(centres, feature_BSD.shape[-1])
        targets[name] = ModuleTarget(1.0, centre_KD, torch.arange(centres) + 1, centre_KD[0])
    return Targets(objective.target, targets, seed=0)


@contextmanager
def _recomputing(model: PeftModel, wanted: bool) -> Iterator[None]:
    """Activation checkpointing, within the block only."""
    base: Any = model.get_base_model()
    model.eval()
    with ExitStack() as stack:
        if wanted:
            settings = {"use_reentrant": False, "preserve_rng_state": False}
            base.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
            for block in BlockRunner(base).blocks:
                block.training = True  # this flag alone: checkpointing asks for it
            stack.callback(base.activation_checkpointing_disable)
            stack.callback(model.eval)
        yield
