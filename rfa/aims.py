"""What each forget token should come down to, and what the original model said of it.

A mean over tokens can be met by two wrongs that cancel: names broken, facts left. So every token
has an aim of its own: the log-probability that tokens of its kind have where the row was never seen.
It is read off the original model and never-seen rows (the holdout set), without a retrained model.
A token's neighbours are the never-seen answer tokens that are predicted from the most similar
features.

Shapes: N forget tokens, M never-seen tokens, D features, J neighbours, V vocabulary, L likeliest.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 5
SHARPNESS = 10.0  # neighbours weigh softmax(SHARPNESS * cosine)
MARGIN = 0.7  # nats above its aim from which a token counts as learned from its row
LIKELIEST = 64  # tokens of the original's prediction that `Prediction` tells apart


def neighbour_aims(feature_ND: Tensor, unseen_MD: Tensor, unseen_log_p_M: Tensor) -> Tensor:
    """Return each token's aim [N]: its neighbours' mean log-probability, weighted by similarity.

    Args:
        feature_ND: the features from which the forget tokens are predicted, under the head.
        unseen_MD: the same of the never-seen answers' tokens.
        unseen_log_p_M: log-probability of each never-seen token.

    Raises:
        ValueError: there are no never-seen tokens.
    """
    if not len(unseen_MD):
        raise ValueError("solve: the holdout set has no answer tokens to read aims from")
    # Centred: all features share one large direction, which would make every cosine alike.
    mean_D = unseen_MD.mean(0)
    cosine_NM = F.normalize(feature_ND - mean_D, dim=-1) @ F.normalize(unseen_MD - mean_D, dim=-1).T
    nearest = cosine_NM.topk(min(NEIGHBOURS, len(unseen_MD)), dim=-1)
    weight_NJ = torch.softmax(SHARPNESS * nearest.values, dim=-1)
    return (weight_NJ * unseen_log_p_M[nearest.indices]).sum(-1)


class Prediction(NamedTuple):
    """A next-token distribution, coarsened: its likeliest tokens each, all others as one.

    It stands for the original model's prediction of a held token. Whole distributions of a large
    forget set would not fit any memory.
    """

    token_NL: Tensor
    log_p_NL: Tensor
    log_rest_N: Tensor

    @classmethod
    def of(cls, log_p_NV: Tensor) -> "Prediction":
        """Coarsen whole distributions."""
        likeliest = log_p_NV.topk(min(LIKELIEST, log_p_NV.shape[-1]), dim=-1)
        return cls(likeliest.indices, likeliest.values, _log_rest(likeliest.values))

    def divergence(self, log_p_NV: Tensor) -> Tensor:
        """Return KL(this || other) [N] of the coarsened distributions, a lower bound on the KL."""
        other_NL = log_p_NV.gather(-1, self.token_NL)
        of_likeliest_N = (self.log_p_NL.exp() * (self.log_p_NL - other_NL)).sum(-1)
        of_rest_N = self.log_rest_N.exp() * (self.log_rest_N - _log_rest(other_NL))
        return of_likeliest_N + of_rest_N


def _log_rest(log_p_NL: Tensor) -> Tensor:
    """Return the log-probability of all other tokens, at least that of rounding in float32."""
    return torch.log((1 - log_p_NL.exp().sum(-1)).clamp(min=1e-6))
