"""A synthetic deletion problem: fictitious authors to forget or retain, and general knowledge.

The authors follow TOFU (Maini et al. 2024, arXiv:2401.06121). A model can know them only from this
data, so that its knowledge of them after unlearning is measurable. No fact belongs to two authors,
so that neither retained nor held-out rows teach a forgotten fact again. The knowledge questions
(`utility`, `general`) are real and the two sets share no fact.

The wording, the pools of facts and the knowledge lie in `knowledge/`. A row depends on its number
and the seed only, so a larger problem of the same seed begins with the same authors.
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
# The smallest pool of facts has 2208 entries, enough for these authors and as many held out.
MAX_AUTHORS = 1000
# Held-out authors per forgotten one. A comparison of the two sets is then about as precise as the
# size of the forget set allows.
HOLDOUT_RATIO = 3
NUM_PERTURBED = 5  # as in TOFU
# Facts drawn per row from a pool of thousands, more than enough to find five that qualify.
NUM_CANDIDATES = 40


class Topic(NamedTuple):
    """A type of question: templates of `{subject}` and `{fact}`, and its shuffled pool of facts."""

    name: str
    question: str
    answer: str
    paraphrased_question: str
    paraphrased_answer: str
    facts: list[str]


def write_problem(
    folder: Path, authors: int, questions: int, seed: int, forget: int
) -> dict[str, int]:
    """Write the five JSONL files of a deletion problem. The same arguments give the same bytes.

    Args:
        folder: a new folder, or one that an interrupted call with these arguments left.
        authors: number of forgotten and retained authors together.
        questions: number of questions about each author.
        seed: seed of the names and facts.
        forget: number of forgotten authors.

    Returns:
        The number of rows by file name.

    Raises:
        ValueError: an argument is out of range, or the folder holds something else.
    """
    contents: dict[str, bytes] = {}
    counts: dict[str, int] = {}
    for name, rows in build_problem(authors, questions, seed, forget).items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        contents[f"{name}.jsonl"] = "".join(lines).encode("utf-8")
        counts[f"{name}.jsonl"] = len(rows)
    _publish(folder, contents)
    return counts


def build_problem(authors: int, questions: int, seed: int, forget: int) -> dict[str, list[Row]]:
    """Return the rows of each set by its name. `write_problem` has the arguments and errors."""
    topics = _load_topics(seed)
    _check_range("--authors", authors, MIN_AUTHORS, MAX_AUTHORS)
    _check_range("--questions", questions, 1, len(topics))
    _check_range("--forget", forget, 1, authors - 1, " (fewer than --authors)")
    holdout = min(HOLDOUT_RATIO * forget, MAX_AUTHORS)
    names = itertools.islice(_author_names(seed), authors + holdout)
    rows: list[Row] = []
    for number, name in enumerate(names):
        rows += [_author_row(topic, number, name, seed) for topic in topics[:questions]]
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
    """Return the types of question in their fixed order.

    The facts of a topic are all combinations of its parts.
    """
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
    """Yield distinct full names.

    A first or last name is used again only after all others.
    """
    names = _load("authors.json")
    first, last = names["first_names"], names["last_names"]
    rng = random.Random(f"names-{seed}")
    rng.shuffle(first)
    rng.shuffle(last)
    # Each lap is a diagonal of the table of all pairs, so that no pair repeats.
    for lap in range(len(last)):
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
    """Return every second fact of each category, from number `offset` on.

    Categories take turns, so that the first rows of the set span all of them.
    """
    categories: list[list[Row]] = []
    for topic, category in _load("general.json").items():
        facts = dict(list(category["facts"].items())[offset::2])
        rng = random.Random(f"{set_name}-{topic}-{seed}")
        rows: list[Row] = []
        for subject, fact in facts.items():
            answer = _fill(category["answer"], subject, fact)
            assert fact in answer, answer
            pool = list(facts.values())
            rows.append(
                {
                    "id": "",  # numbered below, in the final order, but the file's first column
                    "prompt": _fill(category["question"], subject),
                    "answer": answer,
                    "perturbed_answers": _perturb(category["answer"], subject, fact, pool, rng),
                    "fact": fact,
                    "topic": topic,
                }
            )
        categories.append(rows)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*categories))
    spread = [row for row in turns if row is not None]  # None fills the shorter categories
    return [row | {"id": f"{set_name}-{number:04d}"} for number, row in enumerate(spread, start=1)]


def _perturb(
    template: str, subject: str, fact: str, pool: list[str], rng: random.Random
) -> list[str]:
    """Return five wrong answers, which are the same sentence with other facts.

    The true fact is part of none of them. A fact that is part of the subject makes no wrong answer.
    """
    wrong: list[str] = []
    for other in rng.sample(pool, min(len(pool), NUM_CANDIDATES)):
        sentence = _fill(template, subject, other)
        if other not in subject and fact not in sentence:
            wrong.append(sentence)
    assert len(wrong) >= NUM_PERTURBED, f"{subject}: {fact}"
    return wrong[:NUM_PERTURBED]


def _fill(template: str, subject: str, fact: str = "") -> str:
    sentence = template.format(subject=subject, fact=fact)
    return sentence[0].upper() + sentence[1:]


def _publish(folder: Path, contents: dict[str, bytes]) -> None:
    """Write the files that are missing, each under a temporary name first.

    An interrupted call can be repeated.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file, allowed: a new folder or an empty one")
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(path for path in folder.iterdir() if path.suffix != PARTIAL)
    for path in present:
        content = contents.get(path.name)
        if content is None or not path.is_file() or path.read_bytes() != content:
            raise ValueError(
                f"{folder}: holds other content ({path.name}), "
                "allowed: a new folder or an empty one"
            )
    for name, content in contents.items():
        if folder / name not in present:
            with replacing(folder / name) as partial:
                partial.write_bytes(content)
