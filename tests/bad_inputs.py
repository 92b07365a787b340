"""Wrong configurations, generated: every key with values that it cannot take, and texts that are no YAML."""

from collections.abc import Iterator
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel

from pipelines.config.data import ANY_TEXT, PATHS, _kinds
from pipelines.config.load import _section_in
from pipelines.config.schema import UnlearnConfig

NUMBERS = ("true", ".inf", "-.inf", ".nan", "1e308", "-1e308", "many", "{a: 1}", "[[1]]")
TEXTS = ('""', '"a\\0b"', '"a\\nb"', '"\\e[31m"', "{a: 1}", '"\u2028"')
FLAGS = ("2", "perhaps", "[true]", "{a: 1}")
NUMBER_LISTS = ("true", "many", "[1, 2, 3]", "[a, b]", "[.inf, 1]", "[2, 1]", "[true, 2]", "{a: 1}")
TEXT_LISTS = ("{a: 1}", '[""]', '["a\\nb"]', "[[a]]", "[{a: 1}]", "true")
MAPPINGS = ("[1]", "7", "many", "{a: b}", "{beta: [1]}", "{beta: .nan}", "{1: 2}")
LONG_NAME, LONG_PATH = "a" * 256, "/".join(["a" * 99] * 60)
DEEP, WIDE = "[" * 5000, "a" * 30_000
YAML = {
    "a key twice": "model: {path: a}\nmodel: {path: b}\n",
    "a nested key twice": "train: {steps: 1, steps: 2}\n",
    "an alias": "data: &all {forget: {path: a}}\nmodel: *all\n",
    "an endless alias": "data: &all {forget: *all}\n",
    "an alias bomb": "a: &a [x,x,x]\nb: &b [*a,*a,*a]\nc: &c [*b,*b,*b]\nd: [*c,*c,*c]\n",
    "deep nesting": DEEP,
    "deep mappings": "{a: " * 5000,
    "no mapping": "- 1\n",
    "a number": "7\n",
    "nothing": "",
    "a tab": "train:\n\tsteps: 1\n",
    "a tag": "model: !!python/object/apply:os.system [ls]\n",
    "a long key": f"{WIDE}: 1\n",
    "a long value": f"seed: {WIDE}\n",
    "a key with a line break": '"a\\nb": 1\n',
    "a list as a key": "? [1]\n: 2\n",
    "a date": "seed: 2026-11-29\n",
    "no date": "seed: 2026-99-99\n",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "binary": "\x00\x01\x02",
}
# Options and arguments of commands that they cannot take.
OPTIONS = [
    *(("tune", "quick", "--trials", value) for value in ("0", "-1", "many", "1.5", "")),
    *(("tune", "quick", "--method", value) for value in ("best", "", "a\nb")),
    *(("tune", "quick", "--require", value) for value in ("utility", "utility>=x", "x>=1", "")),
    *(("check", "quick", "--price", value) for value in ("-1", "x", "")),
    *(("check", "quick", "--gpu", value) for value in ("H1", "a\nb")),
    *(("serve", "nowhere", "--port", value) for value in ("0", "65536", "x")),
    *(("serve", "nowhere", option, "-1") for option in ("--max-tokens", "--max-queue", "--gpus")),
    *(("make-data", "new", "--authors", value) for value in ("1", "1001", "x")),
    *(("make-data", "new", option, "0") for option in ("--questions", "--forget")),
    *(
        ("evaluate", "quick", "--model", value)
        for value in ("", "  ", "a\nb", "\x1b[31m", LONG_NAME)
    ),
    *(("gate", "nowhere", "--require", value) for value in ("", "after", "after.x<=y")),
    *(
        (command, value)
        for command in ("report", "verify", "gate", "serve")
        for value in (LONG_NAME, "")
    ),
    *((command, LONG_PATH) for command in ("report", "verify", "gate", "serve", "make-data")),
    *((command, "quick", "--no-such") for command in ("run", "check", "tune", "finetune")),
    *(
        (command,)
        for command in ("run", "check", "tune", "finetune", "evaluate", "report", "verify")
    ),
    ("no-such",),
]
# What a file of a run folder cannot be; None where it has no content.
BROKEN = {
    "gone": None,
    "a folder": None,
    "nothing": b"",
    "a list": b"[]",
    "a number": b"7",
    "torn": b'{"schema": 1, "mod',
    "binary": b"\xff\x00\x01",
    "deep": b"[" * 100_000,
    "other types": b'{"schema": 1, "models": 3, "files": 3, "status": []}',
    "types within": b'{"schema": 1, "models": {"before": {"a": "b"}}, "files": {"a": 1}}',
    "another schema": b'{"schema": 2}',
    "a long number": b'{"schema": ' + b"9" * 5000 + b"}",
}


class BadInput(NamedTuple):
    """An override, or a configuration's text, and what a message about it must name."""

    name: str
    override: str = ""
    text: str | None = None
    named: str = ""


def bad_inputs() -> Iterator[BadInput]:
    """Yield all of them, in an order that does not change."""
    for key, field in _fields(UnlearnConfig, ""):
        for value in _wrong_values(key, field):
            yield BadInput(f"{key}={value}", override=f"{key}={value}", named=key.split(".")[-1])
        yield BadInput(f"{key}x", override=f"{key}x=1", named=f"{key}x")
    for name, text in YAML.items():
        yield BadInput(name, text=text)


def _wrong_values(key: str, field: Any) -> tuple[str, ...]:
    """What a key cannot take, by its types."""
    if ANY_TEXT in field.metadata:
        return ()
    kinds = _kinds(field.annotation)
    types = {get_origin(one) for one in (field.annotation, *get_args(field.annotation))}
    if dict in types:
        return MAPPINGS
    long = (LONG_NAME, LONG_PATH) if key.split(".")[-1] in PATHS else ()
    if tuple in types:
        return (*(TEXT_LISTS if str in kinds else NUMBER_LISTS), *long)
    if {int, float} & kinds and str not in kinds:
        return NUMBERS
    if bool in kinds:
        return FLAGS
    return (*TEXTS, *long) if str in kinds else ()


def _fields(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        nested = _section_in(field.annotation)
        if nested is None:
            yield f"{prefix}{name}", field
        else:
            yield from _fields(nested, f"{prefix}{name}.")
