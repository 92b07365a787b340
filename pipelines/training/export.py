"""Write the model of a finished run: PEFT's adapter and the merged model, as safetensors."""

import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from ray.train import Checkpoint
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from pipelines.config.schema import UnlearnConfig
from pipelines.encoding.labelled import load_image_processor
from pipelines.encoding.text import load_tokenizer
from pipelines.model.answers import build_answer_training
from pipelines.model.folder import AUTO_CLASSES
from pipelines.model.load import build_alignment, image_shape, load_base
from pipelines.model.pruning import keep_pruned_, prune_base
from pipelines.storage.atomic import replacing
from pipelines.training.resume_point import ResumePoint, read_point
from rfa.adapters import scale_adapters_
from rfa.pruning import sparsity

PROBE_TOKENS = 16
# The exported model's logits may differ by this share of the largest: merging rounds its weights.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}


def write_model(
    cfg: UnlearnConfig, checkpoint: Checkpoint, folder: str, full: bool
) -> dict[str, float]:
    """Write `folder/model`, and `folder/adapter` unless all parameters were trained (`full`).

    A pruned model also gets `folder/masks.safetensors`. Loads the base model and needs memory for
    one copy of it. Then the written model is loaded as a stranger would load it and compared with
    the adapter on its base.

    Returns:
        `trained_parameters` and, of a pruned model, `sparsity` and `sparsity_before_merge`: the
        share of zeros in its pruned layers.

    Raises:
        RuntimeError: the written model computes something else. `folder/model` is not there then.
    """
    with replacing(Path(folder) / "model") as partial:
        cost, expected = _write_merged(cfg, read_point(checkpoint), Path(folder), partial, full)
        # The model that was merged is gone: there is one copy at a time.
        stranger = AUTO_CLASSES[cfg.task].from_pretrained(
            partial, trust_remote_code=cfg.model.trust_remote_code
        )
        check_same(_probe(cfg, stranger), expected, "fp32" if full else cfg.train.precision)
    return cost


def _write_merged(
    cfg: UnlearnConfig, point: ResumePoint, folder: Path, target: Path, full: bool
) -> tuple[dict[str, float], Tensor]:
    """Write the adapter and, to `target`, the merged model. Returns its cost, and some logits."""
    trained = point.parameters
    precision = "fp32" if full else cfg.train.precision
    new_head = full and cfg.task != "causal_lm"
    base = load_base(cfg.model, precision, task=cfg.task, new_head=new_head)
    masks = prune_base(cfg, base, point.norms)
    cost: dict[str, float] = {}
    if masks:
        cost["sparsity_before_merge"] = sparsity(base, masks)
    build = build_answer_training if full else build_alignment
    module = build(cfg, base, masks)
    wanted = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    statistics = {name for name, _ in module.named_buffers()}
    assert wanted <= set(trained) <= wanted | statistics, "the checkpoint is of another model"
    # A resume point has no frozen weights. The assertion checks the others' names.
    module.load_state_dict(trained, strict=False)
    cost["trained_parameters"] = sum(trained[name].numel() for name in wanted)
    merged = module.model
    if isinstance(merged, PeftModel):
        scale_adapters_(merged, cfg.objective.settings().adapter_scale)
    expected = _probe(cfg, merged)
    if isinstance(merged, PeftModel):
        with replacing(folder / "adapter") as adapter:
            merged.save_pretrained(str(adapter))
            (adapter / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        # A safe merge raises where a merged weight is not finite, before anything is written.
        merged = merged.merge_and_unload(safe_merge=True)
    assert isinstance(merged, PreTrainedModel)
    if masks:
        # Merging fills pruned weights with the adapter's product.
        keep_pruned_(cfg, merged, masks)
        expected = _probe(cfg, merged)
        save_file(masks, folder / "masks.safetensors")
        cost["sparsity"] = sparsity(merged, masks)
    merged.save_pretrained(str(target))
    if cfg.task == "image_classification":
        load_image_processor(cfg.model).save_pretrained(target)
    else:
        load_tokenizer(cfg.model, ends=False).save_pretrained(target)
    return cost, expected


@torch.no_grad()
def _probe(cfg: UnlearnConfig, model: PeftModel | PreTrainedModel) -> Tensor:
    """Return a model's logits of an input that is always the same, [1, ..., V]."""
    model.eval()
    config: Any = model.config
    if cfg.task == "image_classification":
        shape = image_shape(config)
        pixels = torch.linspace(-1, 1, math.prod(shape)).view(1, *shape)
        inputs = {"pixel_values": pixels.to(model.dtype)}
    else:
        tokens = torch.arange(PROBE_TOKENS) % config.get_text_config().vocab_size
        inputs = {"input_ids": tokens[None]}
    return model(**inputs).logits.float()


def check_same(logits: Tensor, expected: Tensor, precision: str) -> None:
    """Require that an exported model computes what the adapter on its base does.

    Raises:
        RuntimeError: it does not. The text has the difference.
    """
    difference = float((logits - expected).abs().max())
    largest = float(expected.abs().max())
    # Not `>`, which a NaN would pass.
    if not difference <= TOLERANCE[precision] * largest:
        raise RuntimeError(
            f"the exported model is not the one that was trained: its logits differ by "
            f"{difference:.3g}, and are {largest:.3g} at most; nothing was exported"
        )
