"""Forget and retain rows in one batch, so that one forward pass serves both.

A row is tokens with an answer (a causal language model), tokens with a class, or an image with a class. An image counts
as one token; wherever a module has more places than the batch has tokens (patches, a feature map), all of a row count.

Shapes: B rows, T tokens, C channels, H height, W width, S places of a module, N chosen places, D features.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """One tokenised row. `answer_start` is the index of the first answer token; `label` is a class, or a group of rows,
    -1 where there is none; `utility` marks a kept row that is no retain row; `fact` is where the tokens that carry the
    row's fact begin and end."""

    input_ids: Sequence[int]
    answer_start: int
    row: int = 0
    label: int = -1
    utility: bool = False
    classified: bool = False
    pixels_CHW: Tensor | None = None
    fact: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        """Tokens; an image counts as many as it has patches of 16 x 16, as a ViT's."""
        return (
            len(self.input_ids)
            if self.pixels_CHW is None
            else max(1, self.pixels_CHW[0].numel() // 256)
        )


class SelectedFeatures(NamedTuple):
    """Chosen places of a module's output: features, the rows they belong to, and their shares of the mean."""

    feature_ND: Tensor
    index_N: Tensor
    weight_N: Tensor


class UnlearnBatch(NamedTuple):
    """Rows padded on the right. Position t of `answer_BT` is true when token t + 1 belongs to the answer, of `fact_BT`
    when it carries the row's fact; in a batch of `classified` rows the first answer is, and stands for the class.

    `forget_B` tells forget rows from those that are kept, `utility_B` which of these come from the utility set; `row_B`
    is a row's number in its set, `label_B` its class or group. Images have `pixels_BCHW`, and one token a row.
    """

    input_ids_BT: Tensor
    attention_BT: Tensor
    answer_BT: Tensor
    fact_BT: Tensor
    forget_B: Tensor
    row_B: Tensor
    label_B: Tensor
    utility_B: Tensor
    pixels_BCHW: Tensor | None = None
    classified: bool = False

    def to(self, device: torch.device | str) -> "UnlearnBatch":
        """The same batch on another device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def rows(self, index_R: Tensor) -> "UnlearnBatch":
        """The rows of these numbers."""
        return self._mapped(lambda tensor: tensor[index_R])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "UnlearnBatch":
        tensors = {
            name: value for name, value in self._asdict().items() if isinstance(value, Tensor)
        }
        return self._replace(**{name: change(tensor) for name, tensor in tensors.items()})

    def model_inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """What the forward of a model of that precision is called with."""
        if self.pixels_BCHW is not None:
            return {"pixel_values": self.pixels_BCHW.to(dtype)}
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids_BT,
            "attention_mask": self.attention_BT.long(),
        }
        return inputs if self.classified else {**inputs, "use_cache": False}

    def expected(self, positions_BT: Tensor) -> Tensor:
        """The tokens or classes [N] that follow the chosen N positions."""
        index_N2 = positions_BT.nonzero()
        if self.classified:
            return self.label_B[index_N2[:, 0]]
        return self.input_ids_BT[index_N2[:, 0], index_N2[:, 1] + 1]

    def places(self, feature_BSD: Tensor, tokens_BT: Tensor) -> SelectedFeatures:
        """The features at chosen tokens, or at all places of their rows in a module whose places are no tokens.

        In a classified batch each row has a share of 1 in all, else each token: as `counts` counts them."""
        if feature_BSD.shape[1] == tokens_BT.shape[1]:
            chosen_BS = tokens_BT
        else:
            chosen_BS = tokens_BT.any(1)[:, None].expand(feature_BSD.shape[:2])
        index_N = chosen_BS.nonzero()[:, 0]
        places_B = (
            chosen_BS.sum(1)
            if self.classified
            else torch.ones_like(chosen_BS[:, 0], dtype=torch.long)
        )
        return SelectedFeatures(feature_BSD[chosen_BS], index_N, 1 / places_B[index_N])

    def retain_tokens_BT(self, tokens: str = "all") -> Tensor:
        """Tokens of kept rows, retain and utility."""
        return self._feature_tokens_BT(tokens) & ~self.forget_B[:, None]

    def forget_tokens_BT(self, tokens: str) -> Tensor:
        """Tokens of forget rows."""
        return self._feature_tokens_BT(tokens) & self.forget_B[:, None]

    def _feature_tokens_BT(self, tokens: str) -> Tensor:
        """Tokens whose features count: `all` real ones but a row's first, or those that predict the `answer`; of
        classified rows, all real ones.

        A language model's first token is an attention sink: the same in every row, and its features are so large (in
        SmolLM2's block 11, 1,000 times the others' norm) that E|h0|^2 would be its own."""
        if self.classified:
            return self.attention_BT
        tokens_BT = (self.answer_BT if tokens == "answer" else self.attention_BT).clone()
        tokens_BT[:, 0] = False
        return tokens_BT

    def counts(self, tokens: str) -> "TokenCounts":
        """How many tokens (rows, where they are classified) each term of the objective averages over, in this batch
        alone."""
        answers_B = self.answer_BT.sum(1)
        retain_BT, forget_BT = self.retain_tokens_BT(), self.forget_tokens_BT(tokens)
        return TokenCounts(
            retain=float((retain_BT.any(1) if self.classified else retain_BT).sum()),
            forget=float((forget_BT.any(1) if self.classified else forget_BT).sum()),
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


def collate(
    retain: Sequence[Row], forget: Sequence[Row], pad_token_id: int, blank: Row | None = None
) -> UnlearnBatch:
    """Pad retain rows, then forget rows, to the longest of them.

    With no rows at all (a worker whose share of a small set is empty) the batch is one row that no term counts: `blank`
    where rows are classified.
    """
    rows = [*retain, *forget]
    if not rows:
        empty = collate([blank or Row([pad_token_id], 1)], [], pad_token_id)
        nowhere_BT = torch.zeros_like(empty.attention_BT)
        return empty._replace(attention_BT=nowhere_BT, answer_BT=nowhere_BT, fact_BT=nowhere_BT)
    classified = rows[0].classified
    width = max(len(row.input_ids) for row in rows)
    input_ids_BT = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    lengths_B = torch.tensor([len(row.input_ids) for row in rows])
    for index, row in enumerate(rows):
        input_ids_BT[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
    position_T = torch.arange(width)
    starts_B = torch.tensor([row.answer_start for row in rows])
    # Position t predicts token t + 1: from the token before the answer to the last but one.
    answer_BT = (position_T >= starts_B[:, None] - 1) & (position_T < lengths_B[:, None] - 1)
    fact_B2 = torch.tensor([row.fact for row in rows])[:, None] - 1
    fact_BT = (position_T >= fact_B2[..., 0]) & (position_T < fact_B2[..., 1])
    if classified:
        answer_BT = (position_T == 0).expand(len(rows), -1)
    return UnlearnBatch(
        input_ids_BT=input_ids_BT,
        attention_BT=position_T < lengths_B[:, None],
        answer_BT=answer_BT,
        fact_BT=fact_BT,
        forget_B=torch.arange(len(rows)) >= len(retain),
        row_B=torch.tensor([row.row for row in rows]),
        label_B=torch.tensor([row.label for row in rows]),
        utility_B=torch.tensor([row.utility for row in rows]),
        pixels_BCHW=None
        if rows[0].pixels_CHW is None
        else torch.stack([_pixels(row) for row in rows]),
        classified=classified,
    )


def _pixels(row: Row) -> Tensor:
    assert row.pixels_CHW is not None, "a batch has images only, or none"
    return row.pixels_CHW
