"""The statistics that `ray-unlearn prepare` has left, and whether they are those of a run.

They are sums over the training set of one model: what a request names and what stays. A run takes
its forget rows' part away, and need not read the others. That is right only if its forget and
retain sets together are the rows that were counted. Sets have digests that are sums over rows, so
that those of any two parts of the rows add up to the same.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.config.load import changed_keys
from pipelines.config.schema import ConfigError, UnlearnConfig
from pipelines.storage.output import OutputDir, open_output
from pipelines.storage.records import Manifest, parse_config, parse_record
from pipelines.storage.seal import MANIFEST, file_digests, manifest_digest
from pipelines.storage.verify import compare

STATISTICS = "statistics"
KEY = "solve.prepared"
# The keys that the statistics depend on, beside the model's files and the rows.
DECIDING = (
    "adapter.layers",
    "adapter.targets",
    "data.max_tokens",
    "data.system_prompt",
    "model.date",
    "model.revision",
    "solve.exact_width",
    "solve.sketch_columns",
    "train.precision",
)
# These are counted alike: which of them a request names is not known yet.
TRAINED = ("forget", "retain")


def check_prepared(cfg: UnlearnConfig, sets: Mapping[str, Any]) -> None:
    """Refuse statistics of another model, of other rows or settings, or that were changed.

    Args:
        cfg: a run's configuration. Without `solve.prepared` there is nothing to refuse.
        sets: each set's number of rows and digest.

    Raises:
        ConfigError: one line that names the key.
    """
    if cfg.solve.prepared is None:
        return
    place = f"{KEY}: {cfg.solve.prepared}"
    output = open_output(cfg.solve.prepared, KEY)
    manifest = _manifest_of(output, place)
    found = manifest.get("purpose"), manifest.get("status")
    if found != ("prepare", "complete"):
        raise ConfigError(
            f"{place}: found status {found[1]} of `{found[0]}`; allowed: complete, of `prepare`"
        )
    model, digest = manifest["model"], manifest.get("model_files")
    found_digest = model_files_digest(cfg.model.path)
    is_other_name = found_digest is None and model["path"] != cfg.model.path
    if digest != found_digest or is_other_name:
        raise ConfigError(
            f"{place}: was prepared for another model ({model['path']}); allowed: statistics of "
            f"{cfg.model.path}, which every request that changes a model changes, too"
        )
    old = parse_config(output.read("config.yaml") or b"{}", f"{place}/config.yaml")
    changed = changed_keys(old, cfg.model_dump(mode="json"))
    others = [name for name in changed if name in DECIDING]
    if others:
        raise ConfigError(f"{place}: was prepared with another {others[0]}; allowed: the same")
    _check_rows(place, manifest["sets"], sets)
    differences = compare(output).differences
    if differences:
        raise ConfigError(
            f"{place}: is not as it was sealed ({differences[0]}); allowed: unchanged"
        )


def model_files_digest(path: str) -> str | None:
    """Return the SHA-256 over all of a model folder's files, the tokenizer's too; None for a hub name."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    text = json.dumps(file_digests(folder), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def prepared_digest(path: str) -> str:
    """Return the digest of the manifest of prepared statistics.

    Raises:
        ConfigError: there are none.
    """
    return manifest_digest(_manifest_of(open_output(path, KEY), f"{KEY}: {path}"))


def _manifest_of(output: OutputDir, place: str) -> dict[str, Any]:
    content = output.read(MANIFEST)
    if content is None:
        raise ConfigError(f"{place}: not found; allowed: a folder that ray-unlearn prepare wrote")
    return parse_record(content, f"{place}/{MANIFEST}", Manifest)


def _check_rows(place: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse rows that are not those which were counted."""
    if old.get("utility") != new.get("utility"):
        raise ConfigError(f"{place}: was prepared with another data.utility; allowed: the same")
    before, after = _total(old), _total(new)
    if before != after:
        raise ConfigError(
            f"{place}: was prepared with other rows: data.forget and data.retain found "
            f"{after[0]:,} rows in all, prepared {before[0]:,}; allowed: the same rows, however "
            "they are parted"
        )


def _total(sets: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many rows were trained on, and the sum of their digests."""
    rows = sum(sets[name]["rows"] for name in TRAINED)
    digest = sum(int(sets[name]["digest"], 16) for name in TRAINED)
    return rows, digest % 2**256
