"""Losses on a model's answers to the forget set: the baselines of the field.

Each is a function and a row of `FORGET_LOSSES`. `objective.output` chooses the row, and
`objective.weights.output` weighs it. Gradient difference (Liu et al. 2022, arXiv 2203.12817) is
`ascent` with `objective.weights.task`.

Torch is not imported here, because the configuration reads names and ranges off the table, and the
command line starts without torch.

Shapes: N answer tokens or classified rows, R rows, V vocabulary or classes.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Answers(NamedTuple):
    """The model's predictions of the forget set's answers.

    `log_NV` are the log-probabilities of every token or class, and `label_N` is the right one.
    `index_N` counts the rows from 0, and `number_N` is the row's number in its set. `teacher_NV`
    are the base model's log-probabilities, for losses that need a teacher. `refusal_N` marks the
    tokens of refusals. They have the index of the row that they stand for.
    """

    log_NV: "Tensor"
    label_N: "Tensor"
    index_N: "Tensor"
    number_N: "Tensor"
    teacher_NV: "Tensor | None" = None
    refusal_N: "Tensor | None" = None

    def label_log_N(self, log_NV: "Tensor") -> "Tensor":
        """Return the log-probabilities of the labels in `log_NV`, [N]."""
        return log_NV.gather(1, self.label_N[:, None])[:, 0]

    def with_label(self, log_NV: "Tensor", value_N: "Tensor") -> "Tensor":
        """Return the log-probabilities [N, V] with the label's set to a value, normalised again."""
        return log_NV.scatter(1, self.label_N[:, None], value_N[:, None]).log_softmax(1)

    def cross_entropy_N(self, target_NV: "Tensor") -> "Tensor":
        """Return the cross-entropy of the predictions to log-probabilities [N, V], [N]."""
        return -(target_NV.exp() * self.log_NV).sum(1)

    def row_sums(self, value_N: "Tensor") -> "Tensor":
        """Sum a value over each row's tokens, [R]."""
        # Rows are counted without gaps, so the last index has their number. Of no rows there is no
        # maximum.
        rows = int(self.index_N.max()) + 1 if len(self.index_N) else 0
        return value_N.new_zeros(rows).index_add(0, self.index_N.to(value_N.device), value_N)


def unlikelihood(answers: Answers) -> "Tensor":
    """Return -log(1 - p) of the label, [N] (Welleck et al. 2019, arXiv 1908.04319)."""
    # 1 - p is the sum of the other probabilities. The difference would lose its digits near p = 1.
    return -answers.log_NV.scatter(1, answers.label_N[:, None], -math.inf).logsumexp(1)


def ascent(answers: Answers) -> "Tensor":
    """Return log p of the label, [N]: gradient ascent on its cross-entropy."""
    return answers.label_log_N(answers.log_NV)


def descent(answers: Answers) -> "Tensor":
    """Return -log p of the label, [N]: its cross-entropy, for what is learned to be taken away.

    Ilharco et al. 2023 (arXiv 2212.04089) negate a task vector: they subtract from the weights what
    fine-tuning adds to them.
    """
    return -answers.label_log_N(answers.log_NV)


def random_label(answers: Answers) -> "Tensor":
    """Return the cross-entropy of another label, [N] (Golatkar et al. 2020, arXiv 1911.04933).

    The label depends on the row's number alone, so that it is the same at every step.
    """
    classes = answers.log_NV.shape[1]
    hashed_N = answers.number_N * 2654435761 % 2**32  # Knuth's multiplicative hash
    # An offset of 1 to classes - 1 never ends at the label itself.
    other_N = (answers.label_N + 1 + hashed_N % (classes - 1)) % classes
    return -answers.log_NV.gather(1, other_N[:, None])[:, 0]


def bad_teacher(answers: Answers) -> "Tensor":
    """Return KL(uniform || model), [N].

    The uniform distribution is a teacher that knows nothing. Chundawat et al. 2023 (arXiv
    2205.08096) use a network of random weights as the teacher.
    """
    return -answers.log_NV.mean(1) - math.log(answers.log_NV.shape[1])


def scrub(answers: Answers) -> "Tensor":
    """Return -KL(base || model), [N].

    Kurmanji et al. 2023 (arXiv 2302.09880) alternate it with steps on the retain set. Here both are
    parts of one step.
    """
    assert answers.teacher_NV is not None
    return -divergence(answers.teacher_NV, answers.log_NV)


def undial(answers: Answers, *, beta: float) -> "Tensor":
    """Return the cross-entropy to the base model's logits with the label's lowered by beta, [N].

    This is UNDIAL (Dong et al. 2024, arXiv 2402.10052).
    """
    assert answers.teacher_NV is not None
    lowered_N = answers.label_log_N(answers.teacher_NV) - beta
    return answers.cross_entropy_N(answers.with_label(answers.teacher_NV, lowered_N))


def ceu(answers: Answers) -> "Tensor":
    """Return the cross-entropy to the model's own output without the label, [N].

    This is CE-U (Yang 2025, arXiv 2503.01224). The author's code leaves out each answer's first
    token, and here all tokens count.
    """
    log_NV = answers.log_NV.detach()
    nothing_N = log_NV.new_full((len(log_NV),), -math.inf)
    return answers.cross_entropy_N(answers.with_label(log_NV, nothing_N))


def wga(answers: Answers, *, beta: float) -> "Tensor":
    """Return p^beta log p of the label with a constant weight, [N].

    This is weighted gradient ascent (Wang et al. 2025, arXiv 2502.19301).
    """
    log_N = answers.label_log_N(answers.log_NV)
    return (beta * log_N.detach()).exp() * log_N


def satimp(answers: Answers, *, beta1: float, beta2: float) -> "Tensor":
    """Return p^beta1 (1 - p)^beta2 log p of the label with a constant weight, [N].

    This is SatImp (Yang et al. 2025, arXiv 2505.11953): saturation times importance.
    """
    log_N = answers.label_log_N(answers.log_NV)
    saturation_N = (beta1 * log_N.detach()).exp()
    importance_N = (-log_N.detach().expm1()) ** beta2
    return saturation_N * importance_N * log_N


def masc(answers: Answers, *, rho: float, eta: float) -> "Tensor":
    """Return how far the label's margin lies above its bound, in units of eta, [N].

    The margin is log p of the label against log of the sum of the ten likeliest others' p. Its
    bound is log(rho / (1 - rho)) - eta. This is MASC's loss (arXiv 2606.02920). It is above 1
    where the label has more than the share rho of its own and the ten others' probability.
    """
    others_NV = answers.log_NV.scatter(1, answers.label_N[:, None], -math.inf)
    rivals_N = others_NV.topk(min(10, others_NV.shape[1] - 1), dim=1).values.logsumexp(1)
    margin_N = answers.label_log_N(answers.log_NV) - rivals_N
    bound = math.log(rho / (1 - rho)) - eta
    return (margin_N - bound).clamp(min=0) / eta


def npo(answers: Answers, *, beta: float) -> "Tensor":
    """Return -(2 / beta) log sigmoid(-beta log(p(answer) / p_base(answer))), [R].

    This is NPO (Zhang et al. 2024, arXiv 2404.05868). As published, a row's log-probability is the
    sum over its answer's tokens.
    """
    assert answers.teacher_NV is not None
    ratio_N = answers.label_log_N(answers.log_NV) - answers.label_log_N(answers.teacher_NV)
    return -2 / beta * log_sigmoid(-beta * answers.row_sums(ratio_N))


def dpo(answers: Answers, *, beta: float) -> "Tensor":
    """Return -(2 / beta) log sigmoid(beta (log ratio of the refusal - log ratio of the answer)), [R].

    A ratio is p / p_base of a whole text. This is DPO (Rafailov et al. 2023, arXiv 2305.18290) with
    a refusal as the preferred answer (TOFU, Maini et al. 2024, arXiv 2401.06121), and
    open-unlearning's factor 2.
    """
    assert answers.teacher_NV is not None
    assert answers.refusal_N is not None
    ratio_N = answers.label_log_N(answers.log_NV) - answers.label_log_N(answers.teacher_NV)
    sign_N = 2 * answers.refusal_N.to(ratio_N.dtype) - 1
    return -2 / beta * log_sigmoid(beta * answers.row_sums(sign_N * ratio_N))


def simnpo(answers: Answers, *, beta: float, gamma: float) -> "Tensor":
    """Return -(2 / beta) log sigmoid(-beta * mean log p(token) - gamma), [R].

    This is SimNPO (Fan et al. 2024, arXiv 2410.07163).
    """
    log_N = answers.label_log_N(answers.log_NV)
    mean_R = answers.row_sums(log_N) / answers.row_sums(log_N.new_ones(len(log_N)))
    return -2 / beta * log_sigmoid(-beta * mean_R - gamma)


def log_sigmoid(value: "Tensor") -> "Tensor":
    """Return log(1 / (1 + exp(-value))) without overflow."""
    # `torch.nn.functional.logsigmoid` would need torch at import.
    return -(-value).logaddexp(value.new_zeros(()))


def divergence(teacher_NV: "Tensor", log_NV: "Tensor") -> "Tensor":
    """Return KL(teacher || model) of each pair of distributions of log-probabilities, [N]."""
    return (teacher_NV.exp() * (teacher_NV - log_NV)).sum(1)


class Parameter(NamedTuple):
    """A parameter of a loss: its default, as published, and the range that is allowed."""

    default: float
    low: float
    high: float


class ForgetLoss(NamedTuple):
    """A loss and its properties.

    `help` is its aim in words, `per` the unit that it is averaged over, `needs_teacher` whether it
    reads the base model's predictions, and `needs_refusals` whether it reads a refusal beside each
    answer. A token whose loss is above `bound` is not forgotten yet,
    for a rule that stops (`rfa.stopping`).
    """

    function: Callable[..., "Tensor"]
    help: str
    per: Literal["token", "row"] = "token"
    needs_teacher: bool = False
    needs_refusals: bool = False
    parameters: Mapping[str, Parameter] = {}
    bound: float | None = None

    def __call__(self, answers: Answers, parameters: Mapping[str, float] | None = None) -> "Tensor":
        """Return the loss of each token or row, with defaults for parameters not given."""
        values = {name: parameter.default for name, parameter in self.parameters.items()}
        values.update(parameters or {})
        return self.function(answers, **values)


FORGET_LOSSES: dict[str, ForgetLoss] = {
    "unlikelihood": ForgetLoss(unlikelihood, "the answer is to be unlikely"),
    "ascent": ForgetLoss(ascent, "its cross-entropy is to rise"),
    "descent": ForgetLoss(descent, "its cross-entropy is to fall, for objective.negate"),
    "random_label": ForgetLoss(random_label, "another label is to be likely"),
    "bad_teacher": ForgetLoss(bad_teacher, "every label is to be as likely"),
    "scrub": ForgetLoss(scrub, "away from the base model's output", needs_teacher=True),
    "undial": ForgetLoss(
        undial,
        "the base model's output with a lower score of the answer",
        needs_teacher=True,
        parameters={"beta": Parameter(10.0, 0, 1000)},
    ),
    "ceu": ForgetLoss(ceu, "what the model says without the answer"),
    "wga": ForgetLoss(
        wga,
        "its cross-entropy is to rise, most where the answer is likely",
        parameters={"beta": Parameter(1.0, 0, 100)},
    ),
    "satimp": ForgetLoss(
        satimp,
        "its cross-entropy is to rise, most where the answer is likely and not yet certain",
        parameters={"beta1": Parameter(5.0, 0, 100), "beta2": Parameter(1.0, 0, 100)},
    ),
    "masc": ForgetLoss(
        masc,
        "the answer is to be no likelier than its ten rivals",
        parameters={"rho": Parameter(0.7, 1e-6, 0.999999), "eta": Parameter(0.25, 0.001, 100)},
        bound=1.0,
    ),
    "npo": ForgetLoss(
        npo,
        "the answer is to be less likely than the base model has it",
        per="row",
        needs_teacher=True,
        parameters={"beta": Parameter(0.1, 0.001, 100)},
    ),
    "dpo": ForgetLoss(
        dpo,
        "a refusal is to be likelier than the answer, against the base model",
        per="row",
        needs_teacher=True,
        needs_refusals=True,
        parameters={"beta": Parameter(0.1, 0.001, 100)},
    ),
    "simnpo": ForgetLoss(
        simnpo,
        "the answer is to be unlikely, whatever its length",
        per="row",
        parameters={"beta": Parameter(2.5, 0.001, 100), "gamma": Parameter(0.0, 0, 100)},
    ),
}


def describe_losses() -> str:
    """List every loss with its aim, for help texts."""
    return "; ".join(f"{name}: {loss.help}" for name, loss in FORGET_LOSSES.items())


def describe_parameters() -> str:
    """List every loss's parameters with defaults and ranges, for help texts."""
    described: list[str] = []
    for name, loss in FORGET_LOSSES.items():
        for parameter, (default, low, high) in loss.parameters.items():
            described.append(f"{parameter} of {name} ({default:g}; {low:g} to {high:g})")
    return ", ".join(described)
