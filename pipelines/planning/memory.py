"""A worker's memory by purpose and ZeRO stage, and its arithmetic, before a run costs money.

Activations come from one step on torch's meta device. The rest is arithmetic over parameters: how
DeepSpeed partitions weights, gradients and optimizer states among workers.
"""

from collections.abc import Iterator, Mapping
from itertools import product

from peft import PeftModel

from pipelines.config.objective import WeightsConfig
from pipelines.config.schema import UnlearnConfig
from pipelines.model.engine import LIVE_PARAMETERS, PERSISTENT_PARAMETER, REDUCE_BUCKET
from pipelines.planning.plan import ASSUMED_ROWS, Layout, Parts
from pipelines.planning.step import Step, StepShape, run_meta_step, use_fused_attention
from pipelines.training.strength import TRIALS
from rfa.adapters import input_width, lora_layers, output_width
from rfa.solver import RETAINED_SETS
from rfa.token_solver import ROUNDS

FP32_BYTES = 4
ADAMW_BYTES = 2 * FP32_BYTES  # two fp32 moments a parameter
PRECISION_BYTES = {"fp32": FP32_BYTES, "bf16": 2}


class Planner:
    """Plan a run of a model that has its adapters and no weights.

    Args:
        cfg: the run's configuration.
        model: the model with LoRA on the meta device, in the precision of the run.
        workers: the number of workers that share the work.
    """

    def __init__(self, cfg: UnlearnConfig, model: PeftModel, workers: int) -> None:
        self.cfg = cfg
        self.model = model
        self.workers = workers
        use_fused_attention(model)
        self._parameter_bytes = PRECISION_BYTES[cfg.train.precision]
        self._frozen_sizes: list[int] = []
        self._adapter_size = 0
        for parameter in model.parameters():
            if parameter.requires_grad:
                self._adapter_size += parameter.numel()
            else:
                self._frozen_sizes.append(parameter.numel())
        # Layouts differ in few shapes, and a meta step of a large model takes seconds.
        self._steps: dict[StepShape, Step] = {}
        self._rounds: dict[bool, Step] = {}  # by whether activations are recomputed

    @property
    def weight_bytes(self) -> int:
        """Return the size of the frozen weights, unpartitioned."""
        return self._parameter_bytes * sum(self._frozen_sizes)

    @property
    def fault(self) -> str | None:
        """Return why a step that was planned comes from a formula, None where all were traced."""
        steps = [*self._steps.values(), *self._rounds.values()]
        return next((step.fault for step in steps if step.fault is not None), None)

    def parts(self, layout: Layout) -> Parts:
        """Return the peak memory of a worker's device in a layout."""
        weights = self.device_weight_bytes(layout)
        adapters = FP32_BYTES * self._adapter_size  # fp32 in any precision of the base model
        optimizer = 0
        solving = 0
        training = 0
        if self.cfg.solve.mode != "off":
            solving = self.solve_step().activations
        if self.cfg.solve.mode == "per_token":
            solving = max(solving, self.round_step(layout).activations)
        if self.cfg.train.steps:
            adapters += self.gradient_bytes(layout)
            optimizer = self.optimizer_bytes(layout)
            training = self.train_step(layout).activations
        statistics = self.statistics_bytes()
        total = weights + adapters + max(solving + statistics, training + optimizer)
        return Parts(weights, adapters, optimizer, max(solving, training), statistics, total)

    def device_weight_bytes(self, layout: Layout) -> int:
        """Return the frozen weights that one device holds at once."""
        if layout.stage < 3:
            return self.weight_bytes
        # ZeRO-3 partitions every large parameter, and gathers up to LIVE_PARAMETERS to compute.
        persistent = 0
        for size in self._frozen_sizes:
            if size <= PERSISTENT_PARAMETER:
                persistent += size
        partitioned = sum(self._frozen_sizes) - persistent
        size = persistent + min(LIVE_PARAMETERS, partitioned)
        if not layout.offload_parameters:
            size += -(-partitioned // self.workers)
        return self._parameter_bytes * size

    def gradient_bytes(self, layout: Layout) -> int:
        """Return the adapters' gradients and the copies that ZeRO adds to reduce them."""
        size = self._adapter_size
        if layout.stage == 0:
            return FP32_BYTES * size
        bucket = REDUCE_BUCKET
        if layout.stage == 1:
            bucket = min(REDUCE_BUCKET, size)
        gradients = FP32_BYTES * size
        if layout.stage >= 2:  # stage 1 leaves gradients unpartitioned
            gradients //= self.workers
        # DeepSpeed updates a partitioned fp32 copy of the parameters.
        copy = FP32_BYTES * size // self.workers
        return gradients + copy + FP32_BYTES * bucket

    def optimizer_bytes(self, layout: Layout) -> int:
        """Return AdamW's moments on the device, which ZeRO partitions from stage 1 on."""
        if layout.stage == 0:
            return ADAMW_BYTES * self._adapter_size
        if self.cfg.train.deepspeed.offload_optimizer:
            return 0
        return ADAMW_BYTES * self._adapter_size // self.workers

    def statistics_bytes(self) -> int:
        """Return the solver's sums on a worker while it collects them; 0 without a solver."""
        if self.cfg.solve.mode == "off":
            return 0
        entries = sum(width * columns for width, columns in self._moment_shapes())
        number = sum(getattr(self.cfg.data, name) is not None for name in RETAINED_SETS)
        return FP32_BYTES * number * entries

    def _moment_shapes(self) -> Iterator[tuple[int, int]]:
        """Yield rows and columns of each layer's second moments, a sketch for wide inputs."""
        solve = self.cfg.solve
        for _, layer in lora_layers(self.model):
            width = input_width(layer)
            if width <= solve.exact_width:
                yield width, width
            else:
                yield width, min(width, solve.sketch_columns)

    def train_step(self, layout: Layout) -> Step:
        """Return memory and arithmetic of one micro-batch, forward and backward."""
        train = self.cfg.train
        parts = self.workers * layout.accumulation
        forget = _largest_share(train.forget_batch_size, parts)
        # Each forget row has its refusal beside it.
        if self.cfg.objective.settings().reads_refusals:
            forget *= 2
        return self._step(
            StepShape(
                retain=_largest_share(train.retain_batch_size, parts),
                forget=forget,
                checkpointing=layout.checkpointing,
                backward=True,
            )
        )

    def solve_step(self) -> Step:
        """Return memory and arithmetic of one batch whose statistics the solver collects."""
        rows = _largest_share(self.cfg.train.retain_batch_size, self.workers)
        step = self._step(StepShape(rows, 0, checkpointing=False, backward=False))
        tokens = rows
        if self.cfg.task != "image_classification":
            tokens *= self.cfg.data.max_tokens
        # The meta step leaves out the moments: a multiplication and an addition an entry and token.
        entries = sum(width * columns for width, columns in self._moment_shapes())
        return step._replace(operations=step.operations + tokens * 2 * entries)

    def round_step(self, layout: Layout) -> Step:
        """Return memory and arithmetic of a batch of forget rows in a round of the token solver."""
        if layout.checkpointing not in self._rounds:
            # Any loss of the answers' logits takes what the solver's takes.
            weights = WeightsConfig(retain=0, forget=0, output=1)
            objective = self.cfg.objective.model_copy(update={"weights": weights})
            cfg = self.cfg.model_copy(update={"objective": objective})
            rows = _largest_share(self.cfg.train.forget_batch_size, self.workers)
            shape = StepShape(0, rows, checkpointing=layout.checkpointing, backward=True)
            step = run_meta_step(cfg, self.model, shape)
            # The gradients at all modules' outputs are held at once.
            widths = sum(output_width(layer) for _, layer in lora_layers(self.model))
            gradients = FP32_BYTES * rows * self.cfg.data.max_tokens * widths
            step = step._replace(activations=step.activations + gradients)
            self._rounds[layout.checkpointing] = step
        return self._rounds[layout.checkpointing]

    def _step(self, shape: StepShape) -> Step:
        if shape not in self._steps:
            self._steps[shape] = run_meta_step(self.cfg, self.model, shape)
        return self._steps[shape]

    def operations(self, layout: Layout, rows: Mapping[str, int | None]) -> float:
        """Return one worker's floating-point operations for the solver's passes and the steps.

        `rows` gives the rows of each set. None counts as `ASSUMED_ROWS`.
        """
        cfg = self.cfg
        counts: dict[str, int] = {}
        for name, number in rows.items():
            counts[name] = ASSUMED_ROWS if number is None else number
        total = 0.0
        if cfg.solve.mode != "off":
            # Of what was prepared only the forget rows' part is read, to be taken away.
            read = RETAINED_SETS if cfg.solve.prepared is None else ("forget", "earlier")
            passes = sum(counts.get(name, 0) for name in read)
            if cfg.solve.mode == "per_token":
                # A backward pass costs two forwards, and a round tries its factor twice or so.
                passes += counts.get("holdout", 0) + ROUNDS * 5 * counts.get("forget", 0)
            elif cfg.solve.strength == "auto":
                # A trial solves on the forget set, about two passes, and scores the holdout set.
                tried = counts.get("forget", 0) * 2 + counts.get("holdout", 0)
                passes += TRIALS * tried
            else:
                passes += counts["forget"]
            total += self.solve_step().operations * passes / cfg.train.retain_batch_size
        if cfg.train.steps:
            micro_batches = cfg.train.steps * layout.accumulation
            total += self.train_step(layout).operations * micro_batches
        return total

    def recommend(self, budget: int, stage: int) -> Layout | None:
        """Return the fastest layout of at most `budget` bytes, None where none fits.

        Layouts are tried from the configured one on, each costing more time than the one before:
        smaller micro-batches, recomputation, ZeRO-3, parameters in CPU memory.
        """
        train = self.cfg.train
        configured = Layout.of(self.cfg, stage)
        stages = [(stage, configured.offload_parameters)]
        if self.workers > 1:  # one worker has nobody to share weights with
            stages += [(3, False), (3, True)]
        checkpointings = [configured.checkpointing]
        accumulations = [configured.accumulation]
        if train.steps:
            if not configured.checkpointing:
                checkpointings.append(True)
            most = max(train.retain_batch_size, train.forget_batch_size) // self.workers
            while 2 * accumulations[-1] <= most:
                accumulations.append(2 * accumulations[-1])
        for (zero, offload), checkpointing, accumulation in product(
            stages, checkpointings, accumulations
        ):
            layout = Layout(zero, checkpointing, accumulation, offload)
            if self.parts(layout).total <= budget:
                return layout
        return None


def _largest_share(rows: int, parts: int) -> int:
    """Return the rows of the largest part; a worker without rows computes one blank row."""
    return max(1, -(-rows // parts))
