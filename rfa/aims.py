"""What each forget token should come down to, and what the original model said of it.

A mean over tokens can be met by two wrongs that cancel: names broken, facts left. So every token
has an aim of its own: the log-probability that tokens of its kind have where the row was never seen.
It is read off the original model and never-seen rows (the holdout set), without a retrained model.
A token's neighbours are the never-seen answer tokens that are predicted from the most similar
features. Their mean prediction also says what should rise in the label's place.

Shapes: N forget tokens, M never-seen tokens, D features, J neighbours, V vocabulary, L likeliest.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 5
SHARPNESS = 10.0  # neighbours weigh softmax(SHARPNESS * cosine)
MARGIN = 0.7  # nats above its aim from which a token counts as learned from its row
LIKELIEST = 64  # tokens that a `Prediction` tells apart
SMALLEST = 1e-9  # a probability of less is rounding


class Prediction(NamedTuple):
    """A next-token distribution, coarsened: its likeliest tokens each, all others as one.

    It stands for the original model's prediction of a held token, or for what neighbours predict.
    Whole distributions of a large forget set would not fit any memory.
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


class Unseen(NamedTuple):
    """Answer tokens of never-seen rows, as the original model predicts them.

    `feature_MD` are the features under the head, `log_p_M` their labels' log-probabilities, and
    `prediction` the whole distributions, coarsened.
    """

    feature_MD: Tensor
    log_p_M: Tensor
    prediction: Prediction


class Neighbours(NamedTuple):
    """Each forget token's nearest never-seen tokens: their indices and weights, which add up to 1."""

    index_NJ: Tensor
    weight_NJ: Tensor

    @classmethod
    def of(cls, feature_ND: Tensor, unseen_MD: Tensor) -> "Neighbours":
        """Find the nearest tokens by the cosine of centred features.

        Raises:
            ValueError: there are no never-seen tokens.
        """
        if not len(unseen_MD):
            raise ValueError("solve: the holdout set has no answer tokens to read aims from")
        # Centred: all features share one large direction, which would make every cosine alike.
        mean_D = unseen_MD.mean(0)
        feature_ND = F.normalize(feature_ND - mean_D, dim=-1)
        cosine_NM = feature_ND @ F.normalize(unseen_MD - mean_D, dim=-1).T
        nearest = cosine_NM.topk(min(NEIGHBOURS, len(unseen_MD)), dim=-1)
        return cls(nearest.indices, torch.softmax(SHARPNESS * nearest.values, dim=-1))

    def log_p(self, unseen: Unseen) -> Tensor:
        """Return the mean log-probability [N] of the neighbours' own labels: the label's aim."""
        return (self.weight_NJ * unseen.log_p_M[self.index_NJ]).sum(-1)

    def others(self, unseen: Unseen, label_N: Tensor, vocabulary: int) -> Prediction:
        """Return the neighbours' mean prediction of all tokens but the label, given that it is not.

        It is what should rise where the label comes down.
        """
        size = min(unseen.prediction.token_NL.shape[1], vocabulary)
        token_NL = self.index_NJ.new_zeros(len(label_N), size)
        log_p_NL = self.weight_NJ.new_zeros(len(label_N), size)
        for row, label in enumerate(label_N.tolist()):
            index_J, weight_J = self.index_NJ[row], self.weight_NJ[row]
            p_JL = weight_J[:, None] * unseen.prediction.log_p_NL[index_J].exp()
            p_V = p_JL.new_zeros(vocabulary)
            p_V.index_add_(0, unseen.prediction.token_NL[index_J].flatten(), p_JL.flatten())
            not_label = (1 - p_V[label]).clamp(min=SMALLEST)
            p_V[label] = 0
            top = p_V.topk(size)
            token_NL[row] = top.indices
            log_p_NL[row] = (top.values / not_label).clamp(min=SMALLEST).log()
        return Prediction(token_NL, log_p_NL, _log_rest(log_p_NL))
