"""A synthetic deletion problem: fictitious authors to forget and to retain, and true knowledge that must not move.

The authors follow TOFU (Maini et al. 2024, arXiv:2401.06121): a model can know them only from this data, so what it
still says about them after unlearning is measurable. A fact never belongs to two authors, so nothing that is retained
or held out teaches a forgotten fact again. The knowledge questions (`utility`, `general`) are real and share no fact.

The wording, the pools of facts and the knowledge lie in `knowledge/`. A row depends on its number and the
seed only: a larger problem of the same seed begins with the same authors.
"""

import itertools
import json
import random
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.storage.atomic import PARTIAL, replacing

Row = dict[str, str | list[str]]

MIN_AUTHORS = 2  # one to forget, one to retain
MAX_AUTHORS = (
    1000  # the smallest pool of facts has 2208 entries: enough for these and as many held out
)
HOLDOUT_SHARE = 3  # held-out authors to one forgotten: what is compared with them is as exact as the forget set allows
NUM_PERTURBED = 5  # as in TOFU
NUM_CANDIDATES = 40  # drawn per row; more than enough to find five that qualify, and cheap in a pool of thousands


class Topic(NamedTuple):
    """One question type: its templates (of `{subject}` and `{fact}`) and the facts it can ask for, shuffled."""

    name: str
    question: str
    answer: str
    paraphrased_question: str
    paraphrased_answer: str
    facts: list[str]


def write_problem(
    folder: Path, authors: int, questions: int, seed: int, forget: int
) -> dict[str, int]:
    """Write the five JSONL files of a deletion problem and return the number of rows of each file.

    `authors` counts forgotten and retained ones together, `questions` are asked about each. The same arguments give the
    same bytes. A `ValueError` names an argument out of range, or a folder that already holds something else.
    """
    problem = build_problem(authors, questions, seed, forget)
    _publish(folder, {f"{name}.jsonl": _to_jsonl(rows) for name, rows in problem.items()})
    return {f"{name}.jsonl": len(rows) for name, rows in problem.items()}


def build_problem(authors: int, questions: int, seed: int, forget: int) -> dict[str, list[Row]]:
    """Return the rows of each set by the set's name; see `write_problem` for arguments and errors."""
    topics = _load_topics(seed)
    _check_range("--authors", authors, MIN_AUTHORS, MAX_AUTHORS)
    _check_range("--questions", questions, 1, len(topics))
    _check_range("--forget", forget, 1, authors - 1, " (fewer than --authors)")
    holdout = min(HOLDOUT_SHARE * forget, MAX_AUTHORS)
    names = itertools.islice(_author_names(seed), authors + holdout)
    rows = [
        _author_row(topic, number, name, seed)
        for number, name in enumerate(names)
        for topic in topics[:questions]
    ]
    return {
        "forget": rows[: forget * questions],
        "retain": rows[forget * questions : authors * questions],
        "holdout": rows[authors * questions :],
        "utility": _knowledge_rows("utility", 0, seed),
        "general": _knowledge_rows("general", 1, seed),
    }


def _check_range(name: str, value: int, lowest: int, highest: int, reason: str = "") -> None:
    if not lowest <= value <= highest:
        allowed = f"{lowest} to {highest}" if highest > lowest else f"only {lowest}"
        raise ValueError(f"{name}: {value} given, allowed {allowed}{reason}")


def _load(name: str) -> dict[str, Any]:
    return json.loads((files("pipelines.data") / "knowledge" / name).read_text(encoding="utf-8"))


def _load_topics(seed: int) -> list[Topic]:
    """Return the question types in their fixed order; a topic's facts are all combinations of its parts."""
    topics: list[Topic] = []
    for name, topic in _load("authors.json")["topics"].items():
        combinations = itertools.product(*topic.pop("parts"))
        separator = topic.pop("separator")
        facts = list(dict.fromkeys(separator.join(parts) for parts in combinations))
        assert len(facts) >= 2 * MAX_AUTHORS, f"{name}: only {len(facts)} facts"
        random.Random(f"facts-{name}-{seed}").shuffle(facts)
        topics.append(Topic(name=name, facts=facts, **topic))
    return topics


def _author_names(seed: int) -> Iterator[str]:
    """Yield distinct full names; a first or last name comes again only when all others have been used."""
    names = _load("authors.json")
    first, last = names["first_names"], names["last_names"]
    rng = random.Random(f"names-{seed}")
    rng.shuffle(first)
    rng.shuffle(last)
    for lap in range(
        len(last)
    ):  # a diagonal of the table of pairs per lap, so that no pair repeats
        for position, name in enumerate(first):
            yield f"{name} {last[(position + lap) % len(last)]}"


def _author_row(topic: Topic, number: int, name: str, seed: int) -> Row:
    row_id = f"author-{number + 1:04d}-{topic.name}"
    fact = topic.facts[number]
    rng = random.Random(f"{row_id}-{seed}")
    answer = _fill(topic.answer, name, fact)
    paraphrase = _fill(topic.paraphrased_answer, name, fact)
    assert fact in answer and fact in paraphrase, row_id
    return {
        "id": row_id,
        "prompt": _fill(topic.question, name),
        "answer": answer,
        "paraphrased_prompt": _fill(topic.paraphrased_question, name),
        "paraphrased_answer": paraphrase,
        "perturbed_answers": _perturb(topic.paraphrased_answer, name, fact, topic.facts, rng),
        "fact": fact,
        "author": name,
        "topic": topic.name,
    }


def _knowledge_rows(set_name: str, offset: int, seed: int) -> list[Row]:
    """Return every second fact of each category from `offset` on; the first rows of the set span all categories."""
    rows: list[list[Row]] = []
    for topic, category in _load("general.json").items():
        facts = dict(list(category["facts"].items())[offset::2])
        rng = random.Random(f"{set_name}-{topic}-{seed}")
        rows.append([])
        for subject, fact in facts.items():
            answer = _fill(category["answer"], subject, fact)
            assert fact in answer, answer
            rows[-1].append(
                {
                    "id": "",  # numbered below, in the final order, but first in the file's columns
                    "prompt": _fill(category["question"], subject),
                    "answer": answer,
                    "perturbed_answers": _perturb(
                        category["answer"], subject, fact, list(facts.values()), rng
                    ),
                    "fact": fact,
                    "topic": topic,
                }
            )
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*rows))
    spread = [row for row in rounds if row is not None]
    return [row | {"id": f"{set_name}-{number:04d}"} for number, row in enumerate(spread, start=1)]


def _perturb(
    template: str, subject: str, fact: str, pool: list[str], rng: random.Random
) -> list[str]:
    """Return five wrong answers: the same sentence with other facts, in none of which the true fact can be read."""
    others = rng.sample(pool, min(len(pool), NUM_CANDIDATES))
    sentences = (_fill(template, subject, other) for other in others if other not in subject)
    wrong = list(
        itertools.islice(
            (sentence for sentence in sentences if fact not in sentence), NUM_PERTURBED
        )
    )
    assert len(wrong) == NUM_PERTURBED, f"{subject}: {fact}"
    return wrong


def _fill(template: str, subject: str, fact: str = "") -> str:
    sentence = template.format(subject=subject, fact=fact)
    return sentence[0].upper() + sentence[1:]


def _to_jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def _publish(folder: Path, contents: dict[str, bytes]) -> None:
    """Write what is missing, each file under a temporary name first; an interrupted run can be repeated."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file, allowed: a new folder or an empty one")
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(path for path in folder.iterdir() if path.suffix != PARTIAL)
    for path in found:
        if (
            path.name not in contents
            or not path.is_file()
            or path.read_bytes() != contents[path.name]
        ):
            raise ValueError(
                f"{folder}: holds other content ({path.name}), allowed: a new folder or an empty one"
            )
    for name, content in contents.items():
        if folder / name not in found:
            with replacing(folder / name) as partial:
                partial.write_bytes(content)
