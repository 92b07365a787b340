"""How far features are from where they should be.

Shapes: N tokens or positions, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rfa.settings import DistanceKind


def distance(
    kind: DistanceKind, difference_ND: Tensor, desired_ND: Tensor, energy: float
) -> Tensor:
    """Return each token's distance between `desired + difference` and `desired`: [N].

    `squared` is |difference|^2 / energy, and `norm` the root of it. `smooth_l1` is its robust form,
    equal to it while every component is under one standard unit, sqrt(energy / D). `cosine` is
    1 - cos.
    """
    difference_ND, desired_ND = difference_ND.float(), desired_ND.float()
    if kind == "squared":
        return difference_ND.square().sum(-1) / energy
    if kind == "norm":
        # LoRA starts at a zero difference. There torch gives this norm the gradient 0, and the root
        # of a sum of squares would have NaN.
        return torch.linalg.vector_norm(difference_ND, dim=-1) / energy**0.5
    if kind == "smooth_l1":
        dimensions = difference_ND.shape[-1]
        scaled_ND = difference_ND / (energy / dimensions) ** 0.5
        robust_ND = F.smooth_l1_loss(scaled_ND, torch.zeros_like(scaled_ND), reduction="none")
        return 2 * robust_ND.sum(-1) / dimensions
    return 1 - F.cosine_similarity(desired_ND + difference_ND, desired_ND, dim=-1)


def likeness(feature_ND: Tensor, base_ND: Tensor) -> Tensor:
    """Return each token's cos(feature, base feature), 0 where it is negative: [N].

    Circuit breakers (Zou et al. 2024, arXiv 2406.04313) bring it down to 0, where the features lie
    at right angles to the base model's, or beyond.
    """
    return F.cosine_similarity(feature_ND.float(), base_ND.float(), dim=-1).relu()
