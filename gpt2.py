"""GPT-2 in NumPy, to be read from top to bottom: building blocks, model, greedy generation.

GPT-2 does one thing: given a text, it scores every token that could come next. Append the token
with the highest score, ask again, and a text is generated:

    encoder, hparams, params = load_encoder_hparams_and_params("124M", "models")
    ids = encoder.encode("Alan Turing theorized that")
    for _ in range(40):
        logits = gpt2(ids, **params, n_head=hparams["n_head"])  # [len(ids), n_vocab]
        ids.append(np.argmax(logits[-1]))  # the last row scores what follows the last token
    print(encoder.decode(ids))

A token is a word, a piece of a word or punctuation, and its id is its number in the vocabulary. A
logit is the score of a token. An embedding is the row of numbers that stands for a token inside the
model. Between layers, x has one such row for each of n_seq tokens: [n_seq, n_embd].

           n_vocab     n_ctx             n_embd             n_head            n_layer
           vocabulary  context length    numbers in a row   attention heads   layers
    124M   50257       1024              768                12                12
    1558M  50257       1024              1600               25                48

The weights are float32 arrays in nested dicts (all of them are listed in `gpt2`). A linear layer is
a dict {"w": weights, "b": bias}, a layer norm is {"g": gain, "b": bias}. So if c_fc is a linear
layer, linear(x, **c_fc) is short for linear(x, w=c_fc["w"], b=c_fc["b"]).

The model is described in "Language Models are Unsupervised Multitask Learners" (Radford et al.
2019), and OpenAI's code is src/model.py. tests/textbook.py has the same functions in plain loops,
one row at a time.
"""

import math

import numpy as np
from tqdm import tqdm


def gelu(x):
    """Activation function: x times (about) the probability that a standard normal variable is < x.

    Any shape. Large values stay as they are, very negative ones become 0. Without a nonlinear
    function between them, two linear layers would be no more than a single one. This is the tanh
    approximation of "Gaussian Error Linear Units" (Hendrycks and Gimpel 2016), section 2.
    """
    # math.sqrt, not np.sqrt: its float64 scalar would make everything after it float64 in NumPy 2.
    # And x * x * x, not x**3, which is much slower
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x):
    """Turn scores into probabilities, with a sum of 1 along the last axis. Any shape."""
    # e^(x - max) = e^x / e^max, and e^max cancels out below; e^x alone could overflow
    powers = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return powers / np.sum(powers, axis=-1, keepdims=True)


def layer_norm(x, g, b, eps=1e-5):
    """Normalize each row of x to mean 0 and variance 1, then scale by g and shift by b.

    However large the rows of x grow from layer to layer, the next layer sees them at one scale.

    x [..., n_embd], g [n_embd], b [n_embd] -> [..., n_embd]. eps, with OpenAI's value, prevents
    division by zero. "Layer Normalization" (Ba et al. 2016), section 3.
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
    3.3, with GELU instead of max(0, x).
    """
    x = gelu(linear(x, **c_fc))  # project up: [n_seq, n_embd] -> [n_seq, 4*n_embd]
    return linear(x, **c_proj)  # project back down: [n_seq, 4*n_embd] -> [n_seq, n_embd]


def attention(q, k, v, mask):
    """Scaled dot-product attention: softmax(q k^T / sqrt(d_k) + mask) v.

    A query is what a token looks for, a key is how others find it, and a value is what it passes on
    to them. Each query gets the average of the values, weighted by how well their keys match it.
    The mask is added to the scores: 0 keeps a key, -1e10 hides it.

    q [..., n_q, d_k], k [..., n_k, d_k], v [..., n_k, d_v], mask [n_q, n_k] -> [..., n_q, d_v].
    In GPT-2, "..." is n_head, and d_k = d_v = n_embd/n_head. Vaswani et al. 2017, section 3.2.1.
    """
    # dot products grow like sqrt(d_k), as terms of either sign partly cancel; without the scaling,
    # softmax would put nearly all its weight on one key
    scores = (q / math.sqrt(q.shape[-1])) @ k.swapaxes(-1, -2) + mask  # [..., n_q, n_k]
    return softmax(scores) @ v  # [..., n_q, n_k] @ [..., n_k, d_v] -> [..., n_q, d_v]


# Generation calls the model once per new token. Without a cache, each call would compute the keys
# and values of all earlier tokens again; with one, they are kept. It changes nothing but the time:
# on a first reading, up to `stream`, take kvcache to be None and n_past to be 0.


def mha(x, c_attn, c_proj, n_head, kvcache=None, n_past=0):
    """Causal multi-head self-attention: each token gathers information from those up to itself.

    One average can follow only one kind of match. So there are n_head heads side by side, each with
    its own queries, keys and values, n_embd/n_head numbers long.

    [n_seq, n_embd] -> [n_seq, n_embd]. Vaswani et al. 2017, section 3.2.2.

    kvcache: float32 [2, n_head, capacity, n_embd/n_head]. It holds the keys and values of n_past
    earlier tokens; mha appends those of x, in place.
    """
    n_seq, n_embd = x.shape
    # project to queries, keys and values: [n_seq, n_embd] -> [n_seq, 3*n_embd]
    qkv = linear(x, **c_attn)
    # a row is q | k | v, and each of them is head 0 | head 1 | ...: cut it at each "|"
    qkv = qkv.reshape(n_seq, 3, n_head, n_embd // n_head)
    # move the axes "3" and n_head to the front, so that each head has a matrix of its own:
    # [n_seq, 3, n_head, n_embd/n_head] -> [3, n_head, n_seq, n_embd/n_head]
    # (five tokens in 124M: [5, 2304] -> [5, 3, 12, 64] -> [3, 12, 5, 64])
    q, k, v = qkv.transpose(1, 2, 0, 3)  # unpacked: each [n_head, n_seq, n_embd/n_head]

    if kvcache is not None:
        kvcache[0, :, n_past : n_past + n_seq] = k
        kvcache[1, :, n_past : n_past + n_seq] = v
        k, v = kvcache[:, :, : n_past + n_seq]  # each [n_head, n_past + n_seq, n_embd/n_head]

    # causal mask, [n_seq, n_past + n_seq]: a row per query, a column per key. np.tri is 1 up to the
    # query's own column (k=n_past shifts the diagonal), 0 after it. For three tokens, the mask is
    #     [[0, -1e10, -1e10],
    #      [0,     0, -1e10],
    #      [0,     0,     0]]  and exp(-1e10) is 0: softmax gives no weight to later tokens
    mask = (1 - np.tri(n_seq, n_past + n_seq, k=n_past, dtype=np.float32)) * -1e10

    heads = attention(q, k, v, mask)  # [n_head, n_seq, n_embd/n_head]
    # merge heads: [n_head, n_seq, n_embd/n_head] -> [n_seq, n_embd]
    x = heads.swapaxes(0, 1).reshape(n_seq, n_embd)
    # project: combine what the heads have found: [n_seq, n_embd] -> [n_seq, n_embd]
    return linear(x, **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, kvcache=None, n_past=0):
    """One layer: attention moves information between tokens, then ffn processes each of them.

    [n_seq, n_embd] -> [n_seq, n_embd]. Both sublayers are pre-norm (their input is normalized) and
    have a residual connection (their output is added to x, so that nothing in x gets lost). mlp
    (multilayer perceptron): the weights of ffn. Radford et al. 2019, section 2.3.
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
            mlp
                c_fc    w [n_embd, 4*n_embd], b [4*n_embd]    projection up
                c_proj  w [4*n_embd, n_embd], b [n_embd]      projection back down
        ln_f            g [n_embd], b [n_embd]                final layer norm

    kvcache: float32 [n_layer, 2, n_head, capacity, n_embd/n_head], as in `mha` for each layer. The
    inputs then follow the n_past tokens that are in it.
    Raises IndexError for an id >= n_vocab and for more than n_ctx tokens in total.
    """
    ids = np.asarray(inputs)  # indexing with an array (JAX needs one) picks a row per token
    positions = np.arange(n_past, n_past + len(ids))
    # attention by itself does not see the order of the tokens: so each one's position is added
    x = wte[ids] + wpe[positions]  # [n_seq] -> [n_seq, n_embd]

    for i, block in enumerate(blocks):
        layer_cache = None if kvcache is None else kvcache[i]  # a view: mha writes into kvcache
        x = transformer_block(x, **block, n_head=n_head, kvcache=layer_cache, n_past=n_past)

    if kvcache is not None:
        # generation needs only what follows the last token. With 124M and a long prompt, the logits
        # of all tokens would take about a quarter of the time of everything before this line
        x = x[-1:]
    # tied embeddings: the row of wte that embeds a token also scores it, by its dot product with x.
    # "Using the Output Embedding to Improve Language Models" (Press and Wolf 2017)
    return layer_norm(x, **ln_f) @ wte.T  # [n_seq, n_embd] @ [n_embd, n_vocab] -> [n_seq, n_vocab]


# How many tokens of a prompt run through the model at once. Attention computes n_seq x n_seq scores
# per head: with a long prompt as a whole, they would take more memory and more time.
CHUNK = 384


def stream(inputs, params, n_head, n_tokens_to_generate):
    """Greedy generation: repeatedly yield the most likely next token (lowest id on ties).

    The same tokens as with the loop at the top of this file, but with a cache.

    inputs: a list of token ids, at least one. params: the weights, as in `gpt2`. Yields
    n_tokens_to_generate ids, ints, each before the next one is computed.
    Raises ValueError if there are no inputs, IndexError when the context of n_ctx tokens is full.
    """
    n_ctx, n_embd = params["wpe"].shape
    capacity = min(len(inputs) + n_tokens_to_generate, n_ctx)
    # np.empty does not initialize the array: each entry is written before it is read
    kvcache = np.empty((len(params["blocks"]), 2, n_head, capacity, n_embd // n_head), np.float32)

    # prefill: run all inputs but the last, only to fill the cache. (The loop below could do that,
    # too, but one matrix product for many tokens is faster than one for each of them)
    *past, token = inputs
    for n_past in range(0, len(past), CHUNK):
        gpt2(past[n_past : n_past + CHUNK], **params, n_head=n_head, kvcache=kvcache, n_past=n_past)

    # decode (not the tokenizer's): feed one token, get the next
    for n_past in range(len(past), len(past) + n_tokens_to_generate):
        logits = gpt2([token], **params, n_head=n_head, kvcache=kvcache, n_past=n_past)
        token = int(np.argmax(logits[-1]))  # softmax would not change which one is the largest
        yield token


# Two functions for programs that import this file. The program at its end calls `stream_text`
# instead, to print each piece of text at once; of `main`, it takes the parameters and the help.


def generate(inputs, params, n_head, n_tokens_to_generate):
    """Return the ids that `stream` yields as a list, and show a progress bar meanwhile."""
    ids = stream(inputs, params, n_head, n_tokens_to_generate)
    # list(tqdm(...)) would first reserve memory for n_tokens_to_generate ids
    return [i for i in tqdm(ids, "generating", n_tokens_to_generate)]


def main(
    prompt: str,
    n_tokens_to_generate: int = 40,
    model_size: str = "124M",
    models_dir: str = "models",
) -> str:
    """Continue a text with GPT-2.

    Args:
        prompt: the text to continue, in quotation marks. If it begins with "-", write
            --prompt="-...". If it is empty, the model begins a new text.
        n_tokens_to_generate: how many tokens to add; with the prompt, at most 1024.
        model_size: 124M, 355M, 774M or 1558M; downloaded when first used.
        models_dir: where the models are kept, each in a folder named after its size.

    Returns:
        The new text, without the prompt.

    Raises:
        UserError (a ValueError), OSError or ImportError: something the user can fix.
    """
    return "".join(stream_text(prompt, n_tokens_to_generate, model_size, models_dir))


def stream_text(prompt, n_tokens_to_generate, model_size, models_dir):
    """Yield the text that `main` returns, piece by piece. Raises what `main` raises.

    This is a chain of generators: the text of each token is yielded before the next is computed.
    """
    from utils import UserError, load_encoder_hparams_and_params  # the model does not need utils

    # refused before anything is downloaded (it is text from the command line, or an int)
    if not str(n_tokens_to_generate).isdecimal():
        raise UserError(f"{n_tokens_to_generate!r} is not a token count: is the prompt in quotes?")
    n_new = int(n_tokens_to_generate)
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    # an empty prompt becomes the separator between training documents
    ids = encoder.encode(prompt) or [encoder.encoder["<|endoftext|>"]]
    if len(ids) + n_new > hparams["n_ctx"]:
        counts = f"the prompt has {len(ids)} tokens; {n_new} more"
        raise UserError(f"{counts} would exceed the context of {hparams['n_ctx']}")
    yield from encoder.decode_each(stream(ids, params, hparams["n_head"], n_new))


if __name__ == "__main__":
    from utils import one_line_errors, parse_arguments

    # what `main` does, but each piece of text is printed as soon as it is generated
    with one_line_errors():
        for piece in stream_text(*parse_arguments(main)):
            print(piece, end="", flush=True)
        print(flush=True)
