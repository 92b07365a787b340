"""Reduce a forward pass's logits to the few numbers per token that all metrics are computed from.

No other module of this package imports torch: the driver reads the table of metrics quickly.

Shapes: N labelled tokens of a batch, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.evaluation.metrics.likelihood import TokenStatistics

# Bounds the float32 copies: 256 rows of a 150k vocabulary are about 150 MB each.
ROWS_PER_CHUNK = 256
# exp of it is 0 in float32: it only keeps 0 * inf out of the moments.
LOWEST_LOG_PROBABILITY = -1e3


class TokenDistances(NamedTuple):
    """How two models differ at each labelled token; arrays of one length, on the host."""

    divergence: NDArray[np.float64]  # KL(reference || model) over the vocabulary, in nats
    surplus: NDArray[np.float64]  # log p(y_t) of the model minus that of the reference
    reference: NDArray[np.float64]  # log p(y_t) of the reference

    def split(self, lengths: Sequence[int]) -> list["TokenDistances"]:
        """Cut the distances of a flattened batch into one per row, of these numbers of tokens."""
        ends = np.cumsum(lengths)[:-1]
        columns = [np.split(values, ends) for values in self]
        return [TokenDistances(*arrays) for arrays in zip(*columns, strict=True)]


@torch.no_grad()
def token_distances(reference_NV: Tensor, logits_NV: Tensor, labels_N: Tensor) -> TokenDistances:
    """Return the distances of a model's next-token distributions from a reference's, in float32.

    Raises:
        ValueError: the models' vocabularies differ in size.
    """
    if reference_NV.shape != logits_NV.shape:
        sizes = f"{logits_NV.shape[-1]} entries, the reference's {reference_NV.shape[-1]}"
        raise ValueError(f"the model's vocabulary has {sizes}; both must have the same tokens")
    chunks: list[Tensor] = []
    for reference, logits, labels in zip(
        reference_NV.split(ROWS_PER_CHUNK),
        logits_NV.split(ROWS_PER_CHUNK),
        labels_N.split(ROWS_PER_CHUNK),
        strict=True,
    ):
        log_r_NV = reference.float().log_softmax(-1).clamp_(min=LOWEST_LOG_PROBABILITY)
        log_p_NV = logits.float().log_softmax(-1).clamp_(min=LOWEST_LOG_PROBABILITY)
        difference_NV = log_p_NV - log_r_NV
        divergence_N = -(log_r_NV.exp() * difference_NV).sum(-1)
        surplus_N = difference_NV.gather(-1, labels[:, None])[:, 0]
        reference_N = log_r_NV.gather(-1, labels[:, None])[:, 0]
        # A KL is not negative; what falls below 0 is rounding.
        chunks.append(torch.stack([divergence_N.clamp(min=0), surplus_N, reference_N]))
    return TokenDistances(*torch.cat(chunks, dim=1).cpu().numpy().astype(np.float64))


@torch.no_grad()
def token_statistics(logits_NV: Tensor, labels_N: Tensor) -> TokenStatistics:
    """Return log-probability, first choice and moments of labelled tokens, computed in float32.

    Row n of the logits predicts label n: the caller has shifted them and left out what is no label.
    """
    shapes = logits_NV.shape, labels_N.shape
    assert logits_NV.ndim == 2 and labels_N.shape == logits_NV.shape[:1], shapes
    chunks: list[Tensor] = []
    for logits, labels in zip(
        logits_NV.split(ROWS_PER_CHUNK), labels_N.split(ROWS_PER_CHUNK), strict=True
    ):
        log_p_NV = logits.float().log_softmax(dim=-1)
        label_log_N = log_p_NV.gather(-1, labels[:, None]).squeeze(-1)
        log_p_NV.clamp_(min=LOWEST_LOG_PROBABILITY)
        p_NV = log_p_NV.exp()
        mean_N = (p_NV * log_p_NV).sum(-1)
        # The centred sum equals E[log^2 p] - mu^2 without its cancellation, which is noise above
        # the 1e-6 floor of Min-K%++ when the vocabulary is large and the prediction nearly uniform.
        variance_N = log_p_NV.sub_(mean_N[:, None]).square_().mul_(p_NV).sum(-1)
        is_argmax_N = logits.argmax(-1) == labels
        # One tensor, so that the statistics leave the device in one copy.
        chunks.append(torch.stack([label_log_N, is_argmax_N.float(), mean_N, variance_N]))
    statistics_4N = torch.cat(chunks, dim=1).cpu().numpy().astype(np.float64)
    log_probability, is_argmax, mean, variance = statistics_4N
    return TokenStatistics(log_probability, is_argmax.astype(np.bool_), mean, variance)
