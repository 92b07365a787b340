"""The README and the documents: their example runs, their links lead somewhere, the README stays short."""

import re
from pathlib import Path

import pytest

from rfa.forget_losses import FORGET_LOSSES
from rfa.methods import METHODS
from rfa.settings import Weights

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_has_at_most_a_thousand_words() -> None:
    assert len(README.split()) <= 1000


def test_the_notebook_example_forgets_one_fact_and_keeps_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    numbers = [float(number) for number in re.findall(r"\d\.\d\d", capsys.readouterr().out)]
    retained_before, forgotten_before, retained_after, forgotten_after = numbers
    assert retained_after > 0.9 * retained_before
    assert forgotten_after < 0.1 * forgotten_before
    printed = "It prints {:.2f} and {:.2f} before, {:.2f} and {:.2f} after."
    assert printed.format(*numbers) in README


def test_every_forget_loss_has_a_line_with_its_parameters_and_their_defaults() -> None:
    page = (ROOT / "docs" / "objective.md").read_text(encoding="utf-8")
    losses = page.partition("## Methods by name")[0]
    for name, loss in FORGET_LOSSES.items():
        (line,) = re.findall(rf"^\| `{name}` \| .*$", losses, re.MULTILINE)
        for parameter, (default, _, _) in loss.parameters.items():
            assert re.search(
                rf"`(objective\.output_parameters\.)?{parameter}`, {default:g}\b", line
            )


def test_every_method_has_a_line_with_its_weights() -> None:
    page = (ROOT / "docs" / "objective.md").read_text(encoding="utf-8")
    methods = page.partition("## Methods by name")[2]
    for name, method in METHODS.items():
        (line,) = re.findall(rf"^\| `{name}` \|(.*)\|$", methods, re.MULTILINE)
        loss, settings = line.split("|")
        assert loss.strip("` ") == method.settings.get("output", "")
        weights = dict(re.findall(r"(retain|forget|kl|task|output) ([\d.]+)", settings))
        assert Weights(0, 0)._replace(**{key: float(weights[key]) for key in weights}) == (
            method.weights
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
