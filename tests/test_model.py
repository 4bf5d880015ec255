"""The model: its building blocks, the forward pass, greedy generation. Begin here.

Every result is held against somebody else's: a definition, the textbook (plain loops in float64),
or transformers (an implementation that nobody here has written).
"""

import copy
import math
import re

import jax
import numpy as np
import pytest
import textbook
from conftest import TOY, random_params, run

import gpt2
from utils import load_encoder_hparams_and_params

N_HEAD = 4


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def to_float64(tree):
    """All arrays as float64, so that the textbook's rounding errors do not count."""
    return jax.tree.map(lambda array: np.asarray(array, np.float64), tree)


@pytest.fixture(scope="module")
def params():
    """A small random model with a vocabulary of 97, a context of 300, and 3 layers."""
    return random_params(97, 300, 24, 3)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(1).integers(0, 97, 280).tolist()


# ---- Building blocks -------------------------------------------------------------------------


def test_softmax_turns_scores_into_probabilities():
    scores = np.log([[1.0, 3.0], [2.0, 2.0]])
    np.testing.assert_allclose(gpt2.softmax(scores), [[1 / 4, 3 / 4], [1 / 2, 1 / 2]])


def test_softmax_does_not_overflow_and_looks_at_each_row_for_itself():
    rows = np.array([[1e4, 1e4, -1e10], [2, 2, -1e10], [-1e4, -1e4, -1e10]], np.float32)
    np.testing.assert_allclose(gpt2.softmax(rows), [[0.5, 0.5, 0]] * 3)


def test_gelu_is_about_x_times_the_probability_of_a_smaller_normal_number():
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    expected = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.tolist()]
    np.testing.assert_allclose(gpt2.gelu(x), expected, atol=5e-4)


def test_gelu_is_the_tanh_approximation():
    """As printed by PyTorch for gelu(x, approximate="tanh")."""
    x = np.array([-3, -1, -0.5, 0.5, 1, 3])
    expected = [-0.00363739, -0.15880801, -0.15428599, 0.34571401, 0.84119199, 2.99636261]
    np.testing.assert_allclose(gpt2.gelu(x), expected, atol=1e-8)


def test_layer_norm_gives_each_row_mean_0_and_variance_1():
    rows = np.array([[5], [0.1]]) * normal(2, 1000) + np.array([[3], [-8]])
    rows = gpt2.layer_norm(rows, g=np.ones(1000), b=np.zeros(1000))
    np.testing.assert_allclose(rows.mean(axis=-1), [0, 0], atol=1e-4)
    np.testing.assert_allclose(rows.var(axis=-1), [1, 1], atol=2e-3)  # eps makes it a bit smaller


def test_layer_norm_scales_each_number_by_g_and_shifts_it_by_b():
    g, b = normal(6, seed=1), normal(6, seed=2)
    plain = gpt2.layer_norm(normal(3, 6), np.ones(6), np.zeros(6))
    np.testing.assert_allclose(gpt2.layer_norm(normal(3, 6), g, b), g * plain + b, rtol=1e-5)


@pytest.mark.parametrize(("scale", "options"), [(1, {"eps": 3.0}), (1e-3, {})])
def test_layer_norm_adds_eps_to_the_variance(scale, options):
    x = scale * np.array([[-1.0, 1.0]])
    expected = x / np.sqrt(scale**2 + options.get("eps", 1e-5))
    np.testing.assert_allclose(gpt2.layer_norm(x, np.ones(2), np.zeros(2), **options), expected)


def test_attention_averages_values_by_scaled_products_of_queries_and_keys():
    q, k, v = normal(2, 4), normal(3, 4, seed=1), normal(3, 5, seed=2)
    weights = np.array([[math.exp(a @ b / math.sqrt(4)) for b in k] for a in q])
    expected = weights @ v / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(gpt2.attention(q, k, v, np.zeros((2, 3))), expected, rtol=1e-5)


def test_attention_does_not_see_a_key_that_the_mask_hides():
    q, k, v = normal(2, 4), normal(3, 4, seed=1), normal(3, 5, seed=2)
    hidden = gpt2.attention(q, k, v, np.array([0, -1e10, 0]))
    without = gpt2.attention(q, k[[0, 2]], v[[0, 2]], np.zeros(2))
    np.testing.assert_allclose(hidden, without, rtol=1e-6)


# ---- The forward pass ------------------------------------------------------------------------


def test_mha_agrees_with_the_textbook(params):
    attn = params["blocks"][0]["attn"]
    x = normal(20, 24)
    expected = textbook.mha(to_float64(x), **to_float64(attn), n_head=N_HEAD)
    np.testing.assert_allclose(gpt2.mha(x, **attn, n_head=N_HEAD), expected, atol=1e-4)


def test_a_transformer_block_agrees_with_the_textbook(params):
    block = params["blocks"][0]
    x = normal(20, 24)
    expected = textbook.transformer_block(to_float64(x), **to_float64(block), n_head=N_HEAD)
    result = gpt2.transformer_block(x, **block, n_head=N_HEAD)
    np.testing.assert_allclose(result, expected, atol=1e-4)


def test_a_later_token_changes_no_earlier_logit(params, ids):
    before, after = (gpt2.gpt2([*ids[:20], last], **params, n_head=N_HEAD) for last in (3, 4))
    np.testing.assert_allclose(before[:20], after[:20], atol=1e-6)
    assert not np.array_equal(before[20], after[20])


@pytest.mark.parametrize(
    ("n_vocab", "n_ctx", "n_embd", "n_layer", "n_head", "n_seq"),
    [(11, 8, 4, 1, 1, 8), (50, 16, 12, 2, 3, 1), (97, 32, 24, 3, 4, 20), (64, 160, 16, 2, 2, 90)],
)
def test_the_logits_agree_with_the_textbook(n_vocab, n_ctx, n_embd, n_layer, n_head, n_seq):
    params = random_params(n_vocab, n_ctx, n_embd, n_layer)
    inputs = np.random.default_rng(2).integers(0, n_vocab, n_seq).tolist()
    logits = gpt2.gpt2(inputs, **params, n_head=n_head)
    assert logits.shape == (n_seq, n_vocab)
    expected = textbook.gpt2(inputs, **to_float64(params), n_head=n_head)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.fixture(scope="module")
def toy_params():
    _encoder, _hparams, params = load_encoder_hparams_and_params("124M", TOY)
    return to_float64(params)


# What transformers computes with the toy: tests/tools/witness.py prints it. Columns: every 64th id.
TRANSFORMERS_LOGITS = {
    0: [0.4124, 0.4183, -2.2335, -1.6065, -0.4191, -4.2933, 0.1126, -2.4435],
    99: [3.221, -0.399, -4.2531, -1.9118, -1.5013, -0.8561, -2.6637, -4.4451],
    199: [0.4341, -0.2312, -2.537, -1.0586, 0.3436, 1.7442, -1.7518, -2.7296],
}
TRANSFORMERS_TOKENS = [6, 363, 368, 11, 276, 259, 371, 372, 198, 374, 376, 276, 378, 278, 259, 379]
TRANSFORMERS_TOKENS += [25, 198, 380, 383, 384, 259, 389, 11, 198, 271, 259, 390, 394, 399, 13, 198]
TRANSFORMERS_TOKENS += [198, 1, 320, 259, 304, 11, 305, 401]


@pytest.mark.parametrize("position", TRANSFORMERS_LOGITS)
@pytest.mark.parametrize("model", [gpt2, textbook])
def test_the_logits_are_those_of_transformers(toy_params, model, position):
    """The layout q | k | v, the order of the heads, GELU's form and eps all show here."""
    inputs = [i * 7 % 512 for i in range(position + 1)]
    logits = model.gpt2(inputs, **toy_params, n_head=4)
    np.testing.assert_allclose(logits[-1][::64], TRANSFORMERS_LOGITS[position], atol=1e-4)


def test_the_greedy_tokens_are_those_of_transformers(toy_params):
    assert gpt2.generate([511], toy_params, 4, 40) == TRANSFORMERS_TOKENS  # <|endoftext|>


def test_the_textbook_shows_how_the_toy_continues_a_line():
    done = run("tests/textbook.py")
    assert (done.returncode, done.stderr) == (0, "")
    rows = done.stdout.splitlines()[-5:]
    appended = [re.match(r"\d\.\d{3} '(.+?)' ", row)[1] for row in rows]
    assert "".join(appended) == " One, two! And"


def test_float32_weights_give_float32_logits(params, ids):
    kvcache = np.empty((3, 2, N_HEAD, 20, 6), np.float32)
    assert gpt2.gpt2(ids[:20], **params, n_head=N_HEAD).dtype == np.float32
    assert gpt2.gpt2(ids[:20], **params, n_head=N_HEAD, kvcache=kvcache).dtype == np.float32


@pytest.mark.parametrize("name", ["layer_norm", "linear", "gelu", "attention", "softmax"])
def test_generation_is_float32_throughout(params, ids, monkeypatch, name):
    """Every array that a building block receives and returns, those from the cache included."""
    function, dtypes = getattr(gpt2, name), set()

    def recorder(*arrays, **more_arrays):
        result = function(*arrays, **more_arrays)
        dtypes.update(array.dtype for array in (*arrays, *more_arrays.values(), result))
        return result

    monkeypatch.setattr(gpt2, name, recorder)
    gpt2.generate(ids[:9], params, N_HEAD, 2)
    assert dtypes == {np.dtype("float32")}


def test_more_tokens_than_the_context_raise_indexerror(params):
    with pytest.raises(IndexError, match="300"):
        gpt2.gpt2([7] * 301, **params, n_head=N_HEAD)


def test_an_id_outside_the_vocabulary_raises_indexerror(params):
    with pytest.raises(IndexError, match="97"):
        gpt2.gpt2([97], **params, n_head=N_HEAD)


# ---- Greedy generation -----------------------------------------------------------------------


@pytest.mark.parametrize("n_seq", [1, 5, 20])
def test_the_generated_tokens_are_those_of_the_textbook(params, ids, n_seq):
    expected = textbook.generate(ids[:n_seq], to_float64(params), N_HEAD, 6)
    assert gpt2.generate(ids[:n_seq], params, N_HEAD, 6) == expected


def test_generated_ids_are_ints(params, ids):
    assert [type(i) for i in gpt2.generate(ids[:4], params, N_HEAD, 3)] == [int, int, int]


def test_generation_leaves_its_arguments_unchanged(params, ids):
    inputs, before = ids[:4], copy.deepcopy(params)
    gpt2.generate(inputs, params, N_HEAD, 3)
    assert inputs == ids[:4]
    np.testing.assert_equal(params, before)


def test_the_lowest_id_wins_a_tie():
    params = random_params(20, 8, 4, 1)
    params["wte"][:] = params["wte"][0]
    assert gpt2.generate([5], params, 1, 3) == [0, 0, 0]


def test_each_token_is_yielded_before_the_next_is_computed(params, ids):
    """The context has room for one token only; the next one would fail."""
    new = gpt2.stream((ids + ids)[:300], params, N_HEAD, 2)
    assert isinstance(next(new), int)
    with pytest.raises(IndexError, match="300"):
        next(new)


def test_the_whole_context_can_be_used(params, ids):
    """The last new token needs no position of its own."""
    assert len(gpt2.generate(ids[:101], params, N_HEAD, 200)) == 200


def test_no_token_at_all_raises_valueerror(params):
    with pytest.raises(ValueError, match="unpack"):
        gpt2.generate([], params, N_HEAD, 3)


def test_cached_logits_equal_uncached_logits(params, ids):
    kvcache = np.empty((3, 2, N_HEAD, 50, 6), np.float32)
    gpt2.gpt2(ids[:30], **params, n_head=N_HEAD, kvcache=kvcache)
    cached = gpt2.gpt2(ids[30:50], **params, n_head=N_HEAD, kvcache=kvcache, n_past=30)
    assert cached.shape == (20, 97)
    expected = gpt2.gpt2(ids[:50], **params, n_head=N_HEAD)[30:]
    np.testing.assert_allclose(cached, expected, atol=1e-5)


@pytest.mark.parametrize("n_seq", [1, 2, 7, 8, 9, 15, 50])
def test_a_prompt_in_chunks_gives_the_same_tokens(params, ids, n_seq, monkeypatch):
    monkeypatch.setattr(gpt2, "CHUNK", 7)
    expected = []
    for _ in range(5):
        logits = gpt2.gpt2(ids[:n_seq] + expected, **params, n_head=N_HEAD)
        expected.append(int(logits[-1].argmax()))
    assert gpt2.generate(ids[:n_seq], params, N_HEAD, 5) == expected


def test_the_model_needs_numpy_and_tqdm_alone():
    """As for somebody who has copied gpt2.py into a notebook."""
    code = (
        "import sys\n"
        "for name in 'encoder fire jax regex requests tensorflow utils'.split():\n"
        "    sys.modules[name] = None  # importing it raises ImportError\n"
        "import gpt2\n"
        "print(gpt2.softmax(gpt2.np.zeros(2)))"
    )
    assert run("-c", code).stdout == "[0.5 0.5]\n"


def test_jax_in_place_of_numpy_gives_the_same_logits(params, ids, monkeypatch):
    expected = gpt2.gpt2(ids[:12], **params, n_head=N_HEAD)
    monkeypatch.setattr(gpt2, "np", jax.numpy)
    jax_params, jax_ids = jax.tree.map(jax.numpy.asarray, (params, ids[:12]))
    logits = jax.jit(gpt2.gpt2, static_argnames="n_head")(jax_ids, **jax_params, n_head=N_HEAD)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4)
