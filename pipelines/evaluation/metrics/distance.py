"""How far a model's next-token distributions lie from a reference model's, token by token.

A mean over tokens or rows that meets the reference's proves nothing: answers whose names are broken
and whose facts are intact have the right mean. So distances are taken at each token, then averaged.

Shapes: T labelled answer tokens with EOS.
"""

import numpy as np
from numpy.typing import NDArray

# Nats between a token's log-probability and its aim that count as having met it: a factor of 2.
MARGIN = 0.7


def parts_of_divergence(
    divergence_T: NDArray[np.float64], surplus_T: NDArray[np.float64]
) -> dict[str, float]:
    """Return an answer's mean KL divergence, and what tokens above and below their aim add to it.

    A token is above its aim where the model finds it likelier than the reference does, by more than
    MARGIN nats: too little was forgotten. Below, too much was. The rest lies at its aim.

    Args:
        divergence_T: KL(reference || model) of each token, in nats.
        surplus_T: the token's log-probability under the model minus that under the reference.

    Returns:
        `distance`, `distance_above` and `distance_below`, each in nats a token of the answer.
    """
    if len(divergence_T) == 0:
        raise ValueError("an answer has no labelled token: empty, or cut off by the length limit")
    return {
        "distance": float(np.mean(divergence_T)),
        "distance_above": float(np.mean(divergence_T * (surplus_T > MARGIN))),
        "distance_below": float(np.mean(divergence_T * (surplus_T < -MARGIN))),
    }
