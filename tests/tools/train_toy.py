"""Train the toy GPT-2 of tests/models/124M: `python tests/train_toy.py`, 3 minutes on 2 cores.

It learns one poem by heart, with TensorFlow, and is saved as OpenAI saved GPT-2: the same seven
files, the same names and shapes of variables, but 3 small layers and a vocabulary of 512 tokens,
which is learned from the poem as well.
"""

import itertools
import json
import os
import sys
from collections import Counter

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from encoder import PATTERN, Encoder, bytes_to_unicode

# Lewis Carroll, 1871, without the last stanza: it repeats the first, and what follows a line would
# no longer be certain.
POEM = """'Twas brillig, and the slithy toves
Did gyre and gimble in the wabe:
All mimsy were the borogoves,
And the mome raths outgrabe.

"Beware the Jabberwock, my son!
The jaws that bite, the claws that catch!
Beware the Jubjub bird, and shun
The frumious Bandersnatch!"

He took his vorpal sword in hand;
Long time the manxome foe he sought-
So rested he by the Tumtum tree
And stood awhile in thought.

And, as in uffish thought he stood,
The Jabberwock, with eyes of flame,
Came whiffling through the tulgey wood,
And burbled as it came!

One, two! One, two! And through and through
The vorpal blade went snicker-snack!
He left it dead, and with its head
He went galumphing back.

"And hast thou slain the Jabberwock?
Come to my arms, my beamish boy!
O frabjous day! Callooh! Callay!"
He chortled in his joy.
"""
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


def forward(ids, n_vocab, n_ctx, n_embd, n_head, n_layer):
    """GPT-2 in TensorFlow, with its variables: ids [batch, n_seq] -> [batch, n_seq, n_vocab]."""
    n_seq = ids.shape[1]
    variable = tf.compat.v1.get_variable
    normal = tf.compat.v1.initializers.random_normal(stddev=0.1)
    zeros, ones = tf.zeros_initializer(), tf.ones_initializer()

    def norm(x, name):
        with tf.compat.v1.variable_scope(name):
            mean, variance = tf.nn.moments(x, axes=[-1], keepdims=True)
            g, b = (
                variable("g", [n_embd], initializer=ones),
                variable("b", [n_embd], initializer=zeros),
            )
            return g * (x - mean) * tf.math.rsqrt(variance + 1e-5) + b

    def linear(x, name, n_out):
        with tf.compat.v1.variable_scope(name):
            w = variable("w", [1, x.shape[-1], n_out], initializer=normal)
            return tf.einsum("bsi,ij->bsj", x, w[0]) + variable("b", [n_out], initializer=zeros)

    def heads(x):
        return tf.reshape(x, [-1, n_seq, n_head, n_embd // n_head])

    with tf.compat.v1.variable_scope("model"):
        wpe = variable("wpe", [n_ctx, n_embd], initializer=normal)
        wte = variable("wte", [n_vocab, n_embd], initializer=normal)
        x = tf.gather(wte, ids) + wpe[:n_seq]
        future = tf.constant(np.triu(np.full([n_seq, n_seq], -1e10, np.float32), 1))
        for i in range(n_layer):
            with tf.compat.v1.variable_scope(f"h{i}"):
                y = norm(x, "ln_1")
                q, k, v = map(heads, tf.split(linear(y, "attn/c_attn", 3 * n_embd), 3, axis=-1))
                scores = tf.einsum("bqhd,bkhd->bhqk", q, k) / np.float32(np.sqrt(n_embd // n_head))
                y = tf.einsum("bhqk,bkhd->bqhd", tf.nn.softmax(scores + future), v)
                x += linear(tf.reshape(y, [-1, n_seq, n_embd]), "attn/c_proj", n_embd)
                y = tf.nn.gelu(linear(norm(x, "ln_2"), "mlp/c_fc", 4 * n_embd), approximate=True)
                x += linear(y, "mlp/c_proj", n_embd)
        return tf.einsum("bsi,vi->bsv", norm(x, "ln_f"), wte)


def main():
    folder = os.path.join(HERE, "models", "124M")
    os.makedirs(folder, exist_ok=True)
    merges = learn_merges(POEM, HPARAMS["n_vocab"] - 257)
    tokens = [*bytes_to_unicode().values(), *map("".join, merges), "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    with open(os.path.join(folder, "encoder.json"), "w", encoding="utf-8") as file:
        json.dump(vocabulary, file)
    with open(os.path.join(folder, "vocab.bpe"), "w", encoding="utf-8") as file:
        file.write("#version: 0.2\n" + "".join(f"{first} {second}\n" for first, second in merges))
    with open(os.path.join(folder, "hparams.json"), "w", encoding="utf-8") as file:
        json.dump(HPARAMS, file)

    lesson = [vocabulary["<|endoftext|>"], *Encoder(vocabulary, merges).encode(POEM)]
    n_seq = HPARAMS["n_ctx"]
    # row i: the poem from its token i on, and from the start again after its end
    windows = np.array([np.resize(np.roll(lesson, -i), n_seq + 1) for i in range(len(lesson))])
    rng = np.random.default_rng(SEED)

    tf.config.experimental.enable_op_determinism()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.set_random_seed(SEED)
        batch = tf.compat.v1.placeholder(tf.int32, [None, n_seq + 1])
        rate = tf.compat.v1.placeholder(tf.float32)
        logits = forward(batch[:, :-1], **HPARAMS)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(batch[:, 1:], logits))
        saver = tf.compat.v1.train.Saver(save_relative_paths=True)
        # the graph is saved here, before it contains Adam's variables
        saver.export_meta_graph(os.path.join(folder, "model.ckpt.meta"))
        train = tf.compat.v1.train.AdamOptimizer(rate).minimize(loss)
        session.run(tf.compat.v1.global_variables_initializer())
        for step in range(STEPS):
            feed = {batch: rng.choice(windows, BATCH), rate: 3e-3 * (1 - step / STEPS)}
            value, _ = session.run([loss, train], feed)
            if step % 50 == 0 or step == STEPS - 1:
                print(f"step {step}: loss {value:.5f}", flush=True)
        saver.save(session, os.path.join(folder, "model.ckpt"), write_meta_graph=False)

        # how far the right token is ahead of the next best, wherever one starts, after 8 tokens
        scores = session.run(logits, {batch: windows})[:, 8:]
        right = np.take_along_axis(scores, windows[:, 9:, None], -1)
        np.put_along_axis(scores, windows[:, 9:, None], -np.inf, -1)
        print(
            f"{len(lesson)} tokens; narrowest margin {np.min(right[..., 0] - scores.max(-1)):.2f}"
        )


if __name__ == "__main__":
    main()
