"""Let a language model continue texts: greedily, or drawing each token by a number that is given.

Shapes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from pipelines.encoding.text import TextEncoder
from pipelines.encoding.windows import positions_of
from pipelines.model.load import stop_tokens

VERBATIM_TOKENS = 128  # tokens generated for plain text (open-unlearning, commit d3d7cf9)


class Question(NamedTuple):
    """Tokens that the model continues, and the right continuation."""

    input_ids: list[int]
    answer: str = ""
    is_text: bool = False  # plain text, continued from its middle
    seed: tuple[int, ...] = ()  # of what is drawn; none for the greedy continuation


class Sampling(LogitsProcessor):
    """Makes greedy generation draw each token at temperature 1, by given numbers.

    The token is the one at which the cumulative probability passes the number. So what is drawn
    for a row does not depend on the rows beside it, as it does with one generator for all.

    Args:
        uniform_BT: numbers in [0, 1), one for each token to generate.
        prompt_tokens: the width of the prompts, padding included.
    """

    def __init__(self, uniform_BT: Tensor, prompt_tokens: int) -> None:
        self._uniform_BT = uniform_BT
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return 0 for the token that is drawn in each row, and -inf for all others; (B, V)."""
        cumulative_BV = scores.double().softmax(-1).cumsum(-1)
        drawn_B = self._uniform_BT[:, input_ids.shape[1] - self._prompt_tokens].to(scores.device)
        # Of the sum, which rounding leaves a little off 1.
        level_B1 = drawn_B[:, None] * cumulative_BV[:, -1:]
        token_B1 = torch.searchsorted(cumulative_BV, level_B1, right=True)
        return torch.full_like(scores, float("-inf")).scatter(1, token_B1, 0.0)


def generate(
    network: Any, encoder: TextEncoder, questions: Sequence[Question], longest: int
) -> list[list[int]]:
    """Return the tokens of a language model's continuations, at most `longest` each, with padding.

    The questions are a batch: all have a seed, or none.
    """
    pad_token_id = encoder.pad_token_id
    width = max(len(question.input_ids) for question in questions)
    input_ids_BT = torch.full((len(questions), width), pad_token_id)
    attention_BT = torch.zeros_like(input_ids_BT)
    # Padded on the left, so that all answers begin at the same position.
    for index, question in enumerate(questions):
        start = width - len(question.input_ids)
        input_ids_BT[index, start:] = torch.tensor(question.input_ids)
        attention_BT[index, start:] = 1
    if all(question.is_text for question in questions):
        longest = min(longest, VERBATIM_TOKENS)
    positions = positions_of(network.config)
    if positions is not None:  # the last token has none, as no other follows it
        longest = max(1, min(longest, positions + 1 - width))
    processors = LogitsProcessorList()
    if questions[0].seed:
        drawn = [np.random.default_rng(question.seed).random(longest) for question in questions]
        processors.append(Sampling(torch.from_numpy(np.stack(drawn)), width))
    out_BT = network.generate(
        input_ids=input_ids_BT.to(network.device),
        attention_mask=attention_BT.to(network.device),
        max_new_tokens=longest,
        do_sample=False,
        logits_processor=processors,
        eos_token_id=stop_tokens(network, encoder.end_ids),
        pad_token_id=pad_token_id,
    )
    return out_BT[:, width:].tolist()
