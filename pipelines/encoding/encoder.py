"""The encoder of a task, which turns the rows of a set into the inputs of the model.

Both encoders can be pickled. `encode_batch` runs in Ray Data's tasks and drops all text. `rows`
runs on the workers of the training and returns `rfa.batch.Row`s. `blank` is the row of a worker
whose share of a small set is empty.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import ray

from pipelines.cluster.tasks import result_of
from pipelines.config.schema import ConfigError, ModelConfig, UnlearnConfig
from pipelines.data.rows import each_row, quoted
from pipelines.data.sets import Sets
from pipelines.encoding import chat
from pipelines.encoding.labelled import ClassEncoder, load_class_config
from pipelines.encoding.text import TextEncoder, load_tokenizer
from pipelines.encoding.windows import Lengths, lengths_of, positions_of

Encoder = TextEncoder | ClassEncoder
# Models with the configuration keys that name them.
Keyed = Sequence[tuple[str, ModelConfig]]
WORDINGS = ["prompt", "answer", "paraphrased_prompt", "paraphrased_answer", "perturbed_answers"]


class Positions(NamedTuple):
    """How many tokens a model has positions for, and the key that names it."""

    key: str
    path: str
    number: int


def build_encoder(cfg: UnlearnConfig) -> Encoder:
    """Return the encoder of the configured task."""
    if cfg.task == "causal_lm":
        return TextEncoder(cfg.model, cfg.data.system_prompt, cfg.data.max_tokens)
    reads_images = cfg.task == "image_classification"
    return ClassEncoder(cfg.model, cfg.data.max_tokens, reads_images=reads_images)


def check_template(cfg: UnlearnConfig, sets: Sets) -> None:
    """Refuse a chat template that would give prompts other tokens than those that were trained.

    Raises:
        ConfigError: the template cannot write prompts and answers, and a row has a prompt.
    """
    if cfg.task != "causal_lm":
        return
    has_prompts = ray.remote(scheduling_strategy="DEFAULT")(_has_prompts)
    tasks: list[Any] = []
    for _, rows in sets.items():
        tasks += [has_prompts.remote(block) for block in rows.to_arrow_refs()]
    if any([result_of(task) for task in tasks]):
        check = ray.remote(scheduling_strategy="DEFAULT")(_check_template)
        in_context = "in_context" in cfg.evaluation.robustness
        result_of(check.remote(cfg.model, cfg.data.system_prompt, in_context))


def _has_prompts(block: Any) -> bool:
    return any(row["prompt"] for row in each_row(block.select(["prompt"])))


def _check_template(model: ModelConfig, system_prompt: str | None, in_context: bool) -> None:
    tokenizer = load_tokenizer(model)
    if tokenizer.chat_template:
        chat.check(tokenizer, model.path, system_prompt)
        if in_context:
            chat.check_context(tokenizer, model.path)
    elif system_prompt:
        raise ConfigError(
            f"data.system_prompt: found a text, and {model.path} has no chat template to write it "
            "in; allowed: null (the text may stand in the prompts), or a model with a chat template"
        )


def check_lengths(cfg: UnlearnConfig, sets: Sets, others: Keyed = ()) -> dict[str, Lengths]:
    """Return how long the rows of each set are, in tokens; nothing of images.

    The `others` are models that rows are scored with, with the keys that name them.

    Raises:
        ConfigError: a classifier would read a part of a forget row only, the chat template does
            not write a row, or a model has too few positions. The text has the row's id.
    """
    if cfg.task == "image_classification":
        return {}
    encoder = build_encoder(cfg)
    # "DEFAULT" leaves these tasks out of a Tune trial's placement group, as in `load_sets`.
    measure = ray.remote(scheduling_strategy="DEFAULT")(_measure)
    waiting: dict[str, list[Any]] = {}
    for name, rows in sets.items():
        waiting[name] = [measure.remote(encoder, block) for block in rows.to_arrow_refs()]
    lengths: dict[str, Lengths] = {}
    for name, tasks in waiting.items():
        lengths[name] = reduce(add, [result_of(task) for task in tasks])
    if cfg.task == "sequence_classification" and lengths["forget"].long_rows:
        result_of(ray.remote(_refuse_cut).remote(cfg, lengths["forget"]))
    if cfg.task == "causal_lm":
        _check_positions(cfg, sets, [("model.path", cfg.model), *others])
    return lengths


def _check_positions(cfg: UnlearnConfig, sets: Sets, models: Keyed) -> None:
    """Refuse a model without positions for all the tokens that it is to read at once."""
    most = cfg.data.max_tokens
    few: list[Positions] = result_of(
        ray.remote(scheduling_strategy="DEFAULT")(_few_positions).remote(models, most)
    )
    if not few:
        return
    encoder: Any = build_encoder(cfg)
    longest = ray.remote(scheduling_strategy="DEFAULT")(_longest)
    tasks: list[Any] = []
    for _, rows in sets.items():
        tasks += [longest.remote(encoder, block) for block in rows.to_arrow_refs()]
    refuse_positions(few, min(most, max(result_of(task) for task in tasks)), most)


def _few_positions(models: Keyed, most: int) -> list[Positions]:
    """Return the models with positions for fewer than `most` tokens."""
    few: list[Positions] = []
    for key, model in models:
        number = positions_of(load_class_config(model))
        if number is not None and number < most:
            few.append(Positions(key, model.path, number))
    return few


def _longest(encoder: TextEncoder, block: Any) -> int:
    return max(map(encoder.longest, each_row(block.select(WORDINGS))), default=0)


def refuse_positions(few: Sequence[Positions], longest: int, most: int) -> None:
    """Refuse the first model that has fewer positions than the longest window has tokens.

    Raises:
        ConfigError: there is one.
    """
    for model in few:
        if longest > model.number:
            raise ConfigError(
                f"data.max_tokens: found {most}, and texts of {longest} tokens or more, for which "
                f"{model.path} ({model.key}) has too few positions; allowed: {model.number} at "
                "most, as behind its last one a model fails or, with rotary positions, is untrained"
            )


def _measure(encoder: Encoder, block: Any) -> Lengths:
    rows = block.select(["set", "id", "prompt", "answer"])
    lengths = map(encoder.length, each_row(rows))
    return lengths_of(rows["id"].to_pylist(), list(lengths), encoder.max_tokens)


def _refuse_cut(cfg: UnlearnConfig, forget: Lengths) -> None:
    """Refuse forget rows that are cut though the classifier could read more of them.

    What lies behind the last of the model's positions has never reached it.
    """
    positions = getattr(load_class_config(cfg.model), "max_position_embeddings", None)
    if positions is not None:
        # RoBERTa counts its positions from 2: its tokenizer knows how many tokens that leaves.
        positions = min(positions, load_tokenizer(cfg.model, ends=False).model_max_length)
    if positions is None or cfg.data.max_tokens < positions:
        raise ConfigError(
            f"data.max_tokens: found {cfg.data.max_tokens}, which cuts {forget.long_rows} rows of "
            f"forget ({quoted(forget.long_ids)}); allowed: as many tokens as the longest has, "
            f"{positions or 'any number'} at most"
        )
