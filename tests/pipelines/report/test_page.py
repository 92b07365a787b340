import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.schema import ConfigError
from pipelines.evaluation.metrics import summarise
from pipelines.evaluation.metrics.keys import metric_of
from pipelines.evaluation.verdict import verdict
from pipelines.report.page import chance_margin, format_number, read_losses, write_report
from tests.pipelines.evaluation.metrics.test_summary import full_samples
from tests.pipelines.evaluation.test_verdict import forget_entry, scores_of

CONFIG = """
model: {path: "runs/<script>alert(1)</script>"}
data: {forget: {path: forget.jsonl}, retain: {path: retain.jsonl}}
adapter: {rank: 32}
train: {steps: 3}
output_dir: runs/one
"""


def write_run(folder: Path, scores: dict[str, Any], manifest: dict[str, Any] | None = None) -> Path:
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    (folder / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    (folder / "manifest.json").write_text(
        json.dumps({"schema": 1} | (manifest or {})), encoding="utf-8"
    )
    lines = [
        json.dumps({"step": step, "loss": 1 / (step + 1), "kl": 0.0, "learning_rate": 1e-3})
        for step in range(3)
    ]
    (folder / "losses.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_sixteen_against_forty_rows_stray_a_sixth_by_chance() -> None:
    assert chance_margin(16, 40) == pytest.approx(0.169, abs=1e-3)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\u2013"),
        (0.9351, "0.935"),
        (1.528, "1.53"),
        (24.13, "24.1"),
        (12345.6, "12,346"),
        (2.1e-5, "2.1e-05"),
        (0.0, "0.000"),
    ],
)
def test_numbers_show_the_digits_that_count(value: float | None, text: str) -> None:
    assert format_number(value) == text


def test_a_step_repeated_after_a_restart_counts_once_and_a_torn_line_is_counted() -> None:
    lines = [
        '{"step": 0, "loss": 3}',
        '{"step": 1, "loss": 2}',
        '{"step": 2, "lo',
        '{"step": 1, "loss": 1.5}',
        "",
        "7",
    ]
    losses, torn_lines = read_losses(lines)
    assert losses == [{"step": 0, "loss": 3}, {"step": 1, "loss": 1.5}]
    assert torn_lines == 2


def test_the_page_stands_alone_and_is_the_same_when_rebuilt(tmp_path: Path) -> None:
    scores = scores_of(before=forget_entry(0.9), after=forget_entry(0.5), oracle=forget_entry(0.5))
    page = write_report(write_run(tmp_path, scores)).read_text(encoding="utf-8")
    targets = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert {target.split(",")[0] for target in targets} == {
        "data:",
        "#limits",
        "data:image/svg+xml;base64",
    }
    assert not re.search(r"https?://|@import|url\(|<script", page)
    assert page.count("<img ") == 1  # The loss; kl is zero throughout.
    assert write_report(tmp_path).read_text(encoding="utf-8") == page


def test_tokens_are_drawn_against_the_oracle_by_what_the_original_knew(tmp_path: Path) -> None:
    scores = scores_of(before=forget_entry(0.9), after=forget_entry(0.5), oracle=forget_entry(0.5))
    write_run(tmp_path, scores)
    assert "<h2>Token by token" not in write_report(tmp_path).read_text(encoding="utf-8")
    # Two were learned, one of them at places of its own; the third the oracle knows as well.
    tokens = {
        "oracle": [-60.0, -2.0, -0.01], "before": [-0.1, -0.1, 0.0], "after": [-0.2, -1.9, -3.0]
    }  # fmt: skip
    write_run(tmp_path, scores | {"tokens": tokens})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "points above the line: too little forgotten; below: too much" in page
    image = re.findall(r'base64,([^"]+)" alt="A scatter plot', page)
    drawing = base64.b64decode(image[0]).decode()
    # matplotlib leaves each text in a comment beside its outlines.
    assert "<!-- learned, to be forgotten (2) -->" in drawing
    assert "<!-- to be kept (1) -->" in drawing
    assert "<!-- as a retrained model -->" in drawing
    assert drawing.count("fill: #d55e00") == 3, "two marks and the legend's"
    assert "<!-- \u221225 -->" in drawing and "<!-- \u221260 -->" not in drawing
    assert write_report(tmp_path).read_text(encoding="utf-8") == page
    del tokens["before"]
    write_run(tmp_path, scores | {"tokens": tokens})
    assert "<h2>Token by token" not in write_report(tmp_path).read_text(encoding="utf-8")


def test_what_comes_from_files_is_escaped(tmp_path: Path) -> None:
    evil = "<evil>"
    manifest = {
        "versions": {evil: evil},
        "git_commit": evil,
        "sets": {evil: {"rows": 4, "digest": evil}},
    }
    scores = scores_of(before=forget_entry(0.9), after=forget_entry(0.5) | {f"{evil}.{evil}": 0.5})
    page = write_report(write_run(tmp_path, scores, manifest)).read_text(encoding="utf-8")
    assert "<evil" not in page
    assert page.count("&lt;evil&gt;") == 7
    assert "<script" not in page
    assert (
        page.count("&lt;script&gt;alert(1)") == 5
    )  # title, sentence, provenance, holders, configuration


def test_facts_that_are_still_recalled_are_not_forgotten_and_stand_beside_rouge(
    tmp_path: Path,
) -> None:
    before, after, oracle = forget_entry(0.9), forget_entry(0.5), forget_entry(0.5)
    recall = ("forget.fact_recall", "forget.fact_recall_paraphrased", "retain.fact_recall")
    scores = scores_of(
        before=before | dict.fromkeys(recall, 1.0),
        after=after | dict.fromkeys(recall, 0.8),
        oracle=oracle,
    )
    level, sentence = verdict(scores)
    assert level == "traces_remain"
    assert "on 13 of 15 scores, but not on fact recall" in sentence
    page = write_report(write_run(tmp_path, scores)).read_text(encoding="utf-8")
    plot, table = page.split("<h2>All scores</h2>")
    names = re.findall(r'<span class="name">([^<]*)</span>', plot)
    assert names[names.index("Fact recall") :][:4] == [
        "Fact recall", "Fact recall, paraphrased", "ROUGE-L", "ROUGE-L, paraphrased"
    ]  # fmt: skip
    assert "Truth ratio" in names
    assert "Retain: fact recall" in names
    assert table.count("<td>Fact recall<") == 2
    assert "80 %" in table  # of the retained facts are kept


def test_several_oracles_stand_with_their_spread_and_their_floor(tmp_path: Path) -> None:
    scores = scores_of(
        before=forget_entry(0.9, forget__token_distance=0.72),
        after=forget_entry(0.5, forget__token_distance=0.11),
        oracle=forget_entry(0.5, forget__token_distance=0.1, forget_quality=None),
    )
    write_run(tmp_path, scores | {"oracle_spread": {"forget.rouge": 0.08}})
    (tmp_path / "config.yaml").write_text(CONFIG + "evaluation: {oracle: [first, second]}\n")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "aim: the floor, 0.100" in page
    table = page.split("<h2>All scores</h2>")[1]
    cells = re.findall(r"<td[^>]*>([^<]*)<", table)
    assert cells[cells.index("Token distance") :][:4] == [
        "Token distance", "0.720", "0.110", "0.100"
    ]  # fmt: skip
    assert cells[cells.index("ROUGE-L") :][:4] == ["ROUGE-L", "0.900", "0.500", "0.500 ± 0.040"]
    assert "Oracle: the mean of 2, ± half of what lies between" in table
    assert "98 %" in table  # Of the way from 0.72 to the floor of 0.10.
    assert "<dt>Oracle</dt><dd>first, second</dd>" in page
    assert "as the 2 oracles do" in page
    write_run(tmp_path, scores_of(before=forget_entry(0.9), after=forget_entry(0.5)))
    assert "floor" not in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_score_stands_with_its_interval_in_the_table_and_in_the_plot(tmp_path: Path) -> None:
    scores = scores_of(before=forget_entry(0.9), after=forget_entry(0.5))
    write_run(tmp_path, scores | {"intervals": {"after": {"forget.rouge": [0.25, 0.7512]}}})
    plot, table = write_report(tmp_path).read_text(encoding="utf-8").split("<h2>All scores</h2>")
    assert plot.count('class="interval" x1="25.0%" x2="75.12%"') == 1
    assert "0.500<small>0.250 to 0.751</small>" in table
    assert "the 95 % interval of the score over rows like these" in table
    page = write_report(write_run(tmp_path, scores)).read_text(encoding="utf-8")
    assert "95 % interval" not in page


def test_absent_scores_are_dashes_with_their_reason(tmp_path: Path) -> None:
    scores = scores_of(
        before=forget_entry(0.9, forget_quality=None), after=forget_entry(0.5, forget_quality=None)
    )
    page = write_report(write_run(tmp_path, scores)).read_text(encoding="utf-8")
    assert '<abbr title="compares with the retrained oracle">\u2013' in page
    assert "There was no retrained oracle." in page


def test_relearning_and_rounding_are_limits_until_they_are_measured(tmp_path: Path) -> None:
    before, after = forget_entry(0.9), forget_entry(0.5)
    page = write_report(write_run(tmp_path, scores_of(before=before, after=after))).read_text(
        encoding="utf-8"
    )
    assert "Relearning was not measured." in page
    assert "Rounding was not measured." in page
    assert "<h2>Robustness" not in page
    after |= {
        "relearn.steps": 5.0,
        "relearn_general.steps": 5.0,
        "quantised_4bit.forget.probability": 0.5,
        "quantised_8bit.forget.probability": 0.5,
    }
    page = write_report(write_run(tmp_path, scores_of(before=before, after=after))).read_text(
        encoding="utf-8"
    )
    untried = (
        "retained rows, half of the forget set at half the learning rate, half of the forget set"
    )
    assert f"Relearning was not measured from {untried} at five times" in page
    assert "Rounding was not measured" not in page
    assert "Rounded to 4 bits" in page


def test_robustness_is_shown_beside_the_oracles_with_a_curve(tmp_path: Path) -> None:
    curve = {
        "relearn.probability.0": 0.41,
        "relearn.probability.10": 0.57,
        "relearn.probability.2": 0.43,
    }
    rounded = {"quantised_4bit.forget.probability": 0.623, "quantised_4bit.forget.loss": 0.789}
    curve |= {"relearn_retain.probability.0": 0.31, "relearn_retain.probability.10": 0.32}
    steps = {"relearn.steps": 10, "relearn_retain.steps": None}
    after = forget_entry(0.5) | rounded | curve | steps
    oracle = forget_entry(0.5) | dict.fromkeys(rounded, 0.498) | curve | dict.fromkeys(steps)
    page = write_report(
        write_run(tmp_path, scores_of(before=forget_entry(0.9), after=after, oracle=oracle))
    ).read_text(encoding="utf-8")
    section, scores = page.split("<h2>Robustness</h2>")[1].split("<h2>All scores</h2>")
    cells = re.findall(r"<td[^>]*>([^<]*)<", section)
    assert cells[cells.index("As it is") :][:3] == ["As it is", "0.500", "0.500"]
    assert cells[cells.index("Rounded to 4 bits") :][:3] == ["Rounded to 4 bits", "0.623", "0.498"]
    row = cells.index("From half of the forget set")
    assert cells[row + 1 : row + 3] == ["10", "not reached"]
    assert cells[row + 3 : row + 6] == ["From retained rows", "not reached", "not reached"]
    assert section.count("Relearning <small>") == 1
    assert "before" not in section
    assert section.count("<img ") == 2, "a curve of each relearning"
    assert "0.789" not in page, "what the section leaves out is in scores.json alone"
    assert "0.623" not in scores
    assert write_report(tmp_path).read_text(encoding="utf-8") == page


@pytest.mark.parametrize("name", ["config.yaml", "scores.json", "manifest.json", "losses.jsonl"])
def test_a_missing_file_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, scores_of(before=forget_entry(0.9), after=forget_entry(0.5)))
    (tmp_path / name).unlink()
    with pytest.raises(
        ConfigError, match=r"^[^\n]*not found; allowed: a folder written by ray-unlearn run$"
    ) as caught:
        write_report(tmp_path)
    assert name in str(caught.value)


def test_a_run_without_steps_needs_no_losses(tmp_path: Path) -> None:
    write_run(tmp_path, scores_of(before=forget_entry(0.9), after=forget_entry(0.5)))
    (tmp_path / "losses.jsonl").unlink()
    (tmp_path / "config.yaml").write_text(CONFIG.replace("steps: 3", "steps: 0"), encoding="utf-8")
    assert "Loss by step" not in write_report(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "found"),
    [("{", "not JSON"), ("[]", "found None, allowed: 1"), ('{"schema": 2}', "found 2")],
)
def test_scores_of_another_make_are_refused(tmp_path: Path, text: str, found: str) -> None:
    write_run(tmp_path, scores_of(before=forget_entry(0.9), after=forget_entry(0.5)))
    (tmp_path / "scores.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=found):
        write_report(tmp_path)


def test_scores_without_an_after_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, scores_of(before=forget_entry(0.9)))
    with pytest.raises(ConfigError, match="models: found no 'before' and 'after'"):
        write_report(tmp_path)


def test_the_strengths_that_were_tried_are_shown_and_which_was_chosen(tmp_path: Path) -> None:
    scores = scores_of(before=forget_entry(0.9), after=forget_entry(0.5))
    trials = [{"strength": 0.004, "gap": -0.25}, {"strength": 0.002, "gap": 0.125}]
    page = write_report(write_run(tmp_path, scores, {"strengths": trials})).read_text(
        encoding="utf-8"
    )
    assert "<tr><td>0.002</td><td>+0.12</td><td>chosen</td></tr>" in page
    assert "<tr><td>0.004</td><td>-0.25</td><td></td></tr>" in page
    assert "<h2>Strength</h2>" not in write_report(write_run(tmp_path, scores)).read_text(
        encoding="utf-8"
    )


def test_the_words_of_a_score_are_the_tables(tmp_path: Path) -> None:
    samples = full_samples()
    entry = summarise(samples, samples)
    scores = scores_of(before=entry, after=entry, oracle=entry)
    page = html.unescape(write_report(write_run(tmp_path, scores)).read_text(encoding="utf-8"))
    table = page.split("<h2>All scores</h2>")[1]
    for metric in map(metric_of, entry):
        direction = "; lower = more remembered" if metric.remembered == "lower" else ""
        assert f"<td>{metric.title()}<small>{metric.help}{direction}</small></td>" in table


def test_only_shares_are_kept_in_percent(tmp_path: Path) -> None:
    entry = {"retain.probability": 0.94, "retain.entropy": 0.7, "retain.loss": 0.3}
    page = write_report(write_run(tmp_path, scores_of(before=entry, after=entry))).read_text(
        encoding="utf-8"
    )
    rows = page.split("<h2>All scores</h2>")[1].split("<tr><td>")[1:]
    kept = {row.split("<")[0]: "100 %" in row for row in rows}
    assert kept == {"Probability": True, "Loss": False, "Entropy": False}


def holders_on(page: str) -> list[tuple[str, str]]:
    part = page.split("<h3>What still holds the rows</h3>")[1].split("</dl>")[0]
    return re.findall(r"<dt><b>([^<]*)</b></dt><dd[^>]*>([^<]*)</dd>", part)


def test_the_requests_before_it_are_listed(tmp_path: Path) -> None:
    scores = scores_of(before=forget_entry(0.9), after=forget_entry(0.5), oracle=forget_entry(0.5))
    run = {"manifest": "0" * 64, "created": "2026-10-05T08:30:00Z"}
    first = {**run, "run": "s3://bucket/one", "model": "/models/base", "verdict": "over_forgotten"}
    manifest: dict[str, Any] = {
        "created": "2026-12-24T00:00:00Z",
        "request": {"number": 3, "earlier": [first, {**run, "run": "<two>"}], "rows": ["ab" * 32]},
        "model": {"path": "<two>/model"},
        "mlflow": {"model_version": 3},
    }
    page = write_report(write_run(tmp_path, scores, manifest)).read_text(encoding="utf-8")
    table = page.split("<h3>Requests</h3>")[1].split("</table>")[0]
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in table.split("<tr>")[2:]]
    assert rows == [
        ["1", "2026-10-05T08:30:00Z", "over forgotten", "s3://bucket/one"],
        ["2", "2026-10-05T08:30:00Z", "", "&lt;two&gt;"],
        ["3", "2026-12-24T00:00:00Z", "indistinguishable", "this one"],
    ]
    assert "ab" * 32 not in page, "a row's hash is for who asks for it"
    assert holders_on(page) == [
        ("the rows themselves", "forget.jsonl"),
        ("model before request 1", "/models/base"),
        ("model of request 1", "s3://bucket/one/model"),
        ("adapter of request 1", "s3://bucket/one/adapter"),
        ("model of request 2", "&lt;two&gt;/model"),
        ("adapter of request 2", "&lt;two&gt;/adapter"),
        ("adapters in MLflow, versions before 3", "models:/ray-unlearn-adapter"),
    ]
    manifest = {"model": {"path": "/models/base"}, "mlflow": {"model_version": 1}}
    page = write_report(write_run(tmp_path, scores, manifest)).read_text(encoding="utf-8")
    assert "<h3>Requests</h3>" not in page
    assert holders_on(page) == [
        ("the rows themselves", "forget.jsonl"),
        ("the model that this run began with", "/models/base"),
    ]
