"""GPT-2 as the textbooks have it, in float64 and in plain loops; it shares no code with gpt2.py, which has to agree."""

import math

import numpy as np


def normalize(row, g, b):
    mean = sum(row) / len(row)
    variance = sum((value - mean) ** 2 for value in row) / len(row)
    return np.array([(value - mean) / math.sqrt(variance + 1e-5) for value in row]) * g + b


def activation(a):
    return a * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))


def layer(rows, block, n_head):
    d = len(rows[0]) // n_head
    triples = [normalize(row, **block["ln_1"]) @ block["attn"]["c_attn"]["w"] for row in rows]
    queries, keys, values = np.split(np.array(triples) + block["attn"]["c_attn"]["b"], 3, axis=1)
    outputs = []
    for i, row in enumerate(rows):
        mixed = []
        for head in range(n_head):
            part = slice(head * d, (head + 1) * d)
            weights = [math.exp(queries[i, part] @ keys[j, part] / math.sqrt(d)) for j in range(i + 1)]
            mixed += list(sum(w * values[j, part] for j, w in enumerate(weights)) / sum(weights))
        row = row + mixed @ block["attn"]["c_proj"]["w"] + block["attn"]["c_proj"]["b"]
        hidden = normalize(row, **block["ln_2"]) @ block["mlp"]["c_fc"]["w"] + block["mlp"]["c_fc"]["b"]
        hidden = np.array([activation(value) for value in hidden])
        outputs.append(row + hidden @ block["mlp"]["c_proj"]["w"] + block["mlp"]["c_proj"]["b"])
    return outputs


def textbook_gpt2(inputs, params, n_head):
    """Token ids -> logits, float64 [n_seq, n_vocab]."""
    params = to_float64(params)
    rows = [params["wte"][token] + params["wpe"][position] for position, token in enumerate(inputs)]
    for block in params["blocks"]:
        rows = layer(rows, block, n_head)
    return np.array([params["wte"] @ normalize(row, **params["ln_f"]) for row in rows])


def to_float64(params):
    if isinstance(params, dict):
        return {name: to_float64(value) for name, value in params.items()}
    if isinstance(params, list):
        return [to_float64(value) for value in params]
    return np.asarray(params, np.float64)


def random_params(n_vocab, n_ctx, n_embd, n_layer, seed=0, scale=0.2):
    """Random float32 weights in the shape of GPT-2's."""
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
    return {"wte": normal(n_vocab, n_embd), "wpe": normal(n_ctx, n_embd), "blocks": blocks, "ln_f": norm()}
