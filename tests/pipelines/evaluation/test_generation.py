"""Tokens drawn by given numbers, by hand and on the tiny model."""

from pathlib import Path

import pytest
import torch

from pipelines.config.schema import UnlearnConfig
from pipelines.encoding.text import TextEncoder
from pipelines.evaluation.generation import Question, Sampling, generate
from pipelines.model.load import load_base


@pytest.mark.parametrize(
    ("number", "token"),
    [(0.0, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.9999999, 3)],
)
def test_a_token_is_drawn_where_the_cumulative_probability_passes_the_number(
    number: float, token: int
) -> None:
    # The first token and the last have no probability, and no number draws them.
    probability_V = torch.tensor([0.0, 0.5, 0.25, 0.25, 0.0])
    uniform_BT = torch.tensor([[0.6, number]], dtype=torch.float64)
    input_ids_BT = torch.zeros(1, 4, dtype=torch.long)  # a prompt of three tokens, and one drawn
    scores_BV = Sampling(uniform_BT, 3)(input_ids_BT, probability_V.log()[None])
    assert scores_BV.isfinite().nonzero().tolist() == [[0, token]]


def test_what_is_drawn_depends_on_the_seed_and_on_no_other_row(cfg: UnlearnConfig) -> None:
    network, encoder = load_base(cfg.model).eval(), TextEncoder(cfg.model, None, 128)
    short, long = encoder.prompt("Who?"), encoder.prompt("Where was the author born, and when?")
    seeds = [(0, 0), (0, 1), (1, 0)]
    questions = [Question(short, seed=seed) for seed in seeds]
    alone = [generate(network, encoder, [question], 8)[0] for question in questions]
    beside = generate(network, encoder, [Question(long, seed=(5,)), *questions], 8)[1:]
    for one, other in zip(alone, beside, strict=True):
        assert one == other[: len(one)]
    assert len({tuple(tokens) for tokens in alone}) == 3
    greedy = generate(network, encoder, [Question(short)], 8)[0]
    assert greedy not in alone
    assert generate(network, encoder, [Question(short)], 8)[0] == greedy


def test_tokens_are_drawn_as_often_as_they_are_probable(cfg: UnlearnConfig, problem: Path) -> None:
    network, encoder = load_base(cfg.model).eval(), TextEncoder(cfg.model, None, 128)
    prompt = encoder.prompt("Who?")
    with torch.no_grad():
        probability_V = network(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    count = 400
    drawn = generate(network, encoder, [Question(prompt, seed=(n,)) for n in range(count)], 1)
    # The mean log-probability of what is drawn is minus the entropy.
    log_N = probability_V.log()[torch.tensor(drawn)[:, 0]]
    entropy = float(torch.special.entr(probability_V).sum())
    assert float(-log_N.mean()) == pytest.approx(entropy, abs=4 * float(log_N.std()) / count**0.5)
