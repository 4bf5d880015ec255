"""The forward pass and greedy generation against definitions and the textbook; no TensorFlow.

Begin here, and with test_encoder.py: these two specify GPT-2. The other tests are about files, the
network and the command line.
"""

import copy
import math
import pathlib
import runpy
import time

import numpy as np
import pytest
from conftest import run
from random_weights import random_params
from textbook import textbook_gpt2

import gpt2

SHAPES = [  # n_vocab, n_ctx, n_embd, n_layer, n_head, n_seq
    (11, 8, 4, 1, 1, 8),
    (50, 16, 12, 2, 3, 1),
    (97, 32, 24, 3, 4, 20),
    (64, 160, 16, 2, 2, 150),
]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def small():
    """params, n_head and token ids of a small random model."""
    ids = np.random.default_rng(1).integers(0, 97, 280).tolist()
    return random_params(97, 300, 24, 3), 4, ids


def greedy(logits_of, ids, n):
    """n new ids, each the most likely one by logits_of(ids)[-1], without a cache."""
    new = []
    for _ in range(n):
        new.append(int(np.argmax(logits_of([*ids, *new])[-1])))
    return new


def test_gelu_is_about_x_times_the_probability_of_a_smaller_normal_number():
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    expected = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.tolist()]
    np.testing.assert_allclose(gpt2.gelu(x), expected, atol=5e-4)


def test_softmax_does_not_overflow_and_takes_each_row_for_itself():
    rows = np.array([[1e4, 1e4, -1e10], [2, 2, -1e10], [-1e4, -1e4, -1e10]], np.float32)
    np.testing.assert_allclose(gpt2.softmax(rows), [[0.5, 0.5, 0]] * 3)


@pytest.mark.parametrize(("scale", "options"), [(1, {"eps": 3.0}), (1e-3, {})])
def test_layer_norm_adds_eps_to_the_variance(scale, options):
    x = scale * np.array([[-1.0, 1.0]])
    expected = x / np.sqrt(scale**2 + options.get("eps", 1e-5))
    np.testing.assert_allclose(gpt2.layer_norm(x, np.ones(2), np.zeros(2), **options), expected)


def test_attention_weighs_values_by_scaled_products_of_queries_and_keys():
    q, k, v = normal(2, 4), normal(3, 4, seed=1), normal(3, 5, seed=2)
    weights = np.array([[math.exp(a @ b / math.sqrt(4)) for b in k] for a in q])
    expected = weights @ v / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(gpt2.attention(q, k, v, np.zeros((2, 3))), expected, rtol=1e-5)


@pytest.mark.parametrize(("n_vocab", "n_ctx", "n_embd", "n_layer", "n_head", "n_seq"), SHAPES)
def test_logits_are_the_textbooks(n_vocab, n_ctx, n_embd, n_layer, n_head, n_seq):
    params = random_params(n_vocab, n_ctx, n_embd, n_layer)
    inputs = np.random.default_rng(2).integers(0, n_vocab, n_seq).tolist()
    logits = gpt2.gpt2(inputs, **params, n_head=n_head)
    assert logits.shape == (n_seq, n_vocab)
    np.testing.assert_allclose(logits, textbook_gpt2(inputs, params, n_head), atol=1e-4)


def test_a_later_token_changes_no_earlier_logit(small):
    params, n_head, ids = small
    before, after = (gpt2.gpt2([*ids[:20], last], **params, n_head=n_head) for last in (3, 4))
    np.testing.assert_array_equal(before[:20], after[:20])
    assert not np.array_equal(before[20], after[20])


def test_everything_is_float32(small, monkeypatch):
    params, n_head, ids = small
    seen = []

    def spy_on(function):
        def spy(*args, **kwargs):
            seen.append(function(*args, **kwargs))
            return seen[-1]

        return spy

    blocks = ("gelu", "softmax", "layer_norm", "linear", "ffn", "attention", "mha")
    for name in (*blocks, "transformer_block", "gpt2"):
        monkeypatch.setattr(gpt2, name, spy_on(getattr(gpt2, name)))
    gpt2.gpt2(ids, **params, n_head=n_head)
    gpt2.generate(ids, params, n_head, 2)
    assert len(seen) > 100
    assert {value.dtype for value in seen} == {np.dtype("float32")}


@pytest.mark.parametrize("n_seq", [1, 5, 20])
def test_generated_tokens_are_the_textbooks_most_likely(small, n_seq):
    params, n_head, ids = small
    expected = greedy(lambda ids: textbook_gpt2(ids, params, n_head), ids[:n_seq], 6)
    assert gpt2.generate(ids[:n_seq], params, n_head, 6) == expected


@pytest.mark.parametrize("n_seq", [6, 7, 8, 50])
def test_a_prompt_in_pieces_gives_the_tokens_of_one_taken_whole(small, n_seq, monkeypatch):
    monkeypatch.setattr(gpt2, "PREFILL_PIECE", 7)
    params, n_head, ids = small
    expected = greedy(lambda ids: gpt2.gpt2(ids, **params, n_head=n_head), ids[:n_seq], 10)
    assert gpt2.generate(ids[:n_seq], params, n_head, 10) == expected


def test_cached_logits_are_the_uncached_ones(small):
    params, n_head, ids = small
    kvcache = np.empty((3, 2, n_head, 50, 6), np.float32)
    gpt2.gpt2(ids[:30], **params, n_head=n_head, kvcache=kvcache)
    last = gpt2.gpt2(ids[30:50], **params, n_head=n_head, kvcache=kvcache, n_past=30)
    assert last.shape == (1, 97)
    np.testing.assert_allclose(last[0], gpt2.gpt2(ids[:50], **params, n_head=n_head)[-1], atol=1e-5)


def test_a_cache_must_have_a_part_for_each_layer(small):
    params, n_head, ids = small
    with pytest.raises(ValueError, match="zip"):
        gpt2.gpt2(ids[:3], **params, n_head=n_head, kvcache=np.empty((2, 2, 4, 3, 6), np.float32))


def test_the_prompt_runs_in_pieces_and_then_only_the_newest_token(small, monkeypatch):
    """And no token runs before somebody asks for the next one."""
    params, n_head, ids = small
    model = gpt2.gpt2
    rows = []

    def spy(inputs, **options):
        rows.append(len(inputs))
        return model(inputs, **options)

    monkeypatch.setattr(gpt2, "gpt2", spy)
    new = gpt2.stream(ids, params, n_head, 4)
    assert rows == []
    first = next(new)
    prompt = [gpt2.PREFILL_PIECE, len(ids) - gpt2.PREFILL_PIECE]
    assert rows == prompt
    next(new)
    assert rows == [*prompt, 1]
    assert [first, *gpt2.stream([*ids, first], params, n_head, 3)] == gpt2.generate(
        ids, params, n_head, 4
    )


def test_a_slow_new_token_draws_no_bar_over_the_text(small, monkeypatch, capsys):
    """The bar of the prompt appears after a second, and only before the first new token."""
    params, n_head, ids = small
    gelu = gpt2.gelu

    def slow_gelu(x):
        time.sleep(0.4)  # in each of three layers
        return gelu(x)

    new = gpt2.stream(ids[:3], params, n_head, 2)
    next(new)
    monkeypatch.setattr(gpt2, "gelu", slow_gelu)
    next(new)
    assert capsys.readouterr().err == ""


def test_the_lowest_id_wins_a_tie():
    params = random_params(20, 8, 4, 1)
    params["wte"][:] = params["wte"][0]
    assert gpt2.generate([5], params, 1, 3) == [0, 0, 0]


def test_generate_returns_ints_and_changes_neither_inputs_nor_weights(small):
    params, n_head, ids = small
    inputs, before = ids[:4], copy.deepcopy(params)
    new = gpt2.generate(inputs, params, n_head, 3)
    assert inputs == ids[:4]
    assert [type(i) for i in new] == [int, int, int]
    np.testing.assert_equal(params, before)


def test_the_whole_context_may_be_used_and_no_token_more(small):
    params, n_head, ids = small
    assert len(gpt2.generate(ids[:100], params, n_head, 200)) == 200
    with pytest.raises(IndexError, match="300"):  # the last new token needs no position
        gpt2.generate(ids[:102], params, n_head, 200)
    with pytest.raises(IndexError, match="300"):
        gpt2.gpt2([7] * 301, **params, n_head=n_head)


def test_the_model_needs_numpy_and_tqdm_alone():
    """As in a notebook of somebody who has copied gpt2.py."""
    code = (
        "import sys\n"
        "for name in 'encoder fire jax regex requests tensorflow utils'.split():\n"
        "    sys.modules[name] = None  # importing it raises ImportError\n"
        "from gpt2 import generate, gpt2\n"
        "sys.path.append('tests')\n"
        "from random_weights import random_params\n"
        "params = random_params(20, 8, 4, 1)\n"
        "print(gpt2([1, 2], **params, n_head=2).shape, len(generate([1, 2], params, 2, 3)))"
    )
    assert run("-c", code).stdout == "(2, 20) 3\n"


def test_with_jax_for_numpy_it_gives_the_same_logits_jits_and_differentiates(small, tmp_path):
    jax = pytest.importorskip("jax")
    _, n_head, ids = small
    params = random_params(97, 20, 24, n_layer=1)
    source = pathlib.Path(gpt2.__file__).read_text(encoding="utf-8")
    assert "import numpy as np" in source
    file = tmp_path / "gpt2_on_jax.py"
    file.write_text(source.replace("import numpy as np", "import jax.numpy as np"))
    on_jax = runpy.run_path(file)["gpt2"]
    jax_params = jax.tree.map(jax.numpy.asarray, params)
    inputs, targets = jax.numpy.asarray(ids[:12]), jax.numpy.asarray(ids[1:13])

    expected = gpt2.gpt2(ids[:12], **params, n_head=n_head)
    jitted = jax.jit(on_jax, static_argnames="n_head")
    for function, tokens in ((on_jax, ids[:12]), (jitted, inputs)):
        logits = function(tokens, **jax_params, n_head=n_head)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, atol=1e-4)

    @jax.jit
    def loss(p):
        scores = jax.nn.log_softmax(on_jax(inputs, **p, n_head=n_head))
        return -scores[jax.numpy.arange(12), targets].mean()

    gradient = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(jax_params))
    step = 1e-2  # of this length, against the gradient, lowers the loss by step times its norm
    norm = sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)) ** 0.5
    lower = loss(jax.tree.map(lambda p, g: p - step / norm * g, params, gradient))
    assert lower - loss(jax_params) == pytest.approx(-step * norm, rel=0.1)
