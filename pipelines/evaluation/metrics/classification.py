"""What a classifier gives away: a trained attack, and the distance between two models' outputs.

Accuracy is a mean: UA = 1 - accuracy on the forget set, RA = accuracy on the retain set, TA = on
the general set (test rows, without the forgotten class where a class is forgotten).

Shapes: B rows, C classes, D features.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def mia_efficacy(
    members: Sequence[float], non_members: Sequence[float], forget: Sequence[float], seed: int = 0
) -> float | None:
    """Return the share of the forget set that an attack calls never seen (arXiv 2304.04934).

    A logistic regression on the loss learns to tell trained rows (of the retain set) from unseen
    ones (of the general set), as many of each. None where one of the three has no row.
    """
    from sklearn.linear_model import LogisticRegression

    count = min(len(members), len(non_members))
    if not count or not forget:
        return None
    # As many of each: else the attack would learn which kind is more common, not the loss's limit.
    draw = np.random.default_rng(seed)
    trained = draw.choice(np.asarray(members, dtype=np.float64), count, replace=False)
    unseen = draw.choice(np.asarray(non_members, dtype=np.float64), count, replace=False)
    losses = np.concatenate([trained, unseen])
    attack = LogisticRegression().fit(losses[:, None], np.repeat([0, 1], count))
    return float(attack.predict(np.asarray(forget, dtype=np.float64)[:, None]).mean())


def activation_distance(probabilities_BC: ArrayLike, oracle_BC: ArrayLike) -> float:
    """Return the mean L2 distance of two models' class probabilities (Golatkar et al. 2020)."""
    difference_BC = np.asarray(probabilities_BC) - np.asarray(oracle_BC)
    return float(np.linalg.norm(difference_BC, axis=1).mean())


def feature_distance(feature_BD: ArrayLike, oracle_BD: ArrayLike) -> float:
    """Return the mean L2 distance of two models' features, relative to the second one's norm."""
    oracle = np.asarray(oracle_BD)
    distance_B = np.linalg.norm(np.asarray(feature_BD) - oracle, axis=1)
    return float((distance_B / np.maximum(np.linalg.norm(oracle, axis=1), 1e-12)).mean())
