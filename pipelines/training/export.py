"""From a finished training run to files: the adapter in PEFT's format and the merged model, both as safetensors."""

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
    """Write `folder/model`, `folder/masks.safetensors` where the model was pruned, and, unless all parameters were
    trained (`full`), `folder/adapter`.

    Loads the base model, puts the trained parameters in, saves; needs memory for one copy of the model. Returns how
    many parameters were trained and, of a pruned model, its pruned layers' share of zeros before and after merging.
    """
    point = read_point(checkpoint)
    trained = point.parameters
    base = load_base(cfg.model, "fp32" if full else cfg.train.precision, task=cfg.task)
    masks = prune_base(cfg, base, point.norms)
    numbers = {"sparsity_before_merge": sparsity(base, masks)} if masks else {}
    module = (build_answer_training if full else build_alignment)(cfg, base, masks)
    wanted = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    statistics = {name for name, _ in module.named_buffers()}
    assert wanted <= set(trained) <= wanted | statistics, "the checkpoint is of another model"
    module.load_state_dict(trained, strict=False)
    model = module.model
    assert isinstance(model, (PeftModel, PreTrainedModel))
    if isinstance(model, PeftModel):
        _publish(model, Path(folder) / "adapter")
        merged = model.merge_and_unload(safe_merge=True)
    else:
        merged = model
    assert isinstance(merged, PreTrainedModel)
    keep_pruned_(cfg, merged, masks)
    if masks:
        save_file(masks, Path(folder) / "masks.safetensors")
        numbers["sparsity"] = sparsity(merged, masks)
    with torch.no_grad():
        _publish(merged, Path(folder) / "model", cfg)
    return {"trained_parameters": sum(trained[name].numel() for name in wanted), **numbers}


def _publish(
    model: PeftModel | PreTrainedModel, target: Path, cfg: UnlearnConfig | None = None
) -> None:
    """Save beside the target and rename, so that a half-written folder never has the final name."""
    with replacing(target) as partial:
        model.save_pretrained(str(partial))
        if cfg is None:
            (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        elif cfg.task == "image_classification":
            load_image_processor(cfg.model).save_pretrained(partial)
        else:
            load_tokenizer(cfg.model, ends=False).save_pretrained(partial)
