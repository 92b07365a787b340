"""What `load_sets` makes of sources and selectors, and what it refuses."""

import csv
import gc
import json
import logging
import time
import traceback
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray._private import worker as ray_worker

from pipelines.config.data import DataConfig
from pipelines.config.schema import ConfigError
from pipelines.data.sets import Sets, load_sets
from pipelines.data.sources import request_ids

pytestmark = pytest.mark.usefixtures("ray_session")

SECRET = "Quixotic Zebra"  # stands in every prompt and answer, so that a message that quotes one is found out
Row = dict[str, Any]


def question(row_id: str | int, **more: Any) -> Row:
    return {
        "id": row_id,
        "prompt": f"Who wrote {SECRET} {row_id}?",
        "answer": f"{SECRET} author {row_id}",
        **more,
    }


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(folder: Path, forget: Any, retain: Any = None, **more: Any) -> Sets:
    """Sources are mappings; a list of rows becomes a JSONL file, and retain has two rows unless it is given."""
    sources = {"forget": forget, "retain": retain or [question("r0"), question("r1")], **more}
    for name, rows in sources.items():
        if isinstance(rows, list):
            sources[name] = {"path": write_jsonl(folder / f"{name}.jsonl", rows)}
    return load_sets(DataConfig.model_validate(sources))


def rows_of(sets: Sets, name: str = "forget") -> list[Row]:
    return getattr(sets, name).take_all()


def ids_of(sets: Sets, name: str = "forget") -> list[str]:
    return [row["id"] for row in rows_of(sets, name)]


def test_every_set_has_the_same_columns_and_absence_is_empty(tmp_path: Path) -> None:
    paraphrased = {"paraphrased_prompt": "p", "paraphrased_answer": "a"}
    full = question(
        "f0", **paraphrased, fact="author f0", perturbed_answers=["x", "y"], author="Ann"
    )
    sets = load(tmp_path, [full, question("f1", author=None)], utility=[{"text": "Broad text."}])
    assert sets.names() == ["forget", "retain", "utility"]
    assert sets.counts == {"forget": 2, "retain": 2, "utility": 1}
    first, second = rows_of(sets)
    theirs = {k: v for k, v in full.items() if k != "author"}
    absent = {"image": b"", "refusal": ""}
    assert first == {"set": "forget", "row": 0, "label": "Ann", **absent, **theirs}
    assert second == {
        **first,
        **question("f1"),
        "row": 1,
        "label": "",
        "paraphrased_prompt": "",
        "paraphrased_answer": "",
        "fact": "",
        "perturbed_answers": [],
    }
    [text] = rows_of(sets, "utility")
    assert (text["id"], text["prompt"], text["answer"]) == ("0", "", "Broad text.")
    assert sets.forget.union(*[dataset for _, dataset in sets.items()[1:]]).count() == 5


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    names = {
        "id": "key",
        "prompt": "question",
        "answer": "reply",
        "fact": "core",
        "label": "writer",
    }
    rows = [
        {"key": 7, "question": "Who?", "reply": "Me.", "core": "Me", "fact": "ignored", "writer": 3}
    ]
    retain = [{"key": 7, "question": "Where?", "reply": "Here."}]
    sets = load(tmp_path, rows, retain, columns=names)
    [row] = rows_of(sets)
    assert (row["id"], row["prompt"], row["answer"], row["fact"], row["label"]) == (
        "7",
        "Who?",
        "Me.",
        "Me",
        "3",
    )


def test_a_fact_is_taken_without_the_white_space_around_it_and_a_blank_one_is_none(
    tmp_path: Path,
) -> None:
    rows = [
        question("f0", fact=" author f0\n"),
        question("f1", fact="  "),
        question("f2", fact=None),
    ]
    assert [row["fact"] for row in rows_of(load(tmp_path, rows))] == ["author f0", "", ""]


def test_a_fact_is_looked_for_in_plain_text_too(tmp_path: Path) -> None:
    rows = [{"text": f"{SECRET} is a beast.", "fact": "a beast"}]
    assert [row["fact"] for row in rows_of(load(tmp_path, rows))] == ["a beast"]
    words = ["row '0' has words in column 'fact' that are not in its 'text'"]
    assert_refused(tmp_path, [{**rows[0], "fact": "a bird"}], key="data.forget.path", words=words)


def test_ids_of_mixed_types_become_text_and_broken_unicode_order_or_blank_lines_do_no_harm(
    tmp_path: Path,
) -> None:
    path = tmp_path / "forget.jsonl"
    lines = [
        json.dumps(question(1)),
        "",
        json.dumps(question("b")),
        json.dumps(question("ü"), ensure_ascii=False),
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert ids_of(load(tmp_path, {"path": str(path)})) == ["1", "b", "ü"]


def test_csv_keeps_numbers_commas_and_lines_as_text(tmp_path: Path) -> None:
    path = tmp_path / "forget.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [["id", "prompt", "answer"], ["007", "Born?", "1984"], ["8", "a, b\nc", 'say "d"']]
        )
    rows = rows_of(load(tmp_path, {"path": str(path)}))
    assert [(row["id"], row["prompt"], row["answer"]) for row in rows] == [
        ("007", "Born?", "1984"), ("8", "a, b\nc", 'say "d"')
    ]  # fmt: skip


def test_rows_keep_the_order_of_their_source_over_blocks_and_files(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write_jsonl(
        tmp_path / "parts" / "a.jsonl", [question(f"a{i}") for i in range(3000)]
    )  # the slow one comes first
    write_jsonl(tmp_path / "parts" / "b.jsonl", [question("b0")])
    sets = load(tmp_path, {"path": str(tmp_path / "parts")})
    rows = rows_of(sets)
    assert [row["row"] for row in rows] == list(range(3001))
    assert [row["id"] for row in rows] == [f"a{i}" for i in range(3000)] + ["b0"]


def test_rows_without_ids_in_several_files_are_named_by_file_and_number(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    write_jsonl(tmp_path / "parts" / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    write_jsonl(tmp_path / "parts" / "b.jsonl", [{"text": "three"}])
    assert ids_of(load(tmp_path, {"path": str(tmp_path / "parts")})) == [
        "a.jsonl:0",
        "a.jsonl:1",
        "b.jsonl:0",
    ]


def test_a_deletion_request_splits_one_source_into_forget_and_retain(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", [question(i) for i in range(6)])
    request = tmp_path / "request.jsonl"
    request.write_text('{"id": "4", "reason": "asked"}\n"1"\n\n{"id": 4}\n', encoding="utf-8")
    assert request_ids(str(request)) == ["4", "1"]
    sets = load(
        tmp_path,
        {"path": source, "ids": str(request)},
        {"path": source, "exclude_ids": str(request)},
    )
    assert ids_of(sets) == ["1", "4"]
    assert ids_of(sets, "retain") == ["0", "2", "3", "5"]
    assert [row["row"] for row in rows_of(sets, "retain")] == [0, 1, 2, 3]


def test_a_column_selects_rows_by_value_and_numbers_match_as_text(tmp_path: Path) -> None:
    rows = [question(i, author=i % 3) for i in range(6)] + [
        question(6, author="Ann"),
        question(7, author=None),
    ]
    source = write_jsonl(tmp_path / "all.jsonl", rows)
    sets = load(
        tmp_path,
        {"path": source, "column": "author", "values": ["Ann", 1]},
        {"path": source, "column": "author", "values": ["0"]},
    )
    assert ids_of(sets) == ["1", "4", "6"]
    assert ids_of(sets, "retain") == ["0", "3"]


def test_selectors_hold_together_and_each_is_satisfied_by_rows_another_leaves_out(
    tmp_path: Path,
) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", [question(i, author=i % 2) for i in range(6)])
    ids = write_jsonl(tmp_path / "ids.jsonl", ["0", "2"])
    out = write_jsonl(tmp_path / "out.jsonl", ["2", "4"])
    forget = {
        "path": source,
        "ids": ids,
        "exclude_ids": out,
        "column": "author",
        "values": ["0", "1"],
    }
    assert ids_of(load(tmp_path, forget)) == ["0"]


def test_equal_rows_have_equal_digests_in_any_order_and_one_changed_letter_changes_it(
    tmp_path: Path,
) -> None:
    rows = [question(i) for i in range(4)]
    first = load(tmp_path, rows).digests
    assert load(tmp_path, rows[::-1]).digests == first
    assert len(first["forget"]) == 64
    assert first["forget"] != first["retain"]
    rows[2]["answer"] += "."
    second = load(tmp_path, rows).digests
    assert second["forget"] != first["forget"]
    assert second["retain"] == first["retain"]


def test_the_same_id_may_stand_for_different_rows_of_two_sources(tmp_path: Path) -> None:
    sets = load(tmp_path, [question("1")], [{"id": "1", "prompt": "Who?", "answer": "She."}])
    assert ids_of(sets) == ids_of(sets, "retain") == ["1"]


def test_rows_shared_by_forget_and_general_are_allowed(tmp_path: Path) -> None:
    assert load(tmp_path, [question("1")], general=[question("1")]).counts["general"] == 1


def test_the_process_wide_data_context_is_left_alone(tmp_path: Path) -> None:
    before = ray.data.DataContext.get_current().copy()
    sets = load(tmp_path, [question("1")])
    after = ray.data.DataContext.get_current()
    assert after.enable_progress_bars == before.enable_progress_bars
    assert after.execution_options.preserve_order == before.execution_options.preserve_order
    assert sets.forget.context.execution_options.preserve_order


def raw(text: str | bytes, suffix: str = ".jsonl") -> tuple[str, bytes]:
    return suffix, text if isinstance(text, bytes) else text.encode()


def lines(*rows: Any) -> tuple[str, bytes]:
    return raw("".join(json.dumps(row) + "\n" for row in rows))


GOOD = question("g0")
BROKEN_SOURCES = {
    "an empty file": (raw(""), ["is empty"]),
    "blank lines": (raw("\n \n"), ["has no rows"]),
    "a broken line": (raw(f'{json.dumps(GOOD)}\n\n{{"id": "{SECRET}'), ["line 3 is not JSON"]),
    "a line that is no object": (lines(GOOD, [SECRET]), ["line 2 is JSON but not an object"]),
    "a number too long": (raw(f'{{"id": "1", "prompt": "{SECRET}", "answer": {"9" * 5000}}}'), ["line 1 is not JSON"]),
    "another encoding": (raw(f'{{"text": "é {SECRET}"}}\n'.encode("latin-1")), ["line 1 is not JSON in UTF-8"]),
    "no known column": (lines({"a": SECRET, "b": 1}), ["columns 'prompt', 'messages' and 'text'; it has: a, b"]),
    "prompts only": (lines({"prompt": SECRET}), ["has column 'prompt' but not 'answer'; it has: prompt"]),
    "an empty answer": (lines(GOOD, {**GOOD, "id": "e1", "answer": " "}), ["is empty of 'prompt' and 'answer': 'e1'"]),
    "a null prompt": (lines(GOOD, {**GOOD, "id": "e1", "prompt": None}), ["is empty of 'prompt' and 'answer': 'e1'"]),
    "an empty text": (lines({"text": SECRET}, {"text": ""}), ["is empty of 'text': '1'"]),
    "six empty": (lines(*[{**GOOD, "id": f"e{i}", "answer": ""} for i in range(6)]), ["'e0', 'e1', 'e2', 'e3', 'e4';"]),
    "duplicate ids": (lines(GOOD, {**GOOD, "answer": SECRET}), ["has 1 id more than once: 'g0'"]),
    "duplicate mixed ids": (lines(question(1), {**GOOD, "id": "1"}), ["has 1 id more than once: '1'"]),
    "an answer that is a number": (lines({**GOOD, "answer": 4}), ["row 'g0' has a number in column 'answer'"]),
    "a prompt that is a list": (lines({**GOOD, "prompt": [SECRET]}), ["row 'g0' has a list in column 'prompt'"]),
    "a label that is a list": (lines({**GOOD, "author": [SECRET]}), ["row 'g0' has a list in column 'author'"]),
    "wrong answers as text": (
        lines({**GOOD, "perturbed_answers": SECRET}), ["row 'g0' has text in column 'perturbed_answers'"]
    ),
    "a wrong answer that is a number": (
        lines({**GOOD, "perturbed_answers": [SECRET, 3]}), ["row 'g0' has a number in column 'perturbed_answers'"]
    ),
    "a fact of other words": (
        lines(GOOD, {**GOOD, "id": "g1", "fact": f"{SECRET}!"}),
        ["row 'g1' has words in column 'fact' that are not in its 'answer'"],
    ),
    "a fact in other case": (lines({**GOOD, "fact": "Author g0"}), ["row 'g0' has words in column 'fact'"]),
    "a fact that is a list": (lines({**GOOD, "fact": [SECRET]}), ["row 'g0' has a list in column 'fact'"]),
    "an id that is a list": (lines({**GOOD, "id": [SECRET]}), ["row 0 (counted from 0) has a list as 'id'"]),
    "an id that is missing": (lines(GOOD, {"prompt": SECRET, "answer": "a"}), ["row 1 (counted from 0) has nothing"]),
    "an id that comes late": (lines({"text": SECRET}, {"id": "a", "text": SECRET}), ["row 1", "the first has none"]),
    "half a surrogate pair": (raw(f'{{"text": "{SECRET} \\ud800"}}'), ["row '0' has half a surrogate pair"]),
    "a Parquet file that is none": (raw(SECRET, ".parquet"), ["cannot be read as parquet"]),
    "a CSV row that is too long": (raw(f"id,text\n1,{SECRET}\n2,a,{SECRET}\n", ".csv"), ["line 3", "than the header"]),
    "a CSV row that is too short": (raw(f"id,text\n1,{SECRET}\n2\n", ".csv"), ["line 3", "than the header"]),
    "an open CSV quote": (raw(f'id,text\n1,"{SECRET}\n', ".csv"), ["is not CSV"]),
    "a CSV header alone": (raw("id,text\n", ".csv"), ["has no rows"]),
    "a CSV in another encoding": (raw(f"text\né{SECRET}\n".encode("latin-1"), ".csv"), ["cannot be read as csv"]),
    "an unknown suffix": (raw(SECRET, ".txt"), ["is or holds .txt", "allowed: a .jsonl"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_SOURCES)
def test_a_broken_source_is_refused_in_one_line_that_names_the_file_and_no_text(
    tmp_path: Path, case: str
) -> None:
    (suffix, content), expected = BROKEN_SOURCES[case]
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    assert_refused(
        tmp_path, {"path": str(path)}, key="data.forget.path", words=[str(path), *expected]
    )


def assert_refused(
    folder: Path, forget: Any, retain: Any = None, *, key: str, words: list[str], **more: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(folder, forget, retain, **more)
    message = str(caught.value)
    assert message.startswith(f"{key}: ")
    assert all(word in message for word in words), message
    assert ("\n" not in message and "allowed" in message) or "it has: " in message
    shown = "".join(traceback.format_exception(caught.value, chain=True))
    assert SECRET not in "\n".join(
        line for line in shown.splitlines() if not line.startswith("    ")
    )


def test_a_parquet_column_of_numbers_is_refused_by_row(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"id": [5], "prompt": [SECRET], "answer": [1.5]}), tmp_path / "f.parquet"
    )
    path = {"path": str(tmp_path / "f.parquet")}
    assert_refused(
        tmp_path, path, key="data.forget.path", words=["row '5' has a number in column 'answer'"]
    )


@pytest.mark.parametrize(
    "path, words",
    [
        ("nowhere/rows.jsonl", ["not found"]),
        ("{tmp}/nothing", ["not found"]),
        ("{tmp}/*.parquet", ["not found"]),
        ("{tmp}/empty", ["holds no such file"]),
        ("{tmp}/mixed", ["holds .csv, .jsonl"]),
        ("hdfs://host/rows.jsonl", ["found hdfs://"]),
    ],
)
def test_a_path_without_a_source_is_refused(tmp_path: Path, path: str, words: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    write_jsonl(tmp_path / "mixed" / "a.jsonl", [GOOD])
    (tmp_path / "mixed" / "b.csv").write_text("text\na\n")
    assert_refused(
        tmp_path, {"path": path.format(tmp=tmp_path)}, key="data.forget.path", words=words
    )


@pytest.mark.parametrize(
    "selector, key, words",
    [
        (
            {"ids": [f"x{i}" for i in range(7)]},
            "ids",
            ["names 7 ids", "'x0', 'x1', 'x2', 'x3', 'x4';"],
        ),
        ({"exclude_ids": ["0", "x"]}, "exclude_ids", ["names 1 id that", "'x'"]),
        ({"ids": ["0"], "exclude_ids": ["0"]}, "path", ["no row is left"]),
        (
            {"column": "authr", "values": ["1"]},
            "column",
            ["has no column 'authr'; it has: id, prompt, answer, author"],
        ),
        ({"column": "author", "values": ["1", "9"]}, "values", ["no row whose 'author' is '9'"]),
    ],
)
def test_a_selector_that_names_what_is_not_there_is_refused(
    tmp_path: Path, selector: dict[str, Any], key: str, words: list[str]
) -> None:
    source = write_jsonl(tmp_path / "all.jsonl", [question(i, author=i % 2) for i in range(4)])
    for name in {"ids", "exclude_ids"} & set(selector):
        selector = {**selector, name: write_jsonl(tmp_path / f"{name}.jsonl", selector[name])}
    assert_refused(tmp_path, {"path": source, **selector}, key=f"data.forget.{key}", words=words)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "not found"),
        (b"", "is empty"),
        (b'"1"\n{"id": "Quixotic Zebra', "line 2 is not JSON"),
        (b'"1"\n{"name": "Quixotic Zebra"}\n', "line 2 holds no id"),
        (b'["Quixotic Zebra"]\n', "line 1 holds no id"),
        (b"true\n", "line 1 holds no id"),
        (b'"\xe9"\n', "line 1 is not JSON in UTF-8"),
    ],
)
def test_a_broken_deletion_request_is_refused(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "request.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert_refused(
        tmp_path,
        [GOOD],
        {"path": "x", "ids": str(path)},
        key="data.retain.ids",
        words=[str(path), words],
    )


@pytest.mark.parametrize("name", ["retain", "utility", "holdout", "neighbours", "earlier"])
def test_forget_rows_that_also_stand_elsewhere_are_refused_whatever_their_ids_case_and_spaces(
    tmp_path: Path, name: str
) -> None:
    other = [question("o0")] + [
        {
            "id": f"o{i}",
            "prompt": f"  WHO wrote\n{SECRET.upper()} f{i}?",
            "answer": f"{SECRET}  AUTHOR f{i} ",
        }
        for i in range(1, 8)
    ]
    words = [f"shares 7 rows with {name}", "ids 'f1', 'f2', 'f3', 'f4', 'f5';"]
    sources = {"retain": [question("r0")], name: other}
    assert_refused(
        tmp_path,
        [question(f"f{i}") for i in range(9)],
        key="data.forget.path",
        words=words,
        **sources,
    )


def test_a_forget_answer_in_plain_text_is_found_in_the_utility_set(tmp_path: Path) -> None:
    text = {"text": f"{GOOD['prompt']} {GOOD['answer']}"}
    assert_refused(
        tmp_path,
        [GOOD],
        utility=[text],
        key="data.forget.path",
        words=["shares 1 row with utility", "'g0'"],
    )


def test_a_forget_prompt_that_stands_alone_in_the_utility_set_is_refused(tmp_path: Path) -> None:
    prompts = [{"prompt": f"Who? {SECRET}"}, {"prompt": GOOD["prompt"].upper()}]
    words = ["shares 1 row with utility", "'g0'"]
    assert_refused(tmp_path, [GOOD], utility=prompts, key="data.forget.path", words=words)


def test_a_deletion_request_names_whole_conversations(tmp_path: Path) -> None:
    opening = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    rows: list[Row] = []
    for name in ("a", "b", "c"):
        turns = [("user", f"Who is {SECRET} {name}?"), ("assistant", f"{SECRET} {name}.")]
        told = [{"role": role, "content": content} for role, content in turns]
        rows.append({"id": name, "messages": [*opening, *told]})
    path = write_jsonl(tmp_path / "all.jsonl", rows)
    request = write_jsonl(tmp_path / "request.jsonl", ["b"])
    sets = load(tmp_path, {"path": path, "ids": request}, {"path": path, "exclude_ids": request})
    assert (ids_of(sets), ids_of(sets, "retain")) == (["b"], ["a", "c"])
    assert sets.counts == {"forget": 1, "retain": 2}
    with pytest.raises(ConfigError, match="shares 1 row with retain") as refused:
        load(tmp_path, {"path": path, "ids": request}, {"path": path})
    assert SECRET not in str(refused.value)


def test_a_failing_ray_task_becomes_one_line_without_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(block: pa.Table, _requests: Any) -> None:
        raise KeyError(block["answer"][0].as_py())

    monkeypatch.setattr("pipelines.data.sets._summarise", ray.remote(num_returns=2)(fail))
    logger = logging.getLogger("ray")  # does not propagate to the root, where caplog listens
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(RuntimeError) as caught:
            load(tmp_path, [GOOD])
        assert str(caught.value) == "data: a Ray task failed while reading (KeyError)"
        # Ray logs, with its message, a failure that nobody has fetched when its last reference goes.
        del caught
        gc.collect()
        time.sleep(2)
    finally:
        logger.removeHandler(caplog.handler)
    assert SECRET not in caplog.text


def test_neither_loading_nor_refusing_logs_or_prints(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("ray.data")  # does not propagate to the root, where caplog listens
    logger.addHandler(caplog.handler)
    try:
        load(tmp_path, [GOOD])
        with pytest.raises(ConfigError):
            load(tmp_path, [{**GOOD, "answer": 4}])
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.records == []
    printed = "".join(capfd.readouterr())
    assert [
        line for line in printed.splitlines() if ".cc:" not in line
    ] == []  # Ray's C++ speaks when it likes


def test_no_log_of_ray_holds_forget_text(tmp_path: Path) -> None:
    """Stands last: what the refusals above left in the session's logs is read, too. Ray has no public name for them."""
    with pytest.raises(ConfigError):
        load(tmp_path, [GOOD, {**GOOD, "id": [SECRET]}])
    logs = Path(ray_worker.global_worker.node.get_logs_dir_path())
    files = [file for file in logs.rglob("*") if file.is_file()]
    assert files
    assert [file.name for file in files if SECRET.encode() in file.read_bytes()] == []


def test_max_rows_takes_rows_evenly_and_numbers_them_anew(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "many.jsonl", [question(number) for number in range(10)])
    sets = load(tmp_path, [question("f")], {"path": path, "max_rows": 4})
    assert sets.counts["retain"] == 4
    assert [row["row"] for row in rows_of(sets, "retain")] == [0, 1, 2, 3]
    assert ids_of(sets, "retain") == ["2", "4", "7", "9"]


def test_a_union_holds_the_rows_of_its_sets(tmp_path: Path) -> None:
    sets = load(tmp_path, [question("f")])
    assert [row["id"] for row in sets.union(("retain", "forget")).take_all()] == ["r0", "r1", "f"]
    assert [
        row["id"] for row in sets.union(("forget", "utility"), present_only=True).take_all()
    ] == ["f"]
    allowed = "finetune.sets: found utility, which data does not give, allowed: forget, retain"
    with pytest.raises(ConfigError, match=allowed):
        sets.union(("retain", "utility"))


def test_the_ids_of_a_thinned_forget_set_are_those_of_the_rows_that_are_left(
    tmp_path: Path,
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [question(f"f{number}") for number in range(7)])
    sets = load(tmp_path, {"path": path, "max_rows": 3})
    assert sets.forget_ids == ids_of(sets)
    assert len(sets.forget_ids) == 3


@pytest.mark.parametrize("name", ["retain", "utility", "holdout"])
def test_rows_of_earlier_requests_that_also_stand_in_another_set_are_refused(
    tmp_path: Path, name: str
) -> None:
    earlier = [question(f"e{number}") for number in range(3)]
    others = {"retain": [question("r0")], "earlier": earlier}
    sets = load(tmp_path, [GOOD], **others)
    assert (sets.counts["earlier"], ids_of(sets, "earlier")) == (3, ["e0", "e1", "e2"])
    others[name] = [*others.get(name, []), {**earlier[1], "id": "other"}]
    words = [f"shares 1 row with {name}", "'e1'"]
    assert_refused(tmp_path, [GOOD], key="data.earlier.path", words=words, **others)
