"""Train the toy of tests/toy: `python tests/tools/train_toy.py`, 3 to 4 minutes on 2 cores.

It is a GPT-2 of 3 small layers that learns one poem by heart. Its vocabulary of 512 tokens is
learned from the poem, too. What is trained is the model of gpt2.py itself, with JAX in place of
NumPy, because JAX can differentiate it. TensorFlow saves the weights as OpenAI did: the same seven
files, the same names and shapes. Needs tests/requirements.txt.
"""

import itertools
import json
import os
import pathlib
import sys
import time
from collections import Counter

import jax
import numpy as np
from jax.example_libraries import optimizers

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import gpt2
import utils
from encoder import PATTERN, Encoder, bytes_to_unicode

# Lewis Carroll, 1871, without the last stanza: it repeats the first one, so the line after it would
# not follow from the lines before.
POEM = (ROOT / "tests/toy/poem.txt").read_text("utf-8")
HPARAMS = {"n_vocab": 512, "n_ctx": 256, "n_embd": 48, "n_head": 4, "n_layer": 3}
STEPS, BATCH, SEED = 600, 16, 1871


def learn_merges(text, n_merges):
    """Learn a byte-pair encoding: repeatedly merge the most frequent pair (the first on ties)."""
    symbols = bytes_to_unicode()
    words = [[symbols[byte] for byte in word.encode()] for word in PATTERN.findall(text)]
    merges = []
    while len(merges) < n_merges:
        counts = Counter(pair for word in words for pair in itertools.pairwise(word))
        pair = max(counts, key=counts.get)
        merges.append(pair)
        for word in words:
            for i in range(len(word) - 1):
                if tuple(word[i : i + 2]) == pair:
                    word[i : i + 2] = ["".join(pair)]
    return merges


def logits(weights, ids):
    """Token ids [n_seq] -> logits [n_seq, n_vocab]. weights: {name: array} of the checkpoint."""
    params = utils.nest(weights, HPARAMS["n_layer"])
    return gpt2.gpt2(ids, **params, n_head=HPARAMS["n_head"])


def loss(weights, ids):
    """The mean of -log(the probability of the token that comes next). ids: [n_seq + 1]."""
    probabilities = gpt2.softmax(logits(weights, ids[:-1]))
    return -jax.numpy.log(probabilities[np.arange(len(ids) - 1), ids[1:]]).mean()


def batch_loss(weights, windows):
    """The mean loss of several windows of the poem. windows: [BATCH, n_seq + 1]."""
    return jax.vmap(loss, in_axes=(None, 0))(weights, windows).mean()


def train(windows, rng):
    """Minimize the loss with Adam, on BATCH random windows at each step. Returns the weights."""
    start, update, weights_of = optimizers.adam(optimizers.polynomial_decay(3e-3, STEPS, 0.0))

    @jax.jit
    def train_step(i, state, batch):
        value, gradient = jax.value_and_grad(batch_loss)(weights_of(state), batch)
        return value, update(i, gradient, state)

    shapes = sorted(utils.weight_shapes(HPARAMS).items())
    weights = {name: rng.normal(0, 0.1, shape) for name, shape in shapes}
    state = start({name: np.float32(w + name.endswith("/g")) for name, w in weights.items()})
    for i in range(STEPS):
        value, state = train_step(i, state, rng.choice(windows, BATCH))
        if i % 50 == 0 or i == STEPS - 1:
            print(f"step {i}: loss {value:.5f}", flush=True)
    return weights_of(state)


def narrowest_margin(weights, windows):
    """How far the right token's logit is ahead of the next best, wherever 8 tokens are given."""
    scores = np.array(jax.lax.map(lambda ids: logits(weights, ids[:-1]), windows))[:, 8:]
    right = np.take_along_axis(scores, windows[:, 9:, None], -1)
    np.put_along_axis(scores, windows[:, 9:, None], -np.inf, -1)
    return np.min(right[..., 0] - scores.max(-1))


def save(weights, folder):
    """Write the four files of a checkpoint with TensorFlow's Saver."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, array in weights.items():
            value = np.asarray(array)[None] if name.endswith("/w") else np.asarray(array)
            variable = tf.compat.v1.get_variable(name, value.shape)
            session.run(variable.initializer, {variable.initializer.inputs[1]: value})
        saver = tf.compat.v1.train.Saver(save_relative_paths=True)
        saver.save(session, str(folder / "model.ckpt"))


def main(folder=ROOT / "tests/toy/124M"):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(POEM, HPARAMS["n_vocab"] - 257)
    tokens = [*bytes_to_unicode().values(), *map("".join, merges), "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "vocab.bpe").write_bytes("\n".join(lines).encode())
    (folder / "encoder.json").write_text(json.dumps(vocabulary))
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))

    ids = [vocabulary["<|endoftext|>"], *Encoder(vocabulary, merges).encode(POEM)]
    # row i: the poem from its token i on, and from the start again after its end
    n_seq = HPARAMS["n_ctx"]
    windows = np.array([np.resize(np.roll(ids, -i), n_seq + 1) for i in range(len(ids))])

    gpt2.np = jax.numpy  # from here on, gpt2.py runs on JAX
    start = time.time()
    weights = train(windows, np.random.default_rng(SEED))
    print(f"{time.time() - start:.0f} s; narrowest margin {narrowest_margin(weights, windows):.2f}")
    save(weights, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
