"""One number for what a model is still good at (TOFU, Maini et al. 2024, arXiv:2401.06121)."""

from collections.abc import Sequence


def model_utility(components: Sequence[float | None]) -> float | None:
    """Return the harmonic mean of scores in [0, 1], which one that collapses pulls down.

    None when one is missing.
    """
    scores = [component for component in components if component is not None]
    if not components or len(scores) < len(components):
        return None
    from scipy.stats import hmean  # late: workers that only score rows need not wait for it

    return float(hmean(scores))
