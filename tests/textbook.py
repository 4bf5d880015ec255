"""GPT-2 as a textbook would write it: plain loops and float64, no cache.

The simplest file of the project. It shares no code with gpt2.py and utils.py, and the tests check
those against it.

The tree of params, with all shapes, is in the docstring of gpt2.gpt2. A linear layer is a dict
{"w": weights, "b": bias}, a layer norm is {"g": gain, "b": bias}. So if c_fc is a linear layer,
textbook_linear(row, **c_fc) means textbook_linear(row, w=c_fc["w"], b=c_fc["b"]).
"""

import math

import numpy as np


def textbook_gpt2(inputs, params, n_head):
    """Token ids [n_seq] -> logits, float64 [n_seq, n_vocab]."""
    params = to_float64(params)
    rows = [params["wte"][token] + params["wpe"][position] for position, token in enumerate(inputs)]
    for block in params["blocks"]:
        rows = textbook_block(rows, block, n_head)
    rows = [textbook_layer_norm(row, **params["ln_f"]) for row in rows]
    return np.array([params["wte"] @ row for row in rows])


def textbook_block(rows, block, n_head):
    """One layer: attention, then the feed-forward network, for each row [n_embd]."""
    queries, keys, values = [], [], []
    for row in rows:
        qkv = textbook_linear(textbook_layer_norm(row, **block["ln_1"]), **block["attn"]["c_attn"])
        q, k, v = np.split(qkv, 3)
        queries.append(q)
        keys.append(k)
        values.append(v)
    outputs = []
    for i, row in enumerate(rows):
        # no token sees a later one; gpt2.py does this with a mask
        heads = textbook_attention(queries[i], keys[: i + 1], values[: i + 1], n_head)
        # residual connection: add to the row, instead of replacing it
        row = row + textbook_linear(heads, **block["attn"]["c_proj"])
        # feed-forward network: project up, GELU, project back down
        hidden = textbook_linear(textbook_layer_norm(row, **block["ln_2"]), **block["mlp"]["c_fc"])
        hidden = np.array([textbook_gelu(value) for value in hidden])
        outputs.append(row + textbook_linear(hidden, **block["mlp"]["c_proj"]))
    return outputs


def textbook_attention(query, keys, values, n_head):
    """For each head, average the values, weighted by softmax; then concatenate: [n_embd]."""
    d = len(query) // n_head
    heads = []
    for head in range(n_head):
        part = slice(head * d, (head + 1) * d)
        # divided by sqrt(d), since a sum of d products becomes larger with d
        scores = [query[part] @ key[part] / math.sqrt(d) for key in keys]
        weights = textbook_softmax(scores)
        heads.append(sum(w * value[part] for w, value in zip(weights, values, strict=True)))
    return np.concatenate(heads)


def textbook_softmax(scores):
    """A list of numbers -> a list of positive numbers whose sum is 1."""
    exps = [math.exp(score) for score in scores]
    return [exp / sum(exps) for exp in exps]


def textbook_linear(row, w, b):
    """row [n_in], w [n_in, n_out], b [n_out] -> [n_out]."""
    return row @ w + b


def textbook_layer_norm(row, g, b):
    """row [n_embd], g [n_embd], b [n_embd] -> [n_embd]."""
    mean = sum(row) / len(row)
    variance = sum((value - mean) ** 2 for value in row) / len(row)
    return np.array([(value - mean) / math.sqrt(variance + 1e-5) for value in row]) * g + b


def textbook_gelu(a):
    """A number a -> about a times the probability that a standard normal variable is < a."""
    return a / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))


def to_float64(params):
    """Convert all arrays, so that rounding errors here are negligible in a comparison."""
    if isinstance(params, dict):
        return {name: to_float64(value) for name, value in params.items()}
    if isinstance(params, list):
        return [to_float64(value) for value in params]
    return np.asarray(params, np.float64)


# ---- The model ends here. This loads its weights ----------------------------------------------


def textbook_load(prefix, n_layer):
    """Load a TensorFlow checkpoint, such as models/124M/model.ckpt: the params of gpt2.gpt2.

    A variable such as "model/h0/attn/c_attn/w" becomes params["blocks"][0]["attn"]["c_attn"]["w"].
    """
    import tensorflow as tf

    params = {"blocks": [{} for _ in range(n_layer)]}
    for name, _shape in tf.train.list_variables(prefix):
        _model, *path, last = name.split("/")
        group = params
        for key in path:
            is_layer = key.startswith("h")
            group = params["blocks"][int(key[1:])] if is_layer else group.setdefault(key, {})
        array = tf.train.load_variable(prefix, name)
        group[last] = array[0] if last == "w" else array  # OpenAI's w are [1, n_in, n_out]
    return params
