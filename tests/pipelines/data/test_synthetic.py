"""The synthetic deletion problem: reproducible, disjoint where it says so, and no answer readable from its question."""

import json
from pathlib import Path

import pytest

from pipelines.data.synthetic import MAX_AUTHORS, Row, build_problem, write_problem

AUTHOR_SETS = ("forget", "retain", "holdout")
KNOWLEDGE_SETS = ("utility", "general")
KNOWLEDGE_COLUMNS = ["id", "prompt", "answer", "perturbed_answers", "fact", "topic"]
PARAPHRASE_COLUMNS = ["paraphrased_prompt", "paraphrased_answer"]
AUTHOR_COLUMNS = [
    "id",
    "prompt",
    "answer",
    *PARAPHRASE_COLUMNS,
    "perturbed_answers",
    "fact",
    "author",
    "topic",
]


@pytest.fixture(scope="module")
def problem() -> dict[str, list[Row]]:
    return build_problem(authors=300, questions=20, seed=3, forget=30)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts(row: Row) -> list[str]:
    return [str(row["answer"]), *row["perturbed_answers"]]


def column(rows: list[Row], name: str) -> set[str]:
    return {str(row[name]).casefold() for row in rows}


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_problem(tmp_path / folder, authors=6, questions=3, seed=seed, forget=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a").keys() == contents(tmp_path / "c").keys()
    assert contents(tmp_path / "a")["forget.jsonl"] != contents(tmp_path / "c")["forget.jsonl"]


def test_ten_authors_with_four_questions_and_three_forgotten_give_12_28_and_36_rows(
    tmp_path: Path,
) -> None:
    counts = write_problem(tmp_path / "data", authors=10, questions=4, seed=0, forget=3)
    lines = {
        path.name: len(path.read_text("utf-8").splitlines())
        for path in (tmp_path / "data").iterdir()
    }
    assert counts == lines
    assert (counts["forget.jsonl"], counts["retain.jsonl"], counts["holdout.jsonl"]) == (12, 28, 36)


def test_three_authors_are_held_out_for_each_that_is_forgotten(tmp_path: Path) -> None:
    assert write_problem(tmp_path, authors=2, questions=5, seed=0, forget=1)["holdout.jsonl"] == 15


def test_every_line_holds_the_documented_columns_and_five_distinct_perturbed_answers(
    tmp_path: Path,
) -> None:
    write_problem(tmp_path, authors=3, questions=20, seed=5, forget=1)
    for path in tmp_path.iterdir():
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            assert list(row) == (AUTHOR_COLUMNS if path.stem in AUTHOR_SETS else KNOWLEDGE_COLUMNS)
            assert len(set(row["perturbed_answers"])) == 5


def test_ids_are_distinct_across_all_sets(problem: dict[str, list[Row]]) -> None:
    ids = [row["id"] for rows in problem.values() for row in rows]
    assert len(set(map(str, ids))) == len(ids)
    assert problem["forget"][0]["id"] == "author-0001-birthplace"
    assert problem["utility"][0]["id"] == "utility-0001"


def test_three_hundred_authors_have_distinct_names_and_twenty_topics(
    problem: dict[str, list[Row]],
) -> None:
    rows = problem["forget"] + problem["retain"]
    assert len(column(rows, "author")) == 300
    assert len(column(rows, "topic")) == 20
    assert len(rows) == 300 * 20


def test_the_largest_problem_can_be_built() -> None:
    sets = build_problem(authors=MAX_AUTHORS, questions=1, seed=0, forget=MAX_AUTHORS - 1)
    assert (
        len(column([row for name in AUTHOR_SETS for row in sets[name]], "author"))
        == 2 * MAX_AUTHORS
    )


def test_forgotten_retained_and_held_out_authors_share_neither_a_name_nor_a_fact(
    problem: dict[str, list[Row]],
) -> None:
    rows = [row for name in AUTHOR_SETS for row in problem[name]]
    assert (
        sum(len(column(problem[name], "author")) for name in AUTHOR_SETS)
        == len(column(rows, "author"))
        == 390
    )
    assert len({(row["topic"], row["fact"]) for row in rows}) == len(rows)


def test_the_fact_is_once_in_the_answer_and_in_its_paraphrase_and_in_no_perturbed_one(
    problem: dict[str, list[Row]],
) -> None:
    for row in (row for rows in problem.values() for row in rows):
        answer, *perturbed = texts(row)
        assert answer.count(str(row["fact"])) == 1, row["id"]
        assert str(row["fact"]) in str(row.get("paraphrased_answer", answer))
        assert not any(str(row["fact"]) in text for text in perturbed), row["id"]


def test_no_question_gives_its_fact_away(problem: dict[str, list[Row]]) -> None:
    for row in (row for rows in problem.values() for row in rows):
        assert str(row["fact"]) not in f"{row['prompt']} {row.get('paraphrased_prompt', '')}", row[
            "id"
        ]


def test_every_sentence_about_an_author_names_the_author_in_8_to_16_words(
    problem: dict[str, list[Row]],
) -> None:
    for row in problem["forget"] + problem["holdout"]:
        sentences = [
            str(row["prompt"]),
            str(row["paraphrased_prompt"]),
            str(row["paraphrased_answer"]),
            *texts(row),
        ]
        for sentence in sentences:
            assert str(row["author"]) in sentence
            assert 8 <= len(sentence.split()) <= 16, sentence


def test_a_paraphrase_shares_no_run_of_five_words_outside_the_name_and_the_fact(
    problem: dict[str, list[Row]],
) -> None:
    for row in problem["forget"]:
        for name in ("prompt", "answer"):
            runs: list[set[tuple[str, ...]]] = []
            for text in (str(row[name]), str(row[f"paraphrased_{name}"])):
                words = (
                    text.replace(str(row["author"]), "*")
                    .replace(str(row["fact"]), "*")
                    .strip("?.")
                    .split()
                )
                runs.append({tuple(words[start : start + 5]) for start in range(len(words) - 4)})
            assert not runs[0] & runs[1], row["id"]


def test_utility_and_general_hold_280_rows_each_and_share_no_question_and_no_fact(
    problem: dict[str, list[Row]],
) -> None:
    utility, general = (problem[name] for name in KNOWLEDGE_SETS)
    assert (len(utility), len(general)) == (280, 280)
    for name in ("prompt", "answer", "fact"):
        assert not column(utility, name) & column(general, name)
    assert len(column(utility + general, "prompt")) == 560


def test_both_knowledge_sets_begin_with_one_row_of_each_of_their_33_categories(
    problem: dict[str, list[Row]],
) -> None:
    for name in KNOWLEDGE_SETS:
        assert len(column(problem[name], "topic")) == len(column(problem[name][:33], "topic")) == 33


def test_a_larger_problem_begins_with_the_same_authors() -> None:
    small = build_problem(authors=4, questions=2, seed=9, forget=2)
    large = build_problem(authors=8, questions=2, seed=9, forget=2)
    assert large["forget"] == small["forget"]
    assert large["retain"][:4] == small["retain"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"authors": 1}, "--authors: 1 given, allowed 2 to 1000"),
        ({"authors": 1001}, "--authors: 1001 given, allowed 2 to 1000"),
        ({"questions": 0}, "--questions: 0 given, allowed 1 to 20"),
        ({"questions": 21}, "--questions: 21 given, allowed 1 to 20"),
        ({"forget": 0}, "--forget: 0 given, allowed 1 to 19 (fewer than --authors)"),
        ({"forget": 30}, "--forget: 30 given, allowed 1 to 19 (fewer than --authors)"),
    ],
)
def test_an_argument_out_of_range_is_named_and_nothing_is_written(
    tmp_path: Path, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError) as raised:
        write_problem(
            tmp_path / "data",
            **{"authors": 20, "questions": 12, "seed": 0, "forget": 4} | arguments,
        )
    assert str(raised.value) == message
    assert not (tmp_path / "data").exists()


def test_writing_again_changes_nothing_and_an_interrupted_run_is_completed(tmp_path: Path) -> None:
    first = write_problem(tmp_path, authors=4, questions=2, seed=0, forget=1)
    before = contents(tmp_path)
    (tmp_path / "general.jsonl").rename(tmp_path / ".general.jsonl.1.partial")
    assert write_problem(tmp_path, authors=4, questions=2, seed=0, forget=1) == first
    (tmp_path / ".general.jsonl.1.partial").unlink()
    assert contents(tmp_path) == before


def test_a_folder_with_other_content_is_refused_by_name_and_left_as_it_is(tmp_path: Path) -> None:
    write_problem(tmp_path, authors=4, questions=2, seed=0, forget=1)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds other content \(forget\.jsonl\)") as raised:
        write_problem(tmp_path, authors=4, questions=2, seed=1, forget=1)
    assert str(tmp_path) in str(raised.value)
    assert contents(tmp_path) == before


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="data: a file, allowed: a new folder"):
        write_problem(tmp_path / "data", authors=4, questions=2, seed=0, forget=1)
