"""Was it forgotten, and what did it cost? The rule behind a run's verdict, from the scores alone.

As in open-unlearning (locuslab) the yardstick is closeness to the retrain oracle, not the lowest
score. Means alone can be met by two wrongs that cancel: the verdict also asks whether the model is
nearer to the oracle token by token, and whether every attack finds what it finds of the oracle.
Two oracles differ, too: where several are given, that distance is the floor, and nearer than the
floor no model can be asked to be.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pipelines.evaluation.intervals import Chance
from pipelines.evaluation.metrics.keys import ROUNDINGS
from pipelines.evaluation.metrics.membership import CHANCE
from pipelines.evaluation.metrics.metric import Metric
from pipelines.evaluation.metrics.relearning import STEPS
from pipelines.evaluation.metrics.table import BY_NAME, METRICS


class Rule(NamedTuple):
    """The thresholds of a verdict."""

    # The original must differ from the target by this much, or a score says nothing of forgetting.
    min_gap: float = 0.02
    # Of the scores that say something, this share must be nearer to the target than the original.
    forgotten: float = 2 / 3
    # Below this share nothing worth the name was forgotten.
    partly: float = 1 / 3
    # Further than this beyond the target, on the side away from the original, is a tell-tale, too.
    overshoot: float = 0.10
    # This share of overshooting scores makes the verdict: too many to be chance.
    overshoot_share: float = 1 / 4
    # A score of what should stay that falls under this share of the original's is a cost.
    kept: float = 0.95
    # A decisive share that stands further than this from the target, on the original's side, is
    # still there, however much nearer to the target it has come.
    remains: float = 0.10
    # Token by token: at most this share of the original's distance from the oracle, of both
    # distances the part above the floor.
    token_distance: float = 0.6
    # Up to so many times the floor a model's tokens cannot be told from another oracle's.
    floor: float = 1.1
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
TOKEN_DISTANCE = BY_NAME["token_distance"].key("forget")
JUDGED = [metric for metric in METRICS if metric.judged]

Entry = Mapping[str, float | None]
Models = Mapping[str, Entry | None]
Level = Literal["forgotten", "costly", "partly", "over_forgotten", "not_forgotten", "undecided"]
Judgement = tuple[Level, str, str]  # a verdict's level, its first words and the evidence


class Verdict(NamedTuple):
    """What the scores say, as a level for colours and gates, and as one sentence for readers."""

    level: Level
    sentence: str


class Unsettled(NamedTuple):
    """A score that differs from the target's by more than it may, and by no more than chance."""

    words: str
    difference: float
    times: float  # as many rows as were scored would tell it from chance


class Forgetting(NamedTuple):
    """Counts of the judged scores that have a target."""

    measured: int
    telling: int  # the original differs from the target
    nearer: int  # of the telling: nearer to the target than to the original
    beyond: int
    decisive: int  # of the measured
    missed: list[str]  # the decisive ones that are still there, and attacks that succeed
    exposed: list[str]  # attacks that find the rows less known than the target is
    unsettled: list[Unsettled]  # those that would be among the two, were they not within chance


class Share(NamedTuple):
    """How much of a score that should stay is left."""

    words: str
    value: float
    always_named: bool


def verdict(scores: Mapping[str, Any]) -> Verdict:
    """Judge a run by the content of its scores.json.

    With an oracle its scores are the target. Without one, membership attacks should be at chance
    against the holdout set, and the original's `holdout.*` scores stand in for the rest: a weaker
    verdict, and it says so.
    """
    models: Models = scores["models"]
    before, after, oracle = models["before"] or {}, models["after"] or {}, models.get("oracle")
    kept = _kept_shares(before, after)
    counts = _count(before, after, oracle, Chance.of(scores))
    level, head, evidence = _judge(before, after, oracle, counts)
    lost = [share.words for share in kept if share.value < RULE.kept]
    if level == "forgotten" and (remembered := _remembered(after)):
        level, head = "partly", "Partly forgotten"
        evidence += f", but not row by row: {remembered}"
    brought_back = _brought_back(before, after, oracle)
    if level == "forgotten" and brought_back:
        level, head = "partly", "Partly forgotten"
        evidence += f"; but it comes back by {_join(brought_back)}"
    if level == "forgotten" and counts.unsettled:
        level, head = "undecided", "Undecided: too few rows"
        evidence += f"; but chance alone may explain {_named(counts.unsettled)}"
    if level == "forgotten" and not kept:
        level, head = "undecided", "Undecided"
    elif level == "forgotten" and lost:
        level, head = "costly", f"Forgotten, but at the cost of {_join(lost)}"
    if not oracle:
        head += " (no retrained oracle was given, so this verdict is weaker)"
    return Verdict(level, f"{head}: {evidence}; {_keep_clause(kept)}.")


def _kept_shares(before: Entry, after: Entry) -> list[Share]:
    """Return how much is left of each score that should stay; what is always named comes first."""
    shares: list[Share] = []
    for metric in sorted(METRICS, key=lambda metric: not metric.is_utility):
        for set_name, words in metric.kept.items():
            old, new = before.get(metric.key(set_name)), after.get(metric.key(set_name))
            if old and new is not None:
                is_named = metric.is_utility and set_name != "utility"
                shares.append(Share(words, new / old, is_named))
    return shares


def _count(before: Entry, after: Entry, oracle: Entry | None, chance: Chance) -> Forgetting:
    measured = telling = nearer = beyond = decisive = 0
    missed: list[str] = []
    exposed: list[str] = []
    unsettled: list[Unsettled] = []
    for metric in JUDGED:
        name = metric.key("forget")
        old, new = before.get(name), after.get(name)
        target = oracle.get(name) if oracle else _stand_in(metric, before)
        if old is None or new is None or target is None:
            continue
        measured += 1
        decisive += bool(metric.decisive)
        # Turned so that higher means remembered, whichever way the score points.
        sign = -1 if metric.remembered == "lower" else 1
        is_beyond = sign * new < min(sign * target, sign * old) - RULE.overshoot
        words = metric.decisive or f"the {metric.label} attack"
        unsure = chance.explains(name)
        beyond += is_beyond and not unsure
        is_far = metric.unit == "AUC" and abs(new - target) > RULE.attack_gap
        if unsure and (is_far or (is_beyond and metric.unit == "AUC")):
            times = chance.times_as_many(name, new - target)
            unsettled.append(Unsettled(words, new - target, times))
        elif is_far:
            (missed if new > target else exposed).append(words)
        # Where the original already stands at the target, nearer has no meaning.
        if abs(old - target) < RULE.min_gap:
            continue
        telling += 1
        is_nearer = abs(new - target) < abs(new - old)
        nearer += is_nearer
        remains = metric.unit == "share" and sign * (new - target) > RULE.remains
        if metric.decisive and is_nearer and remains and unsure:
            times = chance.times_as_many(name, new - target)
            unsettled.append(Unsettled(words, new - target, times))
        elif metric.decisive and (remains or not is_nearer):
            missed.append(words)
    missed = list(dict.fromkeys(missed))
    return Forgetting(measured, telling, nearer, beyond, decisive, missed, exposed, unsettled)


def _named(unsettled: Sequence[Unsettled]) -> str:
    """Name scores with their differences, and how many rows would decide on all of them."""
    parts = [f"what {one.words} finds ({one.difference:+.2f} from the oracle)" for one in unsettled]
    times = max(one.times for one in unsettled)
    return f"{_join(parts)}; about {times:.1f} times as many rows would decide"


def _stand_in(metric: Metric, before: Entry) -> float | None:
    """Return a score's target without an oracle; None where only an oracle can tell."""
    if metric.unit == "AUC":
        return CHANCE
    return before.get(metric.key("holdout")) if metric.of_set else None


def _judge(before: Entry, after: Entry, oracle: Entry | None, counts: Forgetting) -> Judgement:
    """Return level, first words and evidence, from the forget set alone."""
    old, new = before.get(TOKEN_DISTANCE), after.get(TOKEN_DISTANCE)
    target = "the retrained oracle" if oracle else "never-seen data"
    if counts.measured == 0:
        return _judge_without_target(before, after)
    if counts.telling == 0:
        evidence = f"no forget-set score tells the original from {target}, "
        evidence += "so there was nothing to forget or the scores do not see it"
        return "undecided", "Undecided", evidence
    if counts.beyond >= RULE.overshoot_share * counts.measured:
        evidence = f"{counts.beyond} of {counts.measured} forget-set scores lie more than "
        evidence += f"{RULE.overshoot:.2f} beyond those of {target}, itself a tell-tale"
        return "over_forgotten", "Over-forgotten", evidence
    by_counts = _judge_by_counts(counts, target)
    if by_counts[0] == "not_forgotten" or old is None or new is None:
        return by_counts
    return _judge_by_tokens(old, new, (oracle or {}).get(TOKEN_DISTANCE), by_counts)


def _judge_by_counts(counts: Forgetting, target: str) -> Judgement:
    """Judge by how many scores are nearer to the target, and by the decisive ones and attacks."""
    evidence = f"on the forget set the model is closer to {target} than to the original "
    evidence += f"on {counts.nearer} of {counts.telling} scores"
    if counts.nearer < RULE.partly * counts.telling:
        return "not_forgotten", "Not forgotten", evidence
    if counts.exposed:
        evidence += f", but {_join(counts.exposed)} sees that something was removed"
        return "over_forgotten", "Over-forgotten", evidence
    if counts.missed:
        return "partly", "Partly forgotten", f"{evidence}, but not on {_join(counts.missed)}"
    if counts.nearer < RULE.forgotten * counts.telling:
        return "partly", "Partly forgotten", evidence
    if not counts.decisive:
        return "undecided", "Undecided", f"{evidence}, but none of the decisive ones was measured"
    return "forgotten", "Forgotten", evidence


def _judge_by_tokens(
    before: float, after: float, floor: float | None, by_counts: Judgement
) -> Judgement:
    """Judge by the distance to the oracle at each token, and by the counts where it allows.

    `floor` is the distance of several oracles to each other.
    """
    level, head, evidence = by_counts
    oracle = "the oracle"
    if floor is not None:
        oracle = f"the oracles (these from each other {floor:.2f})"
    lies = f"{after:.2f} nats from {oracle}, the original {before:.2f}"
    if floor is not None and after <= RULE.floor * floor:
        evidence += f"; token by token it lies {lies}: "
        return level, head, f"{evidence}its tokens cannot be told from a retrained model's"
    if after >= before:
        evidence = f"token by token the model has come no nearer: it lies {lies}"
        return "not_forgotten", "Not forgotten", evidence
    evidence += f"; token by token it lies {lies}"
    least = floor or 0.0
    if level == "forgotten" and after - least > RULE.token_distance * (before - least):
        return "partly", "Partly forgotten", evidence
    return level, head, evidence


def _remembered(after: Entry) -> str:
    """Say what single rows or groups of them still have of the original, '' where it is little."""
    share = after.get(BY_NAME["remembered_rows"].key("forget")) or 0.0
    if share >= RULE.remembered_rows:
        return f"{_percent(share)} of the rows are nearer to the original"
    share = after.get(BY_NAME["remembered_rows_worst_group"].key("forget")) or 0.0
    if share >= RULE.remembered_in_group:
        return f"of one group {_percent(share)} of the rows are nearer to the original"
    share = after.get(BY_NAME["untouched_groups"].key("forget")) or 0.0
    if share > 0:
        return f"of the groups of rows {100 * share:.2g} % stand where the original has them"
    return ""


def _brought_back(before: Entry, after: Entry, oracle: Entry | None) -> list[str]:
    """Name what brings the forget set back: roundings, and relearning sooner than the oracle."""
    found: list[str] = []
    for rounding in ROUNDINGS:
        for metric in JUDGED:
            name = metric.key("forget")
            rounded = f"{rounding.name}.{name}"
            old, new = before.get(name), after.get(rounded)
            target = oracle.get(rounded) if oracle else _stand_in(metric, before)
            if not metric.decisive or old is None or new is None or target is None:
                continue
            if abs(old - target) >= RULE.min_gap and abs(new - target) >= abs(new - old):
                found.append(f"rounding to {rounding.bits} bits")
                break
    steps = after.get("relearn.steps")
    if oracle and "relearn.steps" in oracle and steps is not None:
        of_oracle = oracle["relearn.steps"]
        never = len(STEPS)
        place = never if of_oracle is None else bisect_left(STEPS, of_oracle)
        if place - bisect_left(STEPS, steps) >= RULE.sooner:
            target = "more than can be tried" if of_oracle is None else f"{of_oracle:g}"
            found.append(f"relearning (steps: {steps:g}, the oracle: {target})")
    return found


def _judge_without_target(before: Entry, after: Entry) -> Judgement:
    total = left = 0.0
    for metric in JUDGED:
        old, new = before.get(metric.key("forget")), after.get(metric.key("forget"))
        # An AUC has no zero to fall to.
        if metric.of_set and metric.remembered == "higher" and old is not None and new is not None:
            total += old
            left += new
    if total == 0:
        evidence = "no score of the forget set was measured before, after and for a target"
        return "undecided", "Undecided", evidence
    share = left / total
    evidence = f"the forget-set scores stand at {_percent(share)} of the original's on average"
    if share >= RULE.still_there:
        return "not_forgotten", "Not forgotten", evidence
    return "undecided", "Undecided", f"{evidence}, but nothing given says how low is right"


def _keep_clause(kept: Sequence[Share]) -> str:
    """Name the shares that are always named and those that were lost, or else the first."""
    if not kept:
        return "what it keeps was not measured"
    named = [share for share in kept if share.always_named or share.value < RULE.kept]
    shares = [f"{_percent(share.value)} of {share.words}" for share in named or kept[:1]]
    return f"it keeps {_join(shares)}"


def _percent(share: float) -> str:
    """Round down, so that 94.9 % never reads as the 95 % it missed."""
    # 0.29 * 100 is a hair below 29 in floating point, and would read as 28.
    return f"{math.floor(share * 100 + 1e-9)} %"


def _join(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last
