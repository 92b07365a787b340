"""One number for what a model is still good at (TOFU, Maini et al. 2024, arXiv:2401.06121)."""

from collections.abc import Sequence


def model_utility(components: Sequence[float | None]) -> float | None:
    """Harmonic mean of scores in [0, 1]: one that collapses pulls the whole down. None when one is missing."""
    known = [component for component in components if component is not None]
    if not components or len(known) < len(components):
        return None
    from scipy.stats import hmean  # late: workers that only score rows need not wait for it

    return float(hmean(known))
