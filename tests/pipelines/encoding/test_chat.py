"""Chat templates that would give a row other tokens than those that were trained are refused, others are not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from pipelines.config.data import DataConfig
from pipelines.config.schema import ConfigError, ModelConfig, UnlearnConfig
from pipelines.data.sets import load_sets
from pipelines.encoding import chat
from pipelines.encoding.encoder import _check_template, check_template
from pipelines.encoding.text import TextEncoder
from tests.tiny_model import TEMPLATE

DATED = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE
WITHOUT_SYSTEM = TEMPLATE.replace("in messages", "in messages if message['role'] != 'system'")
# As DeepSeek-R1's: the question opens thoughts, and answers are written without.
THINKING = TEMPLATE + "{% if add_generation_prompt %}<think>{% endif %}"
# As the thinking Qwen3's: an answer begins with thoughts as well, if only with none.
CLOSED = "{% if message['role'] == 'assistant' %}<think></think>{% endif %}"
CONSISTENT = THINKING.replace("{{ message['content'] }}", CLOSED + "{{ message['content'] }}")
# As Llama 3.1's
FIXED = (
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{{ date_string }}" + TEMPLATE
)
# As Llama 3.2's
TODAY = (
    "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}" + TEMPLATE
)


def refusal(problem: Path, template: str, system: str | None = None) -> str:
    """What is said of a template, '' where it is taken."""
    tokenizer: Any = AutoTokenizer.from_pretrained(problem / "model")
    tokenizer.chat_template = template
    try:
        chat.check(tokenizer, "M", system)
    except ConfigError as fault:
        return str(fault)
    return ""


@pytest.mark.parametrize("unit", ["%H", "%M", "%S", "%d", "%b", "%Y", "%A", "%j"])
def test_a_template_with_a_part_of_the_time_is_refused(problem: Path, unit: str) -> None:
    found = refusal(problem, DATED.replace("%d %b %Y", unit))
    assert found.startswith("model.path: M: the chat template writes the date or the time")
    assert found.endswith("allowed: the day of the training as model.date")


def test_the_date_of_today_is_refused_and_a_fixed_one_is_taken(problem: Path) -> None:
    clock = chat_template_utils.datetime
    assert "(strftime_now)" in refusal(problem, TODAY)
    assert chat_template_utils.datetime is clock
    assert refusal(problem, FIXED) == ""
    assert refusal(problem, TEMPLATE, "Be kind.") == ""


def test_the_day_of_the_training_is_written_where_it_is_given(
    problem: Path, tmp_path: Path
) -> None:
    shutil.copytree(problem / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TODAY)
    model = ModelConfig(path=f"{tmp_path}/model", date="2025-04-10")
    _check_template(model, None, in_context=False)
    encoder = TextEncoder(model, None, 64)
    assert encoder.tokenizer.decode(encoder.prompt("What?")).startswith("10 Apr 2025")
    with pytest.raises(ConfigError, match=r"\(strftime_now\).* as model\.date"):
        _check_template(model.model_copy(update={"date": None}), None, in_context=False)


def test_thoughts_that_a_question_opens_are_refused_unless_answers_begin_with_them(
    problem: Path,
) -> None:
    found = refusal(problem, THINKING)
    assert found.startswith("model.path: M: the chat template asks for an answer in another way")
    assert refusal(problem, CONSISTENT) == ""


def test_plain_text_is_encoded_whatever_the_template(problem: Path, tmp_path: Path) -> None:
    shutil.copytree(problem / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(THINKING)
    encoder = TextEncoder(ModelConfig(path=f"{tmp_path}/model"), None, 64)
    ids, start = encoder.pair("", "Of something.")
    assert start == 1  # nothing predicts the first
    assert ids[-1] == encoder.tokenizer.eos_token_id
    with pytest.raises(ConfigError, match="in another way"):
        encoder.pair("What?", "This.")


@pytest.mark.parametrize(
    "template",
    [
        WITHOUT_SYSTEM,
        # As Gemma's
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + TEMPLATE,
    ],
)
def test_a_template_without_system_turns_is_refused_with_a_system_prompt_alone(
    problem: Path, template: str
) -> None:
    assert refusal(problem, template) == ""
    found = refusal(problem, template, "Be kind.")
    assert found.startswith("data.system_prompt: the chat template of M refuses a system turn or")
    assert "Be kind." not in found


def test_a_template_that_takes_nothing_is_refused(problem: Path) -> None:
    found = refusal(problem, "{{ nothing.at.all }}")
    assert found.startswith("model.path: M: the chat template refuses the turns user, assistant")


def test_a_system_prompt_that_no_template_writes_is_refused(problem: Path, tmp_path: Path) -> None:
    shutil.copytree(problem / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    plain = ModelConfig(path=f"{tmp_path}/model")
    for nothing in (None, ""):
        _check_template(plain, nothing, in_context=False)
    with pytest.raises(ConfigError) as caught:
        _check_template(plain, "Be kind.", in_context=False)
    assert str(caught.value) == (
        f"data.system_prompt: found a text, and {tmp_path}/model has no chat template to write it "
        "in; allowed: null (the text may stand in the prompts), or a model with a chat template"
    )
    _check_template(ModelConfig(path=f"{problem}/model"), "Be kind.", in_context=False)


@pytest.mark.usefixtures("ray_session")
def test_a_template_is_checked_where_a_row_has_a_prompt(
    problem: Path, cfg: UnlearnConfig, tmp_path: Path
) -> None:
    shutil.copytree(problem / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(DATED)
    dated = cfg.model_copy(
        update={"model": cfg.model.model_copy(update={"path": f"{tmp_path}/model"})}
    )
    for name in ("forget", "retain"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"Of {name}."}))
    paths = {name: {"path": f"{tmp_path}/{name}.jsonl"} for name in ("forget", "retain")}
    check_template(dated, load_sets(DataConfig.model_validate(paths)))
    (tmp_path / "retain.jsonl").write_text(json.dumps({"prompt": "Q?", "answer": "A."}))
    sets = load_sets(DataConfig.model_validate(paths))
    check_template(cfg, sets)
    with pytest.raises(ConfigError, match="writes the date or the time"):
        check_template(dated, sets)
