"""The objective's part of the configuration tree."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipelines.config.data import Section
from rfa.forget_losses import FORGET_LOSSES, describe_losses, describe_parameters
from rfa.methods import METHODS, describe_methods
from rfa.settings import (
    STOP_ROWS,
    DistanceKind,
    Objective,
    ResidualKind,
    ScheduleKind,
    TargetKind,
    TokenKind,
    Weights,
)

Weight = Annotated[float, Field(ge=0)]
OBJECTIVE = Objective()
# The losses that tell which tokens are forgotten.
STOPPING = [name for name, loss in FORGET_LOSSES.items() if loss.bound is not None]
if TYPE_CHECKING:
    ForgetLossName = str
    MethodName = str
else:
    ForgetLossName = Literal[tuple(FORGET_LOSSES)]
    MethodName = Literal[tuple(METHODS)]


class WeightsConfig(Section):
    """Weights of the objective's terms. A term of weight 0 is not computed."""

    retain: Weight = Field(
        default=OBJECTIVE.weights.retain, description="Zero residual features on the retain set."
    )
    forget: Weight = Field(
        default=OBJECTIVE.weights.forget, description="Shifted residual features on the forget set."
    )
    kl: Weight = Field(
        default=OBJECTIVE.weights.kl,
        description="KL(base || adapted) of next-token distributions on the retain set.",
    )
    task: Weight = Field(
        default=OBJECTIVE.weights.task, description="Cross-entropy on the retain set's answers."
    )
    output: Weight = Field(
        default=OBJECTIVE.weights.output,
        description="What objective.output asks of the forget set's answers.",
    )


class ObjectiveConfig(Section):
    """Residual feature alignment, reconstructed after Qin et al. 2024 (arXiv 2411.08443)."""

    method: MethodName | None = Field(
        default=None,
        description="A published method: it sets the keys below that are not given. "
        f"{describe_methods()}.",
    )
    residual: ResidualKind = Field(
        default=OBJECTIVE.residual,
        description="local: what each adapted module adds; drift: how far a block's output moved "
        "from the base's; last_drift: the last adapted block's alone.",
    )
    target: TargetKind = Field(
        default=OBJECTIVE.target,
        description="Where the forget set's features are shifted to; reroute: to right angles with "
        "the base model's.",
    )
    distance: DistanceKind = Field(
        default=OBJECTIVE.distance, description="Distance between features."
    )
    tokens: TokenKind = Field(
        default=OBJECTIVE.tokens, description="Which tokens of the forget set are shifted."
    )
    clusters: int = Field(
        default=OBJECTIVE.clusters,
        ge=1,
        le=4096,
        description="Number of centroids for cluster_mean.",
    )
    steering: float = Field(
        default=OBJECTIVE.steering,
        gt=0,
        le=1e6,
        description="Length of the random vector for the target steering.",
    )
    target_rows: int = Field(
        default=512,
        ge=1,
        description="Rows of the retain set that the targets are fitted on, at most.",
    )
    output: ForgetLossName = Field(
        default=OBJECTIVE.output,
        description=f"What weights.output pushes on the forget set. {describe_losses()}.",
    )
    output_parameters: dict[str, float] = Field(
        default={},
        description=f"Parameters of objective.output, by name: {describe_parameters()}.",
    )
    weights: WeightsConfig = WeightsConfig()
    schedule: ScheduleKind = Field(
        default=OBJECTIVE.schedule,
        description="How the weights change over train.steps. crossfade: weights.retain rises from "
        "0 to half of it, weights.forget falls from all to half of it.",
    )

    stop_at: float | None = Field(
        default=OBJECTIVE.stop_at,
        ge=0,
        le=1,
        description=f"Gradient steps end before train.steps once the first {STOP_ROWS} forget rows' "
        "mean share of answer tokens not yet forgotten is at most this; null: never. Outputs that "
        f"tell: {', '.join(STOPPING)}.",
    )

    negate: float = Field(
        default=OBJECTIVE.negate,
        ge=0,
        le=100,
        description="Above 0: the trained adapter is exported times minus this, so that what was "
        "learned is taken away (with objective.output=descent: task vectors).",
    )

    @model_validator(mode="before")
    @classmethod
    def _method_sets_what_is_not_given(cls, values: Any) -> Any:
        method = METHODS.get(str(values.get("method"))) if isinstance(values, dict) else None
        given = values.get("weights", {}) if method else {}
        if method is None or not isinstance(given, dict):
            return values
        return {**method.settings, **values, "weights": {**method.weights._asdict(), **given}}

    @model_validator(mode="after")
    def _something_pushes(self) -> "ObjectiveConfig":
        if self.weights.forget == self.weights.output == self.weights.task == 0:
            raise ValueError(
                "weights.forget, weights.output and weights.task are all 0: nothing would be "
                "learned or forgotten; allowed: one above 0"
            )
        return self

    @field_validator("stop_at")
    @classmethod
    def _the_loss_tells_when_to_stop(
        cls, stop_at: float | None, info: ValidationInfo
    ) -> float | None:
        loss = info.data.get("output", OBJECTIVE.output)
        if stop_at is not None and loss not in STOPPING:
            raise ValueError(
                f"allowed with objective.output={loss}: null; "
                f"a number with objective.output={' or '.join(STOPPING)}"
            )
        return stop_at

    @field_validator("output_parameters")
    @classmethod
    def _parameters_fit_the_loss(
        cls, values: dict[str, float], info: ValidationInfo
    ) -> dict[str, float]:
        loss = info.data.get("output", OBJECTIVE.output)
        allowed = FORGET_LOSSES[loss].parameters
        for name, value in values.items():
            if name not in allowed:
                names = ", ".join(allowed) or "none"
                raise ValueError(f"found {name}, allowed with objective.output={loss}: {names}")
            low, high = allowed[name].low, allowed[name].high
            if not low <= value <= high:
                raise ValueError(f"found {name}={value:g}, allowed: {low:g} to {high:g}")
        return values

    def settings(self) -> Objective:
        """Return the settings of the method."""
        values = self.model_dump(exclude={"method", "target_rows", "weights"})
        return Objective(**values, weights=Weights(**self.weights.model_dump()))
