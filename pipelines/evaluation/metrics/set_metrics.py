"""The metrics of a set's rows, hardest to fool first; tables and plots keep this order."""

from functools import partial

from pipelines.evaluation.metrics import formulas, likelihood, memorization
from pipelines.evaluation.metrics.formulas import mean_of, probability_of, token_mean_of
from pipelines.evaluation.metrics.metric import NEEDS_ORACLE, Metric
from pipelines.evaluation.metrics.sampling import SAMPLES

NEEDS_FACTS = "the data does not say which words are the facts"
NEEDS_PARAPHRASES = "the data has no paraphrases"
distance = partial(Metric, unit="nats", absent=NEEDS_ORACLE, remembered="neither")

OF_SETS = (
    distance(
        name="token_distance",
        label="token distance",
        help="KL divergence of the model's next-token distribution from the oracle's at each token "
        "of an answer, mean over tokens; aim 0, or the distance between two oracles",
        of_set=token_mean_of("token_distance"),
        terminal=("forget", "earlier"),
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
        terminal=("retain", "general", "neighbours"),
    ),
    Metric(
        name="extraction_strength",
        version=2,
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
        version=2,
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
        terminal=("forget", "earlier", "retain", "general", "neighbours"),
        judged=True,
        kept={
            "retain": "the retained answers' probability",
            "general": "general knowledge",
            "neighbours": "the neighbours' probability",
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
        terminal=("forget", "earlier", "retain"),
        judged=True,
        decisive="fact recall",
        kept={
            "retain": "the retained facts",
            "general": "the general facts",
            "neighbours": "the neighbours' facts",
        },
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
        name="leak_at_k",
        label=f"leak@{SAMPLES}",
        help=f"ROUGE-L of the best of {SAMPLES} answers that are drawn at temperature 1",
        of_set=mean_of("leak_at_k"),
        terminal=("forget",),
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
        terminal=("forget", "earlier", "retain", "general", "neighbours"),
        judged=True,
        decisive="accuracy",
        kept={
            "retain": "the retained rows' accuracy",
            "general": "the accuracy on unseen rows",
            "neighbours": "the neighbours' accuracy",
        },
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
        help="the largest share of remembered rows of any group of 3 or more",
        version=2,
        of_set=formulas.remembered_in_worst_group,
        terminal=("forget",),
    ),
    Metric(
        name="untouched_groups",
        label="untouched groups",
        help="share of groups whose mean loss has gone less than a tenth of the way from the "
        "original's to the oracle's or, without one, to that of unseen rows",
        of_set=formulas.untouched_groups,
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
)
