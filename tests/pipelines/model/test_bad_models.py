"""Broken model folders, as the model, as an oracle and as the model to score: one line that names the key."""

from pathlib import Path

import pytest

from pipelines.config.load import load_config
from pipelines.config.schema import ConfigError, ModelConfig
from pipelines.encoding.encoder import _few_positions, refuse_positions
from pipelines.encoding.text import TextEncoder
from pipelines.model.load import check_models, check_vocabulary
from tests.bad_models import (
    MAX_TOKENS,
    POSITIONS,
    WORDS,
    BadModel,
    bad_models,
    few_learned_positions,
    few_rotary_positions,
    small_vocabulary,
    spoiled,
)

BAD = list(bad_models())


def refusal(path: Path, others: dict[str, Path], words: str = WORDS) -> str:
    """What `check` says of these models, without Ray: '' if nothing."""
    cfg = load_config("quick", [f"model.path={path}", f"data.max_tokens={MAX_TOKENS}"])
    if (path / "config.json").read_text().count("gpt2"):
        cfg = cfg.model_copy(
            update={"adapter": cfg.adapter.model_copy(update={"targets": ["attn.c_proj"]})}
        )
    keyed = [(key, ModelConfig(path=str(other))) for key, other in others.items()]
    row = {"prompt": "", "answer": "a", "paraphrased_prompt": "", "paraphrased_answer": ""}
    try:
        check_models(cfg, keyed)
        check_vocabulary(cfg, keyed)
        encoder = TextEncoder(cfg.model, None, MAX_TOKENS)
        longest = min(MAX_TOKENS, encoder.longest({**row, "perturbed_answers": ["no", words]}))
        few = _few_positions([("model.path", cfg.model), *keyed], MAX_TOKENS)
        refuse_positions(few, longest, MAX_TOKENS)
    except ConfigError as fault:
        return str(fault)
    return ""


@pytest.fixture
def good(problem: Path) -> Path:
    return problem / "model"


def test_a_good_folder_passes_everywhere(good: Path) -> None:
    assert refusal(good, {"--model": good, "evaluation.oracle": good}) == ""


@pytest.mark.parametrize("bad", BAD, ids=[bad.name for bad in BAD])
def test_a_broken_model_is_one_line(bad: BadModel, good: Path, tmp_path: Path) -> None:
    folder = spoiled(bad, good, tmp_path / "bad")
    roles = {"model.path": refusal(folder, {})}
    if not bad.of_tokenizer:
        for key in ("evaluation.oracle", "--model"):
            roles[key] = refusal(good, {key: folder})
    for key, line in roles.items():
        assert key in line, f"{key}: {line!r}"
        assert str(folder) in line
        assert bad.named in line
        assert line.isprintable()
        assert not line.startswith("task"), "the task is not at fault"


def test_texts_that_fit_pass_whatever_may_be_read(good: Path, tmp_path: Path) -> None:
    for name, change in (("learned", few_learned_positions), ("rotary", few_rotary_positions)):
        folder = spoiled(BadModel(name, change, ""), good, tmp_path / name)
        encoder = TextEncoder(ModelConfig(path=str(folder)), None, MAX_TOKENS)
        words = "a" * POSITIONS
        while len(encoder.pair("", words)[0]) > POSITIONS:
            words = words[1:]
        assert len(encoder.pair("", words)[0]) == POSITIONS
        assert refusal(folder, {}, words) == ""
        assert refusal(folder, {}, words + " one two three four") != ""


def test_an_oracle_has_the_vocabulary_of_what_is_scored(good: Path, tmp_path: Path) -> None:
    def larger(folder: Path) -> None:
        small_vocabulary(folder, 600)

    padded = spoiled(BadModel("padded", larger, ""), good, tmp_path / "padded")
    told = refusal(good, {"evaluation.oracle": padded})
    assert told == (
        f"evaluation.oracle: {padded} has a vocabulary of 600 tokens, and the model that it is "
        "compared with one of 512; allowed: the same number"
    )
    assert refusal(good, {"--model": padded}) == "", "alone it is compared with nothing"
    assert refusal(good, {"--model": padded, "evaluation.oracle": padded}) == ""


def test_added_tokens_that_no_row_needs_may_lack_an_embedding(good: Path, tmp_path: Path) -> None:
    # Gemma 3's tokenizer has a token for images behind the vocabulary of its models of text.
    from transformers import AutoTokenizer

    def add(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        tokenizer.save_pretrained(folder)

    folder = spoiled(BadModel("image", add, ""), good, tmp_path / "image")
    assert refusal(folder, {}) == ""
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", "<|end|><image>"))
    assert "gives tokens up to 512" in refusal(
        folder.rename(tmp_path / "written"), {}
    )  # another path: tokenizers are loaded once
