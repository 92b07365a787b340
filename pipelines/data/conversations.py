"""Conversations: a cell of turns as the prompt and the answer of one row.

A conversation is one row, which is forgotten or kept as a whole. Its answer is its last assistant
turn. Its prompt is all turns before that, earlier answers included, in one text: each turn is
START, its role, ROLE_END and its content. A lone question is stored as it is, so that it is the
same row as one from the columns prompt and answer. Turns may have the form of OpenAI (`role`,
`content`) or of ShareGPT (`from`, `value`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipelines.data.cells import text_value, type_name
from pipelines.data.readers import SourceError

# Control characters that count as white space, so that hashes of a row's words pass over them.
START, ROLE_END = "\x1e", "\x1f"  # ASCII's record separator and unit separator
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
# Roles that are told in messages. Any other one may be a part of what a row says.
REFUSED_ROLES = ("tool", "function", "function_call", "observation", "ipython", "developer")
# Parts of a turn beside its content that chat templates write, too.
REFUSED_PARTS = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")
ALLOWED_ROLES = "allowed: system, user (or human), assistant (or gpt, model)"


class Turn(NamedTuple):
    """One turn. Its role is `system`, `user` or `assistant`."""

    role: str
    content: str


def turns_of(prompt: str) -> list[Turn]:
    """Return the turns of a row's prompt, none of plain text."""
    if not prompt:
        return []
    if not prompt.startswith(START):
        return [Turn("user", prompt)]
    turns: list[Turn] = []
    for text in prompt[len(START) :].split(START):
        role, _, content = text.partition(ROLE_END)
        turns.append(Turn(role, content))
    return turns


def prompt_of(turns: Sequence[Turn]) -> str:
    """Return turns as the prompt of a row, which `turns_of` takes apart."""
    if len(turns) == 1 and turns[0].role == "user":
        return turns[0].content
    return "".join(f"{START}{role}{ROLE_END}{content}" for role, content in turns)


def answers_of(prompt: str, answer: str) -> list[str]:
    """Return all answers of a row, those inside its prompt first."""
    earlier = [turn.content for turn in turns_of(prompt) if turn.role == "assistant"]
    return [*earlier, answer]


def questions_of(prompt: str, answer: str) -> list[tuple[str, str]]:
    """Return each answer of a row behind the prompt that it answers."""
    turns = [*turns_of(prompt), Turn("assistant", answer)]
    questions: list[tuple[str, str]] = []
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            questions.append((prompt_of(turns[:index]), turn.content))
    return questions


def asked_otherwise(prompt: str, wording: str) -> str:
    """Return a prompt whose last question has another wording, '' for no wording."""
    turns = turns_of(prompt)
    if not wording or not turns:
        return wording
    last = max(index for index, turn in enumerate(turns) if turn.role == "user")
    return prompt_of([*turns[:last], Turn("user", wording), *turns[last + 1 :]])


def plain_prompt(value: Any, row_id: str, column: str) -> str:
    """Return a cell that holds a prompt as text, '' for none."""
    prompt = text_value(value, row_id, column)
    if prompt.startswith(START):
        raise _fault(row_id, f"U+001E at the beginning of column '{column}'", "allowed: text")
    return prompt


def conversation_prompt(value: Any, row_id: str, column: str) -> str:
    """Return the prompt of a cell's conversation, '' for none."""
    turns = _turns(value, row_id, column)
    return prompt_of(turns[:-1] if turns and turns[-1].role == "assistant" else turns)


def conversation_answer(value: Any, row_id: str, column: str) -> str:
    """Return the last answer of a cell's conversation, '' where nothing is answered."""
    turns = _turns(value, row_id, column)
    return turns[-1].content if turns and turns[-1].role == "assistant" else ""


def required_answer(value: Any, row_id: str, column: str) -> str:
    """Return the last answer of a cell's conversation, which must have one."""
    answer = conversation_answer(value, row_id, column)
    if not answer and value:
        found = f"no assistant turn in column '{column}'"
        raise _fault(row_id, found, "allowed: at least one")
    return answer


def _turns(value: Any, row_id: str, column: str) -> list[Turn]:
    """Return the turns of a cell up to its last answer, all of them where it has none."""
    if value is None:
        return []
    if not isinstance(value, list):
        found = f"{type_name(value)} in column '{column}'"
        raise _fault(row_id, found, "allowed: a list of turns with role and content")
    turns: list[Turn] = []
    for number, item in enumerate(value):
        turn = _turn(item, row_id, f"turn {number} (counted from 0) of column '{column}'")
        if turn.role == "assistant" and "user" not in [before.role for before in turns]:
            found = f"an answer to nothing as {number} (counted from 0) of column '{column}'"
            raise _fault(row_id, found, "allowed: a user turn before it")
        turns.append(turn)
    roles = [turn.role for turn in turns]
    if turns and "user" not in roles:
        raise _fault(row_id, f"no user turn in column '{column}'", "allowed: at least one")
    # Nothing answers what comes behind the last answer, and no training learns it.
    while "assistant" in roles and roles[-1] != "assistant":
        roles.pop()
    return turns[: len(roles)]


def _turn(item: Any, row_id: str, where: str) -> Turn:
    """Return one turn of a cell. `where` is its place, in the words of a message."""
    names = ("role", "content")
    # Parquet gives each turn the keys of all, and "nothing" to those that it lacks.
    if isinstance(item, dict) and item.get("role") is None and "from" in item:
        names = ("from", "value")
    if not isinstance(item, dict) or any(name not in item for name in names):
        found = f"{where} without role and content (or from and value)"
        raise _fault(row_id, found, "allowed: both in every turn")
    role, content = item[names[0]], item[names[1]]
    if not isinstance(role, str) or role not in ROLES:
        named = f"'{role}'" if role in REFUSED_ROLES else "of another name"
        raise _fault(row_id, f"{where} with a role {named}", ALLOWED_ROLES)
    for part in REFUSED_PARTS:
        if item.get(part):
            raise _fault(row_id, f"{where} with '{part}'", "allowed: turns of content alone")
    if not isinstance(content, str):
        raise _fault(row_id, f"{where} with {type_name(content)} as content", "allowed: text")
    text_value(content, row_id, where)
    if START in content:
        raise _fault(row_id, f"{where} with U+001E inside", "allowed: text without it")
    if ROLES[role] != "system" and not content.strip():
        raise _fault(row_id, f"{where} without text", "allowed: text, or no such turn")
    return Turn(ROLES[role], content)


def _fault(row_id: str, found: str, allowed: str) -> SourceError:
    return SourceError(f"row '{row_id}' has {found}; {allowed}")
