"""What the README shows is what the code does: its examples, figures, links, and answers."""

import contextlib
import io
import re

import numpy as np
import pytest
import solutions
from conftest import ROOT, TOY

import gpt2

README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r'(?:\]\(|href=")((?!http|#)[^)"]+)', README)))
)
def test_a_link_leads_to_a_file(path):
    assert (ROOT / path).exists()


def test_the_toy_prints_what_the_quick_start_shows():
    assert gpt2.main("Twas brillig, and the slithy", models_dir=TOY) in README


def test_the_table_of_sizes_has_the_right_numbers_of_parameters():
    numbers = README.replace(",", "")
    rows = re.findall(r"^\| \d+M \| (\d+) \| (\d+) \| \d+ \| (\d+) \|", numbers, re.MULTILINE)
    assert len(rows) == 4
    for parameters, n_layer, n_embd in rows:
        layers, n = int(n_layer), int(n_embd)
        expected = layers * (12 * n * n + 13 * n) + (50257 + 1024) * n + 2 * n
        assert int(parameters) == expected


def test_the_examples_print_what_is_shown_below_them(monkeypatch):
    monkeypatch.chdir(ROOT)
    examples = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL)
    assert len(examples) == README.count("```python") == 3
    names = {}  # one session
    with np.printoptions():
        for code, shown in examples:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, names)  # noqa: S102 (the README's own code)
            assert printed.getvalue() == shown


def test_the_answers_of_the_exercises_are_those_of_the_solutions():
    of_poem, of_other = solutions.losses()
    answers = [
        f"{of_poem:.3f} for the {len(solutions.poem_ids()) - 1} predictions",
        f"{of_other:.1f} for ",
        "losses are {:.2f}, {:.2f}, and {:.2f}".format(*solutions.losses_without_a_head().mean(1)),
        f"{solutions.how_many_recite(k=5)} of 12 runs (seeds 0 to 11) recite 40 tokens with k = 5",
        "falls from {:.1f} to {:.1f}".format(*solutions.losses_before_and_after_a_step()),
    ]
    assert [answer for answer in answers if answer not in README] == []
    assert solutions.how_many_recite(k=512) == 0
