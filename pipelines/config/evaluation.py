"""The configuration of scoring: its oracles, its rows, its attacks."""

import os
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator

from pipelines.config.data import Section
from pipelines.config.train import check_gpus

RobustnessCheck = Literal[
    "quantised_8bit",
    "quantised_4bit",
    "quantised_nf4",
    "in_context",
    "relearn",
    "relearn_retain",
    "relearn_general",
    "relearn_1e-5",
    "relearn_1e-4",
    "relearn_lora",
    "leak_at_k",
]


class EvaluationConfig(Section):
    """Scoring: its models, rows, metrics and attacks."""

    oracle: str | tuple[str, ...] | None = Field(
        default=None,
        description="Model folder of the retrain oracle, if there is one, or a list of folders: "
        "oracles of several seeds, whose scores are averaged and whose distance to each other is "
        "the least that a model can be asked for.",
    )
    batch_size: int = Field(default=16, ge=1, description="Rows a worker scores at once.")
    gpus_per_worker: float | None = Field(
        default=None,
        gt=0,
        description="GPUs of a worker that scores; with several, a model is spread over them. "
        "null: train's.",
    )
    max_new_tokens: int = Field(default=200, ge=1, description="Tokens generated for an answer.")
    max_rows: int | None = Field(
        default=None, ge=1, description="Rows scored of each set, evenly spaced; null for all."
    )
    quick: bool = Field(
        default=False,
        description="Likelihoods of the right answers alone: nothing is generated, no wrong "
        "answers are weighed; about a tenth of the work. What robustness asks for is added.",
    )
    robustness: tuple[RobustnessCheck, ...] = Field(
        default=(),
        description="Attempts to bring the forget set back, on the models after and oracle: all, "
        "or any of quantised_8bit, quantised_4bit, quantised_nf4 (the forget and retain sets scored "
        "once more, with rounded weights), in_context (forget questions behind 4 retained ones with "
        "their answers), relearn (50 steps of fine-tuning on half of the forget set), "
        "relearn_retain and relearn_general (the same on as many rows of the retain or the general "
        "set, at most 64), relearn_1e-5 and relearn_1e-4 (relearn at these learning rates, not "
        "2e-5), relearn_lora (at 1e-4, of a LoRA of rank 16), leak_at_k (5 answers drawn at "
        "temperature 1 to each forget question, by the original too). To relearn but by a LoRA, a "
        "worker holds all parameters in fp32 with gradients and AdamW's moments.",
    )

    @field_validator("robustness", mode="before")
    @classmethod
    def _all_or_some(cls, checks: Any) -> Any:
        if checks == "all":
            return get_args(RobustnessCheck)
        if not isinstance(checks, list | tuple):
            raise ValueError(f"allowed: all, or a list of {', '.join(get_args(RobustnessCheck))}")
        return checks

    @field_validator("gpus_per_worker")
    @classmethod
    def _shares_of_one_or_whole_gpus(cls, gpus: float | None) -> float | None:
        return None if gpus is None else check_gpus(gpus)

    @field_validator("oracle", mode="before")
    @classmethod
    def _a_folder_or_different_ones(cls, oracle: Any) -> Any:
        if oracle is None:
            return None
        folders = oracle if isinstance(oracle, list | tuple) else [oracle]
        are_paths = all(isinstance(folder, str) and folder for folder in folders)
        # An oracle beside itself would have no distance, and hide how far two of them lie apart.
        if not folders or not are_paths or len(set(map(_real_path, folders))) < len(folders):
            raise ValueError("allowed: a model folder, or a list of different ones")
        return oracle

    @property
    def oracles(self) -> tuple[str, ...]:
        """The folders of all oracles, none where none is configured."""
        if self.oracle is None:
            return ()
        return (self.oracle,) if isinstance(self.oracle, str) else self.oracle


def _real_path(folder: str) -> str:
    return os.path.realpath(Path(folder).expanduser())
