"""Attacks on what a model has forgotten: rounding its weights, relearning, and gradient norms.

Rounding can undo unlearning whose changes are smaller than its steps (Zhang et al. 2024, arXiv
2410.16454).

Shapes: O outputs, I inputs, G groups of inputs.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipelines.data.rows import content_hash
from pipelines.evaluation.metrics.keys import Rounding
from pipelines.evaluation.metrics.relearning import STEPS, Relearning
from pipelines.model.answers import AnswerTraining
from rfa.adapters import attach_everywhere, fused_weights
from rfa.batch import Row, collate
from rfa.blocks import find_blocks

GROUP = 32  # inputs that share a step, as in group-wise int4
# NF4 (Dettmers et al. 2023, arXiv 2305.14314, appendix E): quantiles of a normal distribution, with
# 0 among them, as shares of the largest absolute value of 64 neighbouring weights.
NF4_GROUP = 64
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
RELEARN_ROWS = 8  # in one step, at most


@torch.no_grad()
def quantise_(weight_OI: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """Round each value to the nearest multiple of its group's step.

    A group is `group` neighbouring inputs of one output. Its step is its largest absolute value /
    (2^(bits-1) - 1), so that there are as many multiples on both sides of 0.

    Returns:
        The steps, of shape (O, G) in float32; 0 for a group of zeros.
    """
    assert weight_OI.ndim == 2 and bits >= 2, (weight_OI.shape, bits)
    outputs, inputs = weight_OI.shape
    # Zeros change no group's largest value.
    padded_OI = nn.functional.pad(weight_OI.float(), (0, -inputs % group))
    grouped_OGI = padded_OI.view(outputs, -1, group)
    step_OG = grouped_OGI.abs().amax(-1) / (2 ** (bits - 1) - 1)
    divisor_OG = torch.where(step_OG > 0, step_OG, torch.ones_like(step_OG))
    rounded_OGI = (grouped_OGI / divisor_OG[..., None]).round() * step_OG[..., None]
    weight_OI.copy_(rounded_OGI.view(outputs, -1)[:, :inputs])
    return step_OG


@torch.no_grad()
def round_to_nf4_(weight_OI: Tensor) -> None:
    """Round each value to the nearest of NF4_VALUES times its group's largest absolute value.

    As bitsandbytes stores a model that is loaded in 4 bits, without its second rounding: that of
    the groups' largest values.
    """
    outputs, inputs = weight_OI.shape
    padded_OI = nn.functional.pad(weight_OI.float(), (0, -inputs % NF4_GROUP))
    grouped_OGI = padded_OI.view(outputs, -1, NF4_GROUP)
    largest_OG1 = grouped_OGI.abs().amax(-1, keepdim=True)
    share_OGI = grouped_OGI / largest_OG1.clamp_min(torch.finfo(torch.float32).tiny)
    values_V = torch.tensor(NF4_VALUES, device=weight_OI.device)
    # A value is nearest to the one between whose bounds it lies.
    bounds = (values_V[1:] + values_V[:-1]) / 2
    rounded_OGI = values_V[torch.bucketize(share_OGI, bounds)] * largest_OG1
    weight_OI.copy_(rounded_OGI.view(outputs, -1)[:, :inputs])


def quantise_blocks_(model: nn.Module, rounding: Rounding) -> list[str]:
    """Round the weights of all linear layers and experts in the blocks; embeddings, norms, head stay.

    Returns:
        The names of the rounded layers, and of the experts' fused weights.
    """
    prefix, blocks = find_blocks(model)
    round_ = round_to_nf4_ if rounding.is_normal else partial(quantise_, bits=rounding.bits)
    names: list[str] = []
    for name, module in blocks.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            weight_OI = module.weight
            if isinstance(module, Conv1D):  # GPT-2's layers hold (I, O)
                weight_OI = weight_OI.T
            round_(weight_OI)
            names.append(f"{prefix}.{name}")
    for name, weight in fused_weights(blocks).items():
        owner: Any = blocks.get_submodule(name.rpartition(".")[0])
        transposed = getattr(owner, "is_transposed", False)  # as gpt-oss's: (experts, I, O)
        for index in range(len(weight)):  # views of an iteration may not be changed in place
            round_(weight[index].T if transposed else weight[index])
        names.append(f"{prefix}.{name}")
    assert names, "an adapted model has linear layers in its blocks"
    return names


def gradient_norm(model: nn.Module, loss: Tensor) -> float:
    """Return the norm of a loss's gradient by each parameter, mean over the parameters.

    Text that a model has learned needs no large step (Wang et al. 2024, arXiv 2402.17012; with the
    mean as in open-unlearning). A gradient is dropped once its norm is known, so that there are
    never all of them.
    """
    norms: list[Tensor] = []

    def measure(parameter: Tensor) -> None:
        assert parameter.grad is not None
        norms.append(parameter.grad.float().norm())
        parameter.grad = None

    hooks = [weight.register_post_accumulate_grad_hook(measure) for weight in model.parameters()]
    try:
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return float(torch.stack([norm.cpu() for norm in norms]).mean())


def learned_and_held_out(
    rows: Sequence[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows to fine-tune on, and the forget rows to score.

    These are the rows of another set and all forget rows, or every second forget row by number and
    the others. A row with the same words as one to learn is in neither.
    """
    ordered = sorted(rows, key=lambda row: row["row"])
    learned = [row for row in ordered if row["set"] != "forget"]
    held_out_rows = [row for row in ordered if row["set"] == "forget"]
    if not learned:
        learned, held_out_rows = held_out_rows[::2], held_out_rows[1::2]
    hashes = {content_hash(row["prompt"], row["answer"]) for row in learned}
    held_out: list[dict[str, Any]] = []
    for row in held_out_rows:
        if content_hash(row["prompt"], row["answer"]) not in hashes:
            held_out.append(row)
    return learned, held_out


def relearn_(
    model: PreTrainedModel,
    rows: Sequence[Row],
    pad_token_id: int,
    seed: int,
    by: Relearning,
    on_step: Callable[[int], None] = lambda _: None,
) -> Iterator[int]:
    """Fine-tune on the rows' answers in place; yield each of STEPS when it is reached.

    `on_step` is called with 1 after every step.
    """
    if by.rank is not None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # of A, which is drawn
            attach_everywhere(model, by.rank)
    training = AnswerTraining(model, classifies=False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=by.learning_rate, weight_decay=0.0)
    batches = _batches(len(rows), seed)
    # The first of STEPS is 0: the model before any step.
    yield STEPS[0]
    for step in range(1, STEPS[-1] + 1):
        batch = collate([rows[index] for index in next(batches)], [], pad_token_id)
        batch = batch.to(model.device)
        training(batch, batch.counts("all")).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        on_step(1)
        if step in STEPS:
            yield step


def _batches(count: int, seed: int) -> Iterator[list[int]]:
    """Yield the indices of batch after batch, for ever, each pass in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        # Parts of nearly one size, where full batches could leave a last one of a single row.
        for indices in order.tensor_split(-(-count // RELEARN_ROWS)):
            yield indices.tolist()
