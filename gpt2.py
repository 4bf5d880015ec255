"""GPT-2 in NumPy, to be read from top to bottom: building blocks, model, greedy generation.

The model is the one described in "Language Models are Unsupervised Multitask Learners" (Radford
et al. 2019) and implemented in OpenAI's src/model.py. Between layers, x has a row of n_embd numbers
for each of n_seq tokens: [n_seq, n_embd]. The vocabulary has n_vocab tokens; the context length,
n_ctx, is the maximum number of tokens the model can process.

The weights are float32 arrays in nested dicts (all of them are listed in `gpt2`). A linear layer is
a dict {"w": weights, "b": bias}, a layer norm is {"g": gain, "b": bias}. So if c_fc is a linear
layer, linear(x, **c_fc) is short for linear(x, w=c_fc["w"], b=c_fc["b"]).
"""

import math

import numpy as np
from tqdm import tqdm


def gelu(x):
    """Activation function: x times (about) the probability that a standard normal variable is < x.

    Any shape. Large values stay as they are, very negative ones become 0. This is the tanh
    approximation of "Gaussian Error Linear Units" (Hendrycks and Gimpel 2016), section 2.
    """
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x):
    """Turn scores into probabilities that sum to 1 along the last axis. Any shape."""
    exp_x = np.exp(x - np.max(x, axis=-1, keepdims=True))  # subtracting the max avoids overflow
    return exp_x / np.sum(exp_x, axis=-1, keepdims=True)


def layer_norm(x, g, b, eps=1e-5):
    """Normalize each row of x to mean 0 and variance 1, then scale by g and shift by b.

    x [..., n_embd], g [n_embd], b [n_embd] -> [..., n_embd]. "Layer Normalization" (Ba et al.
    2016), section 3. eps, with OpenAI's value, prevents division by zero.
    """
    x = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(x * x, axis=-1, keepdims=True)  # [..., n_embd] -> [..., 1]
    return g * (x / np.sqrt(variance + eps)) + b


def linear(x, w, b):
    """Apply a linear layer: x [n_seq, n_in], w [n_in, n_out], b [n_out] -> [n_seq, n_out].

    OpenAI wrote it as a convolution of width 1: hence the "c" in c_fc (fc: fully connected), c_attn
    and c_proj.
    """
    return x @ w + b


def ffn(x, c_fc, c_proj):
    """Feed-forward network, applied to each token independently.

    [n_seq, n_embd] -> [n_seq, n_embd]. "Attention Is All You Need" (Vaswani et al. 2017), section
    3.3, with GELU instead of ReLU.
    """
    x = gelu(linear(x, **c_fc))  # project up: [n_seq, n_embd] -> [n_seq, 4*n_embd]
    return linear(x, **c_proj)  # project back down: [n_seq, 4*n_embd] -> [n_seq, n_embd]


def attention(q, k, v, mask):
    """Scaled dot-product attention: softmax(q k^T / sqrt(d_k) + mask) v.

    A token's query is what it looks for, its key is how others find it, and its value is what it
    passes on to those that find it. Each of n_q queries is compared with n_k keys, and gets the
    average of their values, weighted by how well query and key match.

    q [..., n_q, d_k], k [..., n_k, d_k], v [..., n_k, d_v], mask [n_q, n_k] -> [..., n_q, d_v].
    Queries and keys have d_k dimensions and values d_v; in GPT-2, d_v equals d_k, and "..." is
    n_head. The mask is added to the scores: 0 keeps a key, -1e10 hides it.

    The scores are divided by sqrt(d_k), because dot products grow with d_k, and large scores would
    make softmax put nearly all its weight on one key. Vaswani et al. 2017, section 3.2.1.
    """
    # [..., n_q, d_k] @ [..., d_k, n_k] -> [..., n_q, n_k]
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    return softmax(scores + mask) @ v  # [..., n_q, n_k] @ [..., n_k, d_v] -> [..., n_q, d_v]


def mha(x, c_attn, c_proj, n_head, kvcache=None, n_past=0):
    """Causal multi-head self-attention: each token attends to itself and the tokens before it.

    [n_seq, n_embd] -> [n_seq, n_embd], in n_head heads of n_embd/n_head dimensions each. Vaswani et
    al. 2017, section 3.2.2.

    kvcache: float32 [2, n_head, room, n_embd/n_head]. Its first n_past places are filled with the
    keys and values of earlier tokens; mha adds those of x after them, in place. A token's key and
    value depend on no later token, so they never have to be computed again.
    """
    n_seq, n_embd = x.shape
    # project to queries, keys and values: [n_seq, n_embd] -> [n_seq, 3*n_embd]
    qkv = linear(x, **c_attn)  # the columns are [q | k | v], each of them [head 0 | head 1 | ...]
    # split into three and into heads: [n_seq, 3*n_embd] -> [n_seq, 3, n_head, n_embd/n_head]
    qkv = qkv.reshape(n_seq, 3, n_head, n_embd // n_head)
    # [n_seq, 3, n_head, n_embd/n_head] -> [3, n_head, n_seq, n_embd/n_head]
    q, k, v = qkv.transpose(1, 2, 0, 3)  # each [n_head, n_seq, n_embd/n_head]

    if kvcache is not None:
        kvcache[:, :, n_past : n_past + n_seq] = k, v  # the new ones
        k, v = kvcache[:, :, : n_past + n_seq]  # all, each [n_head, n_past + n_seq, n_embd/n_head]

    # causal mask, [n_seq, n_past + n_seq]: np.tri is 1 where column <= row + n_past, which are the
    # keys that the query of this row may see. With one new token, the mask is all zeros
    mask = (1 - np.tri(n_seq, n_past + n_seq, n_past, np.float32)) * -1e10

    heads = attention(q, k, v, mask)  # [n_head, n_seq, n_embd/n_head]
    # merge heads: [n_head, n_seq, n_embd/n_head] -> [n_seq, n_embd]
    x = heads.swapaxes(0, 1).reshape(n_seq, n_embd)
    return linear(x, **c_proj)  # [n_seq, n_embd] -> [n_seq, n_embd]


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, kvcache=None, n_past=0):
    """One layer: attention moves information between tokens, then ffn processes each of them.

    [n_seq, n_embd] -> [n_seq, n_embd]. Both sublayers are pre-norm (their input is normalized) and
    have a residual connection (their output is added to x). Radford et al. 2019, section 2.3.
    kvcache and n_past: as in `mha`.
    """
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, kvcache=kvcache, n_past=n_past)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, kvcache=None, n_past=0):
    """The model: token ids [n_seq] -> logits [n_seq, n_vocab]; with a kvcache, only the last row.

    Row i scores each token of the vocabulary as the one that follows inputs[: i + 1].

    The weights are passed as **params, a tree of float32 arrays:

        wte             [n_vocab, n_embd]                     token embeddings
        wpe             [n_ctx, n_embd]                       position embeddings
        blocks          a list of n_layer dicts:
            ln_1        g [n_embd], b [n_embd]                layer norm before attention
            attn
                c_attn  w [n_embd, 3*n_embd], b [3*n_embd]    projection to queries, keys, values
                c_proj  w [n_embd, n_embd], b [n_embd]        projection of the merged heads
            ln_2        g [n_embd], b [n_embd]                layer norm before the ffn
            mlp                                               (multilayer perceptron: the ffn)
                c_fc    w [n_embd, 4*n_embd], b [4*n_embd]    projection up
                c_proj  w [4*n_embd, n_embd], b [n_embd]      projection back down
        ln_f            g [n_embd], b [n_embd]                final layer norm

    kvcache: float32 [n_layer, 2, n_head, room, n_embd/n_head], one cache per layer as in `mha`. The
    inputs then follow the n_past tokens that are in it.
    Raises IndexError for an id >= n_vocab and for more than n_ctx tokens in total.
    """
    positions = np.arange(n_past, n_past + len(inputs))
    # asarray, because JAX does not index with a list: [n_seq] -> [n_seq, n_embd]
    x = wte[np.asarray(inputs)] + wpe[positions]

    # each layer's part of kvcache is a view: mha fills kvcache itself
    layer_caches = [None] * len(blocks) if kvcache is None else kvcache
    for block, layer_cache in zip(blocks, layer_caches, strict=True):
        x = transformer_block(x, **block, n_head=n_head, kvcache=layer_cache, n_past=n_past)

    if kvcache is not None:
        x = x[-1:]  # generation needs only the last row
    # tied embeddings: the row of wte that embeds a token also scores it, by its dot product with x.
    # "Using the Output Embedding to Improve Language Models" (Press and Wolf 2017)
    return layer_norm(x, **ln_f) @ wte.T  # [n_seq, n_embd] @ [n_embd, n_vocab] -> [n_seq, n_vocab]


# How many tokens of a prompt run through the model at once. With fewer, matrix products are slower;
# with more, the intermediate results take more memory, and nothing is faster.
PREFILL_PIECE = 192


def stream(inputs, params, n_head, n_tokens_to_generate):
    """Greedy generation: yield the most likely next token (lowest id on ties), again and again.

    The model gives one token at a time, and each depends on all tokens before it, so a text can
    only be written from left to right, with one run of the model per token.

    inputs: a list of token ids, at least one. params: the weights, as in `gpt2`. Yields
    n_tokens_to_generate ids, ints, each as soon as it is known.
    Raises IndexError when the context of n_ctx tokens is full.
    """
    n_embd = params["wpe"].shape[1]
    room = len(inputs) + n_tokens_to_generate
    kvcache = np.empty((len(params["blocks"]), 2, n_head, room, n_embd // n_head), np.float32)
    n_past = 0  # how many tokens are in the cache
    pending = inputs  # the tokens that are not in the cache yet: first the whole prompt (prefill)
    for _ in range(n_tokens_to_generate):
        starts = range(0, len(pending), PREFILL_PIECE)
        # in prefill, a progress bar appears after 1 second
        for start in tqdm(starts, "prompt", leave=False, delay=1, disable=n_past > 0):
            piece = pending[start : start + PREFILL_PIECE]
            logits = gpt2(piece, **params, n_head=n_head, kvcache=kvcache, n_past=n_past)
            n_past += len(piece)
        pending = [int(np.argmax(logits[-1]))]  # then only the newest token (decode)
        yield pending[0]


def generate(inputs, params, n_head, n_tokens_to_generate):
    """Return the ids that `stream` yields as a list, and show a progress bar meanwhile."""
    ids = stream(inputs, params, n_head, n_tokens_to_generate)
    return list(tqdm(ids, "generating", n_tokens_to_generate))


def main(
    prompt: str,
    n_tokens_to_generate: int = 40,
    model_size: str = "124M",
    models_dir: str = "models",
) -> str:
    """Continue a text with GPT-2.

    Args:
        prompt: the text to continue; if it is empty, the model begins a new text.
        n_tokens_to_generate: how many tokens to add; with the prompt, at most 1024 (toy: 256).
        model_size: 124M, 355M, 774M or 1558M; downloaded when first used.
        models_dir: where the models are kept, each in a folder named after its size.

    Returns:
        The new text, without the prompt.

    Raises:
        UserError (a ValueError) or OSError: something the user can fix.
    """
    return "".join(stream_text(prompt, n_tokens_to_generate, model_size, models_dir))


def stream_text(prompt, n_tokens_to_generate, model_size, models_dir, hide_bar=False):
    """Yield the text that `main` returns, piece by piece, while the model generates it.

    hide_bar: show no bar for the new tokens. Raises what `main` raises.
    """
    from utils import check_n_tokens, load_encoder_hparams_and_params

    n_new = check_n_tokens(n_tokens_to_generate)  # before anything is downloaded
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    # an empty prompt becomes the separator between training documents
    input_ids = encoder.encode(prompt) or [encoder.encoder["<|endoftext|>"]]
    check_n_tokens(n_new, len(input_ids), hparams["n_ctx"])
    ids = stream(input_ids, params, hparams["n_head"], n_new)
    yield from encoder.decode_each(tqdm(ids, "generating", n_new, disable=hide_bar))


if __name__ == "__main__":
    from utils import run_command_line

    run_command_line(main, stream_text)
