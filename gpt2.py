"""GPT-2 in NumPy, to be read from top to bottom: building blocks, model, greedy generation.

A token is a word, a piece of a word, or punctuation, and its id is its number in the vocabulary.
GPT-2 does one thing: given a text, it gives each token of its vocabulary a number, its logit. The
larger the logit, the more likely this token is to come next. Append the most likely token, ask
again, and a text is generated. The command

    python gpt2.py "Alan Turing theorized that"

calls `main`, at the end of this file. In essence, this is what happens:

    import numpy as np
    from gpt2 import gpt2
    from utils import load_encoder_hparams_and_params

    encoder, hparams, params = load_encoder_hparams_and_params("124M", "models")
    ids = encoder.encode("Alan Turing theorized that")
    for _ in range(40):
        logits = gpt2(ids, **params, n_head=hparams["n_head"])  # [len(ids), n_vocab]
        ids.append(int(np.argmax(logits[-1])))  # the last row predicts what follows the last token
    print(encoder.decode(ids))  # the prompt and 40 new tokens

Inside the model, a token is a row of numbers, its embedding. What passes from layer to layer is x,
an array of shape [n_seq, n_embd], with one such row for each of n_seq tokens. The sizes are in
hparams, the hyperparameters:

           n_vocab      n_ctx            n_embd               n_head            n_layer
           vocabulary   context length   embedding size       attention heads   layers
    124M   50257        1024             768                  12                12
    1558M  50257        1024             1600                 25                48

The weights are the numbers learned in training: float32 arrays in nested dicts, all listed in the
docstring of `transformer`. A linear layer is a dict {"w": weights, "b": bias}, a layer norm is
{"g": gain, "b": bias}. So if c_fc is a linear layer, linear(x, **c_fc) is short for
linear(x, w=c_fc["w"], b=c_fc["b"]).

The model is described in "Language Models are Unsupervised Multitask Learners" (Radford et al.
2019), and OpenAI's code is src/model.py of https://github.com/openai/gpt-2. tests/textbook.py has
the same functions in plain loops, one row at a time.
"""

import math

import numpy as np
from tqdm import tqdm


def gelu(x):
    """Activation function: keep large positive numbers, and turn very negative ones into almost 0.

    Any shape. 3 -> 2.996, 1 -> 0.841, 0 -> 0, -1 -> -0.159, -3 -> -0.004. Without such a nonlinear
    function between them, two linear layers would be no more than a single one. This is the tanh
    approximation of x * P(Z < x), where Z is a standard normal variable: "Gaussian Error Linear
    Units" (Hendrycks and Gimpel 2016), section 2.
    """
    # math.sqrt returns a Python float, which leaves x float32. np.sqrt would return a float64
    # scalar, and NumPy 2 would turn x into float64. (x * x * x, because x**3 is much slower)
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x):
    """Turn each row of x (along the last axis) into probabilities, which sum to 1.

    Any shape. Attention uses it for its scores. It would also turn logits into the probabilities of
    the next token.
    """
    # e^(x - max) = e^x / e^max, and e^max cancels out below; e^x alone could overflow
    powers = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return powers / np.sum(powers, axis=-1, keepdims=True)


def layer_norm(x, g, b, eps=1e-5):
    """Normalize each row of x to mean 0 and variance 1, then scale by g and shift by b.

    However large the numbers in x become, every layer sees them on the same scale.

    x [..., n_embd], g [n_embd], b [n_embd] -> [..., n_embd]. eps (OpenAI's value) prevents division
    by zero. "Layer Normalization" (Ba et al. 2016), section 3.
    """
    x = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(x * x, axis=-1, keepdims=True)  # [..., n_embd] -> [..., 1]
    return g * (x / np.sqrt(variance + eps)) + b


def linear(x, w, b):
    """Apply a linear layer: x [n_seq, n_in], w [n_in, n_out], b [n_out] -> [n_seq, n_out].

    OpenAI wrote it as a convolution of width 1, which is the same: hence the "c" in the names c_fc
    (fc: fully connected), c_attn and c_proj.
    """
    return x @ w + b


def ffn(x, c_fc, c_proj):
    """Feed-forward network, applied to each token independently.

    [n_seq, n_embd] -> [n_seq, n_embd]. "Attention Is All You Need" (Vaswani et al. 2017), section
    3.3, with GELU instead of max(0, x).
    """
    hidden = linear(x, **c_fc)  # project up: [n_seq, n_embd] -> [n_seq, 4*n_embd]
    hidden = gelu(hidden)
    return linear(hidden, **c_proj)  # project back down: [n_seq, 4*n_embd] -> [n_seq, n_embd]


def attention(q, k, v, mask):
    """Scaled dot-product attention: softmax(q k^T / sqrt(d) + mask) v.

    `mha`, below, computes three rows of d numbers for each token: a query is what the token looks
    for, a key is how others find it, and a value is what it passes on to them. Here, each query
    gets a weighted average of the values. The score of a key is its dot product with the query: the
    larger it is, the more weight the value has. The mask is added to the scores: 0 leaves a key
    visible, -1e10 hides it.

    q [n_q, d], k [n_k, d], v [n_k, d], mask [n_q, n_k] -> [n_q, d]. With a leading axis n_head in
    q, k and v, each head is handled separately. Vaswani et al. 2017, section 3.2.1.
    """
    # A score is a sum of d terms, and the typical size of such a sum grows like sqrt(d). Without
    # the division, softmax would put nearly all the weight on one key. Dividing q has the same
    # effect as dividing the scores, of which there are more in a long text.
    scaled_q = q / math.sqrt(q.shape[-1])
    scores = scaled_q @ k.swapaxes(-1, -2) + mask  # [n_q, d] @ [d, n_k] -> [n_q, n_k]
    weights = softmax(scores)  # the attention weights; each row has a sum of 1
    return weights @ v  # [n_q, n_k] @ [n_k, d] -> [n_q, d]


# From here on, some functions have the parameters kvcache and n_past. They are for generation, and
# explained there, above `stream`. On a first reading, take kvcache to be None and n_past to be 0.


def mha(x, c_attn, c_proj, n_head, kvcache=None, n_past=0):
    """Causal multi-head self-attention: each token looks at itself and earlier tokens.

    A single head gives each token only one weighted average. So there are n_head heads side by
    side, each of which can look for something else: each has queries, keys and values of its own,
    n_embd/n_head numbers long.

    [n_seq, n_embd] -> [n_seq, n_embd]. Vaswani et al. 2017, section 3.2.2.

    kvcache: None, or float32 [2, n_head, capacity, n_embd/n_head], with room for the keys and
    values of `capacity` tokens. It holds those of n_past earlier tokens; those of x are written
    after them.
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
        # from here on, k and v are those of the earlier tokens, too; q is that of the new ones only
        k, v = kvcache[:, :, : n_past + n_seq]  # each [n_head, n_past + n_seq, n_embd/n_head]

    # causal mask: a row per query, a column per key. Query i belongs to token n_past + i, and sees
    # the keys 0 to n_past + i. In softmax, exp(-1e10) is 0, so the others get no weight. (In
    # training, the model has to predict the next token, so it must not see it.)
    #     three tokens:               two tokens, after one in the cache (n_past = 1):
    #     [[0, -1e10, -1e10],         [[0,     0, -1e10],
    #      [0,     0, -1e10],          [0,     0,     0]]
    #      [0,     0,     0]]
    # np.tri has ones on and below the diagonal, which n_past shifts to the right
    visible = np.tri(n_seq, n_past + n_seq, n_past, dtype=np.float32)
    mask = (1 - visible) * -1e10  # [n_seq, n_past + n_seq]

    heads = attention(q, k, v, mask)  # [n_head, n_seq, n_embd/n_head]
    # merge heads: put their results side by side again, token by token:
    # [n_head, n_seq, n_embd/n_head] -> [n_seq, n_head, n_embd/n_head] -> [n_seq, n_embd]
    merged = heads.swapaxes(0, 1).reshape(n_seq, n_embd)
    # project: combine what the heads have found: [n_seq, n_embd] -> [n_seq, n_embd]
    return linear(merged, **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, kvcache=None, n_past=0):
    """One layer: attention moves information between tokens, then ffn processes each of them.

    [n_seq, n_embd] -> [n_seq, n_embd]. Both sublayers are pre-norm (they read a normalized copy of
    x) and have a residual connection (their output is added to x instead of replacing it, so what
    was in x is still there). mlp (multilayer perceptron): the weights of ffn. Radford et al. 2019,
    section 2.3.
    """
    normalized = layer_norm(x, **ln_1)
    x = x + mha(normalized, **attn, n_head=n_head, kvcache=kvcache, n_past=n_past)
    normalized = layer_norm(x, **ln_2)
    return x + ffn(normalized, **mlp)


def transformer(inputs, wte, wpe, blocks, ln_f, n_head, kvcache=None, n_past=0):
    """The model without its last step: embeddings, all layers, and the final layer norm.

    Token ids [n_seq] -> [n_seq, n_embd]. Row i is computed from inputs[: i + 1], and from the
    tokens in the cache. Radford et al. 2019, section 2.3.

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

    kvcache: None, or float32 [n_layer, 2, n_head, capacity, n_embd/n_head], as for `mha` in each
    layer. The inputs follow the n_past tokens that are in it.
    Raises IndexError for an id >= n_vocab, and for more than n_ctx tokens in total. (JAX, in place
    of NumPy, raises nothing.)
    """
    ids = np.asarray(inputs)  # [n_seq]
    positions = np.arange(n_past, n_past + len(ids))  # [n_seq]
    # attention cannot tell where a token stands, so a position embedding is added to each row
    x = wte[ids] + wpe[positions]  # pick a row per token: [n_seq] -> [n_seq, n_embd]

    for i, block in enumerate(blocks):
        layer_cache = None if kvcache is None else kvcache[i]  # a view, so mha writes into kvcache
        x = transformer_block(x, **block, n_head=n_head, kvcache=layer_cache, n_past=n_past)

    return layer_norm(x, **ln_f)


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, kvcache=None, n_past=0):
    """The model: token ids [n_seq] -> logits [n_seq, n_vocab].

    Row i predicts the token that follows inputs[: i + 1] (and the tokens in the cache), with one
    logit for each token of the vocabulary. The arguments and errors are those of `transformer`.
    """
    x = transformer(inputs, wte, wpe, blocks, ln_f, n_head=n_head, kvcache=kvcache, n_past=n_past)
    # tied embeddings: the logit of a token is the dot product of a row of x with the token's own
    # embedding. "Using the Output Embedding to Improve Language Models" (Press and Wolf 2017)
    return x @ wte.T  # [n_seq, n_embd] @ [n_embd, n_vocab] -> [n_seq, n_vocab]


# ---- Generation ------------------------------------------------------------------------------
#
# The loop at the top of this file gives the model the whole text for each new token, and most of
# the work is the same as the last time: because no token looks at later ones, the keys and values
# of the earlier tokens do not change, in any layer. So `stream` keeps them in an array, the
# kvcache:
#
#     [n_layer, 2, n_head, capacity, n_embd/n_head]
#
# The axis of length 2 is for keys and values, and capacity is how many tokens fit. n_past of them
# are in it already, and only the new tokens have to go through the model. Up to rounding, the
# results are the same as without a cache.
#
# For example, three inputs and two new tokens:
#
#     phase      goes through the model    n_past    in the cache afterwards    yields
#     prefill    inputs 0 and 1            0         2 tokens
#     decode     input 2                   2         3 tokens                   new token 0
#     decode     new token 0               3         4 tokens                   new token 1

# How many tokens of a prompt go through the model at once. With larger chunks, attention's scores,
# n_seq x (n_past + n_seq) per head, take more memory; with smaller ones, the matrix products are
# slower. On our machines, 384 was about the fastest.
CHUNK = 384


def stream(inputs, params, n_head, n_tokens_to_generate):
    """Greedy generation: repeatedly yield the most likely next token (lowest id on ties).

    This does what the loop at the top of this file does, but with the cache. It does not stop at
    `<|endoftext|>`, the separator between training documents, after which an unrelated text begins.

    inputs: a list of token ids, at least one. params: the weights, as in `transformer`. Yields
    n_tokens_to_generate ids (ints), each as soon as it is known.
    Raises ValueError if there are no inputs, IndexError when the context of n_ctx tokens is full.
    """
    n_ctx, n_embd = params["wpe"].shape
    n_layer = len(params["blocks"])
    # -1, because the last new token does not go through the model
    capacity = min(len(inputs) + n_tokens_to_generate - 1, n_ctx)
    # np.empty does not initialize the array: each entry is written before it is read
    kvcache = np.empty((n_layer, 2, n_head, capacity, n_embd // n_head), np.float32)

    # the prefill phase: all inputs but the last go through the model, only to fill the cache, so no
    # logits are needed. They go in large chunks, because larger matrix products are more efficient.
    # The last one is left for the decode phase, since its logits choose the first new token
    *past, token = inputs  # a ValueError if there are none
    for n_past in range(0, len(past), CHUNK):
        chunk = past[n_past : n_past + CHUNK]
        transformer(chunk, **params, n_head=n_head, kvcache=kvcache, n_past=n_past)

    # the decode phase: feed one token, get the next
    for n_past in range(len(past), len(past) + n_tokens_to_generate):
        logits = gpt2([token], **params, n_head=n_head, kvcache=kvcache, n_past=n_past)
        token = int(np.argmax(logits[-1]))  # softmax would not change which one is the largest
        yield token


def generate(inputs, params, n_head, n_tokens_to_generate):
    """Return a list of the ids that `stream` yields, and show a progress bar meanwhile.

    For programs that import this file. `main` calls `stream` itself, to print as it generates.
    """
    ids = stream(inputs, params, n_head, n_tokens_to_generate)
    bar = tqdm(ids, desc="generating", total=n_tokens_to_generate)
    return list(bar)


def main(
    prompt: str,
    n_tokens_to_generate: int = 40,
    model_size: str = "124M",
    models_dir: str = "models",
) -> str:
    """Continue a text with GPT-2: print the new text, token by token, and return it.

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
    # here, because the model itself does not need utils
    from utils import UserError, load_encoder_hparams_and_params

    # check the count before anything is downloaded. The command line passes strings, and without
    # quotation marks, the second word of a prompt lands here
    if not str(n_tokens_to_generate).isdecimal():
        raise UserError(f"{n_tokens_to_generate!r} is not a token count: is the prompt in quotes?")
    n_new = int(n_tokens_to_generate)

    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    ids = encoder.encode(prompt)
    if not ids:
        ids = [encoder.encoder["<|endoftext|>"]]  # it separated the texts in training

    n_ctx = hparams["n_ctx"]
    if len(ids) + n_new > n_ctx:
        raise UserError(
            f"the prompt has {len(ids)} tokens; {n_new} more would exceed the context of {n_ctx}"
        )

    text = ""
    new_ids = stream(ids, params, hparams["n_head"], n_new)
    for piece in encoder.decode_each(new_ids):  # a piece as soon as its id is known
        print(piece, end="", flush=True)
        text += piece
    print(flush=True)
    return text


if __name__ == "__main__":
    from utils import one_line_errors, parse_arguments

    with one_line_errors():
        main(*parse_arguments(main))
