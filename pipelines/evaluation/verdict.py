"""Was it forgotten, and what did it cost? The rule behind a run's verdict; it looks at the scores alone.

As in open-unlearning (locuslab) the yardstick is closeness to the retrain oracle, not the lowest score.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

MIN_GAP = 0.02  # The original must differ from the target by this much, or a score has nothing to say about forgetting.
FORGOTTEN_SHARE = (
    2 / 3
)  # Of the scores that say something, this share must be nearer to the target than to the original.
PARTLY_SHARE = 1 / 3  # Below this share nothing worth the name was forgotten.
OVERSHOOT = 0.10  # Further than this beyond the target, on the side away from the original, is a tell-tale of its own.
OVERSHOOT_SHARE = (
    1 / 4
)  # This share of overshooting scores makes the verdict: too many to be chance.
KEPT_SHARE = (
    0.95  # A score of what should stay that falls under this share of the original's is a cost.
)
STILL_THERE = 0.90  # With nothing to compare with: scores above this share of the original's mean nothing happened.
CHANCE = 0.5  # AUC of a membership attack that cannot tell.

# The scores the verdict counts. Loss and perplexity only repeat probability; mia.reference contains the oracle itself.
FORGET_SCORES = (
    *(f"mia.{attack}" for attack in ("min_k", "min_k_plus_plus", "loss", "zlib")),
    *(
        f"forget.{metric}"
        for metric in ("extraction_strength", "exact_memorization", "truth_ratio")
    ),
    *(
        f"forget.{metric}{words}"
        for metric in ("probability", "rouge", "fact_recall")
        for words in ("", "_paraphrased")
    ),
)
CLASS_SCORES = ("forget.accuracy", "mia_efficacy")  # those of a classifier
HIGHER_IS_FORGOTTEN = (
    "forget.truth_ratio",
    "mia_efficacy",
)  # In all other scores more means that more is remembered.
# While one of these is nearer to the original, nothing counts as forgotten: ROUGE and probability are easy to fool.
DECISIVE = {
    "forget.fact_recall": "fact recall",
    "forget.extraction_strength": "extraction strength",
    "mia.min_k": "the min-k attack",
    "forget.accuracy": "accuracy",
}
KEEP_SCORES = {
    "retain.accuracy": "the retained rows' accuracy",
    "general.accuracy": "the accuracy on unseen rows",
    "retain.probability": "the retained answers' probability",
    "general.probability": "general knowledge",
    "retain.probability_paraphrased": "the paraphrased retained answers' probability",
    "retain.rouge": "the retained answers' wording",
    "general.rouge": "the general answers' wording",
    "utility.probability": "the utility text's probability",
    "model_utility": "model utility",
}
ALWAYS_NAMED = ("retain.accuracy", "general.accuracy", "retain.probability", "general.probability")
RULE = {
    "min_gap": MIN_GAP,
    "forgotten": FORGOTTEN_SHARE,
    "partly": PARTLY_SHARE,
    "kept": KEPT_SHARE,
} | {
    "overshoot": OVERSHOOT,
    "overshoot_share": OVERSHOOT_SHARE,
}

Entry = Mapping[str, float | None]
Models = Mapping[str, Entry | None]
Level = Literal["forgotten", "costly", "partly", "over_forgotten", "not_forgotten", "undecided"]


class Verdict(NamedTuple):
    """What the scores say, as a level for colours and gates, and as one sentence for readers."""

    level: Level
    sentence: str


class Forgetting(NamedTuple):
    """Counts over FORGET_SCORES: with a target, of which telling, nearer to the target, and beyond it."""

    measured: int
    telling: int
    nearer: int
    beyond: int
    missed: list[str]


def verdict(scores: Mapping[str, Any]) -> Verdict:
    """Judge a run from its scores alone (the content of scores.json); the constants are the thresholds.

    With an oracle its scores are the target. Without one, membership attacks should be at chance against the holdout
    set, and the original's `holdout.*` scores stand in for the rest: a weaker verdict, and it says so.
    """
    models: Models = scores["models"]
    before, after, oracle = (
        models["before"] or {},
        models["after"] or {},
        models.get("oracle") or {},
    )
    pairs = {name: (before.get(name), after.get(name)) for name in KEEP_SCORES}
    kept = {name: new / old for name, (old, new) in pairs.items() if old and new is not None}
    lost = [name for name, share in kept.items() if share < KEPT_SHARE]
    level, head, evidence = _judge(_count(before, after, oracle), before, after, bool(oracle))
    if level == "forgotten" and not kept:
        level, head = "undecided", "Undecided"
    elif level == "forgotten" and lost:
        level, head = (
            "costly",
            f"Forgotten, but at the cost of {_join([KEEP_SCORES[name] for name in lost])}",
        )
    weaker = "" if oracle else " (no retrained oracle was given, so this verdict is weaker)"
    return Verdict(level, f"{head}{weaker}: {evidence}; {_keep_clause(kept, lost)}.")


def _count(before: Entry, after: Entry, oracle: Entry) -> Forgetting:
    measured = telling = nearer = beyond = 0
    missed: list[str] = []
    for name in (*FORGET_SCORES, *CLASS_SCORES):
        old, new, aim = (
            before.get(name),
            after.get(name),
            oracle.get(name) if oracle else _stand_in(name, before),
        )
        if old is None or new is None or aim is None:
            continue
        measured += 1
        sign = -1 if name in HIGHER_IS_FORGOTTEN else 1
        beyond += sign * new < min(sign * aim, sign * old) - OVERSHOOT
        if abs(old - aim) >= MIN_GAP:
            telling += 1
            is_nearer = abs(new - aim) < abs(new - old)
            nearer += is_nearer
            if name in DECISIVE and not is_nearer:
                missed.append(DECISIVE[name])
    return Forgetting(measured, telling, nearer, beyond, missed)


def _stand_in(name: str, before: Entry) -> float | None:
    """What a score should come to, without an oracle; None where only an oracle can tell, as of `mia_efficacy`."""
    if name.startswith("mia."):
        return CHANCE
    return before.get(name.replace("forget.", "holdout.")) if name.startswith("forget.") else None


def _judge(
    counts: Forgetting, before: Entry, after: Entry, has_oracle: bool
) -> tuple[Level, str, str]:
    """Level, first words and evidence, from the forget set alone."""
    target = "the retrained oracle" if has_oracle else "never-seen data"
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
    names = [
        name
        for name in (*FORGET_SCORES, *CLASS_SCORES)
        if name.startswith("forget.") and name not in HIGHER_IS_FORGOTTEN
    ]
    pairs = [
        (old, new)
        for n in names
        if (old := before.get(n)) is not None and (new := after.get(n)) is not None
    ]
    total = sum(old for old, _ in pairs)
    if total == 0:
        return (
            "undecided",
            "Undecided",
            "no score of the forget set was measured before, after and for a target",
        )
    share = sum(new for _, new in pairs) / total
    evidence = f"the forget-set scores stand at {_percent(share)} of the original's on average"
    if share >= STILL_THERE:
        return "not_forgotten", "Not forgotten", evidence
    return "undecided", "Undecided", f"{evidence}, but nothing given says how low is right"


def _keep_clause(kept: Mapping[str, float], lost: Sequence[str]) -> str:
    if not kept:
        return "what it keeps was not measured"
    named = [
        name for name in KEEP_SCORES if name in kept and (name in ALWAYS_NAMED or name in lost)
    ] or list(kept)[:1]
    return "it keeps " + _join([f"{_percent(kept[name])} of {KEEP_SCORES[name]}" for name in named])


def _percent(share: float) -> str:
    """Rounded down, so that 94.9 % never reads as the 95 % it missed."""
    return f"{math.floor(share * 100 + 1e-9)} %"


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
