"""The configuration tree: every key with its meaning, unit and range."""

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.data import ConfigError as ConfigError
from pipelines.config.data import DataConfig, Section, Task
from pipelines.config.evaluation import EvaluationConfig
from pipelines.config.objective import ObjectiveConfig, Weight
from pipelines.config.train import FinetuneConfig, TrainConfig
from rfa.settings import SolveMode, SolveSettings

SOLVE = SolveSettings()


class ModelConfig(Section):
    """The model that must forget (or, for `finetune`, the model to start from)."""

    path: str = Field(description="A local model folder in Hugging Face format, or a hub name.")
    revision: str | None = Field(default=None, description="A hub revision: branch, tag or commit.")
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that comes with the model. Off unless you say so.",
    )
    date: str | None = Field(
        default=None,
        description="The day that the chat template writes, YYYY-MM-DD, for a template that would "
        "write today's (Llama 3.2's): that of the model's training.",
    )

    @field_validator("date")
    @classmethod
    def _date_is_a_day(cls, text: str | None) -> str | None:
        if text is None:
            return None
        try:
            return date.fromisoformat(text).isoformat()
        except ValueError:
            raise ValueError("allowed: a day as YYYY-MM-DD, or null") from None


class AdapterConfig(Section):
    """The LoRA adapter that holds the change."""

    rank: int = Field(
        default=16,
        ge=1,
        le=4096,
        description="Rank of B A; a layer with fewer inputs or outputs has as many as these.",
    )
    alpha: float = Field(default=32, gt=0, description="The residual is alpha / rank * B A x.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: tuple[str, ...] = Field(
        default=("o_proj", "down_proj"),
        min_length=1,
        description="Ends of the names of the linear layers that are adapted.",
    )
    layers: tuple[int, int] | None = Field(
        default=None,
        description="First and last block that is adapted, counted from 0, both included; null "
        "for all blocks.",
    )

    @model_validator(mode="after")
    def _layers_ascend(self) -> "AdapterConfig":
        if self.layers is not None and not 0 <= self.layers[0] <= self.layers[1]:
            raise ValueError(
                f"layers: found {list(self.layers)}, allowed: [first, last] with 0 <= first <= last"
            )
        return self


class PruneConfig(Section):
    """Pruning before the adapter is put on: PruneLoRA, after Mittal 2024 (arXiv 2411.11907)."""

    method: Literal["none", "rows", "magnitude", "wanda"] = Field(
        default="none",
        description="rows: the outputs of smallest L2 norm (the paper's); magnitude: the smallest"
        " weights; wanda: the smallest weights times their input's norm on the retain set.",
    )
    sparsity: float = Field(
        default=0.5, gt=0, lt=1, description="Share of each layer that is pruned."
    )
    targets: tuple[str, ...] = Field(
        default=("linear",),
        min_length=1,
        description="Ends of the names of the layers that are pruned, or the groups linear, "
        "convolutions, all (each without the head).",
    )
    keep_sparsity: bool = Field(
        default=True,
        description="Keep what is pruned at zero in the merged model; merging alone would fill it.",
    )


class SolveConfig(Section):
    """The one-pass solver: adapters in closed form, from one forward over the data."""

    mode: SolveMode = Field(
        default=SOLVE.mode,
        description="per_token: in rounds, until each forget token is as likely as its like in "
        "the holdout set (language models); blockwise: module by module from the lowest block up, "
        "each from what it sees with the residuals below in place (a classifier's default); "
        "one_pass: all modules from the base model's features; off: train.steps of gradient do "
        "all the work.",
    )
    strength: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto",
        description="Weight of the forget set's shift against the retain set's stillness (> 0); "
        "auto: where the forget set's losses are like the holdout set's. per_token has none.",
    )
    utility_weight: Weight = Field(
        default=SOLVE.utility_weight,
        description="Weight of the utility set's stillness beside the retain set's.",
    )
    fact_weight: float = Field(
        default=SOLVE.fact_weight,
        gt=0,
        le=1000,
        description="Weight of the forget tokens that carry a row's fact (data.columns.fact) "
        "in the forget set's shift; all others weigh 1.",
    )
    ridge: float = Field(
        default=SOLVE.ridge,
        gt=0,
        le=10,
        description="Added to the inputs' second moments, in units of their mean diagonal.",
    )
    exact_width: int = Field(
        default=SOLVE.exact_width,
        ge=1,
        description="Modules with more inputs than this are solved in the low-memory form.",
    )
    sketch_columns: int = Field(
        default=SOLVE.sketch_columns, ge=1, description="Columns of the low-memory form."
    )

    checkpoint_every: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Batches of the retained sets between resume points of their statistics; "
        "null: none, and a restarted run reads them again. A point takes as many bytes as one "
        "worker's statistics (`check` tells them).",
    )
    prepared: str | None = Field(
        default=None,
        description="Results of `ray-unlearn prepare`, in a folder that every node sees or on an "
        "object store: the statistics are those, less the forget rows' part, and no worker reads "
        "the retain and utility sets. For per_token.",
    )

    @field_validator("mode", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, mode: Any) -> Any:
        return "off" if mode is False else mode  # YAML 1.1 reads a bare off as false

    @property
    def reads_holdout(self) -> bool:
        """Whether the solver reads never-seen rows, for each token's aim or for the strength."""
        return self.mode == "per_token" or (self.mode != "off" and self.strength == "auto")

    def settings(self) -> SolveSettings:
        """Return the settings of the solver, without the strength that each solve takes."""
        return SolveSettings(
            **self.model_dump(exclude={"strength", "checkpoint_every", "prepared"})
        )


class TrackingConfig(Section):
    """Tracking by MLflow."""

    uri: str | None = Field(
        default=None, description="Tracking server; null for a sqlite file in the output folder."
    )
    experiment: str = Field(default="ray-unlearn", description="MLflow experiment.")
    model_name: str = Field(
        default="ray-unlearn-adapter", description="Name the adapter is registered under."
    )


class UnlearnConfig(Section):
    """One unlearning problem, from the data to the report."""

    task: Task = Field(
        default="causal_lm",
        description="What the model does: say an answer, or tell the class (data.columns.label) "
        "of a text or an image.",
    )
    model: ModelConfig
    data: DataConfig
    prune: PruneConfig = PruneConfig()
    adapter: AdapterConfig = AdapterConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    solve: SolveConfig = SolveConfig()
    train: TrainConfig = TrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    output_dir: str = Field(
        description="Folder of the run's results, created if missing; or s3:// or gs://."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of everything random.")

    @field_validator("output_dir")
    @classmethod
    def _results_lie_in_a_folder_or_a_bucket(cls, output_dir: str) -> str:
        if "://" in output_dir and not output_dir.startswith(("s3://", "gs://")):
            raise ValueError(
                "allowed: a folder, on a cluster one that all nodes share, or s3:// or gs://"
            )
        return output_dir

    @model_validator(mode="before")
    @classmethod
    def _classifiers_have_no_tokens_to_aim_at(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or tree.get("task", "causal_lm") == "causal_lm":
            return tree
        solve = tree.get("solve", {})
        if not isinstance(solve, dict):
            return tree
        return {**tree, "solve": {"mode": "blockwise", **solve}}

    @model_validator(mode="after")
    def _sections_agree(self) -> "UnlearnConfig":
        if self.task != "causal_lm" and self.evaluation.robustness:
            found = self.evaluation.robustness[0]
            raise ValueError(
                f"evaluation.robustness: found {found}, allowed with task={self.task}: []"
            )
        if "relearn_general" in self.evaluation.robustness and self.data.general is None:
            raise ValueError(
                "data.general: missing, required by evaluation.robustness with relearn_general; "
                "allowed: a set, or robustness without it"
            )
        # Stage 3 partitions the weights, and Wanda and SalUn need complete ones.
        if self.prune.method == "wanda" and self.train.deepspeed.stage == 3:
            raise ValueError(
                "prune.method: found wanda with train.deepspeed.stage=3, allowed: rows, magnitude"
            )
        if self.finetune.salient is not None:
            if "forget" in self.finetune.sets:
                raise ValueError(
                    "finetune.sets: found forget with finetune.salient, allowed: sets without it"
                )
            if self.train.deepspeed.stage == 3:
                raise ValueError(
                    "finetune.salient: found with train.deepspeed.stage=3, "
                    "allowed: null, or stage 0 to 2"
                )
        if self.solve.mode == "per_token" and self.task != "causal_lm":
            raise ValueError(
                f"solve.mode: found per_token, allowed with task={self.task}: off, one_pass, blockwise"
            )
        if self.solve.mode == "off" and self.train.steps == 0:
            raise ValueError(
                "train.steps: found 0 with solve.mode=off, allowed: steps above 0, or a solve.mode"
            )
        task_weight = self.objective.weights.task
        if self.data.earlier is not None and self.train.steps > 0 and task_weight > 0:
            raise ValueError(
                f"objective.weights.task: found {task_weight:g} with data.earlier, whose answers "
                "it would teach again; allowed: 0 (weights.kl holds answers as they are)"
            )
        return self

    @model_validator(mode="after")
    def _the_objective_fits(self) -> "UnlearnConfig":
        mode, objective = self.solve.mode, self.objective
        if objective.settings().reads_refusals and self.task != "causal_lm":
            raise ValueError(
                f"objective.output: found {objective.output}, which compares texts, "
                f"allowed with task={self.task}: others"
            )
        # The closed form solves for what each module adds. Drift is not linear in that.
        if mode != "off" and objective.residual != "local":
            raise ValueError(
                f"objective.residual: found {objective.residual}, "
                f"allowed with solve.mode={mode}: local"
            )
        # It has no place that a solver could shift features to.
        if objective.target == "reroute" and self.solve.settings().reads_targets:
            raise ValueError(
                f"objective.target: found reroute with solve.mode={mode}, "
                "allowed: another target, or solve.mode=off"
            )
        # A solution would be negated as well.
        if mode != "off" and objective.negate > 0:
            raise ValueError(
                f"objective.negate: found {objective.negate:g}, allowed with solve.mode={mode}: 0"
            )
        return self
