"""The data's configuration: sources, selectors and columns. Also the base of all sections."""

import os
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from pipelines.config.text import CONTROL, one_line

Task = Literal["causal_lm", "sequence_classification", "image_classification"]
SetName = Literal["forget", "retain", "utility", "holdout", "general", "neighbours", "earlier"]
SET_NAMES: tuple[SetName, ...] = get_args(SetName)
# What a run holds as it is, and what is to be forgotten at its end. Rows of earlier requests are
# both: they have been forgotten.
HELD_SETS: tuple[SetName, ...] = ("retain", "utility", "earlier")
FORGOTTEN_SETS: tuple[SetName, ...] = ("forget", "earlier")
# What must stay as the original has it.
KEPT_SETS: tuple[SetName, ...] = ("retain", "general", "neighbours", "utility")


# No key needs a larger number, and with one a product of a few of them could overflow.
LARGEST = 1e9
MOST_CHARS = 4096
# Keys that name files and folders. Linux takes paths of 4096 bytes: the rest is for the names of
# files in a folder.
PATHS = ("path", "ids", "exclude_ids", "oracle", "output_dir", "prepared")
MOST_NAME_BYTES, MOST_PATH_BYTES = 255, 3072
# Marks a key that takes what the data or the model have, whatever it is.
ANY_TEXT = "any text"


class ConfigError(ValueError):
    """A mistake of the user in configuration or data. One line of text, exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Section(BaseModel):
    """The base of all sections: unknown keys are refused, and values cannot be changed.

    Numbers are finite and not too large, and none is given as true. Texts have no control
    characters and are not empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_plain(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if ANY_TEXT in field.metadata:
            return value
        kinds = _kinds(field.annotation)
        for single in value if isinstance(value, list | tuple) else [value]:
            if isinstance(single, bool) and {int, float} & kinds and not {bool, str} & kinds:
                raise ValueError("allowed: a number")
            if isinstance(single, int | float):
                _check_size(single, field)
            if isinstance(single, str) and str in kinds:
                _check_text(single, is_path=info.field_name in PATHS)
        return value


def _kinds(annotation: Any) -> set[Any]:
    """Return the types that a key takes, those of its elements and of its literals included."""
    if not get_args(annotation):
        return {annotation if isinstance(annotation, type) else type(annotation)}
    return set().union(*map(_kinds, get_args(annotation)))


def _check_size(number: float, field: FieldInfo) -> None:
    limits = [getattr(limit, "le", getattr(limit, "lt", None)) for limit in field.metadata]
    if not any(limit is not None for limit in limits) and abs(number) > LARGEST:
        raise ValueError(f"allowed: numbers up to {LARGEST:g}")


def check_path(path: str, key: str) -> None:
    """Refuse the path of an option where no file system has such a one.

    Raises:
        ConfigError: one line that begins with `key`.
    """
    try:
        _check_text(path, is_path=True)
    except ValueError as error:
        raise ConfigError(f"{key}: found {path!r}, {error}") from None


def _check_text(text: str, *, is_path: bool) -> None:
    if not text.strip():
        raise ValueError("allowed: a text that is not empty")
    if CONTROL.search(text):
        raise ValueError("allowed: a text without control characters")
    if len(text) > MOST_CHARS:
        raise ValueError(f"allowed: up to {MOST_CHARS} characters")
    # A store's names have other limits.
    if is_path and "://" not in text:
        lengths = [len(os.fsencode(part)) for part in os.path.abspath(text).split("/")]
        if max(lengths) > MOST_NAME_BYTES or sum(lengths) + len(lengths) > MOST_PATH_BYTES:
            raise ValueError(
                f"allowed: a path of names of up to {MOST_NAME_BYTES} bytes, "
                f"{MOST_PATH_BYTES} bytes in all"
            )


class SourceConfig(Section):
    """The source of one set, and which of its rows are in the set."""

    path: str = Field(
        description="JSONL, Parquet or CSV file (local, s3://, gs://), a saved `datasets` folder,"
        " or a hub name."
    )
    split: str = Field(
        default="train",
        description="The split of a hub data set or of a saved DatasetDict.",
    )
    ids: str | None = Field(
        default=None,
        description="A deletion request: a JSONL file of ids; only the rows with these ids are "
        "taken.",
    )
    exclude_ids: str | None = Field(
        default=None, description="A JSONL file of ids; the rows with these ids are left out."
    )
    column: str | None = Field(
        default=None, description="Take only rows whose value in this column is one of `values`."
    )
    values: Annotated[tuple[str | int, ...], ANY_TEXT] = Field(
        default=(), description="The values of `column` that are taken."
    )
    max_rows: int | None = Field(
        default=None, ge=1, description="Take at most so many rows, evenly spaced; null for all."
    )
    share: tuple[float, float] | None = Field(
        default=None,
        description="Take only the rows whose place in [0, 1), from a hash of their content and "
        "data.share_seed, lies from the first number up to below the second: [0, 0.05] for forget"
        " and [0.05, 1] for retain part one source at random. Equal rows stay together.",
    )

    @field_validator("share")
    @classmethod
    def _share_is_a_part(cls, share: tuple[float, float] | None) -> tuple[float, float] | None:
        if share is not None and not 0 <= share[0] < share[1] <= 1:
            raise ValueError("allowed: [from, to] with 0 <= from < to <= 1")
        return share

    @model_validator(mode="after")
    def _column_and_values_come_together(self) -> "SourceConfig":
        if (self.column is None) != (not self.values):
            raise ValueError("column and values are given together or not at all")
        return self


class ColumnsConfig(Section):
    """The names of the sources' columns.

    Question answering has `prompt` and `answer`, or `messages`; plain text has `text`, and
    classification has `label` with `text` or `image`.
    """

    id: str = Field(
        default="id", description="Unique id of a row; a row number where the column is missing."
    )
    prompt: str = Field(default="prompt", description="The question.")
    answer: str = Field(
        default="answer",
        description="The answer that is learned or forgotten; of a list of texts the first. "
        "`answers.text` is the field text of the column answers.",
    )
    messages: str | None = Field(
        default=None,
        description="Conversations: a list of turns with role and content, or from and value. "
        "null takes messages or conversations of a source that has neither prompt and answer nor "
        "text.",
    )
    text: str = Field(
        default="text",
        description="Plain text, used where there is no prompt column.",
    )
    paraphrased_prompt: str = Field(
        default="paraphrased_prompt", description="The same question in other words (optional)."
    )
    paraphrased_answer: str = Field(
        default="paraphrased_answer", description="The same answer in other words (optional)."
    )
    perturbed_answers: str = Field(
        default="perturbed_answers", description="A list of wrong but fluent answers (optional)."
    )
    refusal: str = Field(
        default="refusal",
        description="What a model says that does not know the answer, of the forget set, for "
        "objective.output=dpo (optional; there are sentences for rows without).",
    )
    image: str = Field(
        default="image",
        description="An image file's bytes (PNG, JPEG, ...), or a `datasets` Image, for its task.",
    )
    fact: str = Field(
        default="fact", description="The words of the answer that carry its fact (optional)."
    )
    label: str = Field(
        default="author",
        description="The group of a row, for the targets class_mean and balanced_mean (optional);"
        " the class, which every row needs, where the task is classification.",
    )


class DataConfig(Section):
    """The sets, and how their rows become tokens."""

    forget: SourceConfig = Field(description="What the model must forget.")
    retain: SourceConfig = Field(description="What stood beside it in training and must stay.")
    utility: SourceConfig | None = Field(
        default=None,
        description="Broad text whose behaviour must not move; trained on like retain. Rows may "
        "be prompts without an answer (for `run`): they get the model's own greedy one.",
    )
    holdout: SourceConfig | None = Field(
        default=None, description="Never trained on, alike the forget set: membership inference."
    )
    general: SourceConfig | None = Field(
        default=None, description="General knowledge, only ever evaluated."
    )
    neighbours: SourceConfig | None = Field(
        default=None,
        description="Rows near the forget set, of the same places, form or kind, that must stay; "
        "only ever evaluated.",
    )
    earlier: SourceConfig | None = Field(
        default=None,
        description="Rows of earlier requests, which must stay forgotten: held as they are and "
        "scored, never learned.",
    )
    columns: ColumnsConfig = ColumnsConfig()
    share_seed: int = Field(
        default=0, ge=0, lt=2**32, description="Seed of the places that `share` goes by."
    )
    max_tokens: int = Field(
        default=512,
        ge=8,
        le=131072,
        description="Tokens that the model reads at once. Longer rows of forget and holdout are "
        "read in windows, those of other sets are cut.",
    )
    system_prompt: Annotated[str | None, ANY_TEXT] = Field(
        default=None,
        description="System message for the chat template, which must be there; null takes the "
        "template's own, '' an empty one.",
    )
