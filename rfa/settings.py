"""The settings of the method, and the only place of their defaults.

The configuration builds its keys on these classes.

Torch is not imported here, for the same reason as in `rfa.forget_losses`.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from rfa.forget_losses import FORGET_LOSSES

ResidualKind = Literal["local", "drift", "last_drift"]
TargetKind = Literal[
    "retain_mean", "class_mean", "cluster_mean", "balanced_mean", "gaussian", "steering", "reroute"
]
DistanceKind = Literal["squared", "norm", "smooth_l1", "cosine"]
TokenKind = Literal["answer", "all"]
ScheduleKind = Literal["constant", "crossfade"]

# A rule that ends the steps looks at these many forget rows after so many steps each time. Both
# are those of MASC's authors (arXiv 2606.02920).
STOP_ROWS = 32
STOP_EVERY = 2
SolveMode = Literal["off", "one_pass", "blockwise", "per_token"]


class Weights(NamedTuple):
    """Weights of the objective's five terms. A term of weight 0 is not computed."""

    retain: float = 1.0
    forget: float = 1.0
    kl: float = 0.0
    task: float = 0.0
    output: float = 0.0


class Objective(NamedTuple):
    """The features that are aligned, their target, and the distance to it.

    `clusters` is the number of centroids of the target `cluster_mean`, and `steering` the length of
    the random vector of the target `steering`. `output` names a row of
    `FORGET_LOSSES`, and `output_parameters` has that loss's parameters by name. `schedule` says how
    the weights change over the steps, and `stop_at` when these end early (`rfa.stopping`). Above
    0, `negate` takes that much of what the adapter has learned away from the model.
    """

    residual: ResidualKind = "local"
    target: TargetKind = "retain_mean"
    distance: DistanceKind = "squared"
    tokens: TokenKind = "all"
    clusters: int = 32
    steering: float = 6.5
    output: str = "unlikelihood"
    output_parameters: Mapping[str, float] = {}
    weights: Weights = Weights()
    schedule: ScheduleKind = "constant"
    stop_at: float | None = None
    negate: float = 0.0

    def weights_at(self, progress: float) -> Weights:
        """Return the weights at a share of the steps, from 0 to 1.

        `crossfade` lets the weight of the retain term rise from 0 to half, and that of the forget
        term fall from the whole to half, as the authors of circuit breakers (arXiv 2406.04313) do.
        """
        if self.schedule == "constant":
            return self.weights
        return self.weights._replace(
            retain=self.weights.retain * progress / 2,
            forget=self.weights.forget * (1 - progress / 2),
        )

    @property
    def adapter_scale(self) -> float:
        """The factor on the trained adapter in the model that results."""
        return -self.negate if self.negate else 1.0

    @property
    def aligns(self) -> bool:
        """Whether any term reads features."""
        return self.weights.retain > 0 or self.weights.forget > 0

    @property
    def needs_logits(self) -> bool:
        """Whether any term reads the model's output."""
        return self.weights.kl > 0 or self.weights.task > 0 or self.weights.output > 0

    @property
    def reads_forget_set(self) -> bool:
        """Whether any term reads the forget set's rows."""
        return self.weights.forget > 0 or self.weights.output > 0

    @property
    def compares_answers(self) -> bool:
        """Whether the output term reads the base model's predictions on the forget set."""
        return self.weights.output > 0 and FORGET_LOSSES[self.output].needs_teacher

    @property
    def reads_refusals(self) -> bool:
        """Whether the output term compares each answer of the forget set with a refusal."""
        return self.weights.output > 0 and FORGET_LOSSES[self.output].needs_refusals

    @property
    def needs_teacher(self) -> bool:
        """Whether the base model must be run beside the adapted one."""
        drifts = self.residual != "local" and self.aligns
        return drifts or self.weights.kl > 0 or self.compares_answers


class SolveSettings(NamedTuple):
    """Settings of the closed-form solver.

    Args:
        mode: `one_pass` solves all modules from the base model's features, `blockwise` from the
            lowest block up, `per_token` in rounds that bring each forget token down to its own
            aim (`rfa.token_solver`).
        utility_weight: weight of the residuals on the utility set beside those on the retain set.
        fact_weight: weight of the forget tokens that carry a row's fact. All others weigh 1.
        ridge: added to the inputs' second moments, in units of their mean diagonal.
        exact_width: modules with more inputs than this are solved in the low-memory form.
        sketch_columns: columns of the low-memory form.
    """

    mode: SolveMode = "per_token"
    utility_weight: float = 1.0
    fact_weight: float = 4.0
    ridge: float = 1e-3
    exact_width: int = 16384
    sketch_columns: int = 1024

    @property
    def reads_targets(self) -> bool:
        """Whether the solver moves features to `Objective.target`, by one strength."""
        return self.mode in ("one_pass", "blockwise")
