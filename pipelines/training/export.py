"""Write the model of a finished run: PEFT's adapter and the merged model, as safetensors."""

from pathlib import Path

import torch
from peft import PeftModel
from ray.train import Checkpoint
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pipelines.config.schema import UnlearnConfig
from pipelines.encoding.labelled import load_image_processor
from pipelines.encoding.text import load_tokenizer
from pipelines.model.answers import build_answer_training
from pipelines.model.load import build_alignment, load_base
from pipelines.model.pruning import keep_pruned_, prune_base
from pipelines.storage.atomic import replacing
from pipelines.training.resume_point import read_point
from rfa.pruning import sparsity


def write_model(
    cfg: UnlearnConfig, checkpoint: Checkpoint, folder: str, full: bool
) -> dict[str, float]:
    """Write `folder/model`, and `folder/adapter` unless all parameters were trained (`full`).

    A pruned model also gets `folder/masks.safetensors`. Loads the base model and needs memory for
    one copy of it.

    Returns:
        `trained_parameters` and, of a pruned model, `sparsity` and `sparsity_before_merge`: the
        share of zeros in its pruned layers.
    """
    point = read_point(checkpoint)
    trained = point.parameters
    base = load_base(cfg.model, "fp32" if full else cfg.train.precision, task=cfg.task)
    masks = prune_base(cfg, base, point.norms)
    cost: dict[str, float] = {}
    if masks:
        cost["sparsity_before_merge"] = sparsity(base, masks)
    build = build_answer_training if full else build_alignment
    module = build(cfg, base, masks)
    wanted = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    statistics = {name for name, _ in module.named_buffers()}
    assert wanted <= set(trained) <= wanted | statistics, "the checkpoint is of another model"
    module.load_state_dict(trained, strict=False)
    merged = module.model
    if isinstance(merged, PeftModel):
        _save_pretrained(merged, Path(folder) / "adapter")
        merged = merged.merge_and_unload(safe_merge=True)
    assert isinstance(merged, PreTrainedModel)
    # Merging fills pruned weights with the adapter's product.
    keep_pruned_(cfg, merged, masks)
    if masks:
        save_file(masks, Path(folder) / "masks.safetensors")
        cost["sparsity"] = sparsity(merged, masks)
    with torch.no_grad():
        _save_pretrained(merged, Path(folder) / "model", cfg)
    return {"trained_parameters": sum(trained[name].numel() for name in wanted), **cost}


def _save_pretrained(
    model: PeftModel | PreTrainedModel, target: Path, cfg: UnlearnConfig | None = None
) -> None:
    """Save a model, and with `cfg` its tokenizer or image processor, in one atomic rename."""
    with replacing(target) as partial:
        model.save_pretrained(str(partial))
        if cfg is None:
            (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        elif cfg.task == "image_classification":
            load_image_processor(cfg.model).save_pretrained(partial)
        else:
            load_tokenizer(cfg.model, ends=False).save_pretrained(partial)
