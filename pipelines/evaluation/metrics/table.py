"""The table of metrics. Its readers: scores.json (its `versions`), the terminal, the page,
docs/scores.md, the verdict and the search's score.
"""

from functools import partial

from pipelines.evaluation.metrics import formulas, likelihood, membership, memorization
from pipelines.evaluation.metrics.formulas import attack_auc, mean_of, probability_of, token_mean_of
from pipelines.evaluation.metrics.metric import Metric
from pipelines.evaluation.metrics.relearning import steps_to_relearn

NEEDS_ORACLE = "compares with the retrained oracle"
NEEDS_FACTS = "the data does not say which words are the facts"
NEEDS_PARAPHRASES = "the data has no paraphrases"
NEEDS_HOLDOUT = "needs a holdout set"
# Every attack is an AUC, and the verdict counts it.
attack = partial(Metric, unit="AUC", absent=NEEDS_HOLDOUT, judged=True)
between_classifiers = partial(Metric, unit="distance", applies=formulas.has_classifier_oracle)
distance = partial(Metric, unit="nats", absent=NEEDS_ORACLE, remembered="neither")

# Hardest to fool first; tables and plots keep this order.
METRICS = (
    distance(
        name="token_distance",
        label="token distance",
        help="KL divergence of the model's next-token distribution from the oracle's at each token "
        "of an answer, mean over tokens; aim 0, or the distance between two oracles",
        of_set=token_mean_of("token_distance"),
        terminal=("forget",),
    ),
    distance(
        name="token_distance_above",
        label="token distance, too little forgotten",
        help="the part of it from tokens that are likelier than to the oracle by more than "
        "0.7 nats",
        remembered="higher",
        of_set=token_mean_of("token_distance_above"),
    ),
    distance(
        name="token_distance_below",
        label="token distance, too much forgotten",
        help="the part of it from tokens that are less likely than to the oracle by more than "
        "0.7 nats",
        of_set=token_mean_of("token_distance_below"),
    ),
    distance(
        name="token_distance_paraphrased",
        label="token distance, paraphrased",
        help="token distance when the question is put in other words",
        of_set=token_mean_of("token_distance_paraphrased"),
        terminal=("forget",),
    ),
    Metric(
        name="kept_distance",
        label="kept distance",
        help="KL divergence of the next-token distribution from the original model's at each token "
        "of an answer, mean over tokens; aim 0",
        remembered="neither",
        unit="nats",
        of_set=token_mean_of("kept_distance"),
        terminal=("retain", "general"),
    ),
    Metric(
        name="extraction_strength",
        label="extraction strength",
        help="share of an answer that the model completes word for word from its beginning",
        of_answer=lambda answer: memorization.extraction_strength(answer.body.is_argmax),
        of_set=mean_of("extraction_strength"),
        terminal=("forget",),
        judged=True,
        decisive="extraction strength",
        is_verbatim=True,
    ),
    Metric(
        name="exact_memorization",
        label="exact memorisation",
        help="share of an answer's tokens that are the model's first choice",
        of_answer=lambda answer: memorization.exact_memorization(answer.body.is_argmax),
        of_set=mean_of("exact_memorization"),
        judged=True,
        is_verbatim=True,
    ),
    Metric(
        name="probability",
        label="probability",
        help="how likely the labelled answer is to the model, per token",
        of_set=probability_of("loss"),
        terminal=("forget", "retain", "general"),
        judged=True,
        kept={
            "retain": "the retained answers' probability",
            "general": "general knowledge",
            "utility": "the utility text's probability",
        },
        is_utility=True,
        search="own words",
    ),
    Metric(
        name="probability_paraphrased",
        label="probability, paraphrased",
        help="probability when the question is put in other words",
        absent=NEEDS_PARAPHRASES,
        of_set=probability_of("loss_paraphrased"),
        judged=True,
        kept={"retain": "the paraphrased retained answers' probability"},
        search="other words",
    ),
    Metric(
        name="fact_recall",
        label="fact recall",
        help="share of answers whose fact the model would complete word for word, "
        "given the words before it",
        absent=NEEDS_FACTS,
        of_set=mean_of("fact_recall"),
        terminal=("forget", "retain"),
        judged=True,
        decisive="fact recall",
        kept={"retain": "the retained facts", "general": "the general facts"},
        search="own words",
    ),
    Metric(
        name="fact_recall_paraphrased",
        label="fact recall, paraphrased",
        help="fact recall when the question is put in other words",
        absent=NEEDS_FACTS,
        of_set=mean_of("fact_recall_paraphrased"),
        terminal=("forget",),
        judged=True,
        search="other words",
    ),
    Metric(
        name="rouge",
        label="ROUGE-L",
        help="how much of the labelled answer the model says when asked; easy to fool",
        of_set=mean_of("rouge"),
        terminal=("forget", "retain"),
        judged=True,
        kept={"retain": "the retained answers' wording", "general": "the general answers' wording"},
    ),
    Metric(
        name="rouge_paraphrased",
        label="ROUGE-L, paraphrased",
        help="ROUGE-L when the question is put in other words",
        absent=NEEDS_PARAPHRASES,
        of_set=mean_of("rouge_paraphrased"),
        terminal=("forget",),
        judged=True,
    ),
    Metric(
        name="truth_ratio",
        label="truth ratio",
        help="right answers against wrong ones; on the forget set 1 = cannot tell them apart, "
        "elsewhere 1 = right ones win",
        remembered="lower",
        absent="the data has no perturbed answers",
        of_set=formulas.mean_truth_ratio,
        judged=True,
    ),
    Metric(
        name="accuracy",
        label="accuracy",
        help="share of rows that are given the right class",
        of_set=mean_of("accuracy"),
        terminal=("forget", "retain", "general"),
        judged=True,
        decisive="accuracy",
        kept={"retain": "the retained rows' accuracy", "general": "the accuracy on unseen rows"},
        is_utility=True,
        search="classes",
    ),
    Metric(
        name="remembered_rows",
        label="remembered rows",
        help="share of rows whose probability is nearer to the original's than to the oracle's",
        absent=NEEDS_ORACLE,
        of_set=formulas.remembered_rows,
        terminal=("forget",),
    ),
    Metric(
        name="remembered_rows_worst_group",
        label="remembered rows, worst group",
        help="the largest share of remembered rows of any group (`data.columns.label`) of 3 or more",
        of_set=formulas.remembered_in_worst_group,
        terminal=("forget",),
    ),
    Metric(
        name="loss",
        label="loss",
        help="mean negative log-likelihood of an answer's tokens, in nats",
        remembered="lower",
        unit="nats",
        of_answer=lambda answer: likelihood.loss(answer.tokens.log_probability),
        of_set=mean_of("loss"),
    ),
    Metric(
        name="perplexity",
        label="perplexity",
        help="exponential of the loss over the tokens of all answers",
        remembered="lower",
        unit="perplexity",
        of_set=formulas.perplexity,
    ),
    Metric(
        name="entropy",
        label="entropy",
        help="how unsure the model is of the next token, in nats, mean over an answer's tokens",
        remembered="lower",
        unit="nats",
        of_answer=likelihood.entropy,
        of_set=mean_of("entropy"),
    ),
    attack(
        name="mia.min_k",
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
    Metric(
        name="mia.reference",  # contains the oracle itself, so the verdict does not count it
        label="reference",
        help="an attack by the loss relative to the oracle's",
        unit="AUC",
        absent=NEEDS_ORACLE,
        of_model=formulas.reference_auc,
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
        help="probability of the half of the forget set that is not fine-tuned on",
        of_curve=probability_of("loss"),
    ),
    Metric(
        name="relearn.fact_recall",
        label="fact recall, relearned",
        help="fact recall of the half of the forget set that is not fine-tuned on",
        of_curve=mean_of("fact_recall"),
    ),
    Metric(
        name="relearn.steps",
        label="steps",
        help="until the probability of the other half is halfway back to the original's",
        remembered="lower",
        unit="steps",
        of_curve=steps_to_relearn,
    ),
)
BY_NAME = {metric.name: metric for metric in METRICS}
