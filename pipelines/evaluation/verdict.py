"""Was it forgotten, and what did it cost? The rule behind a run's verdict; it looks at the scores alone.

As in open-unlearning (locuslab) the yardstick is closeness to the retrain oracle, not the lowest score.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pipelines.evaluation.metrics.membership import CHANCE
from pipelines.evaluation.metrics.metric import Metric
from pipelines.evaluation.metrics.table import METRICS

# The original must differ from the target by this much, or a score has nothing to say about forgetting.
MIN_GAP = 0.02
# Of the scores that say something, this share must be nearer to the target than to the original.
FORGOTTEN_SHARE = 2 / 3
# Below this share nothing worth the name was forgotten.
PARTLY_SHARE = 1 / 3
# Further than this beyond the target, on the side away from the original, is a tell-tale of its own.
OVERSHOOT = 0.10
# This share of overshooting scores makes the verdict: too many to be chance.
OVERSHOOT_SHARE = 1 / 4
# A score of what should stay that falls under this share of the original's is a cost.
KEPT_SHARE = 0.95
# With nothing to compare with: scores above this share of the original's mean that nothing happened.
STILL_THERE = 0.90
RULE = {
    "min_gap": MIN_GAP,
    "forgotten": FORGOTTEN_SHARE,
    "partly": PARTLY_SHARE,
    "kept": KEPT_SHARE,
    "overshoot": OVERSHOOT,
    "overshoot_share": OVERSHOOT_SHARE,
}

JUDGED = [metric for metric in METRICS if metric.judged]

Entry = Mapping[str, float | None]
Models = Mapping[str, Entry | None]
Level = Literal["forgotten", "costly", "partly", "over_forgotten", "not_forgotten", "undecided"]


class Verdict(NamedTuple):
    """What the scores say, as a level for colours and gates, and as one sentence for readers."""

    level: Level
    sentence: str


class Forgetting(NamedTuple):
    """Counts of the judged scores that have a target, and the decisive ones that are nearer to the original."""

    measured: int
    telling: int  # the original differs from the target
    nearer: int  # of the telling: nearer to the target than to the original
    beyond: int
    missed: list[str]


def verdict(scores: Mapping[str, Any]) -> Verdict:
    """Judge a run from its scores alone (the content of scores.json); the constants are the thresholds.

    With an oracle its scores are the target. Without one, membership attacks should be at chance against the holdout
    set, and the original's `holdout.*` scores stand in for the rest: a weaker verdict, and it says so.
    """
    models: Models = scores["models"]
    before, after, oracle = models["before"] or {}, models["after"] or {}, models.get("oracle")
    kept = _kept_shares(before, after)
    level, head, evidence = _judge(before, after, oracle)
    lost = [share for share in kept if share.value < KEPT_SHARE]
    if level == "forgotten" and not kept:
        level, head = "undecided", "Undecided"
    elif level == "forgotten" and lost:
        level = "costly"
        head = f"Forgotten, but at the cost of {_join([share.words for share in lost])}"
    if not oracle:
        head += " (no retrained oracle was given, so this verdict is weaker)"
    return Verdict(level, f"{head}: {evidence}; {_keep_clause(kept)}.")


class Share(NamedTuple):
    """How much of a score that should stay is left."""

    words: str
    value: float
    always_named: bool


def _kept_shares(before: Entry, after: Entry) -> list[Share]:
    shares: list[Share] = []
    # What a verdict always names comes first.
    for metric in sorted(METRICS, key=lambda metric: not metric.is_utility):
        for set_name, words in metric.kept.items():
            old, new = before.get(metric.key(set_name)), after.get(metric.key(set_name))
            if old and new is not None:
                is_named = metric.is_utility and set_name != "utility"
                shares.append(Share(words, new / old, is_named))
    return shares


def _count(before: Entry, after: Entry, oracle: Entry | None) -> Forgetting:
    measured = telling = nearer = beyond = 0
    missed: list[str] = []
    for metric in JUDGED:
        name = metric.key("forget")
        old, new = before.get(name), after.get(name)
        target = oracle.get(name) if oracle else _stand_in(metric, before)
        if old is None or new is None or target is None:
            continue
        measured += 1
        sign = -1 if metric.remembered == "lower" else 1
        beyond += sign * new < min(sign * target, sign * old) - OVERSHOOT
        if abs(old - target) < MIN_GAP:
            continue
        telling += 1
        is_nearer = abs(new - target) < abs(new - old)
        nearer += is_nearer
        if metric.decisive and not is_nearer:
            missed.append(metric.decisive)
    return Forgetting(measured, telling, nearer, beyond, missed)


def _stand_in(metric: Metric, before: Entry) -> float | None:
    """Return the target of a score without an oracle; None where only an oracle can tell, as of `mia_efficacy`."""
    if metric.unit == "AUC":
        return CHANCE
    return before.get(metric.key("holdout")) if metric.of_set else None


def _judge(before: Entry, after: Entry, oracle: Entry | None) -> tuple[Level, str, str]:
    """Return level, first words and evidence, from the forget set alone."""
    counts = _count(before, after, oracle)
    target = "the retrained oracle" if oracle else "never-seen data"
    if counts.measured == 0:
        return _judge_without_target(before, after)
    if counts.beyond >= OVERSHOOT_SHARE * counts.measured:
        far = f"{counts.beyond} of {counts.measured} forget-set scores lie more than {OVERSHOOT:.2f} beyond those of"
        return "over_forgotten", "Over-forgotten", f"{far} {target}, itself a tell-tale"
    if counts.telling == 0:
        why = "so there was nothing to forget or the scores do not see it"
        return (
            "undecided",
            "Undecided",
            f"no forget-set score tells the original from {target}, {why}",
        )
    closer = f"on the forget set the model is closer to {target} than to the original"
    evidence = f"{closer} on {counts.nearer} of {counts.telling} scores"
    if counts.nearer < PARTLY_SHARE * counts.telling:
        return "not_forgotten", "Not forgotten", evidence
    if counts.missed:
        return "partly", "Partly forgotten", f"{evidence}, but not on {_join(counts.missed)}"
    if counts.nearer < FORGOTTEN_SHARE * counts.telling:
        return "partly", "Partly forgotten", evidence
    return "forgotten", "Forgotten", evidence


def _judge_without_target(before: Entry, after: Entry) -> tuple[Level, str, str]:
    total = left = 0.0
    for metric in JUDGED:
        old, new = before.get(metric.key("forget")), after.get(metric.key("forget"))
        # An AUC has no zero to fall to.
        if metric.of_set and metric.remembered == "higher" and old is not None and new is not None:
            total += old
            left += new
    if total == 0:
        return (
            "undecided",
            "Undecided",
            "no score of the forget set was measured before, after and for a target",
        )
    share = left / total
    evidence = f"the forget-set scores stand at {_percent(share)} of the original's on average"
    if share >= STILL_THERE:
        return "not_forgotten", "Not forgotten", evidence
    return "undecided", "Undecided", f"{evidence}, but nothing given says how low is right"


def _keep_clause(kept: Sequence[Share]) -> str:
    """Return a clause on what was kept: the shares that are always named and those that were lost, else the first."""
    if not kept:
        return "what it keeps was not measured"
    named = [share for share in kept if share.always_named or share.value < KEPT_SHARE]
    return "it keeps " + _join(
        [f"{_percent(share.value)} of {share.words}" for share in named or kept[:1]]
    )


def _percent(share: float) -> str:
    """Rounded down, so that 94.9 % never reads as the 95 % it missed."""
    return f"{math.floor(share * 100 + 1e-9)} %"


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
