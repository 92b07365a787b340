"""Turns in a tokenizer's chat template: what stands before each answer, and the answer with its end.

What no template may do is refused here, because a row would then be other tokens than those that
were trained. Messages quote no turn.
"""

from collections.abc import Callable, Sequence
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
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], *, asks: bool = False, **known: Any
) -> str:
    """Return turns as text; if it `asks`, up to where the model's answer begins.

    `known` goes to the template.

    Raises:
        ConfigError: the template does not take the turns.
    """
    messages = [turn._asdict() for turn in turns]
    apply: Callable[..., Any] = tokenizer.apply_chat_template
    try:
        return str(apply(messages, tokenize=False, add_generation_prompt=asks, **known))
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
                "the chat template begins an answer in another way than it asks for one; "
                "allowed: a template whose generation prompt is how its answers begin"
            )
        so_far = text.rstrip()
        found.append(Answer(before, text[len(before) :].rstrip()))
    if len(turns) > 2:
        _check_complete(turns, so_far)
    return found


def _check_complete(turns: Sequence[Turn], text: str) -> None:
    """Refuse a text that lacks what somebody else than the assistant says."""
    for turn in turns:
        if turn.role != "assistant" and turn.content.strip() not in text:
            raise ConfigError(
                f"the chat template leaves out or changes a {turn.role} turn; "
                "allowed: turns that it writes"
            )
