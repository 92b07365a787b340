"""The module that a worker trains: loaded, pruned and ready for DeepSpeed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import ray.train
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipelines.config.schema import TrainConfig
from pipelines.model.answers import build_answer_training, salient_weights
from pipelines.model.load import build_alignment, load_base
from pipelines.model.pruning import Masks, held_rows, input_norms, prune_base
from pipelines.training.job import Job
from pipelines.training.resume_point import read_norms
from pipelines.training.worker_rows import WorkerRows
from rfa.objective import ResidualAlignment


class Pruned(NamedTuple):
    """Pruning state of the base model.

    `norms` are Wanda's input norms. `kept_rows` gives the surviving outputs [O] of each weight
    that is pruned by whole outputs.
    """

    norms: Mapping[str, Tensor] | None
    kept_rows: dict[str, Tensor]


def build_module(job: Job, rows: WorkerRows) -> tuple[nn.Module, Pruned]:
    """Load and prune the base model, and put the job's objective on it."""
    cfg = job.cfg
    precision = "fp32" if job.kind == "finetune" else cfg.train.precision
    new_head = job.kind == "finetune" and cfg.task != "causal_lm"
    base = load_base(cfg.model, precision, task=cfg.task, new_head=new_head)
    # A restarted worker must prune as before, whatever its share of the rows is now.
    norms = read_norms(ray.train.get_checkpoint())
    if not norms:
        limit = -(-cfg.objective.target_rows // cfg.train.retain_batch_size)
        norms = input_norms(cfg, base, rows.retain_batches(limit), _device(cfg.train))
    masks = prune_base(cfg, base, norms)
    module: nn.Module
    if job.kind == "finetune":
        module = build_answer_training(cfg, base, _trainable_masks(job, rows, base, masks))
    else:
        module = build_alignment(cfg, base, masks)
    if cfg.train.activation_checkpointing:
        checkpoint_activations(module)
    return module, Pruned(norms, held_rows(base, masks))


def _trainable_masks(job: Job, rows: WorkerRows, base: PreTrainedModel, masks: Masks) -> Masks:
    """Return the weights that fine-tuning may change: unpruned and, for SalUn, salient ones."""
    share = job.cfg.finetune.salient
    if share is None:
        return masks
    batches = (rows.collate(part, []) for part in rows.once("forget"))
    trainable: Masks = {}
    salient = salient_weights(share, base, batches, _device(job.cfg.train))
    for name, mask in salient.items():
        trainable[name] = mask & masks.get(name, mask).to(mask.device)
    return trainable


def _device(train: TrainConfig) -> torch.device:
    return torch.device("cuda" if train.gpus_per_worker else "cpu")


def checkpoint_activations(module: nn.Module) -> None:
    """Let transformers recompute a block's activations in the backward pass."""
    model: Any = module.model
    base = model.get_base_model() if isinstance(module, ResidualAlignment) else model
    # The re-entrant form needs an input with a gradient, and a frozen embedding gives none.
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if isinstance(module, ResidualAlignment):
        module.train()  # it sets its blocks' flags by whether they recompute
