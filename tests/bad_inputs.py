"""Wrong configurations, generated: every key with values that it cannot take, and texts that are no YAML."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel

from pipelines.config.data import ANY_TEXT, _kinds
from pipelines.config.load import _section_in
from pipelines.config.schema import UnlearnConfig

NUMBERS = ("true", ".inf", "-.inf", ".nan", "1e308", "-1e308", "many", "{a: 1}", "[[1]]")
TEXTS = ('""', '"a\\0b"', '"a\\nb"', '"\\e[31m"', "{a: 1}", '"\u2028"')
FLAGS = ("2", "perhaps", "[true]", "{a: 1}")
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


class BadInput(NamedTuple):
    """An override, or a configuration's text, and what a message about it must name."""

    name: str
    override: str = ""
    text: str | None = None
    named: str = ""


def bad_inputs() -> Iterator[BadInput]:
    """Yield all of them, in an order that does not change."""
    for key, field in _fields(UnlearnConfig, ""):
        kinds = _kinds(field.annotation)
        values: tuple[str, ...] = ()
        if {int, float} & kinds and str not in kinds:
            values = NUMBERS
        elif bool in kinds:
            values = FLAGS
        elif str in kinds and ANY_TEXT not in field.metadata and tuple not in kinds:
            values = TEXTS
        for value in values:
            if key.startswith("objective.output_parameters") and value.startswith("{"):
                value = "{a: 1}"
            yield BadInput(f"{key}={value}", override=f"{key}={value}", named=key.split(".")[-1])
        yield BadInput(f"{key}x", override=f"{key}x=1", named=f"{key}x")
    for name, text in YAML.items():
        yield BadInput(name, text=text)


def _fields(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        nested = _section_in(field.annotation)
        if nested is None:
            yield f"{prefix}{name}", field
        else:
            yield from _fields(nested, f"{prefix}{name}.")
