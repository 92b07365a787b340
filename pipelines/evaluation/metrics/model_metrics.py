"""The metrics of a whole model: attacks, comparisons with the oracle, relearning."""

from functools import partial

from pipelines.evaluation.metrics import formulas, likelihood, membership, trained_attack
from pipelines.evaluation.metrics.formulas import attack_auc, mean_of, probability_of
from pipelines.evaluation.metrics.metric import NEEDS_ORACLE, Metric
from pipelines.evaluation.metrics.relearning import steps_to_relearn

# Every attack is an AUC, and the verdict counts it.
attack = partial(Metric, unit="AUC", absent="needs a holdout set", judged=True)
between_classifiers = partial(Metric, unit="distance", applies=formulas.has_classifier_oracle)

OF_MODELS = (
    attack(
        name="mia.min_k",
        version=2,
        label="min-k %",
        help="an attack by each answer's least likely tokens",
        of_answer=lambda answer: membership.min_k(answer.body.log_probability),
        reads="min_k",
        of_model=attack_auc("min_k"),
        applies=formulas.answers_can_be_attacked,
        terminal=("mia",),
        decisive="the min-k attack",
        search="own words",
    ),
    attack(
        name="mia.min_k_plus_plus",
        version=2,
        label="min-k %++",
        help="min-k %, relative to the spread of the model's predictions",
        of_answer=lambda answer: membership.min_k_plus_plus(
            answer.body.log_probability, answer.body.mean, answer.body.variance
        ),
        reads="min_k_plus_plus",
        of_model=attack_auc("min_k_plus_plus"),
        applies=formulas.answers_can_be_attacked,
    ),
    attack(
        name="mia.loss",
        label="loss",
        help="an attack by each row's loss",
        of_model=attack_auc("loss"),
        applies=formulas.can_be_attacked,
    ),
    attack(
        name="mia.zlib",
        label="zlib",
        help="an attack by the loss relative to how far the text compresses",
        of_answer=lambda answer: membership.zlib_score(
            likelihood.loss(answer.tokens.log_probability), answer.text
        ),
        reads="zlib_score",
        of_model=attack_auc("zlib_score"),
        applies=formulas.answers_can_be_attacked,
    ),
    attack(
        name="mia.grad_norm",
        label="gradient norm",
        help="an attack by the norm of each row's gradient, mean over the model's parameters",
        of_model=attack_auc("grad_norm"),
        applies=formulas.answers_can_be_attacked,
        terminal=("mia",),
    ),
    attack(
        name="mia.trained",
        label="trained",
        help="an attack by a classifier that has learned from other rows which numbers tell, and "
        "which way",
        remembered="neither",
        of_answer=lambda answer: trained_attack.outputs_of(answer.body),
        reads="outputs",
        of_model=formulas.trained_attack_auc,
        applies=formulas.answers_can_be_attacked,
    ),
    Metric(
        name="mia.reference",  # contains the oracle itself, so the verdict does not count it
        label="reference",
        help="an attack by the loss relative to the oracle's",
        unit="AUC",
        absent=NEEDS_ORACLE,
        of_model=formulas.reference_auc,
    ),
    Metric(
        # What is removed can expose what stays (Carlini et al. 2022, arXiv 2206.10469).
        name="mia.retain",
        label="loss, retained rows",
        help="an attack by loss on the rows that stay; aim: no higher than before",
        remembered="neither",
        unit="AUC",
        absent="needs a holdout set",
        of_model=attack_auc("loss", "retain"),
        applies=formulas.can_be_attacked,
    ),
    Metric(
        name="forget_quality",
        label="forget quality",
        help="p-value that the truth ratios are distributed as the oracle's (Kolmogorov-Smirnov); "
        "under 0.05 they differ, above it few rows may hide that they do",
        remembered="neither",
        unit="p-value",
        absent=NEEDS_ORACLE,
        of_model=formulas.forget_quality,
    ),
    Metric(
        name="privleak",
        version=2,
        label="PrivLeak",
        help="the min-k attack against the oracle's, in percent; aim 0, below: remembered, "
        "above: over-forgotten",
        remembered="lower",
        unit="percent",
        absent=NEEDS_ORACLE,
        of_model=formulas.privleak,
    ),
    Metric(
        name="mia_efficacy",
        label="MIA efficacy",
        help="share of the forget set that an attack trained on retained and unseen rows calls "
        "unseen; aim: the oracle's",
        remembered="lower",
        of_model=formulas.mia_efficacy,
        applies=formulas.gives_classes,
        terminal=("",),
        judged=True,
        search="classes",
    ),
    between_classifiers(
        name="activation_distance",
        remembered="neither",
        label="activation distance",
        help="between this model's and the oracle's class probabilities on the forget set; aim 0",
        of_model=formulas.activation_distance,
    ),
    between_classifiers(
        name="feature_distance",
        remembered="neither",
        label="feature distance",
        help="between the last block's features and the oracle's on the forget set, relative; "
        "aim 0, weak evidence",
        of_model=formulas.feature_distance,
    ),
    Metric(
        name="model_utility",
        label="model utility",
        help="harmonic mean of probability, ROUGE-L and truth ratio on the retain and general "
        "sets; aim: as before",
        remembered="neither",
        absent="needs probability, ROUGE-L and truth ratio of both the retain and the general set",
        of_model=formulas.model_utility,
        terminal=("",),
        kept={"": "model utility"},
    ),
    Metric(
        name="relearn.probability",
        label="probability, relearned",
        help="probability of the forget rows that are not fine-tuned on",
        of_curve=probability_of("loss"),
    ),
    Metric(
        name="relearn.fact_recall",
        label="fact recall, relearned",
        help="fact recall of the forget rows that are not fine-tuned on",
        of_curve=mean_of("fact_recall"),
    ),
    Metric(
        name="relearn.steps",
        label="steps",
        help="until the probability of the forget rows that are not fine-tuned on is halfway back "
        "to the original's",
        remembered="lower",
        unit="steps",
        of_curve=steps_to_relearn,
    ),
)
