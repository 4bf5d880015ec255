"""The README's links, examples, exercises and messages are right."""

import contextlib
import io
import re
import runpy
import time

import numpy as np
import pytest
from conftest import ROOT, TOY

import gpt2
import utils

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_a_link_leads_to_a_file(path):
    assert (ROOT / path).exists()


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


def test_each_function_of_the_model_and_only_existing_names_are_mentioned():
    sources = [(ROOT / f"{name}.py").read_text(encoding="utf-8") for name in ("gpt2", "utils")]
    sources.append((ROOT / "encoder.py").read_text(encoding="utf-8"))
    mentioned = set(
        re.findall(r"`(\w+)`", README.partition("### From Enter")[2].partition("###")[0])
    )
    assert set(re.findall(r"^def (\w+)", sources[0], re.MULTILINE)) <= mentioned | {"generate"}
    assert mentioned <= set(re.findall(r"def (\w+)", "".join(sources)))


def test_the_examples_print_what_the_readme_shows(monkeypatch):
    monkeypatch.chdir(ROOT)
    examples = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL)
    names = {}
    assert len(examples) == README.count("```python") == 2
    with np.printoptions():
        for code, shown in examples:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, names)  # noqa: S102 (the README's own code, in one session)
            assert printed.getvalue() == shown


# ---- Exercises: each test does one and has the answer from the README ------------------------


def load():
    encoder, hparams, params = utils.load_encoder_hparams_and_params("124M", str(TOY))
    return encoder, hparams["n_head"], params


def loss(ids, params, n_head):
    probabilities = gpt2.softmax(gpt2.gpt2(ids[:-1], **params, n_head=n_head))
    return -np.mean(np.log(probabilities[np.arange(len(ids) - 1), ids[1:]]))


@pytest.fixture(scope="module")
def poem():
    source = (ROOT / "tests" / "train_toy.py").read_text(encoding="utf-8")
    return load()[0].encode(re.search(r'POEM = """(.*?)"""', source, re.DOTALL)[1])


def answer(pattern):
    """The numbers in the README's answer that match this pattern."""
    return [float(number) for number in re.search(pattern, README).groups()]


def test_the_toy_knows_its_poem_and_is_confidently_wrong_elsewhere(poem):
    encoder, n_head, params = load()
    n_tokens, of_poem, of_other, evenly = answer(
        r"the (\d+) tokens of the poem .*, (0\.\d+)\. .* dog\.\", (\d\.\d):.* log 512 = (\d\.\d)"
    )
    assert len(poem) == n_tokens
    assert loss(poem, params, n_head) == pytest.approx(of_poem, abs=5e-4)
    other = encoder.encode("The quick brown fox jumps over the lazy dog.")
    assert loss(other, params, n_head) == pytest.approx(of_other, abs=0.05)
    assert np.log(512) == pytest.approx(evenly, abs=0.05)


def test_the_heads_of_the_first_layer_are_needed_most(poem):
    means = []
    for layer in range(3):
        losses = []
        for head in range(4):
            _, n_head, params = load()
            params["blocks"][layer]["attn"]["c_proj"]["w"][12 * head : 12 * (head + 1)] = 0
            losses.append(loss(poem, params, n_head))
        means.append(np.mean(losses))
    assert means == pytest.approx(
        answer(r"three layers are (0\.\d+), (0\.\d+) and (0\.\d+)"), abs=5e-3
    )


@pytest.mark.parametrize("k", [512, 5])
def test_sampling_at_a_high_temperature_needs_top_k(k):
    encoder, n_head, params = load()
    prompt = encoder.encode("Twas brillig, and the slithy")
    poem = gpt2.generate(prompt, params, n_head, 40)

    def sample(seed):
        rng = np.random.default_rng(seed)
        ids = []
        for _ in range(40):
            logits = gpt2.gpt2(prompt + ids, **params, n_head=n_head)[-1].astype(float) / 1.5
            logits[logits < np.sort(logits)[-k]] = -np.inf
            ids.append(int(rng.choice(512, p=gpt2.softmax(logits))))
        return ids

    recited, runs = answer(r"With k = 5, (\d+) of (\d+) runs recite 40 tokens")
    assert sum(sample(seed) == poem for seed in range(int(runs))) == (recited if k == 5 else 0)


# ---- The picture and the messages ------------------------------------------------------------


def test_the_picture_can_be_drawn_again(tmp_path, monkeypatch):
    """Pixel for pixel by the same version of Matplotlib; others place letters elsewhere."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("sys.argv", ["draw_attention.py", str(tmp_path / "attention.png")])
    runpy.run_path(str(ROOT / "tests" / "draw_attention.py"), run_name="__main__")
    drawn = image.open(tmp_path / "attention.png")
    kept = image.open(ROOT / "tests" / "attention.png")
    if drawn.info["Software"] == kept.info["Software"]:
        np.testing.assert_array_equal(drawn, kept)
    else:
        assert drawn.size == kept.size


def test_the_messages_are_those_that_the_readme_explains(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "URL", "http://127.0.0.1:9/where-nothing-listens")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (toy / "124M" / "hparams.json").write_text("")
    mistakes = {
        "cannot download": lambda: gpt2.main("Twas", 40, "124M", tmp_path / "new"),
        "cannot read": lambda: gpt2.main("Twas", 40, "124M", toy),
        "301 prompt tokens": lambda: gpt2.main("and " * 300, 40, "124M", TOY),
        "n_tokens_to_generate": lambda: gpt2.main("Alan", "Turing"),
    }
    table = README.partition("## Using it")[2]
    messages = re.findall(r"^\| `(.+?)`[ ,]", table, re.MULTILINE)
    for start, mistake in mistakes.items():
        (message,) = [message for message in messages if message.startswith(start)]
        with pytest.raises(ValueError) as caught:
            mistake()
        assert re.match(re.escape(message).replace(r"\.\.\.", ".*"), str(caught.value))
