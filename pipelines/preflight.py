"""Every refusal before a command trains or scores anything, in one order for all commands.

`check_settings` needs the configuration alone, so that `submit` can call it before it sends
anything. `preflight` needs Ray, the model and the data. A command that is refused has trained and
overwritten nothing.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from pipelines.cluster.resources import check_resources, stage_of
from pipelines.cluster.tasks import on_this_node, result_of
from pipelines.config.data import SetName
from pipelines.config.schema import ConfigError, ModelConfig, UnlearnConfig
from pipelines.config.text import PASSWORD, PASSWORD_OPTION
from pipelines.config.unread import first_unread
from pipelines.data.sets import Sets, load_sets
from pipelines.encoding.encoder import check_lengths, check_template
from pipelines.encoding.labelled import check_labels, check_target
from pipelines.encoding.windows import Lengths, treatment
from pipelines.evaluation.scored_model import oracle_names
from pipelines.storage.chain import check_parent
from pipelines.storage.output import refuse_store
from pipelines.storage.prepared import TRAINED, check_prepared
from pipelines.storage.run_folder import RunFolder
from pipelines.terminal import Terminal
from pipelines.tracking.mirror import check_tracking

if TYPE_CHECKING:
    from pipelines.model.load import ModelSize

# A command's purpose. `check` has that of `run`, and is refused whatever `run` is refused.
Purpose = Literal["run", "tune", "finetune", "evaluate", "prepare"]


class Checked(NamedTuple):
    """The sets, the model's numbers of parameters, and how long each set's rows are."""

    sets: Sets
    size: "ModelSize"
    lengths: dict[str, Lengths]


def check_settings(cfg: UnlearnConfig, purpose: Purpose) -> None:
    """Refuse a configuration that cannot work, whatever the cluster, the model and the data are.

    Raises:
        ConfigError: one line that names the key.
    """
    check_passwords(cfg)
    if purpose == "finetune":
        check_learned_sets(cfg)
    if purpose == "prepare":
        check_preparable(cfg)
    if purpose == "prepare" or (purpose == "run" and cfg.solve.prepared is not None):
        refuse_thinned(cfg)
    if purpose == "run":
        check_read(cfg)
    if purpose == "tune":
        refuse_store(cfg.output_dir)
        refuse_prepared(cfg)
    if purpose in ("run", "tune"):
        check_holdout(cfg)
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
    """Check the cluster, the models, the data and the run's folder, and return the sets.

    `run` is the folder that results go to, `model` the one that `evaluate` scores.

    Raises:
        ConfigError: one line that names the key.
    """
    check_resources(cfg.train, terminal.say)
    check_partitioning(cfg, purpose)
    others = [] if model is None else [("--model", model)]
    if purpose not in ("finetune", "prepare"):
        others += [("evaluation.oracle", oracle) for oracle in oracles_of(cfg).values()]

    def check() -> "ModelSize":
        from pipelines.model.load import check_models, check_vocabulary

        new_head = purpose == "finetune" and cfg.task != "causal_lm"
        size = check_models(cfg, others, new_head=new_head)
        if cfg.task != "image_classification":
            check_vocabulary(cfg, others)
        return size

    # A task, because the driver does not import transformers. It runs while the data is read, and
    # loads no weights.
    task = on_this_node(check).remote()
    sets = load_sets(cfg.data, cfg.task)
    size = result_of(task)
    check_labels(cfg, sets)
    if purpose in ("run", "tune"):
        check_target(cfg, sets)
    if purpose in ("finetune", "prepare"):
        check_answered(cfg, sets, purpose)
    if run is not None:
        run.check_inputs(sets.inputs())
    check_template(cfg, sets)
    lengths = check_lengths(cfg, sets, others)
    if purpose in ("run", "tune"):
        # Last, as these read all weights and all statistics.
        check_parent(cfg.model.path)
        check_prepared(cfg, sets.inputs())
    terminal.say("Data: " + ", ".join(f"{name} {sets.counts[name]} rows" for name in sets.names()))
    for name, of_set in lengths.items():
        if of_set.long_rows:
            longer = (
                f"{of_set.long_rows} rows are longer than data.max_tokens={cfg.data.max_tokens}"
            )
            terminal.say(f"Data: {name}: {longer}, {treatment(name, of_set)}")
    return Checked(sets, size, lengths)


def check_passwords(cfg: UnlearnConfig) -> None:
    """Refuse a password in a URI: the run's files and MLflow's parameters would keep it."""
    uri = cfg.tracking.uri
    if uri is not None and (PASSWORD.search(uri) or PASSWORD_OPTION.search(uri)):
        raise ConfigError(
            "tracking.uri: holds a password, which the run's files would keep; allowed: passwords "
            "in the environment or in submit's --env-file (MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, PGPASSWORD)"
        )


def check_read(cfg: UnlearnConfig) -> None:
    """Refuse a setting that this configuration does not read."""
    unread = first_unread(cfg)
    if unread is not None:
        key, words = unread
        raise ConfigError(
            f"{key}: found another value than the default, which is read with {words} alone; "
            "allowed: that, or the default"
        )


def check_preparable(cfg: UnlearnConfig) -> None:
    """Refuse to prepare for methods that need more of the retained rows than sums over them."""
    if cfg.solve.mode != "per_token":
        raise ConfigError(f"solve.mode: found {cfg.solve.mode}, allowed with prepare: per_token")
    if cfg.prune.method != "none":
        raise ConfigError(f"prune.method: found {cfg.prune.method}, allowed with prepare: none")


def refuse_thinned(cfg: UnlearnConfig) -> None:
    """Refuse `max_rows` where prepared statistics must be of all rows that may be forgotten.

    Which rows it leaves out changes with how forget and retain set are parted.
    """
    for name in TRAINED:
        max_rows = getattr(cfg.data, name).max_rows
        if max_rows is not None:
            raise ConfigError(
                f"data.{name}.max_rows: found {max_rows}, "
                "allowed with prepare and solve.prepared: null"
            )


def refuse_prepared(cfg: UnlearnConfig) -> None:
    """Refuse prepared statistics for a search, which collects its own for every form it tries."""
    if cfg.solve.prepared is not None:
        raise ConfigError(f"solve.prepared: found {cfg.solve.prepared}, allowed in a search: null")


def check_holdout(cfg: UnlearnConfig) -> None:
    """Require a holdout set where the solver reads one: for a strength or for each token's aim."""
    if cfg.data.holdout is not None or not cfg.solve.reads_holdout:
        return
    if cfg.solve.mode == "per_token":
        raise ConfigError(
            "data.holdout: missing, required by solve.mode=per_token, which reads each token's "
            "aim from it; give never-seen rows like the forget set's, or another mode"
        )
    raise ConfigError(
        "data.holdout: missing, required by solve.strength=auto; allowed: a set, or a number there"
    )


def check_comparison(cfg: UnlearnConfig) -> None:
    """Require the sets by which a search compares its trials with a model that never learned.

    Without an oracle that is the holdout set. The membership attack on a classifier also needs
    rows that the model has not been trained on.
    """
    data = cfg.data
    has_oracle = bool(cfg.evaluation.oracles)
    if cfg.task == "causal_lm" and data.holdout is None and not has_oracle:
        raise ConfigError("data.holdout: missing, required by a search without evaluation.oracle")
    if cfg.task != "causal_lm" and data.general is None and (has_oracle or data.holdout is None):
        raise ConfigError(
            "data.general: missing, required by a search that scores classifiers "
            "by the attack on them"
        )


def check_learned_sets(cfg: UnlearnConfig) -> None:
    """Require that `data` gives every set that fine-tuning is to learn."""
    present = [name for name in get_args(SetName) if getattr(cfg.data, name) is not None]
    for name in cfg.finetune.sets:
        if name not in present:
            raise ConfigError(
                f"finetune.sets: found {name}, which data does not give, "
                f"allowed: {', '.join(present)}"
            )


def check_partitioning(cfg: UnlearnConfig, purpose: Purpose) -> None:
    """Refuse ZeRO-3 for methods that rank single weights, as each worker would have a part."""
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


def check_answered(cfg: UnlearnConfig, sets: Sets, purpose: Purpose) -> None:
    """Require an answer in every row that fine-tuning learns, or whose statistics are prepared.

    `run` lets the model answer such rows itself. Its own answers would teach it nothing here, and
    what they are depends on settings of the run.
    """
    if sets.unanswered and (purpose == "prepare" or "utility" in cfg.finetune.sets):
        assert cfg.data.utility is not None
        raise ConfigError(
            f"data.utility.path: {cfg.data.utility.path}: {sets.unanswered} of "
            f"{sets.counts['utility']} rows have no answer, allowed for `run` only; "
            "here an answer in every row, or no such set"
        )


def oracles_of(cfg: UnlearnConfig) -> dict[str, ModelConfig]:
    """Return the retrain oracles under their names in a run, none where none is configured."""
    models = [ModelConfig(path=path) for path in cfg.evaluation.oracles]
    return dict(zip(oracle_names(len(models)), models, strict=True))
