"""Turns in a tokenizer's chat template: what stands before each answer, and the answer with its end.

What no template may do is refused here, because a row would then be other tokens than those that
were trained. Messages quote no turn.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.config.schema import ConfigError
from pipelines.data.conversations import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Answer(NamedTuple):
    """The text before an answer, and the answer's own text with its end."""

    before: str
    text: str


def render(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], *, asks: bool = False
) -> str:
    """Return turns as text; if it `asks`, up to where the model's answer begins.

    Raises:
        ConfigError: the template does not take the turns.
    """
    messages = [turn._asdict() for turn in turns]
    apply: Callable[..., Any] = tokenizer.apply_chat_template
    try:
        return str(apply(messages, tokenize=False, add_generation_prompt=asks))
    except Exception as error:  # a template raises what it likes, and its message may quote a turn
        roles = ", ".join(turn.role for turn in turns[:6])
        more = ", ..." if len(turns) > 6 else ""
        raise ConfigError(
            f"the chat template refuses the turns {roles}{more} ({type(error).__name__}); "
            "allowed: turns that it takes"
        ) from None


def answers(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn]) -> list[Answer]:
    """Return the assistant's answers among turns that end with one, each behind what precedes it.

    Raises:
        ConfigError: the template does not write the turns one after another, in full.
    """
    found: list[Answer] = []
    so_far = ""
    for index, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        before = render(tokenizer, turns[:index], asks=True)
        text = render(tokenizer, turns[: index + 1])
        if not before.startswith(so_far):
            raise ConfigError(
                "the chat template writes an answer in another way when turns follow it; "
                "allowed: one answer a row, or a template that leaves earlier turns as they are"
            )
        if not text.startswith(before):
            raise ConfigError(
                "the chat template asks for an answer in another way than it begins one (it may "
                "open <think>); allowed: a template whose generation prompt begins its answers, too"
            )
        so_far = text.rstrip()
        found.append(Answer(before, text[len(before) :].rstrip()))
    if len(turns) > 2:
        _check_complete(turns, so_far)
    return found


def check(tokenizer: "PreTrainedTokenizerBase", path: str, system_prompt: str | None) -> None:
    """Refuse the template of the model at `path` if it cannot write prompts and answers.

    Raises:
        ConfigError: it refuses the system prompt or leaves it out, depends on the time of day, or
            asks for an answer in another way than it writes one.
    """
    turns = [Turn("user", "question"), Turn("assistant", "answer")]
    try:
        _check_time(tokenizer, turns)
        answers(tokenizer, turns)
    except ConfigError as fault:
        raise ConfigError(f"model.path: {path}: {fault}") from None
    if system_prompt is not None:
        try:
            answers(tokenizer, [Turn("system", system_prompt), *turns])
        except ConfigError:
            raise ConfigError(
                f"data.system_prompt: the chat template of {path} refuses a system turn or leaves "
                "it out; allowed: null (the text may stand in the prompts), or another template"
            ) from None


def check_context(tokenizer: "PreTrainedTokenizerBase", path: str) -> None:
    """Refuse the template of the model at `path` if it does not write a question behind others.

    Raises:
        ConfigError: it refuses several turns, or leaves some out.
    """
    turns = [Turn("user", "question"), Turn("assistant", "answer"), Turn("user", "another")]
    text = ""
    with suppress(ConfigError):
        text = render(tokenizer, turns, asks=True)
    if any(turn.content not in text for turn in turns):
        raise ConfigError(
            f"evaluation.robustness: found in_context, and the chat template of {path} refuses "
            "several turns or leaves some out; allowed: a list without it"
        )


def write_day(tokenizer: "PreTrainedTokenizerBase", day: datetime) -> None:
    """Let the tokenizer's template write this day where it would write the present one."""
    dated: Any = tokenizer
    apply: Callable[..., Any] = dated.apply_chat_template

    def apply_on_day(*args: Any, **kwargs: Any) -> Any:
        with _clock_at(day):
            return apply(*args, **kwargs)

    dated.apply_chat_template = apply_on_day


def _check_time(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn]) -> None:
    """Refuse a template that writes turns otherwise at another time."""
    with _clock_at(datetime(2001, 2, 3, 4, 5, 6, tzinfo=UTC)):
        once = render(tokenizer, turns)
    with _clock_at(datetime(2012, 11, 12, 13, 14, 15, tzinfo=UTC)):
        later = render(tokenizer, turns)
    if once != later:
        raise ConfigError(
            "the chat template writes the date or the time (strftime_now), so that a row has other "
            "tokens than those that were trained; allowed: the day of the training as model.date"
        )


@contextmanager
def _clock_at(moment: datetime) -> Generator[None]:
    """Stop the clock that transformers gives to templates (strftime_now)."""
    from transformers.utils import chat_template_utils  # imported here: the driver never tokenises

    clock: Any = SimpleNamespace(now=lambda *_: moment)
    module: Any = chat_template_utils
    original = module.datetime
    module.datetime = clock
    try:
        yield
    finally:
        module.datetime = original


def _check_complete(turns: Sequence[Turn], text: str) -> None:
    """Refuse a text that lacks what somebody else than the assistant says."""
    for turn in turns:
        if turn.role != "assistant" and turn.content.strip() not in text:
            raise ConfigError(
                f"the chat template leaves out or changes a {turn.role} turn; "
                "allowed: turns that it writes"
            )
