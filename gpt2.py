"""GPT-2 in NumPy, to be read from top to bottom: the layers, the model, greedy generation, the command line.

The model is that of "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019), as OpenAI wrote it in
src/model.py. It turns n_seq token ids into n_seq rows of logits: row i scores each token of the vocabulary as the one
that follows tokens 0 to i. Arrays are float32 throughout, and x is [n_seq, n_embd]: one row a token.
"""

import os
import signal
import sys

if __name__ == "__main__":  # from the first import on, Ctrl-C ends the program at once, with the usual status
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import numpy as np
from tqdm import tqdm

from utils import UserError, load_encoder_hparams_and_params


def gelu(x):
    """The activation: about 0 for x << 0, about x for x >> 0, smooth between. Any shape.

    The tanh form, with its fitted 0.044715, of Hendrycks and Gimpel 2016, section 2.
    """
    # ** 0.5, a Python float: np.sqrt would give a float64 scalar, and on NumPy 2 all that follows would be float64
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x)))


def softmax(x):
    """Scores -> probabilities: from 0 to 1, each row (last axis) sums to 1. Any shape."""
    exp_x = np.exp(x - np.max(x, axis=-1, keepdims=True))  # the largest becomes exp(0) = 1: none overflows
    return exp_x / np.sum(exp_x, axis=-1, keepdims=True)


def layer_norm(x, g, b, eps=1e-5):
    """Give each row of x mean 0 and variance 1, then scale by g and shift by b, both [n_embd]; same shape as x.

    Ba et al. 2016, section 3; eps (OpenAI's value) keeps a constant row from dividing by 0.
    """
    x = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(x * x, axis=-1, keepdims=True)  # [n_seq, n_embd] -> [n_seq, 1]
    return g * (x / np.sqrt(variance + eps)) + b


def linear(x, w, b):
    """x @ w + b: [n_seq, n_in], [n_in, n_out], [n_out] -> [n_seq, n_out]."""
    return x @ w + b


def ffn(x, c_fc, c_proj):
    """The feed-forward network: what each token makes of itself, alone. [n_seq, n_embd] -> [n_seq, n_embd].

    Vaswani et al. 2017, section 3.3, with GELU for its ReLU.
    """
    # [n_seq, n_embd] -> [n_seq, 4*n_embd] -> [n_seq, n_embd]
    return linear(gelu(linear(x, **c_fc)), **c_proj)


def attention(q, k, v, mask):
    """Each query's mean of the values, weighted by how well their keys match it.

    q [n_q, d_k], k [n_k, d_k], v [n_k, d_v], mask [n_q, n_k] (added to the scores: 0 keeps, -1e10 hides, for its exp is
    0) -> [n_q, d_v]. Axes before these, such as the heads, are kept. Vaswani et al. 2017, section 3.2.1: a sum of d_k
    products grows with sqrt(d_k); divided by that, it does not make softmax choose one key and forget the others.
    """
    scores = (q / q.shape[-1] ** 0.5) @ k.swapaxes(-1, -2)  # [n_q, d_k] @ [d_k, n_k] -> [n_q, n_k]
    return softmax(scores + mask) @ v  # [n_q, n_k] @ [n_k, d_v] -> [n_q, d_v]


def mha(x, c_attn, c_proj, n_head, kvcache=None):
    """Multi-head self-attention: what a token takes from itself and those before. [n_seq, n_embd] -> [n_seq, n_embd].

    Vaswani et al. 2017, section 3.2.2. n_head heads attend side by side, each in n_embd / n_head dimensions.
    kvcache, a float32 array [2, n_head, n_past + n_seq, n_embd/n_head], holds the keys and values of n_past earlier
    tokens; those of the n_seq new ones are written behind them.
    """
    n_seq, n_embd = x.shape
    # [n_seq, n_embd] -> [n_seq, 3*n_embd] -> [n_seq, 3, n_head, n_embd/n_head] -> [3, n_head, n_seq, n_embd/n_head]
    qkv = linear(x, **c_attn).reshape(n_seq, 3, n_head, n_embd // n_head).transpose(1, 2, 0, 3)
    q, k, v = qkv  # [n_head, n_seq, n_embd/n_head] each
    if kvcache is not None:  # no later token changes a key or value: computed once, they serve all that follow
        kvcache[:, :, -n_seq:] = qkv[1:]
        k, v = kvcache  # from here on k and v are [n_head, n_past + n_seq, n_embd/n_head]
    # the causal mask: the query at place n_past + i sees keys 0 to n_past + i; one new token, the last, sees them all
    seen = np.tri(n_seq, k.shape[1], k.shape[1] - n_seq, dtype=x.dtype)  # [n_seq, n_past + n_seq], 1 or 0
    x = attention(q, k, v, -1e10 * (1 - seen))  # -> [n_head, n_seq, n_embd/n_head]
    x = x.swapaxes(0, 1).reshape(n_seq, n_embd)  # the heads side by side again: -> [n_seq, n_embd]
    return linear(x, **c_proj)  # [n_seq, n_embd] -> [n_seq, n_embd]


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, kvcache=None):
    """One layer: each token looks back (attention), then thinks (ffn). [n_seq, n_embd] -> [n_seq, n_embd].

    Each adds to x instead of replacing it, and reads it normalized: Radford et al. 2019, section 2.3.
    """
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, kvcache=kvcache)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, kvcache=None):
    """The model: token ids [n_seq] -> logits, float32 [n_seq, n_vocab]; row i is about the token after inputs[i].

    wte [n_vocab, n_embd] and wpe [n_ctx, n_embd] embed tokens and positions; blocks has each layer's weights, ln_f
    those of the last layer_norm.
    kvcache [n_layer, 2, n_head, n_past + n_seq, n_embd/n_head] (see `mha`): inputs come after n_past earlier tokens,
    and the logits are those of the last one alone, [1, n_vocab]. It is filled in place; all else is left as it is.
    Raises IndexError for an id from n_vocab on, or more than n_ctx tokens in all.
    """
    inputs = np.asarray(inputs)
    n_past = 0 if kvcache is None else kvcache.shape[3] - len(inputs)
    x = wte[inputs] + wpe[np.arange(n_past, n_past + len(inputs))]  # [n_seq] -> [n_seq, n_embd]
    for i, block in enumerate(blocks):
        x = transformer_block(x, **block, n_head=n_head, kvcache=None if kvcache is None else kvcache[i])
    x = x if kvcache is None else x[-1:]  # with a cache: [n_seq, n_embd] -> [1, n_embd]
    # wte once more: a token scores high if its embedding is like x (tied weights, Press and Wolf 2017)
    return layer_norm(x, **ln_f) @ wte.T  # [n_seq or 1, n_embd] @ [n_embd, n_vocab] -> [n_seq or 1, n_vocab]


def generate(inputs, params, n_head, n_tokens_to_generate):
    """Greedy generation: again and again the token with the largest logit (the first, of equals) is appended.

    inputs: token ids [n_seq], left as they are. params: what `gpt2` takes. Returns the n_tokens_to_generate new ids, a
    list of ints. Raises UserError (a ValueError) if there is no input or the model has not as many positions.
    """
    (n_ctx, n_embd), n_seq, n_new = params["wpe"].shape, len(inputs), n_tokens_to_generate
    if type(n_new) is not int or n_new < 0 or not 1 <= n_seq <= n_ctx - n_new:
        raise UserError(f"{n_seq} prompt tokens + {n_new!r} new: whole numbers, the first > 0, {n_ctx} at most in all")
    kvcache = np.empty((len(params["blocks"]), 2, n_head, n_seq + n_new, n_embd // n_head), np.float32)
    # Made and freed, for one effect: malloc on Linux gives a large freed block back to the system, and to get its pages
    # once more takes time. After it has freed a block of just under 32 MiB, it keeps what is no larger.
    np.empty(2**25 - 2**16, np.uint8)
    ids, n_past = list(inputs), 0
    for _ in tqdm(range(n_new), "generating"):
        while n_past < len(ids):  # at first the prompt, 192 tokens at a time (fastest of what was tried); then one
            new = ids[n_past : n_past + 192]
            logits = gpt2(new, **params, n_head=n_head, kvcache=kvcache[:, :, :, : n_past + len(new)])
            n_past += len(new)
        ids.append(int(np.argmax(logits[-1])))  # [n_vocab] -> id
    return ids[n_seq:]


def main(prompt, n_tokens_to_generate=40, model_size="124M", models_dir="models"):
    """Continue a text with GPT-2.

    Args:
        prompt: the text to continue; "" lets the model begin.
        n_tokens_to_generate: how many tokens to add; together with the prompt's, at most 1024.
        model_size: 124M, 355M, 774M or 1558M; downloaded at its first use.
        models_dir: the folder that holds a folder for each model size.

    Returns:
        The new text, without the prompt.

    Raises:
        UserError (a ValueError) or OSError: something that the user can mend.
    """
    if type(n_tokens_to_generate) is not int or n_tokens_to_generate < 0:  # said before half a gigabyte is downloaded
        raise UserError(f"n_tokens_to_generate must be a whole number from 0 up, not {n_tokens_to_generate!r}")
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    inputs = encoder.encode(prompt) or [encoder.encoder["<|endoftext|>"]]  # what stood before each training text
    return encoder.decode(generate(inputs, params, hparams["n_head"], n_tokens_to_generate))


def command_line():
    """Run `main` as the command line asks. What a user can mend is one line on stderr and exit status 1."""
    import contextlib
    import functools
    import io

    import fire

    calls = []  # Fire calls a function before it has understood the whole line: here it is only noted
    note = functools.wraps(main)(lambda *args, **kwargs: calls.append(functools.partial(main, *args, **kwargs)))
    fire.decorators.FIRE_METADATA = "_fire"  # an attribute that SetParseFns makes; --help lists those without "_"
    fire.decorators.SetParseFns(prompt=str, model_size=str, models_dir=str)(note)  # or Fire makes a number of "12345"
    try:
        with contextlib.redirect_stderr(io.StringIO()) as screen:  # Fire answers a mistake with a screenful
            # Fire's own separator is "-", here a prompt like any
            fire.Fire(note, ["--help"] if {"-h", "--help"} & set(sys.argv) else [*sys.argv[1:], "--", "--separator=\0"])
        print(calls[0](), flush=True)
    except fire.core.FireExit as stop:
        mistake = stop.code and f"{stop.trace.elements[-1].ErrorAsStr()!r} (see python gpt2.py --help)"
        sys.exit(mistake or print(screen.getvalue(), file=sys.stderr))  # code 0 is --help: its text, and status 0
    except BrokenPipeError:  # the reader of the text has seen enough: nothing to say, not even when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        sys.exit(" ".join(str(error).split()))  # one line, even if a file name has two


if __name__ == "__main__":
    # a stream that the caller has closed takes all in silence; a terminal that cannot show a character shows "?"
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")
    command_line()
