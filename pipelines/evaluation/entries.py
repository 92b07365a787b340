"""From the samples of all models to what a score file says of each.

With several oracles a score that compares with the oracle is its mean over them, and the entry
`oracle` holds the mean of theirs. Each oracle is compared with the others as a model is with it: so
its `forget.token_distance` is the floor, how far one retrained model lies from another.

Shapes: M models, N tokens of the forget set's answers.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.intervals import Intervals, intervals_of
from pipelines.evaluation.metrics import Sample, relearn_scores, summarise
from pipelines.evaluation.metrics.keys import InContext, Rounding, versions
from pipelines.evaluation.metrics.relearning import STEPS
from pipelines.evaluation.metrics.summary import Scores, mean_scores, spread
from pipelines.evaluation.scored_model import (
    QUANTISED_SETS,
    Beside,
    Change,
    Relearned,
    ScoredModel,
    is_oracle,
)

if TYPE_CHECKING:
    from pipelines.evaluation.scorer import Samples

    SamplesByModel = Mapping[ScoredModel, Samples]


TOKENS = 2000  # in a score file, at most


class Evaluation(NamedTuple):
    """The scores of all models, and what else a score file holds beside them.

    Attributes:
        models: the entries, by model.
        oracle_spread: how much several oracles differ in each score; empty for one.
        tokens: log-probabilities of forget answers' tokens, by model, the same token at the same
            place of each list; empty without an oracle.
        intervals: of each score, and of its difference from the oracle's.
        rows: how many rows of each set were scored.
    """

    models: dict[str, Scores]
    oracle_spread: dict[str, float]
    tokens: dict[str, list[float]]
    intervals: Intervals
    rows: dict[str, int]

    def content(self) -> dict[str, Any]:
        """Return this as a part of a score file, with the version of each metric."""
        content: dict[str, Any] = {
            "models": self.models,
            "versions": versions(self.models.values()),
            "rows": self.rows,
            "intervals": self.intervals,
        }
        if self.oracle_spread:
            content["oracle_spread"] = self.oracle_spread
        if self.tokens:
            content["tokens"] = self.tokens
        return content


def evaluation_of(samples: "SamplesByModel", attacks: Mapping[str, Sequence[Change]]) -> Evaluation:
    """Return the entries of all models, from their samples.

    `attacks` has the changes that were made to each model, by the model's name.
    """
    oracles = [name for name in attacks if is_oracle(name)]
    models = _entries(list(attacks), oracles, samples)
    for name, changes in attacks.items():
        for change in changes:
            models[name] |= _scores_of_change(ScoredModel(name, change), samples)
    others = [name for name in models if name not in oracles]
    tokens = _tokens(others, oracles, samples) if others and oracles else {}

    def entries_of(drawn: "SamplesByModel") -> dict[str, Scores]:
        return _with_one_oracle(_entries(list(attacks), oracles, drawn), oracles)

    differences = spread([models[name] for name in oracles]) if len(oracles) > 1 else {}
    return Evaluation(
        models=_with_one_oracle(models, oracles),
        oracle_spread=differences,
        tokens=tokens,
        intervals=intervals_of(samples, entries_of),
        rows=dict(Counter(set_name for set_name, _ in samples[ScoredModel(next(iter(attacks)))])),
    )


def _entries(
    names: Sequence[str], oracles: Sequence[str], samples: "SamplesByModel"
) -> dict[str, Scores]:
    """Return the scores of each model as it is; a comparison is the mean over the oracles."""
    entries: dict[str, Scores] = {}
    for name in names:
        compared: list[Scores] = []
        for oracle in oracles:
            if oracle != name:
                of_oracle = _in_order(samples[ScoredModel(oracle)])
                compared.append(summarise(_rows_beside(name, oracle, samples), of_oracle))
        if compared:
            entries[name] = mean_scores(compared)
        else:
            entries[name] = summarise(_rows_beside(name, None, samples))
    return entries


def _with_one_oracle(entries: Mapping[str, Scores], oracles: Sequence[str]) -> dict[str, Scores]:
    """Put the mean of several oracles' entries in their place, as `oracle`."""
    if len(oracles) < 2:
        return dict(entries)
    others = {name: entry for name, entry in entries.items() if name not in oracles}
    return others | {"oracle": mean_scores([entries[name] for name in oracles])}


def _rows_beside(name: str, oracle: str | None, samples: "SamplesByModel") -> list[Sample]:
    """Return a model's samples with what they are compared with, of the original and an oracle.

    Without an oracle nothing says how likely a single row would be, as unseen rows are unlike. Their
    mean loss is the aim of a group's.
    """
    before = samples.get(ScoredModel("before"), {})
    of_oracle = samples[ScoredModel(oracle)] if oracle else {}
    unseen = [
        row["loss"] for row in before.values() if row["set_name"] == "holdout" and "loss" in row
    ]
    references = [reference for reference in ("before", oracle) if reference]
    rows: Samples = {}
    for key, sample in samples[ScoredModel(name)].items():
        # A copy, as the same sample is compared with every oracle.
        row = rows[key] = Sample(**sample)
        for reference in references:
            row |= samples.get(ScoredModel(name, Beside(reference)), {}).get(key, {})
        if row["set_name"] != "forget" or "loss" not in before.get(key, {}):
            continue
        row["before_loss"] = before[key]["loss"]
        if "loss" in of_oracle.get(key, {}):
            row["target_loss"] = of_oracle[key]["loss"]
        elif oracle is None and unseen:
            row["unseen_loss"] = fmean(unseen)
    return _in_order(rows)


def _scores_of_change(model: ScoredModel, samples: "SamplesByModel") -> Scores:
    """Return what a model's entry holds of a change that was made to it."""
    if isinstance(model.change, Rounding | InContext):
        scores: Scores = {}
        for key, value in summarise(_in_order(samples[model])).items():
            if key.partition(".")[0] in QUANTISED_SETS:
                scores[f"{model.change.name}.{key}"] = value
        return scores
    assert isinstance(model.change, Relearned)
    relearning = model.change.by
    curve: dict[int, list[Sample]] = {}
    for step in STEPS:
        relearned = ScoredModel(model.name, Relearned(step, relearning))
        curve[step] = _in_order(samples.get(relearned, {}))
    held_out = samples.get(ScoredModel(model.name, Relearned(0, relearning)), {})
    before = samples.get(ScoredModel("before"), {})
    # The original is scored on the whole set, and compared on the rows that were not learned.
    original = {row: sample for row, sample in before.items() if row in held_out}
    return relearn_scores(curve, _in_order(original) if before else None, relearning)


def _tokens(
    names: Sequence[str], oracles: Sequence[str], samples: "SamplesByModel"
) -> dict[str, list[float]]:
    """Return log-probabilities of the forget answers' tokens, at most TOKENS, evenly spread.

    Those under `oracle` are the mean over the oracles. A token that is not finite under one of the
    models is left out.
    """

    def column_N(name: str, oracle: str, number: str) -> NDArray[np.float64]:
        compared = _in_order(samples.get(ScoredModel(name, Beside(oracle)), {}))
        tokens = [row[number] for row in compared if number in row]
        return np.concatenate([np.zeros(0), *tokens])

    # An oracle's own numbers come with each model that was compared with it, and are all the same.
    of_oracles = [column_N(names[0], oracle, "oracle_log_probability") for oracle in oracles]
    columns = {"oracle": np.mean(of_oracles, axis=0)}
    for name in names:
        columns[name] = column_N(name, oracles[0], "log_probability")
    values_MN = np.stack(list(columns.values()))
    values_MN = values_MN[:, np.isfinite(values_MN).all(axis=0)]
    count = values_MN.shape[1]
    if count == 0:
        return {}
    kept = min(count, TOKENS)
    # Adding 0 turns -0 into 0.
    values_MN = values_MN[:, np.arange(kept) * count // kept].round(3) + 0.0
    # In the order of the text, log-probabilities could spell the text to who has the models.
    values_MN = values_MN[:, np.lexsort(values_MN[::-1])]
    return dict(zip(columns, values_MN.tolist(), strict=True))


def _in_order(samples: "Samples") -> list[Sample]:
    return [samples[row] for row in sorted(samples)]
