"""One table of metrics: nothing is scored without a row in it, and nobody keeps a list beside it."""

import ast
from pathlib import Path

import pytest

import pipelines
from pipelines.config.data import SET_NAMES
from pipelines.evaluation.metrics import Sample, relearn_scores, summarise
from pipelines.evaluation.metrics.keys import ROUNDINGS, metric_of, terminal_titles, versions
from pipelines.evaluation.metrics.metric import Metric
from pipelines.evaluation.metrics.relearning import RELEARNINGS
from pipelines.evaluation.metrics.table import METRICS
from tests.pipelines.evaluation.metrics.test_summary import full_samples

ROOT = Path(pipelines.__file__).parent.parent


@pytest.fixture(scope="module")
def entry() -> dict[str, float | None]:
    """Every key that a score file can hold."""
    classified = [
        Sample(set_name=name, loss=1.0, accuracy=1.0, probabilities=(1.0,), feature=(1.0,))
        for name in SET_NAMES
    ]
    samples = full_samples() * 3  # a group has three rows at least
    for sample in samples:
        sample |= {"before_loss": 1.0, "target_loss": 2.0, "group": 1}
    scores = summarise(samples, samples) | summarise(classified, classified)
    rounded = {
        f"{rounding.name}.{key}": value for rounding in ROUNDINGS for key, value in scores.items()
    }
    for relearning in RELEARNINGS:
        scores |= relearn_scores({0: samples, 50: samples}, samples, relearning)
    return scores | rounded


def test_every_score_comes_from_the_table_and_every_row_of_it_is_scored(
    entry: dict[str, float | None],
) -> None:
    assert {metric_of(key).name for key in entry} == {metric.name for metric in METRICS}


def test_a_score_file_carries_the_version_of_each_of_its_metrics(
    entry: dict[str, float | None],
) -> None:
    names = {named.name for named in (*METRICS, *ROUNDINGS, *RELEARNINGS)}
    assert versions([entry]).keys() == names
    assert versions([{"relearn_retain.probability.50": 0.5}]) == {
        "relearn.probability": 1,
        "relearn_retain": 1,
    }
    assert versions([{"mia.loss": 0.5}, {"quantised_4bit.forget.loss": None}]) == {
        "loss": 1,
        "mia.loss": 1,
        "quantised_4bit": 1,
    }


def test_a_key_that_is_not_in_the_table_is_an_error() -> None:
    with pytest.raises(KeyError, match="guess"):
        metric_of("mia.guess")


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_every_row_has_all_that_its_readers_need(metric: Metric) -> None:
    assert metric.label and metric.help and metric.absent and metric.version >= 1
    formulas = (metric.of_set, metric.of_model, metric.of_curve)
    assert [formula is not None for formula in formulas].count(True) == 1
    # A judged share needs a direction; an attack may find forgotten rows known or too little known.
    assert not metric.judged or metric.remembered != "neither" or metric.unit == "AUC"
    assert not metric.decisive or metric.judged
    for group in (*metric.terminal, *metric.kept):
        assert (group in SET_NAMES) == (metric.of_set is not None)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_the_documentation_says_what_a_score_is_and_which_way_is_remembered(
    metric: Metric,
) -> None:
    page = (ROOT / "docs" / "scores.md").read_text(encoding="utf-8")
    words = f"{metric.label}: {metric.help} | {metric.unit} | {metric.remembered}"
    assert f"| `{metric.name}` | {words} |\n" in page


def test_names_are_unique_and_so_are_the_terminals_titles() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert len(set(terminal_titles().values())) == len(terminal_titles())


def test_no_other_module_lists_metrics() -> None:
    names = {metric.name for metric in METRICS} - {"loss", "accuracy", "probability"}
    keys = {f"{set_name}.{name}" for set_name in SET_NAMES for name in names} | names
    for package in ("pipelines", "tuning", "deploy"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name in ("set_metrics.py", "model_metrics.py"):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Tuple | ast.List | ast.Set):
                    texts = [part.value for part in node.elts if isinstance(part, ast.Constant)]
                    assert len(keys.intersection(texts)) < 2, f"{path}:{node.lineno}"
