"""What a classifier gives away: an attack that is trained, and how far two models' outputs lie apart.

Accuracy itself is a mean: UA = 1 - accuracy on the forget set, RA = accuracy on the retain set, TA = on the general set
(test rows, without the forgotten class where a class is forgotten).
"""

from collections.abc import Sequence

import numpy as np


def mia_efficacy(
    members: Sequence[float], non_members: Sequence[float], forget: Sequence[float], seed: int = 0
) -> float | None:
    """The share of the forget set that a membership attack calls never seen (Liu et al. 2023, arXiv 2304.04934).

    A logistic regression on each row's loss tells trained rows (of the retain set) from unseen ones (of the general
    set), as many of each. None where one of the three has no row.
    """
    from sklearn.linear_model import LogisticRegression

    count = min(len(members), len(non_members))
    if not count or not forget:
        return None
    draw = np.random.default_rng(seed)
    chosen = [
        draw.choice(np.asarray(own, dtype=np.float64), count, replace=False)
        for own in (members, non_members)
    ]
    attack = LogisticRegression().fit(np.concatenate(chosen)[:, None], [0] * count + [1] * count)
    return float(attack.predict(np.asarray(forget, dtype=np.float64)[:, None]).mean())


def activation_distance(
    probabilities_BC: Sequence[Sequence[float]], oracle_BC: Sequence[Sequence[float]]
) -> float:
    """Mean over rows of the L2 distance between two models' class probabilities (Golatkar et al. 2020)."""
    return float(
        np.linalg.norm(np.asarray(probabilities_BC) - np.asarray(oracle_BC), axis=1).mean()
    )


def feature_distance(
    feature_BD: Sequence[Sequence[float]], oracle_BD: Sequence[Sequence[float]]
) -> float:
    """Mean over rows of the L2 distance between two models' features, relative to the second one's norm."""
    oracle = np.asarray(oracle_BD)
    apart_B = np.linalg.norm(np.asarray(feature_BD) - oracle, axis=1)
    return float((apart_B / np.maximum(np.linalg.norm(oracle, axis=1), 1e-12)).mean())
