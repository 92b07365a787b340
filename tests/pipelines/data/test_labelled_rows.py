"""Rows to classify, and shares of a source; with the columns of CIFAR-10, IMDB and ELI5, and what is refused."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs

from pipelines.config.data import ColumnsConfig, DataConfig, Task
from pipelines.config.load import load_config
from pipelines.config.schema import ConfigError
from pipelines.data.readers import Piece, open_rows
from pipelines.data.rows import Selection, number_rows, read_piece
from pipelines.data.sets import Sets, load_sets

SECRET = "Quixotic Zebra"
CLASSES = ["cat", "dog", "frog"]
EVERYTHING = Selection(None, frozenset(), None, frozenset())
BY_IMAGE = ColumnsConfig(image="img", label="label")
BY_TEXT = ColumnsConfig(label="label")


def image_of(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8))


def png(seed: int) -> bytes:
    file = io.BytesIO()
    image_of(seed).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, **columns: list[Any]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve images of three classes in turn, as CIFAR-10 has them; `test` has two more."""
    folder = tmp_path_factory.mktemp("pictures")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    )

    def split(numbers: range) -> datasets.Dataset:
        rows = {"img": [image_of(n) for n in numbers], "label": [n % 3 for n in numbers]}
        return datasets.Dataset.from_dict(rows, features=features)

    datasets.DatasetDict({"train": split(range(12)), "test": split(range(12, 14))}).save_to_disk(
        str(folder)
    )
    return str(folder)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four reviews as IMDB has them; `unsupervised` has one whose label is -1."""
    folder = tmp_path_factory.mktemp("reviews")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    train = {"text": [f"{SECRET} film {n}.\n" for n in range(4)], "label": [0, 0, 1, 1]}
    without = {"text": ["Unseen."], "label": [-1]}
    splits = {
        name: datasets.Dataset.from_dict(rows, features=features)
        for name, rows in (("train", train), ("unsupervised", without))
    }
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return str(folder)


def piece(path: str, format: str = "parquet", split: str = "train", name: str = "forget") -> Piece:
    return Piece(name, path, format, path, fs.LocalFileSystem(), split)


def read(
    source: Piece, columns: ColumnsConfig, task: Task, selection: Selection = EVERYTHING
) -> list[dict[str, Any]]:
    return pa.concat_tables(read_piece(source, columns, selection, task)).to_pylist()


def load(columns: dict[str, str], task: Task, **sources: Any) -> Sets:
    return load_sets(DataConfig.model_validate({"columns": columns, **sources}), task)


def fault_of(rows: list[dict[str, Any]]) -> str:
    [*_, last] = rows
    assert not last["selected"]
    assert SECRET not in last["fault"]
    assert "\n" not in last["fault"]
    return last["fault"]


@pytest.mark.usefixtures("ray_session")
def test_one_class_of_a_saved_data_set_of_images_is_forgotten(pictures: str) -> None:
    sets = load(
        {"image": "img", "label": "label"},
        "image_classification",
        forget={"path": pictures, "column": "label", "values": [1]},
        retain={"path": pictures, "column": "label", "values": [0, 2]},
        utility={"path": pictures, "split": "test"},
    )
    assert (sets.counts, sets.unanswered) == ({"forget": 4, "retain": 8, "utility": 2}, 0)
    rows = sets.forget.take_all()
    assert [(row["id"], row["label"]) for row in rows] == [
        ("1", "1"),
        ("4", "1"),
        ("7", "1"),
        ("10", "1"),
    ]
    assert {row["prompt"] + row["answer"] + row["fact"] for row in rows} == {""}
    for row in rows:
        opened = Image.open(io.BytesIO(row["image"]))
        assert np.array_equal(np.asarray(opened), np.asarray(image_of(int(row["id"]))))


@pytest.mark.usefixtures("ray_session")
def test_an_image_that_is_to_go_cannot_stay_under_another_id_and_label(tmp_path: Path) -> None:
    forget = write_parquet(
        tmp_path / "forget.parquet", id=["f0", "f1"], image=[png(0), png(1)], label=[0, 1]
    )
    retain = write_parquet(
        tmp_path / "retain.parquet", id=["r0", "r1"], image=[png(2), png(1)], label=[0, 2]
    )
    with pytest.raises(ConfigError) as caught:
        load(
            {"label": "label"},
            "image_classification",
            forget={"path": forget},
            retain={"path": retain},
        )
    message = f"data.forget.path: {forget} shares 1 row with retain ({retain}), by image: ids 'f1'; allowed: "
    assert str(caught.value).startswith(message)


@pytest.mark.usefixtures("ray_session")
def test_a_text_that_is_to_go_cannot_stay_under_another_label(tmp_path: Path) -> None:
    forget = write_jsonl(tmp_path / "forget.jsonl", [{"text": f"{SECRET} one.", "label": 0}])
    retain = write_jsonl(
        tmp_path / "retain.jsonl", [{"text": f"{SECRET.upper()}  one.", "label": 1}]
    )
    with pytest.raises(
        ConfigError, match=r"shares 1 row with retain .*, by text: ids '0'; allowed: "
    ) as caught:
        load(
            {"label": "label"},
            "sequence_classification",
            forget={"path": forget},
            retain={"path": retain},
        )
    assert SECRET not in str(caught.value)


@pytest.mark.usefixtures("ray_session")
def test_a_source_is_parted_at_random_into_forget_and_retain(tmp_path: Path) -> None:
    rows = [{"text": f"Text {n % 900}.", "label": n % 2} for n in range(1000)]
    path = write_jsonl(tmp_path / "all.jsonl", rows)
    shares = {
        "forget": {"path": path, "share": [0, 0.25]},
        "retain": {"path": path, "share": [0.25, 1]},
    }
    sets = load({"label": "label"}, "sequence_classification", **shares)
    assert sets.counts["forget"] + sets.counts["retain"] == 1000
    assert 200 < sets.counts["forget"] < 300
    ids = [{row["id"] for row in rows.take_all()} for _, rows in sets.items()]
    assert ids[0] | ids[1] == {str(n) for n in range(1000)}
    with pytest.raises(
        ConfigError,
        match="no row is left after ids, exclude_ids, column and share; allowed: at least",
    ):
        load({}, "causal_lm", forget={"path": path, "share": [0, 1e-9]}, retain={"path": path})


def kept(rows: list[dict[str, Any]]) -> set[str]:
    return {row["id"] for row in rows if row["selected"]}


def test_shares_are_disjoint_complete_and_seeded_and_hold_equal_rows_together(
    tmp_path: Path,
) -> None:
    rows = [
        {
            "id": n,
            "prompt": f"WHO  is {n % 500}?" if n < 500 else f"Who is {n % 500}?",
            "answer": "I",
        }
        for n in range(1000)
    ]
    source = piece(write_jsonl(tmp_path / "all.jsonl", rows), "jsonl")

    def share(first: float, end: float, seed: int = 0) -> set[str]:
        chosen = Selection(None, frozenset(), None, frozenset(), (first, end), seed)
        return kept(read(source, ColumnsConfig(), "causal_lm", chosen))

    parts = [share(0, 0.1), share(0.1, 0.6), share(0.6, 1)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1000
    for part, expected in zip(parts, (100, 500, 400), strict=True):
        assert abs(len(part) - expected) < 80
        assert {f"{(int(row) + 500) % 1000}" for row in part} == part
    assert share(0, 0.1) == parts[0]
    assert share(0, 0.05) < parts[0]
    assert share(0, 0.1, seed=1) != parts[0]
    assert share(0, 1) == set.union(*parts)


def test_a_share_has_its_place_by_the_image_alone(tmp_path: Path) -> None:
    images = [png(n % 20) for n in range(40)]
    source = write_parquet(tmp_path / "rows.parquet", image=images, label=list(range(40)))
    half = Selection(None, frozenset(), None, frozenset(), (0, 0.5))
    found = kept(read(piece(source), BY_TEXT, "image_classification", half))
    assert 0 < len(found) < 40
    assert {f"{(int(row) + 20) % 40}" for row in found} == found


def test_an_id_or_value_that_lies_in_another_share_counts_as_found(tmp_path: Path) -> None:
    source = piece(
        write_jsonl(tmp_path / "all.jsonl", [{"text": f"{n}", "author": "Ann"} for n in range(20)]),
        "jsonl",
    )
    chosen = Selection(frozenset({"3", "4"}), frozenset(), "author", frozenset({"Ann"}), (0, 1e-12))
    rows = read(source, ColumnsConfig(), "causal_lm", chosen)
    assert [(row["id"], row["selected"], row["value"]) for row in rows if row["id"] in ("3", "4")] == [
        ("3", False, "Ann"), ("4", False, "Ann")
    ]  # fmt: skip


@pytest.mark.parametrize("share", ["[0.5,0.5]", "[0.6,0.5]", "[-0.1,1]", "[0,1.1]"])
def test_a_share_that_is_no_part_is_refused(share: str) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^data.forget.share: found \[.*\], allowed: \[from, to\] with 0 <= from <",
    ):
        load_config("quick", [f"data.forget.share={share}"])
    assert load_config("quick", ["data.forget.share=[0,0.05]"]).data.forget.share == (0, 0.05)


def test_a_text_to_classify_is_an_answer_with_a_label_whatever_else_its_source_has(
    reviews: str, tmp_path: Path
) -> None:
    rows = read(piece(reviews, "saved"), BY_TEXT, "sequence_classification")
    assert [(row["prompt"], row["answer"], row["label"], row["image"]) for row in rows] == [
        ("", f"{SECRET} film {n}.\n", str(n // 2), b"") for n in range(4)
    ]
    more = {
        "prompt": 3,
        "answer": [],
        "fact": "none of it",
        "image": "a.png",
        "perturbed_answers": 1,
    }
    source = write_jsonl(
        tmp_path / "rows.jsonl", [{"text": f"{SECRET} film 0.\n", "label": "0", **more}]
    )
    assert read(piece(source, "jsonl"), BY_TEXT, "sequence_classification")[0] == rows[0]


def test_the_digest_of_an_image_row_is_of_its_bytes_and_its_label(tmp_path: Path) -> None:
    digests = set()
    for number, (seed, label) in enumerate([(0, 0), (1, 0), (0, 1)]):
        source = write_parquet(tmp_path / f"{number}.parquet", image=[png(seed)], label=[label])
        [row] = read(piece(source), BY_TEXT, "image_classification")
        digests.add(row["digest"])
        assert (
            row["content"] == row["question"] == hashlib.blake2b(png(seed), digest_size=16).digest()
        )
    assert len(digests) == 3


@pytest.mark.parametrize("name", ["forget", "utility"])
def test_an_image_row_is_never_one_without_an_answer(tmp_path: Path, name: str) -> None:
    source = piece(
        write_parquet(tmp_path / "rows.parquet", image=[png(0), png(1)], label=[0, 1]), name=name
    )
    [block] = read_piece(source, BY_TEXT, EVERYTHING, "image_classification")
    rows, unanswered = number_rows(block, 0, 2, 2)
    assert (rows.num_rows, unanswered) == (2, 0)


def test_a_column_of_images_is_not_read_where_nothing_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []

    def open_and_tell(source: Piece, wanted: set[str]) -> Any:
        asked.append(wanted)
        return open_rows(source, wanted)

    monkeypatch.setattr("pipelines.data.rows.open_rows", open_and_tell)
    source = piece(write_parquet(tmp_path / "rows.parquet", text=["A"], image=[png(0)], label=[0]))
    for task in ("causal_lm", "sequence_classification"):
        [row] = read(source, BY_TEXT, task)
        assert (row["answer"], row["image"]) == ("A", b"")
    read(source, BY_TEXT, "image_classification")
    assert ["image" in wanted for wanted in asked] == [False, False, True]


def test_images_of_the_hub_are_read_where_it_gives_but_their_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_dataset` takes a folder of images as it takes a hub name; its rows are paths into that folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number, name in enumerate(CLASSES):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "one.png").write_bytes(png(number))
    columns, source = (
        ColumnsConfig(label="label"),
        Piece("forget", "hub", "hub", str(tmp_path), None, "train"),
    )
    rows = read(source, columns, "image_classification")
    assert [(row["image"], row["label"]) for row in rows] == [
        (png(number), str(number)) for number in range(3)
    ]


def test_a_path_alone_is_no_image(tmp_path: Path) -> None:
    source = write_parquet(
        tmp_path / "paths.parquet", image=[{"bytes": None, "path": "a.png"}], label=[2]
    )
    expected = "row '0' has a path alone in column 'image'; allowed: the image file's bytes"
    assert expected in fault_of(read(piece(source), BY_TEXT, "image_classification"))


IMAGE_FAULTS: dict[str, tuple[dict[str, list[Any]], str]] = {
    "no column of images": (
        {"label": [0], "picture": [b""]},
        "has no column 'image' (data.columns.image); it has: lab",
    ),
    "no column of labels": (
        {"image": [png(0)]},
        "has no column 'label' (data.columns.label); it has: image",
    ),
    "no image": (
        {"image": [png(0), None], "label": [0, 0]},
        "is empty of 'image' and 'label': '1'; allowed: an image",
    ),
    "an empty image": (
        {"image": [b""], "label": [0]},
        "is empty of 'image' and 'label': '0'; allowed: an image and a l",
    ),
    "no label": (
        {"image": [png(0), png(1)], "label": [None, 0]},
        "is empty of 'image' and 'label': '0'",
    ),
    "text for an image": (
        {"image": [SECRET], "label": [0]},
        "row '0' has text in column 'image'; allowed: an image",
    ),
    "other bytes": (
        {"image": [SECRET.encode()], "label": [0]},
        "row '0' has bytes in column 'image' that PIL cannot",
    ),
    "a number as label": (
        {"image": [png(0)], "label": [0.5]},
        "row '0' has a number in column 'label'; allowed: text",
    ),
}


@pytest.mark.parametrize("case", IMAGE_FAULTS)
def test_a_row_without_an_image_or_a_label_is_refused(tmp_path: Path, case: str) -> None:
    columns, words = IMAGE_FAULTS[case]
    source = write_parquet(tmp_path / "rows.parquet", **columns)
    fault = fault_of(read(piece(source), BY_TEXT, "image_classification"))
    assert fault.startswith(f"data.forget.path: {source}")
    assert words in fault


@pytest.mark.parametrize(
    "rows, ids",
    [
        ([{"text": SECRET, "label": 0}, {"text": SECRET}], "'1'"),
        ([{"text": SECRET, "label": " "}], "'0'"),
        ([{"text": SECRET, "label": -1}] * 7, "'0', '1', '2', '3', '4'"),
        ([{"text": " ", "label": 0}], "'0'"),
    ],
)
@pytest.mark.parametrize("name", ["retain", "utility"])
def test_a_text_without_a_label_is_refused_in_every_set(
    tmp_path: Path, rows: list[dict[str, Any]], ids: str, name: str
) -> None:
    source = piece(write_jsonl(tmp_path / "rows.jsonl", rows), "jsonl", name=name)
    fault = fault_of(read(source, BY_TEXT, "sequence_classification"))
    assert f"is empty of 'text' and 'label': {ids}; allowed: text and a label in every row" in fault


def test_a_split_without_labels_is_refused(reviews: str) -> None:
    fault = fault_of(
        read(piece(reviews, "saved", "unsupervised"), BY_TEXT, "sequence_classification")
    )
    assert "is empty of 'text' and 'label': '0'" in fault


def test_the_first_of_several_answers_in_a_field_is_the_answer(tmp_path: Path) -> None:
    """ELI5-Category's columns, and its way to hold answers: lists of texts and scores in one column."""
    answers = [
        {"a_id": [f"a{n}", "b"], "text": [f"Since {n}.", "No idea."], "score": [9, 1]}
        for n in range(2)
    ]
    rows = {
        "q_id": ["q0", "q1"], "title": ["Why 0?", "Why 1?"], "selftext": ["", "More."], "category": ["Biology"] * 2,
        "subreddit": ["explainlikeimfive"] * 2, "answers": answers,
    }  # fmt: skip
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path))
    columns = load_config("rfa_eli5").data.columns
    found = read(piece(str(tmp_path), "saved"), columns, "causal_lm")
    assert [(row["id"], row["prompt"], row["answer"], row["label"]) for row in found] == [
        ("q0", "Why 0?", "Since 0.", "Biology"), ("q1", "Why 1?", "Since 1.", "Biology")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "answers, words",
    [
        ({"text": []}, "is empty of 'title' and 'answers.text': '0'"),
        ({"score": [1]}, "is empty of 'title' and 'answers.text': '0'"),
        ({"text": [[SECRET]]}, "row '0' has a list in column 'answers.text'; allowed: text"),
    ],
)
def test_a_row_without_an_answer_in_the_field_is_refused(
    tmp_path: Path, answers: Any, words: str
) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{"title": "Why?", "answers": answers}])
    columns = ColumnsConfig(prompt="title", answer="answers.text")
    assert words in fault_of(read(piece(source, "jsonl"), columns, "causal_lm"))


def test_a_column_whose_name_has_a_dot_is_itself(tmp_path: Path) -> None:
    source = write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": "Why?", "a.b": "So.", "a": {"b": "Not so."}}]
    )
    [row] = read(piece(source, "jsonl"), ColumnsConfig(answer="a.b"), "causal_lm")
    assert row["answer"] == "So."
