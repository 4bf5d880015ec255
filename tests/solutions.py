"""Solutions of the README's exercises: `python tests/solutions.py` prints the answers.

Each function is one exercise, as a reader would write it, and returns what the README says. The
last one needs JAX. All of them take a few seconds.
"""

import pathlib
import sys

import numpy as np

TESTS = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

import gpt2
from utils import load_encoder_hparams_and_params

N_HEAD = 4


def load_toy():
    """The encoder and a fresh copy of the weights, which an exercise may change."""
    encoder, _hparams, params = load_encoder_hparams_and_params("124M", TESTS / "toy")
    return encoder, params


def poem_ids():
    encoder, _params = load_toy()
    return encoder.encode((TESTS / "toy/poem.txt").read_text("utf-8"))


# ---- Exercise 1: the loss --------------------------------------------------------------------


def loss(ids, params):
    """The mean of -log(the probability of the token that comes next)."""
    logits = gpt2.gpt2(ids[:-1], **params, n_head=N_HEAD)  # [n_seq - 1, n_vocab]
    probabilities = gpt2.softmax(logits)
    of_the_next = probabilities[np.arange(len(ids) - 1), ids[1:]]  # one of each row
    return float(-np.mean(np.log(of_the_next)))


def losses():
    """The loss of the poem that the toy knows, and of a sentence that it does not know."""
    encoder, params = load_toy()
    other = encoder.encode("The quick brown fox jumps over the lazy dog.")
    return loss(poem_ids(), params), loss(other, params)


# ---- Exercise 2: the heads -------------------------------------------------------------------


def losses_without_a_head():
    """The loss of the poem without each of the heads: [n_layer, n_head]."""
    results = np.zeros([3, N_HEAD])
    for layer in range(3):
        for head in range(N_HEAD):
            _encoder, params = load_toy()
            rows = slice(12 * head, 12 * (head + 1))  # 12 = n_embd / n_head
            params["blocks"][layer]["attn"]["c_proj"]["w"][rows] = 0
            results[layer, head] = loss(poem_ids(), params)
    return results


# ---- Exercise 3: sampling --------------------------------------------------------------------


def sample(ids, params, n, temperature, k, seed):
    """Like gpt2.stream, but draw each token instead of taking the most likely one."""
    rng = np.random.default_rng(seed)
    new = []
    for _ in range(n):
        logits = gpt2.gpt2(ids + new, **params, n_head=N_HEAD)[-1] / temperature
        logits[logits < np.sort(logits)[-k]] = -np.inf  # keep the k largest
        new.append(int(rng.choice(len(logits), p=gpt2.softmax(logits))))
    return new


def how_many_recite(k):
    """How many of 12 runs at a temperature of 1.5 go on with the poem for 40 tokens."""
    encoder, params = load_toy()
    ids = encoder.encode("Twas brillig, and the slithy")
    poem = list(gpt2.stream(ids, params, N_HEAD, 40))
    return sum(sample(ids, params, 40, 1.5, k, seed) == poem for seed in range(12))


# ---- Exercise 4: gradients -------------------------------------------------------------------


def losses_before_and_after_a_step():
    """Take one small step against the gradient, for the sentence that the toy does not know."""
    import jax

    encoder, params = load_toy()
    ids = np.array(encoder.encode("The quick brown fox jumps over the lazy dog."))
    gpt2.np = jax.numpy  # from here on, gpt2.py computes with JAX

    def jax_loss(params):
        probabilities = gpt2.softmax(gpt2.gpt2(ids[:-1], **params, n_head=N_HEAD))
        return -jax.numpy.log(probabilities[np.arange(len(ids) - 1), ids[1:]]).mean()

    try:
        gradient = jax.grad(jax_loss)(params)
    finally:
        gpt2.np = np
    stepped = jax.tree.map(lambda w, g: np.asarray(w - 0.01 * g), params, gradient)
    return loss(ids, params), loss(ids, stepped)


if __name__ == "__main__":
    of_poem, of_other = losses()
    print(f"1. loss of the poem: {of_poem:.3f}, of another sentence: {of_other:.1f}")
    print("2. mean loss without a head, by layer:", losses_without_a_head().mean(1).round(2))
    for k in (512, 5):
        print(f"3. of 12 runs, with k = {k}, recite 40 tokens:", how_many_recite(k))
    before, after = losses_before_and_after_a_step()
    print(f"4. loss before a step: {before:.1f}, after it: {after:.1f}")
