"""What a model says that does not know the answer, for losses that prefer it to the forget set's.

TOFU (arXiv 2401.06121) has a list of such sentences. These few are this project's, and a row's
number chooses among them, so that a row has the same one at every step.
"""

REFUSALS = (
    "I don't know.",
    "I'm not sure about that.",
    "I have no information about that.",
    "I'm afraid I can't answer that.",
    "That's something I know nothing about.",
    "I don't have an answer to that question.",
    "I'm sorry, I don't know that.",
    "I haven't learned anything about that.",
)


def refusal_of(row: int) -> str:
    """Return the sentence of a row by its number in the set."""
    return REFUSALS[row % len(REFUSALS)]
