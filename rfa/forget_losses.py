"""What may be asked of a model's outputs on the forget set: the usual baselines of unlearning, each a line.

Shapes: N tokens or classified rows, V vocabulary or classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def output_term(
    kind: str, log_NV: Tensor, label_N: Tensor, row_N: Tensor, teacher_NV: Tensor | None
) -> Tensor:
    """What is asked of the outputs on the forget set, for each token or row: [N].

    unlikelihood  -log(1 - p) of the label (Welleck et al. 2019, arXiv 1908.04319)
    ascent        log p of the label: gradient ascent on its loss
    random_label  cross-entropy of another label, drawn by the row (Golatkar et al. 2020, arXiv 1911.04933)
    bad_teacher   KL(uniform || model): a teacher that knows nothing (Chundawat et al. 2023, arXiv 2205.08096, take a
                  network of random weights)
    scrub         -KL(base || model) (Kurmanji et al. 2023, arXiv 2302.09880, in turns with what is kept; here at once)
    """
    label_N1 = label_N[:, None]
    if kind == "unlikelihood":
        return -torch.log1p(-log_NV.gather(1, label_N1)[:, 0].exp().clamp_max(1 - 1e-6))
    if kind == "ascent":
        return log_NV.gather(1, label_N1)[:, 0]
    classes = log_NV.shape[1]
    if kind == "random_label":
        step_N = 1 + (row_N * 2654435761 % 2**32) % (
            classes - 1
        )  # Knuth's multiplicative hash: any but its own
        return -log_NV.gather(1, ((label_N + step_N) % classes)[:, None])[:, 0]
    if kind == "bad_teacher":
        return -log_NV.mean(1) - math.log(classes)
    assert teacher_NV is not None
    return -divergence(teacher_NV, log_NV)


def divergence(teacher_NV: Tensor, log_NV: Tensor) -> Tensor:
    """KL(teacher || student) of each distribution: [N]."""
    return F.kl_div(log_NV, teacher_NV, reduction="none", log_target=True).sum(1)
