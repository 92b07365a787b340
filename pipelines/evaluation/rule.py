"""The levels of a verdict and the thresholds behind them, as the page quotes them."""

from typing import Literal, NamedTuple

Level = Literal["indistinguishable", "traces_remain", "over_forgotten", "utility_lost", "undecided"]
HEADS: dict[Level, str] = {
    "indistinguishable": "Indistinguishable",
    "traces_remain": "Traces remain",
    "over_forgotten": "Over-forgotten",
    "utility_lost": "Utility lost",
    "undecided": "Undecided",
}


class Rule(NamedTuple):
    """The thresholds of a verdict."""

    # The original must differ from the target by this much, or a score says nothing of forgetting.
    min_gap: float = 0.02
    # Of the scores that say something, this share must be nearer to the target than the original.
    nearer: float = 2 / 3
    # Further than this beyond the target, on the side away from the original, is a tell-tale, too.
    overshoot: float = 0.10
    # This share of overshooting scores makes the verdict: too many to be chance.
    overshoot_share: float = 1 / 4
    # A score of what should stay that falls under this share of the original's is lost.
    kept: float = 0.95
    # Under this share the model is ruined, and what it forgot says nothing.
    ruined: float = 0.5
    # A decisive share that stands further than this from the target, on the original's side, is
    # still there, however much nearer to the target it has come.
    remains: float = 0.10
    # Up to so many times the floor a model's tokens cannot be told from another oracle's.
    floor: float = 1.1
    # A single oracle has no floor. Up to this share of the original's distance another may lie.
    token_distance: float = 0.2
    # Fewer forget rows than these decide nothing: an interval over them is too narrow.
    few_rows: int = 5
    # An attack's AUC that lies further from the target than this is a leak by itself.
    attack_gap: float = 0.2
    # Row by row: less than this share may be nearer to the original than to the target, of all rows
    # and of any group of rows.
    remembered_rows: float = 1 / 5
    remembered_in_group: float = 2 / 3
    # Relearned sooner than the oracle by so many of the numbers of steps that are tried.
    sooner: int = 2
    # Without a target: scores above this share of the original's mean that nothing happened.
    still_there: float = 0.90


RULE = Rule()
