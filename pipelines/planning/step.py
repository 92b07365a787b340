"""One training step on torch's meta device: its memory and arithmetic without weights or data.

Tensors on the meta device have shapes and no content. A tally of the tensors that are alive gives
the activations' peak, and torch's counter the floating-point operations. Every token counts as an
answer's and every row has `data.max_tokens`, so the result bounds a real step from above. Where the
rows are known, `check` puts the longest one's tokens there.

Shapes: B rows, T tokens, S positions, D features, K centres.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface

from pipelines.config.schema import UnlearnConfig
from pipelines.model.blank import blank_mask
from pipelines.model.load import image_shape
from pipelines.planning.estimate import estimate
from rfa.batch import Row, UnlearnBatch, collate
from rfa.blocks import BlockRunner
from rfa.objective import ResidualAlignment
from rfa.targets import ModuleTarget, Targets


class Step(NamedTuple):
    """A worker's micro-batch: peak bytes beyond the model, and floating-point operations.

    `fault` says why they were not traced but come from a formula.
    """

    activations: int
    operations: float
    fault: str | None = None


class StepShape(NamedTuple):
    """The rows of a micro-batch; `backward` is false for the solver, which needs features alone."""

    retain: int
    forget: int
    checkpointing: bool
    backward: bool


def run_meta_step(cfg: UnlearnConfig, model: PeftModel, shape: StepShape) -> Step:
    """Run the real objective on a model without weights and return its memory and arithmetic.

    A model that cannot run so gets both by a formula.
    """
    fault = None
    for form in BATCH_FORMS:
        try:
            return _trace(cfg, model, form(*_meta_batch(cfg, model.config, shape)), shape)
        # Any code of any model runs here, and a plan is not worth a run that would succeed.
        except Exception as error:
            fault = fault or f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return Step(*estimate(cfg, model, shape), fault)


def _trace(cfg: UnlearnConfig, model: PeftModel, batch: "MetaBatch", shape: StepShape) -> Step:
    alignment = ResidualAlignment(model, cfg.objective.settings())
    tally = Tally(model)
    try:
        alignment.targets = _meta_targets(alignment, batch)
        with _activation_checkpointing(model, shape.checkpointing), tally:
            if shape.backward:
                alignment(batch).total.backward()
            else:
                alignment.feature_sums(batch, sample_tokens=0)
    finally:
        alignment.hooks.close()
        model.zero_grad(set_to_none=True)
    return Step(tally.peak, float(tally.operations))


class Tally(TorchDispatchMode):
    """Count the bytes of tensors created inside the context while they are alive, and arithmetic.

    `peak` is the maximum of the bytes. The model's own parameters and its adapters' gradients do
    not count, because a plan lists them separately. `operations` are floating-point operations by
    torch's formulas; torch's own counter would hold tensors alive.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = self.operations = 0
        self._seen: Any = weakref.WeakSet()
        for tensor in (*model.parameters(), *model.buffers()):
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()  # views share one: it counts once
            if storage not in self._seen:
                self._seen.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, change: int) -> None:
        self.live += change
        self.peak = max(self.peak, self.live)


def use_fused_attention(model: PeftModel) -> None:
    """Let a model on the meta device compute attention in one kernel, as real devices do.

    Without this the meta device would allocate the attention scores, which grow with T squared.
    """
    AttentionInterface.register("planned", fused_attention)
    base: Any = model.get_base_model()
    base.set_attn_implementation("planned")


def fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    **_settings: Any,
) -> tuple[Tensor, None]:
    """Compute attention by the one flash kernel of torch that also has a meta implementation."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # grouped queries: this kernel wants a key and a value for each head
        key = key.repeat_interleave(groups, 1)
        value = value.repeat_interleave(groups, 1)
    width = value.shape[-1]
    if width < key.shape[-1]:  # and values as wide as keys, which DeepSeek's are not
        value = nn.functional.pad(value, (0, key.shape[-1] - width))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value)[0][..., :width].transpose(1, 2), None


class MetaBatch(UnlearnBatch):
    """A batch with real masks and labels on the CPU and inputs without content.

    The objective selects tensors by mask, which needs the masks' content. `form` is that of the
    model's own mask, one of `MASK_FORMS`.
    """

    form: ClassVar[int] = 4

    def model_inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Return a padded batch's forward inputs on the meta device."""
        if self.pixels_BCHW is not None:
            return super().model_inputs(dtype)
        rows, tokens = self.input_ids_BT.shape
        mask = blank_mask(rows, tokens, self.form)
        inputs: dict[str, Any] = {"input_ids": self.input_ids_BT.to("meta"), **mask}
        if not self.classified:
            inputs["use_cache"] = False
        return inputs


class FlatMaskBatch(MetaBatch):
    """A batch whose model gets a mask of two dimensions."""

    form = 2


class MasklessBatch(MetaBatch):
    """A batch whose model gets no mask."""

    form = 0


BATCH_FORMS = (MetaBatch, FlatMaskBatch, MasklessBatch)


def _meta_batch(cfg: UnlearnConfig, model_config: Any, shape: StepShape) -> UnlearnBatch:
    tokens = cfg.data.max_tokens
    pixels_CHW = None
    if cfg.task == "image_classification":
        tokens = 1
        pixels_CHW = torch.empty(image_shape(model_config), device="meta")
    row = Row(
        [0] * tokens, answer_start=1, classified=cfg.task != "causal_lm", pixels_CHW=pixels_CHW
    )
    return collate([row] * shape.retain, [row] * shape.forget, pad_token_id=0)


def _meta_targets(alignment: ResidualAlignment, batch: UnlearnBatch) -> Targets:
    """Return targets without content, with as many centres as the objective's own can have."""
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
def _activation_checkpointing(model: PeftModel, enabled: bool) -> Iterator[None]:
    base: Any = model.get_base_model()
    model.eval()
    if not enabled:
        yield
        return
    settings = {"use_reentrant": False, "preserve_rng_state": False}
    base.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    # transformers' blocks recompute only where this flag is set. Their children stay in evaluation
    # mode, as the objective trains them: without dropout.
    for block in BlockRunner(base).blocks:
        block.training = True
    try:
        yield
    finally:
        base.activation_checkpointing_disable()
        model.eval()
