import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.schema import ConfigError
from pipelines.evaluation.metrics import summarise
from pipelines.evaluation.metrics.keys import metric_of
from pipelines.evaluation.metrics.table import METRICS
from pipelines.evaluation.verdict import verdict
from pipelines.report.page import chance_margin, format_number, read_losses, write_report
from tests.pipelines.evaluation.metrics.test_summary import full_samples

# The scores that the verdict counts of a language model.
FORGET_SCORES = [
    metric.key("forget") for metric in METRICS if metric.judged and metric.search != "classes"
]
KEPT = {"retain.probability": 0.94, "general.probability": 0.60}
CONFIG = """
model: {path: "runs/<script>alert(1)</script>"}
data: {forget: {path: forget.jsonl}, retain: {path: retain.jsonl}}
adapter: {rank: 32}
train: {steps: 3}
output_dir: runs/one
"""


def forget_entry(level: float, **scores: float | None) -> dict[str, float | None]:
    """An entry of scores.json whose forget-set scores all stand at one level; truth ratio runs the other way."""
    entry: dict[str, float | None] = dict.fromkeys(FORGET_SCORES, level)
    entry["forget.truth_ratio"] = 1 - level
    return entry | KEPT | {key.replace("__", "."): value for key, value in scores.items()}


def scores_of(**models: dict[str, Any]) -> dict[str, Any]:
    return {"schema": 1, "models": models, "cost": {}}


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


def test_a_model_at_the_oracle_has_forgotten_and_the_sentence_counts_the_scores() -> None:
    after = forget_entry(0.5, retain__probability=0.93, general__probability=0.59)
    level, sentence = verdict(
        scores_of(before=forget_entry(0.9), after=after, oracle=forget_entry(0.5))
    )
    assert level == "forgotten"
    assert sentence == (
        "Forgotten: on the forget set the model is closer to the retrained oracle than to the original on 14 of 14 "
        "scores; it keeps 98 % of the retained answers' probability and 98 % of general knowledge."
    )


def test_a_model_at_the_original_has_not_forgotten() -> None:
    level, sentence = verdict(
        scores_of(before=forget_entry(0.9), after=forget_entry(0.88), oracle=forget_entry(0.5))
    )
    assert level == "not_forgotten"
    assert sentence.startswith("Not forgotten: ")
    assert "on 0 of 14 scores" in sentence


def test_half_of_the_scores_at_the_oracle_is_partly() -> None:
    missed = ("forget.probability", "forget.rouge", "mia.loss", "mia.zlib")
    after = forget_entry(0.5) | dict.fromkeys(
        [name for name in FORGET_SCORES if name.startswith(missed)], 0.9
    )
    level, sentence = verdict(
        scores_of(before=forget_entry(0.9), after=after, oracle=forget_entry(0.5))
    )
    assert level == "partly"
    assert "on 8 of 14 scores" in sentence


def test_extractable_answers_are_not_forgotten_whatever_the_other_scores_say() -> None:
    after = forget_entry(0.5, forget__extraction_strength=0.85)
    level, sentence = verdict(
        scores_of(before=forget_entry(0.9), after=after, oracle=forget_entry(0.5))
    )
    assert level == "partly"
    assert "on 13 of 14 scores, but not on extraction strength" in sentence


def test_a_cost_is_named_in_the_head_and_in_numbers() -> None:
    after = forget_entry(0.5, general__probability=0.27)
    level, sentence = verdict(
        scores_of(before=forget_entry(0.9), after=after, oracle=forget_entry(0.5))
    )
    assert level == "costly"
    assert sentence.startswith("Forgotten, but at the cost of general knowledge: ")
    assert sentence.endswith(
        "it keeps 100 % of the retained answers' probability and 45 % of general knowledge."
    )


@pytest.mark.parametrize(("share", "level"), [(0.96, "forgotten"), (0.949, "costly")])
def test_a_share_just_under_95_percent_is_a_cost_and_never_reads_as_95(
    share: float, level: str
) -> None:
    after = forget_entry(0.5, retain__probability=0.94 * share)
    found = verdict(scores_of(before=forget_entry(0.9), after=after, oracle=forget_entry(0.5)))
    assert found.level == level
    assert "95 %" not in found.sentence


@pytest.mark.parametrize(("after", "level"), [(0.41, "forgotten"), (0.39, "over_forgotten")])
def test_scores_more_than_a_tenth_below_the_oracle_are_over_forgotten(
    after: float, level: str
) -> None:
    scores = scores_of(
        before=forget_entry(0.9), after=forget_entry(after), oracle=forget_entry(0.5)
    )
    assert verdict(scores).level == level


def test_three_overshooting_scores_of_fourteen_are_tolerated_and_four_are_not() -> None:
    models = {"before": forget_entry(0.9), "oracle": forget_entry(0.5)}
    three = forget_entry(0.5, forget__rouge=0.1, forget__probability=0.1, mia__loss=0.35)
    assert verdict(scores_of(after=three, **models)).level == "forgotten"
    level, sentence = verdict(scores_of(after=three | {"mia.zlib": 0.35}, **models))
    assert level == "over_forgotten"
    assert (
        "4 of 14 forget-set scores lie more than 0.10 beyond those of the retrained oracle"
        in sentence
    )


def test_a_model_the_oracle_cannot_be_told_from_at_the_start_leaves_the_verdict_open() -> None:
    level, sentence = verdict(
        scores_of(before=forget_entry(0.5), after=forget_entry(0.5), oracle=forget_entry(0.5))
    )
    assert level == "undecided"
    assert "nothing to forget" in sentence


@pytest.mark.parametrize(
    ("auc", "level", "words"),
    [
        (0.31, "forgotten", ""),
        (0.29, "over_forgotten", "but the gradient norm attack sees that something was removed"),
        (0.71, "partly", "but not on the gradient norm attack"),
    ],
)
def test_one_attack_that_is_far_from_the_oracles_decides(
    auc: float, level: str, words: str
) -> None:
    models = {"before": forget_entry(0.95), "oracle": forget_entry(0.5)}
    found = verdict(scores_of(after=forget_entry(0.5, mia__grad_norm=auc), **models))
    assert found.level == level
    assert words in found.sentence


@pytest.mark.parametrize(
    ("distance", "level", "words"),
    [
        (0.42, "forgotten", "token by token it lies 0.42 nats a token, the original 0.72 from"),
        (0.45, "partly", "token by token it lies 0.45 nats a token, the original 0.72 from"),
        (0.98, "not_forgotten", "token by token the model is no nearer to the retrained oracle"),
    ],
)
def test_scores_at_the_oracles_prove_nothing_while_the_tokens_are_elsewhere(
    distance: float, level: str, words: str
) -> None:
    before = forget_entry(0.9, forget__token_distance=0.72)
    after = forget_entry(0.5, forget__token_distance=distance)
    found = verdict(scores_of(before=before, after=after, oracle=forget_entry(0.5)))
    assert found.level == level
    assert words in found.sentence


def test_the_original_as_its_own_oracle_leaves_the_verdict_open() -> None:
    models = {"before": forget_entry(0.9), "oracle": forget_entry(0.9)}
    assert verdict(scores_of(after=forget_entry(0.4), **models)).level == "undecided"


def test_forgetting_without_any_score_of_what_stays_is_undecided() -> None:
    nothing = dict.fromkeys(KEPT)
    models = {
        "before": forget_entry(0.9) | nothing,
        "after": forget_entry(0.5),
        "oracle": forget_entry(0.5),
    }
    level, sentence = verdict(scores_of(**models))
    assert level == "undecided"
    assert sentence.endswith("what it keeps was not measured.")


def test_without_an_oracle_attacks_at_chance_give_a_verdict_that_calls_itself_weaker() -> None:
    before = {"mia.min_k": 0.98, "mia.loss": 0.97, "forget.rouge": 0.9} | KEPT
    after = {"mia.min_k": 0.55, "mia.loss": 0.52, "forget.rouge": 0.4} | KEPT
    level, sentence = verdict(scores_of(before=before, after=after))
    assert level == "forgotten"
    assert sentence.startswith(
        "Forgotten (no retrained oracle was given, so this verdict is weaker): "
    )
    assert "closer to never-seen data than to the original on 2 of 2 scores" in sentence


def test_without_an_oracle_the_holdout_scores_of_the_original_stand_in() -> None:
    before = {"forget.rouge": 0.9, "holdout.rouge": 0.3} | KEPT
    assert (
        verdict(scores_of(before=before, after={"forget.rouge": 0.35} | KEPT)).level == "forgotten"
    )
    assert (
        verdict(scores_of(before=before, after={"forget.rouge": 0.85} | KEPT)).level
        == "not_forgotten"
    )


@pytest.mark.parametrize(("rouge", "level"), [(0.85, "not_forgotten"), (0.2, "undecided")])
def test_with_neither_oracle_nor_holdout_only_failure_can_be_told(rouge: float, level: str) -> None:
    found = verdict(
        scores_of(before={"forget.rouge": 0.9} | KEPT, after={"forget.rouge": rouge} | KEPT)
    )
    assert found.level == level


def test_without_an_oracle_nothing_says_that_a_class_that_is_gone_is_gone_too_far() -> None:
    before = {"forget.accuracy": 0.91, "mia_efficacy": 0.16, "retain.accuracy": 0.87}
    gone = {"forget.accuracy": 0.0, "mia_efficacy": 1.0, "retain.accuracy": 0.87}
    level, sentence = verdict(scores_of(before=before, after=gone))
    assert level == "undecided"
    assert (
        "stand at 0 % of the original's on average, but nothing given says how low is right"
        in sentence
    )
    assert verdict(scores_of(before=before, after=gone, oracle=gone)).level == "forgotten"
    assert verdict(scores_of(before=before, after=before)).level == "not_forgotten"


def test_null_scores_are_left_out_of_the_count() -> None:
    after = forget_entry(0.5, forget__rouge=None, mia__zlib=None)
    level, sentence = verdict(
        scores_of(before=forget_entry(0.9), after=after, oracle=forget_entry(0.5))
    )
    assert level == "forgotten"
    assert "on 12 of 12 scores" in sentence


def test_no_scores_at_all_are_undecided() -> None:
    assert verdict(scores_of(before={}, after={})).level == "undecided"


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
    assert page.count("&lt;script&gt;alert(1)") == 4  # title, sentence, provenance, configuration


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
    assert level == "partly"
    assert "on 12 of 14 scores, but not on fact recall" in sentence
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
        "quantised_4bit.forget.probability": 0.5,
        "quantised_8bit.forget.probability": 0.5,
    }
    page = write_report(write_run(tmp_path, scores_of(before=before, after=after))).read_text(
        encoding="utf-8"
    )
    assert "was not measured." not in page
    assert "Rounded to 4 bits" in page


def test_robustness_is_shown_beside_the_oracles_with_a_curve(tmp_path: Path) -> None:
    curve = {
        "relearn.probability.0": 0.41,
        "relearn.probability.10": 0.57,
        "relearn.probability.2": 0.43,
    }
    rounded = {"quantised_4bit.forget.probability": 0.623, "quantised_4bit.forget.loss": 0.789}
    after = forget_entry(0.5) | rounded | curve | {"relearn.steps": 10}
    oracle = forget_entry(0.5) | dict.fromkeys(rounded, 0.498) | curve | {"relearn.steps": None}
    page = write_report(
        write_run(tmp_path, scores_of(before=forget_entry(0.9), after=after, oracle=oracle))
    ).read_text(encoding="utf-8")
    section, scores = page.split("<h2>Robustness</h2>")[1].split("<h2>All scores</h2>")
    cells = re.findall(r"<td[^>]*>([^<]*)<", section)
    assert cells[cells.index("Unrounded") :][:3] == ["Unrounded", "0.500", "0.500"]
    assert cells[cells.index("Rounded to 4 bits") :][:3] == ["Rounded to 4 bits", "0.623", "0.498"]
    assert cells[cells.index("Steps") :][:3] == ["Steps", "10", "not reached"]
    assert "before" not in section
    assert section.count("<img ") == 1
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
