"""Forget and retain rows in one batch, so that one forward pass serves both.

Shapes: B rows, T tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """One tokenised row. `answer_start` is the index of the first answer token; `label` -1 where there is none;
    `utility` marks a kept row that is no retain row."""

    input_ids: Sequence[int]
    answer_start: int
    row: int = 0
    label: int = -1
    utility: bool = False


class UnlearnBatch(NamedTuple):
    """Rows padded on the right. Position t of `answer_BT` is true when token t + 1 belongs to the answer.

    `forget_B` tells forget rows from those that are kept, `utility_B` which of these come from the utility set; `row_B`
    is a row's number in its set, `label_B` its group.
    """

    input_ids_BT: Tensor
    attention_BT: Tensor
    answer_BT: Tensor
    forget_B: Tensor
    row_B: Tensor
    label_B: Tensor
    utility_B: Tensor

    def to(self, device: torch.device | str) -> "UnlearnBatch":
        """The same batch on another device."""
        return UnlearnBatch(*(tensor.to(device) for tensor in self))

    def retain_tokens_BT(self, tokens: str = "all") -> Tensor:
        """Tokens of kept rows, retain and utility."""
        return self._feature_tokens_BT(tokens) & ~self.forget_B[:, None]

    def forget_tokens_BT(self, tokens: str) -> Tensor:
        """Tokens of forget rows."""
        return self._feature_tokens_BT(tokens) & self.forget_B[:, None]

    def _feature_tokens_BT(self, tokens: str) -> Tensor:
        """Tokens whose features count: `all` real ones but a row's first, or those that predict the `answer`.

        The first token is an attention sink: the same in every row, and its features are so large (in SmolLM2's block
        11, 1,000 times the others' norm) that E|h0|^2 would be its own."""
        tokens_BT = (self.answer_BT if tokens == "answer" else self.attention_BT).clone()
        tokens_BT[:, 0] = False
        return tokens_BT

    def counts(self, tokens: str) -> "TokenCounts":
        """How many tokens each term of the objective averages over, in this batch alone."""
        answers_B = self.answer_BT.sum(1)
        return TokenCounts(
            retain=float(self.retain_tokens_BT().sum()),
            forget=float(self.forget_tokens_BT(tokens).sum()),
            retain_answer=float(answers_B[~self.forget_B].sum()),
            forget_answer=float(answers_B[self.forget_B].sum()),
        )


class TokenCounts(NamedTuple):
    """Tokens that each term is averaged over: over all workers and micro-batches of a step, so that the loss does not
    depend on how rows are split."""

    retain: float
    forget: float
    retain_answer: float
    forget_answer: float


def collate(retain: Sequence[Row], forget: Sequence[Row], pad_token_id: int) -> UnlearnBatch:
    """Pad retain rows, then forget rows, to the longest of them.

    With no rows at all (a worker whose share of a small set is empty) the batch is one row that no term counts.
    """
    rows = [*retain, *forget]
    if not rows:
        empty = collate([Row([pad_token_id], 1)], [], pad_token_id)
        return empty._replace(attention_BT=torch.zeros_like(empty.attention_BT))
    width = max(len(row.input_ids) for row in rows)
    input_ids_BT = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    lengths_B = torch.tensor([len(row.input_ids) for row in rows])
    for index, row in enumerate(rows):
        input_ids_BT[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
    position_T = torch.arange(width)
    starts_B = torch.tensor([row.answer_start for row in rows])
    # Position t predicts token t + 1: from the token before the answer to the last but one.
    answer_BT = (position_T >= starts_B[:, None] - 1) & (position_T < lengths_B[:, None] - 1)
    return UnlearnBatch(
        input_ids_BT=input_ids_BT,
        attention_BT=position_T < lengths_B[:, None],
        answer_BT=answer_BT,
        forget_B=torch.arange(len(rows)) >= len(retain),
        row_B=torch.tensor([row.row for row in rows]),
        label_B=torch.tensor([row.label for row in rows]),
        utility_B=torch.tensor([row.utility for row in rows]),
    )
