"""From the samples of one model to one number: the formulas that the table of metrics names.

A formula of a set gets the rows of one set and returns None when no row carries its number. A
formula of a model gets the model's rows and the retrain oracle's, each by set. A row without a
number is left out of a mean.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from pipelines.evaluation.metrics import (
    classification,
    likelihood,
    membership,
    trained_attack,
    truth_ratio,
    utility,
)
from pipelines.evaluation.metrics.sample import Sample

Rows = Sequence[Sample]
# A row that the original has likelier than the target by no more than this was not learned from it.
MIN_LEARNED = 0.1
# Of fewer rows a single one would make a group's share.
MIN_GROUP = 3
# So much likelier, chance does not explain it: a group of fewer rows tells something, too.
CLEARLY_LEARNED = 0.3
# A group is untouched whose loss has gone less than this part of the way to where it should be.
MIN_MOVED = 0.1
RowsBySet = Mapping[str, Rows]  # of every set; none of a set that was not scored
OfSet = Callable[[Rows], float | None]
OfModel = Callable[[RowsBySet, RowsBySet | None], float | None]


def mean_of(name: str) -> OfSet:
    """Return the formula of a number's mean."""
    return partial(_average, name, lambda values: float(np.mean(values)))


def token_mean_of(name: str) -> OfSet:
    """Return the mean over all tokens of the rows, of a number that is each row's mean."""

    def formula(rows: Rows) -> float | None:
        rows = [row for row in rows if row.get(name) is not None and row.get("tokens")]
        if not rows:
            return None
        return float(np.average(_values(rows, name), weights=_values(rows, "tokens")))

    return formula


def probability_of(name: str) -> OfSet:
    """Return the formula of the mean probability of the answers that have this loss."""
    return partial(_average, name, likelihood.probability)


def _average(name: str, average: Callable[[list[float]], float], rows: Rows) -> float | None:
    values = _values(rows, name)
    return average(values) if values else None


def _values(rows: Rows, name: str) -> list[Any]:
    return [row[name] for row in rows if row.get(name) is not None]


def remembered_rows(rows: Rows) -> float | None:
    """Return the share of rows that are nearer to the original model than to a retrained one.

    A row counts by its answer's probability, and only where the original has it clearly likelier
    than the oracle: `before_loss` and `target_loss` of the sample.
    """
    compared = [row for row in rows if "target_loss" in row and row.get("loss") is not None]
    if not compared:
        return None
    remembered: list[bool] = []
    for row in compared:
        before = likelihood.probability([row["before_loss"]])
        after = likelihood.probability([row["loss"]])
        target = likelihood.probability([row["target_loss"]])
        was_learned = before - target > MIN_LEARNED
        remembered.append(was_learned and after - target > before - after)
    return float(np.mean(remembered))


def remembered_in_worst_group(rows: Rows) -> float | None:
    """Return the largest share of `remembered_rows` of any group of MIN_GROUP rows or more.

    None of rows without such groups.
    """
    shares = [remembered_rows(group) for group in _groups(rows) if len(group) >= MIN_GROUP]
    return max((share for share in shares if share is not None), default=None)


def untouched_groups(rows: Rows) -> float | None:
    """Return the share of groups whose mean loss has hardly moved from the original's.

    The way is that to the oracle's, or without one to unseen rows' mean, of which only groups of
    MIN_GROUP rows or more are judged. A group that was not learned is not untouched.
    """
    untouched: list[bool] = []
    for group in _groups(rows):
        aim = "target_loss" if "target_loss" in group[0] else "unseen_loss"
        losses = {name: _values(group, name) for name in ("before_loss", "loss", aim)}
        is_small = len(group) < MIN_GROUP
        if not all(losses.values()) or (is_small and aim == "unseen_loss"):
            continue
        learned = likelihood.probability(losses["before_loss"]) - likelihood.probability(
            losses[aim]
        )
        before, after, target = (float(np.mean(values)) for values in losses.values())
        was_learned = learned > (CLEARLY_LEARNED if is_small else MIN_LEARNED)
        untouched.append(was_learned and after - before < MIN_MOVED * (target - before))
    return float(np.mean(untouched)) if untouched else None


def _groups(rows: Rows) -> list[list[Sample]]:
    """Return the rows of each group; rows without one are left out."""
    groups: dict[int, list[Sample]] = {}
    for row in rows:
        if row.get("group") is not None:
            groups.setdefault(row["group"], []).append(row)
    return list(groups.values())


def perplexity(rows: Rows) -> float | None:
    """Return the perplexity over all tokens of the rows."""
    rows = [row for row in rows if row.get("loss") is not None and row.get("tokens") is not None]
    if not rows:
        return None
    return likelihood.perplexity(_values(rows, "loss"), _values(rows, "tokens"))


def mean_truth_ratio(rows: Rows) -> float | None:
    """Return the mean truth ratio, read the other way round on the forget set."""
    ratios = _truth_ratios(rows)
    if not ratios:
        return None
    if rows[0]["set_name"] == "forget":
        return truth_ratio.forget_truth_ratio(ratios)
    return truth_ratio.retain_truth_ratio(ratios)


def _truth_ratios(rows: Rows) -> list[float]:
    """Return the raw ratios of the rows that have a perturbed answer and a correct one."""
    ratios: list[float] = []
    for row in rows:
        correct = row.get("correct_loss")
        if correct is None:
            correct = row.get("loss")
        if correct is not None and row.get("perturbed_losses"):
            ratios.append(truth_ratio.truth_ratio(correct, row["perturbed_losses"]))
    return ratios


def gives_classes(model: RowsBySet, _: RowsBySet | None = None) -> bool:
    """Return whether the model is a classifier: its rows carry a class."""
    return any(row.get("accuracy") is not None for rows in model.values() for row in rows)


def gives_answers(model: RowsBySet, _: RowsBySet | None) -> bool:
    """Return whether the model is a language model."""
    return not gives_classes(model)


def can_be_attacked(model: RowsBySet, _: RowsBySet | None) -> bool:
    """Return whether there are rows on both sides of a membership attack."""
    return bool(model["forget"] and model["holdout"])


def answers_can_be_attacked(model: RowsBySet, oracle: RowsBySet | None) -> bool:
    """Return whether a membership attack can be made on a language model."""
    return gives_answers(model, oracle) and can_be_attacked(model, oracle)


def has_classifier_oracle(model: RowsBySet, oracle: RowsBySet | None) -> bool:
    """Return whether a classifier and its oracle scored the same forget rows."""
    if oracle is None or not model["forget"] or not gives_classes(model):
        return False
    return len(model["forget"]) == len(oracle["forget"])


def attack_auc(name: str, members: str = "forget") -> OfModel:
    """Return the formula of a membership attack's AUC on a set, by this number of a row."""

    def formula(model: RowsBySet, _: RowsBySet | None) -> float | None:
        return membership.auc(_values(model[members], name), _values(model["holdout"], name))

    return formula


def trained_attack_auc(model: RowsBySet, _: RowsBySet | None) -> float | None:
    """Return the AUC of a classifier of several numbers of each row's predictions."""
    return trained_attack.trained_auc(
        _values(model["forget"], "outputs"), _values(model["holdout"], "outputs")
    )


def reference_auc(model: RowsBySet, oracle: RowsBySet | None) -> float | None:
    """Return the AUC of the attack on the difference of both models' losses.

    Raises:
        ValueError: the models did not score the same rows in the same order.
    """
    if oracle is None:
        return None
    return membership.auc(
        _reference_scores("forget", model, oracle), _reference_scores("holdout", model, oracle)
    )


def _reference_scores(set_name: str, model: RowsBySet, oracle: RowsBySet) -> list[float]:
    rows, oracle_rows = model[set_name], oracle[set_name]
    if len(rows) != len(oracle_rows):
        raise ValueError(
            f"{set_name}: {len(rows)} samples of the model, but {len(oracle_rows)} of the oracle"
        )
    scores: list[float] = []
    for index, (row, oracle_row) in enumerate(zip(rows, oracle_rows, strict=True)):
        tokens, oracle_tokens = row.get("tokens"), oracle_row.get("tokens")
        if tokens != oracle_tokens:
            raise ValueError(
                f"{set_name}: sample {index} has {tokens} tokens for the model and {oracle_tokens} "
                "for the oracle; both need the same rows in the same order and the same tokenizer"
            )
        if row.get("loss") is not None and oracle_row.get("loss") is not None:
            scores.append(membership.reference_score(row["loss"], oracle_row["loss"]))
    return scores


def privleak(model: RowsBySet, oracle: RowsBySet | None) -> float | None:
    """Return PrivLeak, from the min-k attack on both models."""
    if oracle is None:
        return None
    min_k_auc = attack_auc("min_k")
    return membership.privleak(min_k_auc(model, None), min_k_auc(oracle, None))


def forget_quality(model: RowsBySet, oracle: RowsBySet | None) -> float | None:
    """Return forget quality, from both models' raw truth ratios on the forget set."""
    ratios = _truth_ratios(model["forget"])
    oracle_ratios = _truth_ratios(oracle["forget"]) if oracle is not None else []
    return truth_ratio.forget_quality(ratios, oracle_ratios) if ratios and oracle_ratios else None


def model_utility(model: RowsBySet, _: RowsBySet | None) -> float | None:
    """Return model utility, from three scores of the retain and of the general set."""
    # Six, where TOFU has nine: the general set stands for its real authors and world facts.
    components: list[float | None] = []
    for rows in (model["retain"], model["general"]):
        components += [probability_of("loss")(rows), mean_of("rouge")(rows), mean_truth_ratio(rows)]
    return utility.model_utility(components)


def mia_efficacy(model: RowsBySet, _: RowsBySet | None) -> float | None:
    """Return the share of the forget set that an attack on losses calls never seen."""
    members, unseen = _values(model["retain"], "loss"), _values(model["general"], "loss")
    return classification.mia_efficacy(members, unseen, _values(model["forget"], "loss"))


def activation_distance(model: RowsBySet, oracle: RowsBySet | None) -> float | None:
    """Return the distance of both models' class probabilities on the forget set."""
    assert oracle is not None
    return classification.activation_distance(
        _values(model["forget"], "probabilities"), _values(oracle["forget"], "probabilities")
    )


def feature_distance(model: RowsBySet, oracle: RowsBySet | None) -> float | None:
    """Return the distance of both models' features there; None where their sizes differ."""
    assert oracle is not None
    features = _values(model["forget"], "feature")
    oracle_features = _values(oracle["forget"], "feature")
    if len(features[0]) != len(oracle_features[0]):
        return None
    return classification.feature_distance(features, oracle_features)
