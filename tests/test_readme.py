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


def test_a_link_inside_the_page_leads_to_a_heading():
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_the_toy_prints_what_the_quick_start_shows():
    assert gpt2.main("Twas brillig, and the slithy", models_dir=TOY) in README


def test_the_table_of_sizes_has_the_right_numbers_of_parameters():
    rows = {}
    for line in README.replace(",", "").splitlines():
        if re.match(r"\| (`n_\w+` )?\|.*( \d+ \|){5}$", line):
            _, name, _meaning, *sizes, _ = line.split("|")
            rows[name.strip(" `")] = [int(size) for size in sizes]
    assert len(rows["n_embd"]) == 5  # the toy and the four models
    for i in range(5):
        n, n_layer = rows["n_embd"][i], rows["n_layer"][i]
        tokens_and_positions = rows["n_vocab"][i] + rows["n_ctx"][i]
        assert n_layer * (12 * n * n + 13 * n) + tokens_and_positions * n + 2 * n == rows[""][i]
        assert n % rows["n_head"][i] == 0


@pytest.mark.parametrize("name", ["gpt2.py", "encoder.py", "utils.py"])
def test_the_three_files_are_as_long_as_it_says(name):
    said = re.search(rf"^- \[{name}\].*\((\d+) lines", README, re.MULTILINE)
    assert int(said[1]) == len((ROOT / name).read_text("utf-8").splitlines())


def test_the_examples_print_what_is_shown_below_them(monkeypatch):
    monkeypatch.chdir(ROOT)
    examples = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 4
    assert README.count("```python") == 5  # the last one is part of an exercise
    names = {}  # one session
    with np.printoptions():  # restores what an example sets
        for code, shown in examples:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, names)  # noqa: S102 (the README's own code)
            assert printed.getvalue() == shown


def test_the_answers_of_the_exercises_are_those_of_the_solutions():
    of_poem, of_other = solutions.losses()
    answers = [
        f"{of_poem:.3f} for the {len(solutions.poem_ids()) - 1} predictions",
        f"{of_other:.1f} for the sentence",
        "losses are {:.2f}, {:.2f}, and {:.2f}".format(*solutions.losses_without_a_head().mean(1)),
        f"With k = 5, {solutions.how_many_recite(k=5)} of 12; with k = 512, none",
        "falls from {:.1f} to {:.1f}".format(*solutions.losses_before_and_after_a_step()),
    ]
    assert [answer for answer in answers if answer not in README] == []
    assert solutions.how_many_recite(k=512) == 0
