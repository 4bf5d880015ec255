"""GPT-2 for one token at a time: the functions of gpt2.py again, in plain loops.

In gpt2.py, x is a matrix with one row per token. Here, a function that has x there takes one `row`,
or a list of `rows` where tokens look at each other (in mha and its callers). There is no
mask, because token i is simply not shown any later tokens, and no cache. Where a line of gpt2.py is
hard to picture, find it here.

    python tests/textbook.py

shows what happens inside the toy of tests/toy while it continues a line of the poem that it knows.
"""

import math

import numpy as np


def gelu(number):
    """A number -> a number: large ones stay as they are, very negative ones become almost 0."""
    inner = math.sqrt(2 / math.pi) * (number + 0.044715 * number**3)
    return 0.5 * number * (1 + math.tanh(inner))


def softmax(scores):
    """A list of numbers -> a list of positive numbers whose sum is 1.

    (gpt2.py subtracts the maximum first, so that large numbers do not overflow.)
    """
    powers = [math.exp(score) for score in scores]
    total = sum(powers)
    return [power / total for power in powers]


def layer_norm(row, g, b):
    """[n_embd] -> [n_embd], with mean 0 and variance 1 before g and b are applied."""
    mean = sum(row) / len(row)
    variance = sum((number - mean) ** 2 for number in row) / len(row)
    normalized = np.array([(number - mean) / math.sqrt(variance + 1e-5) for number in row])
    return g * normalized + b


def linear(row, w, b):
    """[n_in] -> [n_out]. w: [n_in, n_out], b: [n_out]."""
    return row @ w + b


def ffn(row, c_fc, c_proj):
    """[n_embd] -> [n_embd], by way of four times as many numbers."""
    hidden = linear(row, **c_fc)
    hidden = np.array([gelu(number) for number in hidden])
    return linear(hidden, **c_proj)


def attention(query, keys, values):
    """One query of one head: the average of the values, weighted by how well the keys match it."""
    scores = [query @ key / math.sqrt(len(query)) for key in keys]
    weights = softmax(scores)
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def mha(rows, c_attn, c_proj, n_head):
    """A list of rows [n_embd] -> a list of as many rows [n_embd]."""
    queries, keys, values = [], [], []
    for row in rows:
        query, key, value = np.split(linear(row, **c_attn), 3)
        # cut each into n_head parts: queries[token][head] has n_embd/n_head numbers
        queries.append(np.split(query, n_head))
        keys.append(np.split(key, n_head))
        values.append(np.split(value, n_head))
    outputs = []
    for i in range(len(rows)):
        heads = []
        for head in range(n_head):
            # token i sees the tokens up to itself: [: i + 1]
            keys_of_head = [key[head] for key in keys[: i + 1]]
            values_of_head = [value[head] for value in values[: i + 1]]
            heads.append(attention(queries[i][head], keys_of_head, values_of_head))
        outputs.append(linear(np.concatenate(heads), **c_proj))
    return outputs


def transformer_block(rows, mlp, attn, ln_1, ln_2, n_head):
    """One layer: a list of rows [n_embd] -> a list of as many rows [n_embd]."""
    normalized = [layer_norm(row, **ln_1) for row in rows]
    outputs = mha(normalized, **attn, n_head=n_head)
    rows = [row + output for row, output in zip(rows, outputs, strict=True)]
    return [row + ffn(layer_norm(row, **ln_2), **mlp) for row in rows]


def transformer(inputs, wte, wpe, blocks, ln_f, n_head):
    """A list of token ids -> a list of rows [n_embd], one for each token.

    wte has a row for each token of the vocabulary, wpe for each position. blocks is a list of
    dicts, one for each layer, with the arguments of transformer_block: mlp, attn, ln_1 and ln_2.
    A linear layer is a dict {"w": weights, "b": bias}, a layer norm is {"g": gain, "b": bias}.
    """
    rows = [wte[token_id] + wpe[position] for position, token_id in enumerate(inputs)]
    for block in blocks:
        rows = transformer_block(rows, **block, n_head=n_head)
    return [layer_norm(row, **ln_f) for row in rows]


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head):
    """A list of token ids -> a list of logits, [n_vocab] for each token."""
    rows = transformer(inputs, wte, wpe, blocks, ln_f, n_head)
    return [wte @ row for row in rows]


def generate(inputs, params, n_head, n_tokens_to_generate):
    """Greedy generation: a list of the new ids."""
    ids = list(inputs)
    for _ in range(n_tokens_to_generate):
        logits = gpt2(ids, **params, n_head=n_head)
        ids.append(int(np.argmax(logits[-1])))
    return ids[len(inputs) :]


# ---- The model ends here. What follows shows the toy at work ---------------------------------


def show(encoder, params, n_head, text):
    """Print what happens inside the model while it reads this text and writes 5 more tokens."""
    ids = encoder.encode(text)
    tokens = [encoder.decode([token_id]) for token_id in ids]
    print("ids:   ", ids)
    print("tokens:", tokens)
    show_layers(ids, tokens, params, n_head)
    show_generation(ids, encoder, params, n_head)


def show_layers(ids, tokens, params, n_head):
    """Print how the row of the last token changes from layer to layer."""
    rows = [params["wte"][token_id] + params["wpe"][i] for i, token_id in enumerate(ids)]
    print("\nThe last token is a row of", len(rows[-1]), "numbers. The first 6 of them:")
    print("wte + wpe    ", rows[-1][:6])
    for layer, block in enumerate(params["blocks"]):
        if layer == 1:  # the one in the README's picture
            print("attention weights of layer 1 for the last token:")
            show_attention(rows, tokens, block, n_head)
        rows = transformer_block(rows, **block, n_head=n_head)
        print(f"after layer {layer}", rows[-1][:6])


def show_attention(rows, tokens, block, n_head):
    """Print with which weights each head averages the values of the tokens, for the last token."""
    queries, keys = [], []
    for row in rows:
        normalized = layer_norm(row, **block["ln_1"])
        query, key, _value = np.split(linear(normalized, **block["attn"]["c_attn"]), 3)
        queries.append(np.split(query, n_head))
        keys.append(np.split(key, n_head))
    for head in range(n_head):
        query = queries[-1][head]
        scores = [query @ key[head] / math.sqrt(len(query)) for key in keys]
        print(f"  head {head}:", end="")
        for weight, token in zip(softmax(scores), tokens, strict=True):
            print(f" {weight:.2f}{token!r}", end="")
        print()


def show_generation(ids, encoder, params, n_head):
    """Print the three most likely tokens, append the first of them, and so on, 5 times."""
    print("\nThe three most likely next tokens, the first of which is appended:")
    for _ in range(5):
        logits = gpt2(ids, **params, n_head=n_head)
        probabilities = softmax(logits[-1])
        best_first = np.argsort(probabilities)[::-1]
        for token_id in best_first[:3]:
            print(f"{probabilities[token_id]:.3f} {encoder.decode([token_id])!r:13}", end="")
        print()
        ids = [*ids, int(best_first[0])]


if __name__ == "__main__":
    import pathlib
    import sys

    tests = pathlib.Path(__file__).resolve().parent
    sys.path.insert(0, str(tests.parent))
    from utils import load_encoder_hparams_and_params

    # the toy is stored under the name of one of OpenAI's models
    encoder, hparams, params = load_encoder_hparams_and_params("124M", tests / "toy")
    np.set_printoptions(precision=2, suppress=True)
    show(encoder, params, hparams["n_head"], "One, two!")
