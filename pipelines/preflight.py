"""Every refusal before a command trains or scores anything, in one order for all commands.

`check_settings` needs the configuration alone: `submit` calls it, too, before anything is sent. `preflight` needs Ray,
the model and the data. A command that is refused has trained and overwritten nothing.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pipelines.cluster.resources import check_resources, stage_of
from pipelines.cluster.tasks import on_this_node, result_of
from pipelines.config.data import SetName
from pipelines.config.schema import ConfigError, ModelConfig, UnlearnConfig
from pipelines.data.sets import Sets, load_sets
from pipelines.encoding.labelled import check_labels, check_target
from pipelines.encoding.text import load_tokenizer
from pipelines.storage.output import refuse_store
from pipelines.storage.run_folder import RunFolder
from pipelines.terminal import Terminal
from pipelines.tracking.mirror import check_tracking

# What a command is going to do; `check` is refused what `run` is refused.
Purpose = Literal["run", "tune", "finetune", "evaluate"]


class Checked(NamedTuple):
    """What is known before training: the sets, and the model's numbers of parameters."""

    sets: Sets
    size: Any


def check_settings(cfg: UnlearnConfig, purpose: Purpose) -> None:
    """Refuse a configuration that `purpose` cannot work with, whatever the cluster, the model and the data are.

    Raises:
        ConfigError: one line that names the key.
    """
    if purpose == "finetune":
        check_learned_sets(cfg)
    if purpose == "tune":
        refuse_store(cfg.output_dir)
    if purpose in ("run", "tune"):
        check_strength(cfg)
        check_tracking(cfg.tracking, Path(cfg.output_dir))
    if purpose == "tune":
        check_comparison(cfg)


def preflight(
    cfg: UnlearnConfig,
    purpose: Purpose,
    terminal: Terminal,
    *,
    run: RunFolder | None = None,
    model: ModelConfig | None = None,
) -> Checked:
    """Read the sets, once the cluster, the models, the labels and the run's folder are known to be what they must.

    The model is checked in a task, without its weights, while the data is read: the driver imports none of what that
    takes. `run` is the folder that results go to, `model` the one that `evaluate` scores.

    Raises:
        ConfigError: one line that names the key.
    """
    check_resources(cfg.train, terminal.say)
    check_partitioning(cfg, purpose)
    others = {} if model is None else {"--model": model}
    if purpose != "finetune":
        others |= oracle_of(cfg, "evaluation.oracle")
    size = on_this_node(_check_models).remote(cfg, others)
    sets = load_sets(cfg.data, cfg.task)
    checked = Checked(sets, result_of(size))
    check_labels(cfg, sets)
    if purpose in ("run", "tune"):
        check_target(cfg, sets)
    if purpose == "finetune":
        check_answered(cfg, sets)
    if run is not None:
        run.check_inputs(sets.inputs())
    terminal.say("Data: " + ", ".join(f"{name} {sets.counts[name]} rows" for name in sets.names()))
    return checked


def check_strength(cfg: UnlearnConfig) -> None:
    """Require a holdout set where the solver's strength is to be found by it."""
    if cfg.solve.mode != "off" and cfg.solve.strength == "auto" and cfg.data.holdout is None:
        raise ConfigError(
            "data.holdout: missing, required by solve.strength=auto; allowed: a set, or a number there"
        )


def check_comparison(cfg: UnlearnConfig) -> None:
    """Require the sets that a search's trials are compared with a model that never saw the forget set by."""
    data, has_oracle = cfg.data, cfg.evaluation.oracle is not None
    if cfg.task == "causal_lm" and data.holdout is None and not has_oracle:
        raise ConfigError("data.holdout: missing, required by a search without evaluation.oracle")
    if cfg.task != "causal_lm" and data.general is None and (has_oracle or data.holdout is None):
        raise ConfigError(
            "data.general: missing, required by a search that scores classifiers by the attack on them"
        )


def check_learned_sets(cfg: UnlearnConfig) -> None:
    """Require the sets that fine-tuning is to learn."""
    present = [name for name in get_args(SetName) if getattr(cfg.data, name) is not None]
    for name in cfg.finetune.sets:
        if name not in present:
            raise ConfigError(
                f"finetune.sets: found {name}, which data does not give, allowed: {', '.join(present)}"
            )


def check_partitioning(cfg: UnlearnConfig, purpose: Purpose) -> None:
    """Refuse what ranks single weights where ZeRO-3 gives each worker a part of them."""
    key = None
    if cfg.prune.method == "wanda" and purpose != "evaluate":
        key = "prune.method"
    elif purpose == "finetune" and cfg.finetune.salient is not None:
        key = "finetune.salient"
    if key is not None and stage_of(cfg) == 3:
        raise ConfigError(
            f"{key}: needs unpartitioned weights, which train.deepspeed.stage=3 does not give; "
            "set it to 0, 1 or 2, or drop this key"
        )


def check_answered(cfg: UnlearnConfig, sets: Sets) -> None:
    """Require an answer in every row that fine-tuning learns: the model's own answers would teach it nothing."""
    if sets.unanswered and "utility" in cfg.finetune.sets:
        assert cfg.data.utility is not None
        raise ConfigError(
            f"data.utility.path: {cfg.data.utility.path}: {sets.unanswered} of {sets.counts['utility']} rows have no "
            "answer, allowed for `run` only; here an answer in every row, or finetune.sets without utility"
        )


def oracle_of(cfg: UnlearnConfig, name: str) -> dict[str, ModelConfig]:
    """Return the retrain oracle under a name; nothing where none is configured."""
    return {} if cfg.evaluation.oracle is None else {name: ModelConfig(path=cfg.evaluation.oracle)}


def _check_models(cfg: UnlearnConfig, others: dict[str, ModelConfig]) -> Any:
    from pipelines.model.load import check_models  # transformers: in a task alone

    size = check_models(cfg, others)
    if cfg.task != "image_classification":
        load_tokenizer(cfg.model, ends=cfg.task == "causal_lm")
    return size
