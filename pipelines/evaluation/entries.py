"""From the samples of all models to what a score file says of each.

With several oracles a score that compares with the oracle is its mean over them, and the entry
`oracle` holds the mean of theirs. Each oracle is compared with the others as a model is with it: so
its `forget.token_distance` is the floor, how far one retrained model lies from another.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.evaluation.metrics import Sample, relearn_scores, summarise
from pipelines.evaluation.metrics.keys import Rounding, versions
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


class Evaluation(NamedTuple):
    """The scores of all models, and how much several oracles differ in each."""

    models: dict[str, Scores]
    oracle_spread: dict[str, float]

    def content(self) -> dict[str, Any]:
        """Return this as a part of a score file, with the version of each metric."""
        content: dict[str, Any] = {
            "models": self.models,
            "versions": versions(self.models.values()),
        }
        if self.oracle_spread:
            content["oracle_spread"] = self.oracle_spread
        return content


def evaluation_of(samples: "SamplesByModel", attacks: Mapping[str, Sequence[Change]]) -> Evaluation:
    """Return the entries of all models, from their samples.

    `attacks` has the changes that were made to each model, by the model's name.
    """
    oracles = [name for name in attacks if is_oracle(name)]
    models: dict[str, Scores] = {}
    for name, changes in attacks.items():
        others = [oracle for oracle in oracles if oracle != name]
        models[name] = _compared_scores(name, others, samples)
        for change in changes:
            models[name] |= _scores_of_change(ScoredModel(name, change), samples)
    if len(oracles) < 2:
        return Evaluation(models, {})
    of_oracles = [models.pop(name) for name in oracles]
    models["oracle"] = mean_scores(of_oracles)
    return Evaluation(models, spread(of_oracles))


def _compared_scores(name: str, oracles: Sequence[str], samples: "SamplesByModel") -> Scores:
    """Return a model's scores, in comparison with these oracles where there are any."""
    if not oracles:
        return summarise(_rows_beside(name, ["before"], samples))
    compared: list[Scores] = []
    for oracle in oracles:
        rows = _rows_beside(name, ["before", oracle], samples)
        compared.append(summarise(rows, _in_order(samples[ScoredModel(oracle)])))
    return mean_scores(compared)


def _rows_beside(name: str, references: Sequence[str], samples: "SamplesByModel") -> list[Sample]:
    """Return a model's samples with its distances to the references that it was compared with."""
    rows: Samples = {}
    for key, sample in samples[ScoredModel(name)].items():
        rows[key] = Sample(**sample)
        for reference in references:
            rows[key] |= samples.get(ScoredModel(name, Beside(reference)), {}).get(key, {})
    return _in_order(rows)


def _scores_of_change(model: ScoredModel, samples: "SamplesByModel") -> Scores:
    """Return what a model's entry holds of a change that was made to it."""
    if isinstance(model.change, Rounding):
        scores: Scores = {}
        for key, value in summarise(_in_order(samples[model])).items():
            if key.partition(".")[0] in QUANTISED_SETS:
                scores[f"{model.change.name}.{key}"] = value
        return scores
    curve: dict[int, list[Sample]] = {}
    for step in STEPS:
        curve[step] = _in_order(samples.get(ScoredModel(model.name, Relearned(step)), {}))
    held_out = samples.get(ScoredModel(model.name, Relearned(0)), {})
    before = samples.get(ScoredModel("before"), {})
    original = {row: sample for row, sample in before.items() if row in held_out}
    return relearn_scores(curve, _in_order(original) if before else None)


def _in_order(samples: "Samples") -> list[Sample]:
    return [samples[row] for row in sorted(samples)]
