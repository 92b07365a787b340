"""A model's entry in scores.json, from a handful of samples."""

import json
from math import inf, log, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config.data import SET_NAMES
from pipelines.evaluation.metrics import Sample, summarise
from pipelines.evaluation.metrics.table import METRICS

ALWAYS = {"mia.reference", "privleak", "forget_quality", "model_utility"}


def full_sample(set_name: str, loss: float) -> Sample:
    """A row with every field; its correct answer has probability 1/2 and its perturbed answers 1/8."""
    numbers = {metric.reads or metric.name: 0.5 for metric in METRICS if metric.of_answer}
    numbers |= {"loss": loss, "exact_memorization": 0.75, "zlib_score": loss / 10}
    numbers |= {"min_k": loss, "min_k_plus_plus": -loss}
    return Sample(
        set_name=set_name,
        **numbers,
        tokens=2,
        loss_paraphrased=log(8),
        correct_loss=log(2),
        perturbed_losses=(log(4), log(16)),
        rouge=0.5,
        rouge_paraphrased=0.25,
        leak_at_k=0.75,
        fact_recall=1.0,
        fact_recall_paraphrased=0.0,
        grad_norm=loss,
        token_distance=0.5,
        token_distance_above=0.25,
        token_distance_below=0.125,
        token_distance_paraphrased=1.0,
        kept_distance=0.0625,
    )


def changed(sample: Sample, **numbers: float) -> Sample:
    return Sample(**{**sample, **numbers})


def full_samples(forget_loss: float = log(2)) -> list[Sample]:
    """Two rows a set; only the losses of the forget set vary."""
    return [
        full_sample(name, forget_loss if name == "forget" else log(4))
        for name in SET_NAMES
        for _ in range(2)
    ]


def test_a_set_is_summarised_by_its_means() -> None:
    scores = summarise(full_samples())
    assert scores["forget.probability"] == pytest.approx(1 / 2)
    assert scores["forget.loss"] == pytest.approx(log(2))
    assert scores["forget.perplexity"] == pytest.approx(2)
    assert scores["forget.rouge"] == 0.5
    assert scores["forget.probability_paraphrased"] == pytest.approx(1 / 8)
    assert scores["forget.rouge_paraphrased"] == 0.25
    assert scores["forget.leak_at_k"] == 0.75
    assert scores["forget.fact_recall"] == 1.0
    assert scores["forget.fact_recall_paraphrased"] == 0.0
    assert scores["forget.exact_memorization"] == 0.75
    assert scores["forget.extraction_strength"] == 0.5
    assert scores["retain.probability"] == pytest.approx(1 / 4)


def test_the_truth_ratio_is_read_the_other_way_round_outside_the_forget_set() -> None:
    scores = summarise(full_samples())  # TR = (1/8) / (1/2)
    assert scores["forget.truth_ratio"] == pytest.approx(0.25)
    assert scores["retain.truth_ratio"] == scores["general.truth_ratio"] == pytest.approx(0.75)


def test_the_answer_stands_in_for_a_paraphrase_that_is_not_there() -> None:
    sample = Sample(set_name="general", loss=log(2), perturbed_losses=(log(8),))
    assert summarise([sample])["general.truth_ratio"] == pytest.approx(0.75)


def test_perplexity_weighs_a_row_by_its_tokens_and_loss_does_not() -> None:
    samples = [
        Sample(set_name="utility", loss=log(2), tokens=3),
        Sample(set_name="utility", loss=log(8), tokens=1),
        Sample(set_name="utility", rouge=1.0),
    ]
    scores = summarise(samples)
    assert scores["utility.loss"] == pytest.approx(2 * log(2))
    assert scores["utility.perplexity"] == pytest.approx(2**1.5)


def test_a_row_without_a_number_is_left_out_of_the_mean() -> None:
    samples = [
        Sample(set_name="retain", rouge=0.5, tokens=4, perturbed_losses=(1.0,)),
        Sample(
            set_name="retain", loss=log(2), tokens=1, correct_loss=0.0, perturbed_losses=(log(4),)
        ),
    ]
    scores = summarise(samples)
    assert scores["retain.rouge"] == 0.5
    assert scores["retain.perplexity"] == pytest.approx(2)
    assert scores["retain.truth_ratio"] == pytest.approx(0.75)


def test_fact_recall_is_the_share_of_recalled_facts_among_rows_that_have_one() -> None:
    samples = [
        Sample(set_name="forget", fact_recall=recall) for recall in (1.0, 0.0, 0.0, None, 0.0)
    ]
    scores = summarise([changed(samples[0], fact_recall_paraphrased=1.0), *samples[1:]])
    assert scores["forget.fact_recall"] == 0.25
    assert scores["forget.fact_recall_paraphrased"] == 1.0


def test_a_metric_no_row_has_a_number_for_is_absent() -> None:
    scores = summarise([Sample(set_name="retain", loss=1.0)])
    assert set(scores) == ALWAYS | {"retain.loss", "retain.probability"}


def test_without_samples_only_what_is_always_there_is_there() -> None:
    assert summarise([]) == dict.fromkeys(ALWAYS)


def test_attacks_compare_forget_with_holdout() -> None:
    samples = [
        Sample(set_name="forget", loss=1.0, zlib_score=2.0, min_k=1.0, min_k_plus_plus=1.0),
        Sample(set_name="forget", loss=3.0, zlib_score=2.0, min_k=1.0, min_k_plus_plus=1.0),
        Sample(set_name="holdout", loss=2.0, zlib_score=1.0, min_k=2.0, min_k_plus_plus=1.0),
    ]
    scores = summarise(samples)
    names = ("mia.loss", "mia.zlib", "mia.min_k", "mia.min_k_plus_plus")
    assert [scores[name] for name in names] == [0.5, 0.0, 1.0, 0.5]


def test_the_retained_rows_are_attacked_against_the_holdout_set_too() -> None:
    losses = {"forget": [9.0], "retain": [1.0, 2.5, 4.0], "holdout": [2.0, 3.0]}
    samples = [Sample(set_name=name, loss=loss) for name in losses for loss in losses[name]]
    # Of six pairs the unseen row has the higher loss in (1, 2), (1, 3) and (2.5, 3).
    assert summarise(samples)["mia.retain"] == 0.5
    assert summarise(samples)["mia.loss"] == 0.0


@pytest.mark.parametrize("missing", ["forget", "holdout"])
def test_without_forget_or_holdout_there_is_no_attack(missing: str) -> None:
    scores = summarise([sample for sample in full_samples() if sample["set_name"] != missing])
    assert [name for name in scores if name.startswith("mia.")] == ["mia.reference"]
    assert scores["mia.reference"] is None


def test_an_attack_without_a_score_on_one_side_is_none() -> None:
    scores = summarise(
        [Sample(set_name="forget", loss=1.0, min_k=1.0), Sample(set_name="holdout", loss=2.0)]
    )
    assert scores["mia.loss"] == 1.0
    assert scores["mia.min_k"] is None


def test_without_an_oracle_what_compares_with_it_is_none() -> None:
    scores = summarise(full_samples())
    assert scores["mia.reference"] is scores["privleak"] is scores["forget_quality"] is None


def test_a_model_equal_to_its_oracle_cannot_be_told_from_it() -> None:
    scores = summarise(full_samples(forget_loss=log(4)), full_samples(forget_loss=log(4)))
    assert (scores["mia.reference"], scores["privleak"], scores["forget_quality"]) == (
        0.5,
        0.0,
        1.0,
    )


def test_a_model_that_still_knows_the_forget_set_is_told_from_its_oracle() -> None:
    # forget: loss log 2 against the oracle's log 4; AUC of min_k 1 against 1/2, so privleak = -100
    scores = summarise(full_samples(forget_loss=log(2)), full_samples(forget_loss=log(4)))
    assert scores["mia.reference"] == 1.0
    assert scores["privleak"] == pytest.approx(-100.0)


def test_privleak_reads_the_auc_of_min_k_and_no_other() -> None:
    def with_min_k(forget: float) -> list[Sample]:
        rows = [("forget", forget), ("holdout", 2.0)]
        return [Sample(set_name=name, loss=1.0, tokens=2, min_k=score) for name, score in rows]

    # AUC 1 for the model (1 < 2), 1/2 for the oracle (a tie); the losses tie everywhere
    assert summarise(with_min_k(1.0), with_min_k(2.0))["privleak"] == pytest.approx(-100.0)


@pytest.mark.filterwarnings("error")
def test_forget_quality_needs_the_ratios_of_both_models() -> None:
    model = [Sample(set_name="forget", loss=1.0, perturbed_losses=(1.0,))]
    without = [Sample(set_name="forget", loss=1.0)]
    assert summarise(model, without)["forget_quality"] is None
    assert summarise(without, model)["forget_quality"] is None
    assert summarise(model, model)["forget_quality"] == 1.0


def test_forget_quality_compares_the_raw_ratios_of_the_forget_set_only() -> None:
    def with_ratios(forget: list[float], retain: float) -> list[Sample]:
        rows = [("forget", ratio) for ratio in forget] + [("retain", retain)] * 9
        return [
            Sample(set_name=name, correct_loss=0.0, perturbed_losses=(-log(ratio),))
            for name, ratio in rows
        ]

    model, oracle = with_ratios([0.1, 0.2, 0.3], 0.1), with_ratios([0.7, 0.8, 0.9], 0.9)
    # 2 of the C(6, 3) = 20 arrangements are as extreme; 1/TR or the retain rows would change that
    assert summarise(model, oracle)["forget_quality"] == pytest.approx(0.1)


def test_an_oracle_of_other_rows_is_refused() -> None:
    model = [Sample(set_name="forget", loss=1.0, tokens=3)]
    with pytest.raises(ValueError, match="forget: 1 samples of the model, but 2 of the oracle"):
        summarise(model, model * 2)
    with pytest.raises(
        ValueError, match="sample 0 has 3 tokens for the model and 4 for the oracle"
    ):
        summarise(model, [changed(model[0], tokens=4)])


def test_model_utility_is_the_harmonic_mean_of_retain_and_general() -> None:
    # probability 1/4, rouge 1/2, truth ratio 3/4 in both sets: 3 / (4 + 2 + 4/3)
    assert summarise(full_samples())["model_utility"] == pytest.approx(3 / (4 + 2 + 4 / 3))


@pytest.mark.parametrize("missing", ["retain", "general"])
def test_model_utility_needs_both_sets(missing: str) -> None:
    assert (
        summarise([row for row in full_samples() if row["set_name"] != missing])["model_utility"]
        is None
    )


@pytest.mark.parametrize("broken", [nan, inf, 1e6])
def test_a_number_that_is_not_finite_becomes_none(broken: float) -> None:
    samples = [*full_samples(), changed(full_sample("forget", broken), min_k=broken, rouge=nan)]
    scores = summarise(samples, samples)
    assert scores["forget.perplexity"] is None
    assert scores["forget.rouge"] is None
    json.dumps(scores, allow_nan=False)


def test_a_classifier_is_scored_by_what_it_gets_right_and_gives_away() -> None:
    def sample(
        name: str, loss: float, probabilities: tuple[float, float], feature: tuple[float, float]
    ) -> Sample:
        right = float(probabilities[0] > 0.5)
        return Sample(
            set_name=name, loss=loss, accuracy=right, probabilities=probabilities, feature=feature
        )

    members = [sample("retain", 0.1, (0.9, 0.1), (1.0, 0.0))] * 8
    unseen = [sample("general", 2.0, (0.1, 0.9), (1.0, 0.0))] * 8
    forget = [
        sample("forget", 2.1, (0.2, 0.8), (0.0, 1.0)),
        sample("forget", 0.05, (1.0, 0.0), (0.0, 2.0)),
    ]
    oracle = [
        sample("forget", 2.0, (0.2, 0.8), (0.0, 1.0)),
        sample("forget", 2.0, (0.4, 0.6), (0.0, 1.0)),
    ]
    scores = summarise([*members, *unseen, *forget], oracle)
    assert (scores["retain.accuracy"], scores["general.accuracy"], scores["forget.accuracy"]) == (
        1,
        0,
        0.5,
    )
    assert scores["mia_efficacy"] == 0.5
    assert scores["activation_distance"] == pytest.approx(0.6 * 2**0.5 / 2)
    assert scores["feature_distance"] == pytest.approx(0.5)
    assert "forget_quality" not in scores


@settings(deadline=None, max_examples=50)
@given(
    st.permutations(
        [
            *full_samples(forget_loss=0.1)[:4],
            full_sample("forget", 2.0),
            full_sample("holdout", 1.0),
        ]
    )
)
def test_the_order_of_the_samples_does_not_matter(samples: list[Sample]) -> None:
    expected = summarise(sorted(samples, key=lambda sample: (sample["set_name"], sample["loss"])))
    assert summarise(samples) == pytest.approx(expected)
