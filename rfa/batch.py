"""Forget and retain rows in one batch, so that one forward pass serves both.

A row is tokens with an answer (a causal language model), tokens with a class, or an image with a
class. An image counts as one token. Where a module has more positions than the batch has tokens
(patches, a feature map), all positions of a row count.

Shapes: B rows, T tokens, C channels, H height, W width, S positions of a module, N selected
positions, D features, R selected rows.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rfa.settings import Objective, TokenKind


class Row(NamedTuple):
    """One tokenised row, or one `part` of it by number, where a row is read in several.

    `answer_start` is the index of the first answer token. `label` is a class, or a group of rows,
    and -1 if there is none. `utility` marks a row of the utility set, and `earlier` one that was
    forgotten before and is to be held so. `fact` is the first token that carries the row's fact,
    and the one after the last. `refusal` has the tokens of the row's question with a refusal as its
    answer, and where that begins, for losses that prefer it.
    """

    input_ids: Sequence[int]
    answer_start: int
    row: int = 0
    label: int = -1
    utility: bool = False
    classified: bool = False
    pixels_CHW: Tensor | None = None
    fact: tuple[int, int] = (0, 0)
    part: int = 0
    earlier: bool = False
    refusal: tuple[Sequence[int], int] | None = None

    @property
    def size(self) -> int:
        """Return the number of tokens. An image counts one per 16 x 16 patch, as in ViT."""
        if self.pixels_CHW is None:
            return len(self.input_ids)
        return max(1, self.pixels_CHW[0].numel() // 256)


class SelectedFeatures(NamedTuple):
    """Features at selected positions of a module's output.

    `index_N` is the batch's row that each position belongs to, `weight_N` its weight in a sum.
    Weights sum to 1 per row in a batch of classified rows and are 1 per token otherwise, matching
    the denominators in `TokenCounts`.
    """

    feature_ND: Tensor
    index_N: Tensor
    weight_N: Tensor


class UnlearnBatch(NamedTuple):
    """Rows padded on the right.

    Position t of `answer_BT` is true when token t + 1 belongs to the answer, and of `fact_BT` when
    token t + 1 carries the row's fact. In a batch of `classified` rows only the first position of
    `answer_BT` is true. It stands for the class.

    `forget_B` marks the forget set's rows, `refusal_B` those of them that are refusals, each in the
    order of the rows that it stands for. Of the others, which are held, `utility_B` marks those of
    the utility set, and `earlier_B` those that were forgotten before. `row_B` is a row's number in
    its set, `part_B` the part of it, `label_B` its class or group. Images have `pixels_BCHW`, and
    one token a row.
    """

    input_ids_BT: Tensor
    attention_BT: Tensor
    answer_BT: Tensor
    fact_BT: Tensor
    forget_B: Tensor
    row_B: Tensor
    part_B: Tensor
    label_B: Tensor
    utility_B: Tensor
    earlier_B: Tensor
    refusal_B: Tensor
    pixels_BCHW: Tensor | None = None
    classified: bool = False

    def to(self, device: torch.device | str) -> "UnlearnBatch":
        """Return the batch on another device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def rows(self, index_R: Tensor) -> "UnlearnBatch":
        """Select rows by index."""
        return self._mapped(lambda tensor: tensor[index_R])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "UnlearnBatch":
        changed: dict[str, Tensor] = {}
        for name, value in self._asdict().items():
            if isinstance(value, Tensor):
                changed[name] = change(value)
        return self._replace(**changed)

    def model_inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Return the keyword arguments of a model's forward, with pixels as `dtype`."""
        if self.pixels_BCHW is not None:
            return {"pixel_values": self.pixels_BCHW.to(dtype)}
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids_BT,
            "attention_mask": self.attention_BT.long(),
        }
        # Classifiers know no such argument. A decoder's cache would only hold memory here.
        if not self.classified:
            inputs["use_cache"] = False
        return inputs

    def expected(self, positions_BT: Tensor) -> Tensor:
        """Return the tokens or classes [N] that follow N selected positions."""
        index_N2 = positions_BT.nonzero()
        if self.classified:
            return self.label_B[index_N2[:, 0]]
        return self.input_ids_BT[index_N2[:, 0], index_N2[:, 1] + 1]

    def select(self, feature_BSD: Tensor, tokens_BT: Tensor) -> SelectedFeatures:
        """Select features at tokens.

        Where a module's positions are no tokens, all positions of the tokens' rows are selected.
        """
        # The planner runs this on the meta device with the masks on the CPU, as a mask without
        # values has no number of selected positions. So `index_N` is made of the mask alone.
        feature_BSD = self._by_row(feature_BSD, tokens_BT)
        selected_BS = tokens_BT
        if feature_BSD.shape[1] != tokens_BT.shape[1]:
            selected_BS = tokens_BT.any(1)[:, None].expand(feature_BSD.shape[:2])
        index_N = selected_BS.nonzero()[:, 0]
        weight_N = torch.ones(len(index_N), device=index_N.device)
        if self.classified:
            weight_N = 1 / selected_BS.sum(1)[index_N]
        return SelectedFeatures(feature_BSD[selected_BS], index_N, weight_N.to(feature_BSD.device))

    def _by_row(self, feature_BSD: Tensor, tokens_BT: Tensor) -> Tensor:
        """Return the features of each row: a layer may see all rows' tokens as if each were one.

        Raises:
            ValueError: the features are neither those of rows nor those of their tokens.
        """
        rows, tokens = tokens_BT.shape
        if len(feature_BSD) == rows * tokens and feature_BSD.shape[1] == 1:
            feature_BSD = feature_BSD.reshape(rows, tokens, -1)  # as OPT's `fc1` and `fc2`
        of_tokens = feature_BSD.shape[1] == tokens or self.classified
        if len(feature_BSD) != rows or not of_tokens:
            raise ValueError(
                f"adapter.targets: a layer has features of {list(feature_BSD.shape[:2])} rows and "
                f"positions where {rows} rows of {tokens} tokens are read; choose other layers"
            )
        return feature_BSD

    @property
    def retain_B(self) -> Tensor:
        """The rows of the retain set itself, to which targets are fitted."""
        return ~(self.forget_B | self.utility_B | self.earlier_B)

    def retain_tokens_BT(self, tokens: TokenKind = "all") -> Tensor:
        """Mark tokens of all rows that are held: those of the retain set and the sets beside it."""
        return self._feature_tokens_BT(tokens) & ~self.forget_B[:, None]

    def forget_tokens_BT(self, tokens: TokenKind) -> Tensor:
        """Mark tokens of forget rows, without refusals."""
        return self._feature_tokens_BT(tokens) & self.forgotten_B[:, None]

    @property
    def forgotten_B(self) -> Tensor:
        """The forget set's rows without refusals."""
        return self.forget_B & ~self.refusal_B

    def _feature_tokens_BT(self, tokens: TokenKind) -> Tensor:
        """Mark the tokens whose features count.

        These are all real tokens but a row's first, or those that predict the answer. Of classified
        rows, all real tokens count.
        """
        if self.classified:
            return self.attention_BT
        marked_BT = self.answer_BT if tokens == "answer" else self.attention_BT
        tokens_BT = marked_BT.clone()
        # A language model's first token is an attention sink. It is the same in every row, and its
        # features are so large (in SmolLM2's block 11, 1,000 times the others' norm) that E|h0|^2
        # would be that token's alone.
        tokens_BT[:, 0] = False
        return tokens_BT

    def counts(self, tokens: TokenKind) -> "TokenCounts":
        """Count the tokens or rows that each term averages over, in this batch alone."""
        answers_B = self.answer_BT.sum(1)
        # Retained rows are held at all of their tokens, whichever kind of the forget rows' shifts.
        retain_BT, forget_BT = self.retain_tokens_BT(), self.forget_tokens_BT(tokens)
        if self.classified:
            retain_BT, forget_BT = retain_BT.any(1), forget_BT.any(1)
        return TokenCounts(
            retain=float(retain_BT.sum()),
            forget=float(forget_BT.sum()),
            retain_answer=float(answers_B[~self.forget_B].sum()),
            forget_answer=float(answers_B[self.forgotten_B].sum()),
            # A loss per row sees only rows with an answer (`Answers.row_sums`).
            forget_rows=float((answers_B[self.forgotten_B] > 0).sum()),
        )


class TokenCounts(NamedTuple):
    """The tokens (of classified rows: the rows) that each term is averaged over.

    They are counted over all workers and micro-batches of a step, so that the loss does not depend
    on how rows are split. `forget_rows` are the forget rows that have an answer.
    """

    retain: float
    forget: float
    retain_answer: float
    forget_answer: float
    forget_rows: float


def refusals_of(forget: Sequence[Row], objective: Objective) -> list[Row]:
    """Return the refusals of forget rows as rows, and none unless the objective reads them."""
    rows: list[Row] = []
    if objective.reads_refusals:
        for row in forget:
            assert row.refusal is not None
            ids, start = row.refusal
            rows.append(row._replace(input_ids=ids, answer_start=start, fact=(0, 0), refusal=None))
    return rows


def collate(
    retain: Sequence[Row],
    forget: Sequence[Row],
    pad_token_id: int,
    blank: Row | None = None,
    *,
    refusals: Sequence[Row] = (),
) -> UnlearnBatch:
    """Make a batch of retain rows, forget rows and refusals, padded to the longest of them.

    With no rows at all the batch is one row that no term counts. Classified rows need `blank` for
    it, a row of their kind.
    """
    rows = [*retain, *forget, *refusals]
    # A worker's share of a small set may be empty, but it must run the model as often as the
    # others: they wait for it in every exchange.
    if not rows:
        empty = collate([blank or Row([pad_token_id], 1)], [], pad_token_id)
        nowhere_BT = torch.zeros_like(empty.attention_BT)
        return empty._replace(attention_BT=nowhere_BT, answer_BT=nowhere_BT, fact_BT=nowhere_BT)
    width = max(len(row.input_ids) for row in rows)
    input_ids_BT = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    lengths_B = torch.tensor([len(row.input_ids) for row in rows])
    for ids_T, row in zip(input_ids_BT, rows, strict=True):
        ids_T[: len(row.input_ids)] = torch.tensor(row.input_ids)
    position_T = torch.arange(width)
    starts_B = torch.tensor([row.answer_start for row in rows])
    # Position t predicts token t + 1: from the token before the answer to the last but one.
    answer_BT = (position_T >= starts_B[:, None] - 1) & (position_T < lengths_B[:, None] - 1)
    # The same shift by one. A row without a fact has (0, 0), of which no position is left.
    fact_B12 = torch.tensor([row.fact for row in rows])[:, None] - 1
    fact_BT = (position_T >= fact_B12[..., 0]) & (position_T < fact_B12[..., 1])
    classified = rows[0].classified
    if classified:
        answer_BT = (position_T == 0).expand(len(rows), -1)
    images = [row.pixels_CHW for row in rows if row.pixels_CHW is not None]
    assert len(images) in (0, len(rows)), "a batch has images only, or none"
    return UnlearnBatch(
        input_ids_BT=input_ids_BT,
        attention_BT=position_T < lengths_B[:, None],
        answer_BT=answer_BT,
        fact_BT=fact_BT,
        forget_B=torch.arange(len(rows)) >= len(retain),
        row_B=torch.tensor([row.row for row in rows]),
        part_B=torch.tensor([row.part for row in rows]),
        label_B=torch.tensor([row.label for row in rows]),
        utility_B=torch.tensor([row.utility for row in rows]),
        earlier_B=torch.tensor([row.earlier for row in rows]),
        refusal_B=torch.arange(len(rows)) >= len(retain) + len(forget),
        pixels_BCHW=torch.stack(images) if images else None,
        classified=classified,
    )
