"""Was it forgotten, and what did it cost? The rule behind a run's verdict, from the scores alone.

As in open-unlearning (locuslab) the yardstick is closeness to the retrain oracle, not the lowest
score. Means alone can be met by two wrongs that cancel: the verdict also asks whether the model lies
at the oracle token by token, and whether every attack finds what it finds of the oracle. Two
oracles differ, too: where several are given, that distance is the floor, and nearer than the floor
no model can be asked to be.

A run has one level. A model that has lost what should stay is no result (`utility_lost`), whatever
it forgot. One that stands beyond the oracle is `over_forgotten`: that is a tell-tale, too. What
else differs from the oracle are traces (`traces_remain`). Where chance alone may explain what does,
the verdict is `undecided`, and only what is left is `indistinguishable`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipelines.evaluation.intervals import Chance
from pipelines.evaluation.metrics.table import BY_NAME, JUDGED, METRICS
from pipelines.evaluation.rule import HEADS, RULE, Level
from pipelines.evaluation.traces import (
    Entry,
    hidden_traces,
    join_words,
    percent,
    returned,
    stand_in,
)

TOKEN_DISTANCE = BY_NAME["token_distance"].key("forget")
ABOVE = BY_NAME["token_distance_above"].key("forget")
BELOW = BY_NAME["token_distance_below"].key("forget")
MOST_NAMED = 3  # of what was kept or lost, in a sentence

Models = Mapping[str, Entry | None]
Judgement = tuple[Level, str]  # a verdict's level and the evidence


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
    missed: list[str]  # decisive ones that are still there, and attacks that tell as before
    exposed: list[str]  # attacks that find the rows less known than the target and before
    told: list[str]  # attacks without a direction that tell the rows as they do not tell the target
    unsettled: list[Unsettled]  # those that would be among the two, were they not within chance


class Share(NamedTuple):
    """How much of a score that should stay is left."""

    words: str
    value: float  # beside the original's
    of_lower: float  # beside the original's or the lowest that retraining gives
    always_named: bool


def verdict(scores: Mapping[str, Any]) -> Verdict:
    """Judge a run by the content of its scores.json.

    With an oracle its scores are the target. Without one, membership attacks should be at chance
    against the holdout set, and the original's `holdout.*` scores stand in for the rest: a weaker
    verdict, and it says so.
    """
    models: Models = scores["models"]
    before, after, oracle = models["before"] or {}, models["after"] or {}, models.get("oracle")
    chance = Chance.of(scores)
    kept = _kept_shares(before, after, oracle or {}, scores.get("oracle_spread", {}))
    counts = _count(before, after, oracle, chance)
    level, evidence = _judge(before, after, oracle, counts, chance)
    traces = hidden_traces(before, after, oracle)
    if level == "indistinguishable" and traces:
        level = "traces_remain"
        evidence += f", but {'; '.join(traces)}"
    back = returned(before, after, oracle)
    if back:
        level = "traces_remain" if level in ("indistinguishable", "undecided") else level
        evidence += f"; rows of earlier requests are back ({join_words(back)})"
    lost = [share.words for share in kept if share.of_lower < RULE.kept]
    is_ruined = any(share.of_lower < RULE.ruined for share in kept)
    if is_ruined or (level == "indistinguishable" and lost):
        level = "utility_lost"
    head = HEADS[level]
    if level == "utility_lost":
        head += f" ({join_words(_first(lost))})"
    if level == "indistinguishable" and counts.unsettled:
        level, head = "undecided", "Undecided: too few rows"
        evidence += f"; but chance alone may explain {_named(counts.unsettled)}"
    is_too_few = scores.get("rows", {}).get("forget", RULE.few_rows) < RULE.few_rows
    if is_too_few and level != "utility_lost" and not back:
        level, head = "undecided", "Undecided: too few rows"
        evidence += f"; but fewer than {RULE.few_rows} forget rows decide nothing"
    if level == "indistinguishable" and not kept:
        level, head = "undecided", HEADS["undecided"]
    if not oracle:
        head += " (no retrained oracle was given, so this verdict is weaker)"
    return Verdict(level, f"{head}: {evidence}; {_keep_clause(kept)}.")


def _kept_shares(
    before: Entry, after: Entry, oracle: Entry, spread: Mapping[str, float]
) -> list[Share]:
    """Return how much is left of each score that should stay; what is always named comes first.

    What retraining would have lost, too, is not lost by unlearning, nor is what several oracles
    differ by.
    """
    shares: list[Share] = []
    for metric in sorted(METRICS, key=lambda metric: not metric.is_utility):
        for set_name, words in metric.kept.items():
            old, new = before.get(metric.key(set_name)), after.get(metric.key(set_name))
            if old and new is not None:
                is_named = metric.is_utility and set_name != "utility"
                retrained = oracle.get(metric.key(set_name))
                differ = spread.get(metric.key(set_name), 0.0)
                lower = old if retrained is None else min(old, retrained - differ)
                of_lower = new / lower if lower > 0 else math.inf
                shares.append(Share(words, new / old, of_lower, is_named))
    return shares


def _count(before: Entry, after: Entry, oracle: Entry | None, chance: Chance) -> Forgetting:
    measured = telling = nearer = beyond = decisive = 0
    missed: list[str] = []
    exposed: list[str] = []
    told: list[str] = []
    unsettled: list[Unsettled] = []
    for metric in JUDGED:
        name = metric.key("forget")
        old, new = before.get(name), after.get(name)
        target = oracle.get(name) if oracle else stand_in(metric, before)
        if old is None or new is None or target is None:
            continue
        measured += 1
        decisive += bool(metric.decisive)
        # Turned so that higher means remembered, whichever way the score points.
        sign = -1 if metric.remembered == "lower" else 1
        has_direction = metric.remembered != "neither"
        is_beyond = has_direction and sign * new < min(sign * target, sign * old) - RULE.overshoot
        words = metric.decisive or f"the {metric.label} attack"
        unsure = chance.explains(name)
        beyond += is_beyond and not unsure
        is_far = metric.unit == "AUC" and abs(new - target) > RULE.attack_gap
        if unsure and (is_far or (is_beyond and metric.unit == "AUC")):
            times = chance.times_as_many(name, new - target)
            unsettled.append(Unsettled(words, new - target, times))
        elif is_far and not has_direction:
            told.append(words)
        elif is_far:
            # What was as low in the original has not been removed from it.
            is_lowered = new < min(target, old - RULE.min_gap)
            (exposed if is_lowered else missed).append(words)
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
    return Forgetting(measured, telling, nearer, beyond, decisive, missed, exposed, told, unsettled)


def _named(unsettled: Sequence[Unsettled]) -> str:
    """Name scores with their differences, and how many rows would decide on all of them."""
    parts = [f"what {one.words} finds ({one.difference:+.2f} from the oracle)" for one in unsettled]
    times = max(one.times for one in unsettled)
    return f"{join_words(parts)}; about {times:.1f} times as many rows would decide"


def _judge(
    before: Entry, after: Entry, oracle: Entry | None, counts: Forgetting, chance: Chance
) -> Judgement:
    """Return level and evidence, from the forget set alone."""
    target = "the retrained oracle" if oracle else "never-seen data"
    if counts.measured == 0:
        return _judge_without_target(before, after)
    if counts.telling == 0:
        evidence = f"no forget-set score tells the original from {target}, "
        evidence += "so there was nothing to forget or the scores do not see it"
        return "undecided", evidence
    if counts.beyond >= RULE.overshoot_share * counts.measured:
        evidence = f"{counts.beyond} of {counts.measured} forget-set scores lie more than "
        evidence += f"{RULE.overshoot:.2f} beyond those of {target}, itself a tell-tale"
        return "over_forgotten", evidence
    by_counts = _judge_by_counts(counts, target)
    if before.get(TOKEN_DISTANCE) is None or after.get(TOKEN_DISTANCE) is None:
        return by_counts
    return _judge_by_tokens((before, after, oracle or {}), counts, by_counts, chance)


def _judge_by_counts(counts: Forgetting, target: str) -> Judgement:
    """Judge by how many scores are nearer to the target, and by the decisive ones and attacks."""
    evidence = f"on the forget set the model is closer to {target} than to the original "
    evidence += f"on {counts.nearer} of {counts.telling} scores"
    if counts.exposed:
        return (
            "over_forgotten",
            f"{evidence}, but {join_words(counts.exposed)} sees that something was removed",
        )
    if counts.missed:
        return "traces_remain", f"{evidence}, but not on {join_words(counts.missed)}"
    if counts.told:
        tells = f"but {join_words(counts.told)} tells the rows from never-seen ones"
        return "traces_remain", f"{evidence}, {tells}"
    if counts.nearer < RULE.nearer * counts.telling:
        return "traces_remain", evidence
    if not counts.decisive:
        return "undecided", f"{evidence}, but none of the decisive ones was measured"
    return "indistinguishable", evidence


def _judge_by_tokens(
    models: Sequence[Entry], counts: Forgetting, by_counts: Judgement, chance: Chance
) -> Judgement:
    """Judge by the distance to the oracle at each token, and by the counts where it allows.

    `models` are before, after and oracle. Several oracles' distance to each other is the floor.
    """
    _, after, _ = models
    level, evidence = by_counts
    old, new, floor = (entry.get(TOKEN_DISTANCE) for entry in models)
    assert old is not None and new is not None
    named, most = "the oracle", RULE.token_distance * old
    if floor is not None:
        named, most = f"the oracles (these from each other {floor:.2f})", RULE.floor * floor
    lies = f"{new:.2f} nats from {named}, the original {old:.2f}"
    if new <= most or chance.explains(TOKEN_DISTANCE):
        evidence += f"; token by token it lies {lies}: "
        return level, f"{evidence}its tokens cannot be told from a retrained model's"
    if new < old or level == "over_forgotten":
        found: Level = "over_forgotten" if level == "over_forgotten" else "traces_remain"
        return found, f"{evidence}; token by token it lies {lies}"
    below, above = (after.get(name) or 0.0 for name in (BELOW, ABOVE))
    if below <= above:
        return "traces_remain", f"token by token the model has come no nearer: it lies {lies}"
    # What is still there is worse than what is missing elsewhere.
    found = "traces_remain" if counts.missed else "over_forgotten"
    return found, f"{evidence}; token by token it lies farther out, on the other side: {lies}"


def _judge_without_target(before: Entry, after: Entry) -> Judgement:
    total = left = 0.0
    for metric in JUDGED:
        old, new = before.get(metric.key("forget")), after.get(metric.key("forget"))
        # An AUC has no zero to fall to.
        if metric.of_set and metric.remembered == "higher" and old is not None and new is not None:
            total += old
            left += new
    if total == 0:
        return "undecided", "no score of the forget set was measured before, after and for a target"
    share = left / total
    evidence = f"the forget-set scores stand at {percent(share)} of the original's on average"
    if share >= RULE.still_there:
        return "traces_remain", evidence
    return "undecided", f"{evidence}, but nothing given says how low is right"


def _keep_clause(kept: Sequence[Share]) -> str:
    """Name the shares that are always named and those that were lost, or else the first."""
    if not kept:
        return "what it keeps was not measured"
    named = [share for share in kept if share.always_named or share.of_lower < RULE.kept]
    shares = [f"{percent(share.value)} of {share.words}" for share in named or kept[:1]]
    return f"it keeps {join_words(_first(shares))}"


def _first(parts: Sequence[str]) -> list[str]:
    """Return the first parts, with a word for the others where there are many."""
    if len(parts) <= MOST_NAMED:
        return list(parts)
    return [*parts[:MOST_NAMED], f"{len(parts) - MOST_NAMED} more"]
