"""Does the model still prefer the true answer to perturbed ones (TOFU, arXiv:2401.06121)?

Definitions follow open-unlearning (locuslab, commit d3d7cf9). A truth ratio near 0 says that the
model tells true from false, near 1 that it cannot.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def truth_ratio(correct_loss: float, perturbed_losses: Sequence[float]) -> float:
    """Return exp(-mean_j L(perturbed_j)) / (exp(-L(correct)) + 1e-10) of one sample.

    It has at least one perturbed answer.
    """
    assert len(perturbed_losses), "a truth ratio needs a perturbed answer"
    # Plain numbers: intervals take this of every row hundreds of times, and an array costs more.
    return math.exp(-fmean(perturbed_losses)) / (math.exp(-correct_loss) + 1e-10)


def forget_truth_ratio(ratios: ArrayLike) -> float:
    """Return the mean of min(TR, 1/(TR + 1e-10)): 1 when both answers are equally likely."""
    ratio = np.asarray(ratios, dtype=np.float64)
    return float(np.mean(np.minimum(ratio, 1 / (ratio + 1e-10))))


def retain_truth_ratio(ratios: ArrayLike) -> float:
    """Return the mean of max(0, 1 - TR): 1 when the true answer is always far likelier.

    It is for every set but the forget set.
    """
    return float(np.mean(np.maximum(0.0, 1 - np.asarray(ratios, dtype=np.float64))))


def forget_quality(ratios: ArrayLike, oracle_ratios: ArrayLike | None) -> float | None:
    """Return the p-value of the Kolmogorov-Smirnov test between truth ratios on the forget set.

    Near 1 the model is not to be told from the one retrained without the forget set. None without
    an oracle.
    """
    if oracle_ratios is None:
        return None
    from scipy.stats import ks_2samp  # late: workers that only score rows need not wait for it

    test: Any = ks_2samp(np.asarray(ratios), np.asarray(oracle_ratios))
    return float(test.pvalue)
