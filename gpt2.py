"""GPT-2 in NumPy, to be read from top to bottom: building blocks, model, greedy generation.

The model is the one described in "Language Models are Unsupervised Multitask Learners" (Radford
et al. 2019) and implemented in OpenAI's src/model.py. Weights and activations are float32. Between
layers, x has a row of n_embd numbers for each of n_seq tokens: [n_seq, n_embd]. The vocabulary has
n_vocab tokens; the context length, n_ctx, is the maximum number of tokens the model can process.
"""

import numpy as np
from tqdm import tqdm

from utils import UserError, check_n_tokens, load_encoder_hparams_and_params, run_command_line


def gelu(x):
    """Activation function, a smooth version of max(x, 0). Any shape.

    The tanh approximation of "Gaussian Error Linear Units" (Hendrycks and Gimpel 2016), section 2.
    """
    # ** 0.5 gives a Python float; with np.sqrt's np.float64, NumPy 2 would make x float64
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x)))


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

    OpenAI wrote it as a convolution of width 1: hence the "c" in c_fc, c_attn and c_proj.
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
    """Scaled dot-product attention: average the values, weighted by how well query and key match.

    A token's query is what it looks for, its key is how others find it, and its value is what it
    passes on to those that find it.

    q [..., n_q, d_k], k [..., n_k, d_k], v [..., n_k, d_v], mask [n_q, n_k] -> [..., n_q, d_v].
    The mask is added to the scores: 0 keeps a key, -1e10 hides it.

    The scores are divided by sqrt(d_k), because dot products grow with d_k, and large scores would
    make softmax put nearly all its weight on one key. Vaswani et al. 2017, section 3.2.1.
    """
    # scaling q instead of the scores gives the same result and is usually cheaper
    # [..., n_q, d_k] @ [..., d_k, n_k] -> [..., n_q, n_k]
    scores = (q / q.shape[-1] ** 0.5) @ k.swapaxes(-1, -2)
    return softmax(scores + mask) @ v  # [..., n_q, n_k] @ [..., n_k, d_v] -> [..., n_q, d_v]


def mha(x, c_attn, c_proj, n_head, kvcache=None):
    """Causal multi-head self-attention: each token attends to itself and the tokens before it.

    [n_seq, n_embd] -> [n_seq, n_embd], in n_head heads of n_embd/n_head dimensions each. Vaswani et
    al. 2017, section 3.2.2.
    kvcache: float32 [2, n_head, n_past + n_seq, n_embd/n_head], the keys and the values. The first
    n_past positions belong to earlier tokens; mha fills in the last n_seq, those of x, in place.
    """
    n_seq, n_embd = x.shape
    # project to queries, keys and values: [n_seq, n_embd] -> [n_seq, 3*n_embd]
    qkv = linear(x, **c_attn)  # the columns are [q | k | v], each of them [head 0 | head 1 | ...]
    # split into three: [n_seq, 3*n_embd] -> [3, n_seq, n_embd]
    qkv = qkv.reshape(n_seq, 3, n_embd).swapaxes(0, 1)
    # split into heads: [3, n_seq, n_embd] -> [3, n_head, n_seq, n_embd/n_head]
    qkv = qkv.reshape(3, n_seq, n_head, n_embd // n_head).swapaxes(1, 2)
    q, k, v = qkv  # each [n_head, n_seq, n_embd/n_head]

    n_past = 0
    if kvcache is not None:
        # a token's key and value depend on no later token, so they are computed only once
        n_past = kvcache.shape[2] - n_seq
        # the new keys and values: [2, n_head, n_seq, n_embd/n_head]
        kvcache[:, :, n_past:] = qkv[1:]
        k, v = kvcache  # all of them, each [n_head, n_past + n_seq, n_embd/n_head]

    # causal mask, [n_seq, n_past + n_seq]: query i, at position n_past + i, may attend to the keys
    # up to that position, where np.tri is 1. In decode, with one new token, the mask is all zeros
    mask = (1 - np.tri(n_seq, n_past + n_seq, n_past, np.float32)) * -1e10

    heads = attention(q, k, v, mask)  # [n_head, n_seq, n_embd/n_head]
    # merge heads: [n_head, n_seq, n_embd/n_head] -> [n_seq, n_embd]
    x = heads.swapaxes(0, 1).reshape(n_seq, n_embd)
    return linear(x, **c_proj)  # [n_seq, n_embd] -> [n_seq, n_embd]


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, kvcache=None):
    """One layer: attention moves information between tokens, then ffn processes each of them.

    [n_seq, n_embd] -> [n_seq, n_embd]. Both sublayers are pre-norm (their input is normalized) and
    have a residual connection (their output is added to x). Radford et al. 2019, section 2.3.
    """
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, kvcache=kvcache)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, kvcache=None):
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
            mlp
                c_fc    w [n_embd, 4*n_embd], b [4*n_embd]    projection up
                c_proj  w [4*n_embd, n_embd], b [n_embd]      projection back down
        ln_f            g [n_embd], b [n_embd]                final layer norm

    kvcache: float32 [n_layer, 2, n_head, n_past + n_seq, n_embd/n_head], a cache per layer as in
    `mha`. The inputs then follow n_past earlier tokens, so n_past is kvcache.shape[3] - n_seq.
    Raises IndexError for an id >= n_vocab and for more than n_ctx tokens in total.
    """
    inputs = np.asarray(inputs)
    n_past = 0 if kvcache is None else kvcache.shape[3] - len(inputs)
    positions = np.arange(n_past, n_past + len(inputs))
    x = wte[inputs] + wpe[positions]  # [n_seq] -> [n_seq, n_embd]

    layer_caches = [None] * len(blocks) if kvcache is None else kvcache
    for block, layer_cache in zip(blocks, layer_caches, strict=True):
        x = transformer_block(x, **block, n_head=n_head, kvcache=layer_cache)

    first_row = 0 if kvcache is None else -1  # generation needs only the last row
    # tied embeddings: the row of wte that embeds a token also scores it, by its dot product with x.
    # "Using the Output Embedding to Improve Language Models" (Press and Wolf 2017)
    # [n_seq, n_embd] @ [n_embd, n_vocab] -> [n_seq, n_vocab]; with a cache, [1, n_vocab]
    return layer_norm(x[first_row:], **ln_f) @ wte.T


# How many tokens of a prompt run through the model at once. With fewer, matrix products are slower;
# with more, intermediate results no longer fit into the CPU's caches.
PREFILL_PIECE = 192


def generate(inputs, params, n_head, n_tokens_to_generate):
    """Greedy generation: repeatedly append the most likely token (lowest id on ties).

    inputs: a list of token ids, at least one; it is left unchanged. params: the weights, as in
    `gpt2`. Returns the n_tokens_to_generate new ids, a list of ints.
    Raises UserError (a ValueError) if the context has no room for them.
    """
    n_seq = len(inputs)
    n_ctx, n_embd = params["wpe"].shape
    n_new = check_n_tokens(n_tokens_to_generate)
    if n_seq + n_new > n_ctx:
        raise UserError(f"{n_seq} prompt tokens and {n_new} new ones exceed the context of {n_ctx}")
    n_layer = len(params["blocks"])
    cache = np.empty((n_layer, 2, n_head, n_seq + n_new, n_embd // n_head), np.float32)
    ids = list(inputs)
    n_past = 0  # how many tokens are in the cache
    for _ in tqdm(range(n_new), "generating"):
        # the first round runs the prompt through the model, piece by piece (prefill);
        # each later round runs only the newest token (decode)
        for start in range(n_past, len(ids), PREFILL_PIECE):
            piece = ids[start : start + PREFILL_PIECE]
            end = start + len(piece)
            # the slice of the cache ends with the piece: that tells gpt2 the piece's positions
            logits = gpt2(piece, **params, n_head=n_head, kvcache=cache[:, :, :, :end])
        n_past = len(ids)
        ids.append(int(np.argmax(logits[-1])))  # [1, n_vocab] -> the next id
    return ids[n_seq:]


def main(prompt, n_tokens_to_generate=40, model_size="124M", models_dir="models"):
    """Continue a text with GPT-2.

    Args:
        prompt: the text to continue; if it is empty, the model begins a new text.
        n_tokens_to_generate: how many tokens to add; with those of the prompt, at most 1024.
        model_size: 124M, 355M, 774M or 1558M; downloaded when first used.
        models_dir: where the models are kept, each in a folder named after its size.

    Returns:
        The new text, without the prompt.

    Raises:
        UserError (a ValueError) or OSError: something the user can fix.
    """
    check_n_tokens(n_tokens_to_generate)  # before anything is downloaded
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    # an empty prompt becomes the separator between training documents
    input_ids = encoder.encode(prompt) or [encoder.encoder["<|endoftext|>"]]
    output_ids = generate(input_ids, params, hparams["n_head"], n_tokens_to_generate)
    return encoder.decode(output_ids)


if __name__ == "__main__":
    run_command_line(main)
