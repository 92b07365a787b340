"""Benchmarks by name: data sets with the columns that the hub's have are read by their presets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import fs

from pipelines.config.data import SET_NAMES, SourceConfig
from pipelines.config.load import load_config
from pipelines.data.readers import Piece
from pipelines.data.rows import Selection, read_piece

EVERYTHING = Selection(None, frozenset(), None, frozenset())
QUESTIONS = {"question": ["Who?", "Where?"], "answer": ["Ann.", "In Bern."]}
PERTURBED = {
    **QUESTIONS,
    "paraphrased_answer": ["It is Ann.", "Bern."],
    "perturbed_answer": [["Bob.", "Cid."], ["In Rome.", "In Oslo."]],
    "paraphrased_question": ["What name?", "What place?"],
}
OPTIONS = {f"option{number}": ["x", "y"] for number in range(1, 5)}
QUERIES = {"query": QUESTIONS["question"], "answer": QUESTIONS["answer"]}
PEOPLE = {"subject": ["Stephen King", "Confucius"]}
TEXTS = {"text": ["Some article.", "Another one."]}
# By the hub's name and the split.
COLUMNS: dict[tuple[str, str], dict[str, Any]] = {
    ("locuslab/TOFU:world_facts", "train"): QUESTIONS | OPTIONS,
    ("muse-bench/MUSE-News:raw", "forget"): TEXTS,
    ("muse-bench/MUSE-News:raw", "retain1"): TEXTS,
    ("muse-bench/MUSE-News:raw", "holdout"): TEXTS,
    ("muse-bench/MUSE-News:knowmem", "retain_qa"): QUESTIONS,
    ("cais/wmdp-corpora:cyber-forget-corpus", "train"): TEXTS,
    ("cais/wmdp-corpora:cyber-retain-corpus", "train"): TEXTS,
    ("jinzhuoran/RWKU:train_positive_llama3", "train"): TEXTS | PEOPLE,
    ("jinzhuoran/RWKU:neighbor_level2", "test"): QUERIES | PEOPLE,
}
for forget, retain in (("01", "99"), ("05", "95"), ("10", "90")):
    COLUMNS["locuslab/TOFU:forget" + forget + "_perturbed", "train"] = PERTURBED
    COLUMNS["locuslab/TOFU:retain" + retain, "train"] = QUESTIONS
    COLUMNS["locuslab/TOFU:holdout" + forget, "train"] = QUESTIONS


def source_of(source: SourceConfig, folder: Path) -> Piece:
    """The same source as a saved data set."""
    saved = folder / source.path.replace("/", "-") / source.split
    if not saved.exists():
        rows = datasets.Dataset.from_dict(COLUMNS[source.path, source.split])
        datasets.DatasetDict({source.split: rows}).save_to_disk(str(saved))
    return Piece("forget", str(saved), "saved", str(saved), fs.LocalFileSystem(), source.split)


FORGET05 = [
    "data.forget.path=locuslab/TOFU:forget05_perturbed",
    "data.retain.path=locuslab/TOFU:retain95",
    "data.holdout.path=locuslab/TOFU:holdout05",
    "evaluation.oracle=open-unlearning/tofu_Llama-3.2-1B-Instruct_retain95",
]
FORGET01 = [change.replace("05", "01").replace("95", "99") for change in FORGET05]


@pytest.mark.parametrize(
    "preset, changes",
    [
        ("tofu", []),
        ("tofu", FORGET05),
        ("tofu", FORGET01),
        ("muse", []),
        ("wmdp", []),
        ("rwku", []),
    ],
    ids=["forget10", "forget05", "forget01", "muse", "wmdp", "rwku"],
)
def test_every_source_of_a_preset_is_read(preset: str, changes: list[str], tmp_path: Path) -> None:
    cfg = load_config(preset, changes)
    for name in SET_NAMES:
        source: SourceConfig | None = getattr(cfg.data, name)
        if source is None:
            continue
        selection = replace(EVERYTHING, column=source.column, values=frozenset(source.values or ()))
        tables = read_piece(source_of(source, tmp_path), cfg.data.columns, selection, cfg.task)
        first, *others = pa.concat_tables(tables).to_pylist()
        columns = COLUMNS[source.path, source.split]
        number = 0
        if source.column is None:
            assert len(others) == 1
        else:
            assert not others, "a person's rows alone"
            number = columns[source.column].index(source.values[0])
        asked = columns.get(cfg.data.columns.prompt, ["", ""])
        assert first["prompt"] == asked[number]
        assert first["answer"] == columns.get("answer", columns.get("text"))[number]
        if columns is PERTURBED:
            assert first["paraphrased_prompt"] == "What name?"
            assert first["paraphrased_answer"] == "It is Ann."
            assert first["perturbed_answers"] == ["Bob.", "Cid."]


def test_the_comment_of_tofu_names_the_same_changes() -> None:
    text = Path("pipelines/config/presets/tofu.yaml").read_text()
    for change in FORGET05:
        assert change in text
