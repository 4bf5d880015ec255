"""GPT-2 as a textbook would write it: plain loops and float64, no cache, nothing clever.

The plainest page of the project. It shares no code with gpt2.py and encoder.py, and the tests hold
them to its results.
"""

import itertools
import math

import numpy as np


def textbook_gpt2(inputs, params, n_head):
    """Token ids [n_seq] -> logits, float64 [n_seq, n_vocab]."""
    params = to_float64(params)
    rows = [params["wte"][token] + params["wpe"][place] for place, token in enumerate(inputs)]
    for block in params["blocks"]:
        rows = textbook_block(rows, block, n_head)
    return np.array([params["wte"] @ normalized(row, **params["ln_f"]) for row in rows])


def textbook_block(rows, block, n_head):
    """One layer: each row [n_embd] gathers from the rows up to itself, then passes the ffn."""
    queries, keys, values = [], [], []
    for row in rows:
        q, k, v = np.split(linear(normalized(row, **block["ln_1"]), **block["attn"]["c_attn"]), 3)
        queries.append(q)
        keys.append(k)
        values.append(v)
    outputs = []
    for i, row in enumerate(rows):
        heads = gathered(queries[i], keys[: i + 1], values[: i + 1], n_head)
        row = row + linear(heads, **block["attn"]["c_proj"])
        hidden = linear(normalized(row, **block["ln_2"]), **block["mlp"]["c_fc"])
        hidden = np.array([activation(value) for value in hidden])
        outputs.append(row + linear(hidden, **block["mlp"]["c_proj"]))
    return outputs


def gathered(query, keys, values, n_head):
    """The weighted averages of the values, one per head, side by side: [n_embd]."""
    d = len(query) // n_head
    heads = []
    for head in range(n_head):
        part = slice(head * d, (head + 1) * d)
        weights = [math.exp(query[part] @ key[part] / math.sqrt(d)) for key in keys]
        total = sum(weight * value[part] for weight, value in zip(weights, values, strict=True))
        heads.append(total / sum(weights))
    return np.concatenate(heads)


def linear(row, w, b):
    return row @ w + b


def normalized(row, g, b):
    mean = sum(row) / len(row)
    variance = sum((value - mean) ** 2 for value in row) / len(row)
    return np.array([(value - mean) / math.sqrt(variance + 1e-5) for value in row]) * g + b


def activation(a):
    return a / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))


def to_float64(params):
    if isinstance(params, dict):
        return {name: to_float64(value) for name, value in params.items()}
    if isinstance(params, list):
        return [to_float64(value) for value in params]
    return np.asarray(params, np.float64)


def textbook_bpe(word, ranks):
    """Merge the symbols of a word; ranks says in which order the merges were learned."""
    symbols = list(word)
    while True:
        pairs = [pair for pair in itertools.pairwise(symbols) if pair in ranks]
        if not pairs:
            return symbols
        earliest = min(pairs, key=ranks.get)
        merged = []
        for symbol in symbols:
            if merged and (merged[-1], symbol) == earliest:
                merged[-1] += symbol
            else:
                merged.append(symbol)
        symbols = merged


def random_params(n_vocab, n_ctx, n_embd, n_layer, seed=0, scale=0.2):
    """For the tests: random float32 weights in the shape of GPT-2's."""
    rng = np.random.default_rng(seed)

    def normal(*shape, mean=0.0):
        return (mean + scale * rng.standard_normal(shape)).astype(np.float32)

    def norm():
        return {"g": normal(n_embd, mean=1.0), "b": normal(n_embd)}

    def linear(n_in, n_out):
        return {"w": normal(n_in, n_out), "b": normal(n_out)}

    def block():
        attn = {"c_attn": linear(n_embd, 3 * n_embd), "c_proj": linear(n_embd, n_embd)}
        mlp = {"c_fc": linear(n_embd, 4 * n_embd), "c_proj": linear(4 * n_embd, n_embd)}
        return {"ln_1": norm(), "attn": attn, "ln_2": norm(), "mlp": mlp}

    blocks = [block() for _ in range(n_layer)]
    return {
        "wte": normal(n_vocab, n_embd),
        "wpe": normal(n_ctx, n_embd),
        "blocks": blocks,
        "ln_f": norm(),
    }
