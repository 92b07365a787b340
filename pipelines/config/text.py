"""Text from and for the user: strict YAML, and messages of one line."""

import re
from typing import Any

import yaml

MESSAGE_CHARS = 500
PASSWORD = re.compile(r"\w://[^/?#@\s]*:[^/?#@\s]+@")
# Likewise among the options at a URI's end.
PASSWORD_OPTION = re.compile(
    r"([?&](?:password|passwd|pwd|token|sslpassword)=)[^&#\s]+", re.IGNORECASE
)
# Control characters, among them the line ends of Unicode, and what hides or reorders text.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def one_line(message: object) -> str:
    """Return a message as one line of limited length: no control character, no URI's password.

    Its middle is left out where it is too long, so that it still says at its end what is allowed.
    """
    words = " ".join(str(message).split())
    words = re.sub(r"//[^/@\s]*@", "//", words)
    text = escaped(PASSWORD_OPTION.sub(r"\1...", words))
    if len(text) <= MESSAGE_CHARS:
        return text
    half = (MESSAGE_CHARS - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def reason_of(error: BaseException) -> str:
    """Return the first line of the error that caused another, with its kind where it needs one."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = one_line(str(error).partition("\n")[0])
    if line and isinstance(error, OSError | ValueError):
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def escaped(text: str) -> str:
    """Return a text with its control characters spelled out, which a terminal would obey."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class _StrictLoader(yaml.SafeLoader):
    """Refuses what would be lost, or grow, in silence: keys given twice, anchors and aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: found an anchor or an alias")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names: set[str] = set()
        for key, _ in node.value:
            if key.value in names:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: found the key {key.value} a second time")
            names.add(str(key.value))
        return super().construct_mapping(node, deep)


# A date is a text, as no key takes anything else for one.
_StrictLoader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


def parse_yaml(text: str) -> Any:
    """Parse YAML.

    Raises:
        yaml.YAMLError: it is none, has a key twice, an anchor or an alias, or is nested too deeply.
    """
    try:
        return yaml.load(text, _StrictLoader)
    except RecursionError:
        raise yaml.YAMLError("found too many levels of nesting") from None
    except (
        ValueError,
        OverflowError,
        TypeError,
    ) as error:  # a date such as 2026-99-99, a list as a key
        raise yaml.YAMLError(f"found {one_line(error)}") from None
