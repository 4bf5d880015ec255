"""Random weights in the shape of GPT-2's, and checkpoints, for the tests and the benchmark."""

import numpy as np


def random_params(n_vocab, n_ctx, n_embd, n_layer, seed=0, scale=0.2):
    """The tree of float32 arrays that gpt2.gpt2 takes, filled with normally distributed numbers."""
    rng = np.random.default_rng(seed)

    def normal(*shape, mean=0):
        return rng.normal(mean, scale, shape).astype(np.float32)

    def norm():
        return {"g": normal(n_embd, mean=1), "b": normal(n_embd)}

    def linear(n_in, n_out):
        return {"w": normal(n_in, n_out), "b": normal(n_out)}

    def block():
        attn = {"c_attn": linear(n_embd, 3 * n_embd), "c_proj": linear(n_embd, n_embd)}
        mlp = {"c_fc": linear(n_embd, 4 * n_embd), "c_proj": linear(4 * n_embd, n_embd)}
        return {"ln_1": norm(), "attn": attn, "ln_2": norm(), "mlp": mlp}

    wte, wpe = normal(n_vocab, n_embd), normal(n_ctx, n_embd)
    return {"wte": wte, "wpe": wpe, "blocks": [block() for _ in range(n_layer)], "ln_f": norm()}


def variables(params, prefix="model"):
    """The same arrays, named and shaped as in OpenAI's checkpoints.

    {"model/h0/attn/c_attn/w": float32 [1, n_in, n_out], ...}
    """
    flat = {}
    for name, value in params.items():
        if name == "blocks":
            for i, block in enumerate(value):
                flat |= variables(block, f"{prefix}/h{i}")
        elif isinstance(value, dict):
            flat |= variables(value, f"{prefix}/{name}")
        else:
            flat[f"{prefix}/{name}"] = value[None] if name == "w" else value
    return flat


def save(prefix, values):
    """Write {variable: value} as a TensorFlow checkpoint, in this order. Returns the prefix.

    This is the operation that TensorFlow's Saver uses, which sorts the variables by their names.
    """
    import tensorflow as tf

    no_slices = [""] * len(values)
    arrays = {"tensor_names": list(values), "tensors": list(values.values())}
    tf.raw_ops.SaveV2(prefix=str(prefix), shape_and_slices=no_slices, **arrays)
    return str(prefix)
