"""The README's links, examples and messages are right."""

import contextlib
import io
import re
import runpy
import time

import pytest
from conftest import ROOT, TOY

import gpt2
import utils

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\[([^\]]+)\]\(((?!http)[^)#]+)(?:#L(\d+))?\)", README)


@pytest.mark.parametrize(("text", "path", "line"), LINKS)
def test_a_link_leads_to_what_it_names(text, path, line):
    assert (ROOT / path).exists()
    if line:
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        assert re.match(rf"\s*(def|class) {text}\b", lines[int(line) - 1])


@pytest.mark.parametrize("anchor", sorted(set(re.findall(r"\]\(#([^)]+)\)", README))))
def test_an_anchor_is_a_heading(anchor):
    headings = re.findall(r"^#+ (.+)", README, re.MULTILINE)
    assert anchor in [heading.lower().replace(" ", "-") for heading in headings]


def test_the_toy_prints_what_the_readme_shows():
    assert gpt2.main("Twas brillig, and the slithy", models_dir=TOY) in README


def test_the_table_of_sizes_has_the_right_numbers_of_parameters():
    rows = re.findall(r"^\| \d+M \| ([\d,]+) \| (\d+) \| \d+ \| (\d+) \|", README, re.MULTILINE)
    assert len(rows) == 4
    for parameters, n_layer, n_embd in rows:
        layers, n = int(n_layer), int(n_embd)
        expected = layers * (12 * n * n + 13 * n) + (50257 + 1024) * n + 2 * n
        assert int(parameters.replace(",", "")) == expected


def test_each_function_of_the_model_is_linked():
    source = (ROOT / "gpt2.py").read_text(encoding="utf-8")
    linked = {text for text, path, line in LINKS if path == "gpt2.py" and line}
    assert linked == set(re.findall(r"^def (\w+)", source, re.MULTILINE))


def test_the_examples_print_what_the_readme_shows(monkeypatch):
    pytest.importorskip("jax")
    monkeypatch.chdir(ROOT)
    examples = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL)
    names = {}
    assert len(examples) == README.count("```python")
    for code, shown in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)  # noqa: S102 (the README's own code, in one session)
        assert printed.getvalue() == shown


def test_the_picture_can_be_drawn_again(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    file = tmp_path / "attention.png"
    monkeypatch.setattr("sys.argv", ["draw_attention.py", str(file)])
    runpy.run_path(str(ROOT / "tests" / "draw_attention.py"), run_name="__main__")
    for png in (file, ROOT / "tests" / "attention.png"):
        assert png.read_bytes().startswith(b"\x89PNG")
        assert png.stat().st_size < 60_000


def test_the_messages_are_those_that_the_readme_explains(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "URL", "http://127.0.0.1:9/where-nothing-listens")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (toy / "124M" / "hparams.json").write_text("")
    mistakes = {
        "cannot download": lambda: gpt2.main("Twas", 40, "124M", tmp_path / "new"),
        "cannot read": lambda: gpt2.main("Twas", 40, "124M", toy),
        "model_size": lambda: gpt2.main("Twas", 40, "125M"),
        "301 prompt tokens": lambda: gpt2.main("and " * 300, 40, "124M", TOY),
        "n_tokens_to_generate": lambda: gpt2.main("Alan", "Turing"),
    }
    table = README.partition("## When something goes wrong")[2]
    messages = re.findall(r"^\| `(.+?)`[ ,]", table, re.MULTILINE)
    for start, mistake in mistakes.items():
        (message,) = [message for message in messages if message.startswith(start)]
        with pytest.raises(ValueError) as caught:
            mistake()
        assert re.match(re.escape(message).replace(r"\.\.\.", ".*"), str(caught.value))
