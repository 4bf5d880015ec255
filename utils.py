"""Everything around the model: the checkpoint, its download, the command line, errors.

`load_encoder_hparams_and_params` is the entry point of a program that uses the model. In each
section, a function is followed by those that it calls.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from encoder import get_encoder


def load_encoder_hparams_and_params(model_size, models_dir):
    """Load everything `gpt2.generate` needs: an Encoder, the hparams dict and the params dict.

    hparams are the hyperparameters: n_vocab, n_ctx, n_embd, n_head and n_layer. params are the
    weights, in the tree that `gpt2.gpt2` takes.
    model_size: 124M, 355M, 774M or 1558M. Its files are in <models_dir>/<model_size>; missing ones
    are downloaded first. Raises UserError (a ValueError) or OSError.
    """
    model_dir = os.path.join(os.path.expanduser(models_dir), str(model_size))
    download_gpt2_files(model_size, model_dir)
    with damage_reported(f"{model_dir}/encoder.json or vocab.bpe"):
        encoder = get_encoder(model_size, os.path.dirname(model_dir))
    with damage_reported(f"{model_dir}/hparams.json"):
        hparams = dict(json.loads(Path(model_dir, "hparams.json").read_text("utf-8")))
    hparams["n_vocab"] = len(encoder.encoder)  # so the weights must fit the vocabulary, too
    return encoder, hparams, load_gpt2_params_from_tf_ckpt(checkpoint_prefix(model_dir), hparams)


# ---- Checkpoint ------------------------------------------------------------------------------
#
# A TensorFlow checkpoint has two files (or more, if the data is in several shards):
#
# model.ckpt.index                  the names, shapes and checksums of the variables
# model.ckpt.data-00000-of-00001    their values; in OpenAI's, float32 arrays one after another
#
# "model.ckpt" is called the prefix. tests/textbook.py loads such a checkpoint in the plainest way.

DATA = ".data-00000-of-00001"


def checkpoint_prefix(model_dir):
    """Find the checkpoint in model_dir. Returns its prefix, as in models/124M/model.ckpt.

    Its name is in the file `checkpoint`, perhaps with the folder in which it was once saved.
    Without that file, the index tells the name; without an index, it is OpenAI's. Raises UserError
    or OSError, also for several indexes without that file.
    """
    path = Path(model_dir, "checkpoint")
    indexes = [*path.parent.glob("*.index")] or [path.with_name("model.ckpt.index")]
    if len(indexes) == 1 and not path.exists():
        return indexes[0].with_suffix("")
    with damage_reported(path):
        # the first string in quotes, without folders
        return path.with_name(re.search(r': "(?:[^"]*[/\\])?([^"]+)"', path.read_text("utf-8"))[1])


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """Load the weights as `gpt2.gpt2` takes them: nested dicts of float32 arrays.

    tf_ckpt_path: the prefix. hparams: n_vocab, n_ctx, n_embd, n_head, n_layer.
    Raises UserError if the checkpoint is damaged or has other sizes than hparams, OSError if it
    cannot be opened.

    Reading OpenAI's data file takes hardly any time or memory, because it can be memory-mapped: its
    arrays are in the order of their names. To be sure, the first run also reads each array with
    TensorFlow, and compares. If all are equal, it saves a note with the shapes and a fingerprint of
    the checkpoint. While that still matches, TensorFlow is not needed. (Damage that leaves size and
    modification time unchanged goes unnoticed.) Other files, such as those with an optimizer's
    arrays, are read with TensorFlow every time. (The index says where each array is, but in a
    binary format that only TensorFlow reads: parsing it would take more code than this.)

    The arrays can be changed: the map is copy-on-write, so the file stays as it is.
    """
    # On Linux, malloc returns a large block to the system when it is freed, and from then on keeps
    # all blocks up to that size (at most 32 MiB) for the next array. So free one: it saves a fifth
    # of the time of a 900-token prompt (124M, on one machine)
    np.empty(2**25 - 2**16, np.uint8)
    open(f"{tf_ckpt_path}.index", "rb").close()  # raises OSError if there is no checkpoint
    arrays = map_as_noted(tf_ckpt_path) or read_with_tensorflow(tf_ckpt_path)
    with damage_reported(f"{tf_ckpt_path} or hparams.json"):
        params = nest(arrays)
        sizes = {"n_vocab": len(params["wte"]), "n_layer": len(params["blocks"])}
        sizes["n_ctx"], sizes["n_embd"] = params["wpe"].shape
        if not sizes.items() <= hparams.items() or hparams["n_embd"] % hparams["n_head"]:
            raise ValueError(f"the sizes of the weights are {sizes}, but hparams are {hparams}")
    return params


def map_as_noted(prefix):
    """Memory-map the arrays, if a note of an earlier run says that this is right: {name: array}.

    Returns None if no note fits.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
        note = json.loads(Path(f"{prefix}.mapped").read_text("utf-8"))
        return map_arrays(prefix, note[fingerprint(prefix)])


def fingerprint(prefix):
    """Identify a checkpoint. A copy that keeps the modification time has the same fingerprint.

    (Copying may round the time to seconds.) The index has the CRC of every array. Raises OSError.
    """
    index = Path(f"{prefix}.index").read_bytes().hex()
    return f"{file_size(f'{prefix}{DATA}')} {int(os.path.getmtime(f'{prefix}{DATA}'))} {index}"


def map_arrays(prefix, shapes):
    """Memory-map the data file and cut it into arrays of these shapes: {name: array}.

    Returns {} if the file is not exactly as long as the arrays. Raises OSError.
    """
    sizes = [np.prod(shape, dtype=np.int64) for shape in shapes.values()]
    if file_size(f"{prefix}{DATA}") != 4 * sum(sizes):  # bytes per float32
        return {}
    data = np.memmap(f"{prefix}{DATA}", np.float32, "c")  # copy-on-write
    parts = np.split(np.asarray(data), np.cumsum(sizes)[:-1])
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def read_with_tensorflow(prefix):
    """Read the arrays with TensorFlow, which verifies their checksums: {name: array}.

    Those that can be memory-mapped are, to save memory. Saves the note for later runs, which is
    empty if any array cannot be mapped. Raises UserError or OSError.
    """
    print(f"reading {prefix} with TensorFlow", file=sys.stderr)  # importing it takes seconds
    import tensorflow as tf

    with damage_reported(prefix, (tf.errors.OpError, ValueError, LookupError)):
        reader = tf.compat.v1.train.NewCheckpointReader(str(prefix))
        shapes = sorted(reader.get_variable_to_shape_map().items())  # as in OpenAI's data file
        # only GPT-2's, not an optimizer's, such as model/wte/Adam
        shapes = {n: shape for n, shape in shapes if re.fullmatch("model/(w[tp]e|.*/[gbw])", n)}
        mapped = map_arrays(prefix, shapes)
        read = ((n, np.asarray(reader.get_tensor(n), np.float32)) for n in tqdm(shapes, "reading"))
        different = {n: array for n, array in read if not np.array_equal(array, mapped.get(n))}
    note = {} if different else {fingerprint(prefix): shapes}
    with contextlib.suppress(OSError):  # a read-only folder
        Path(f"{prefix}.mapped").write_text(json.dumps(note))
    return mapped | different


def nest(arrays):
    """Build the tree of params from {name: array}.

    For instance, "model/h0/attn/c_attn/w", [1, n_in, n_out] in OpenAI's checkpoint, becomes
    params["blocks"][0]["attn"]["c_attn"]["w"], [n_in, n_out].
    """
    params = {}
    for name, array in arrays.items():
        group = params
        for key in name.split("/")[1:-1]:
            group = group.setdefault(key, {})
        group[name.split("/")[-1]] = array.reshape(array.shape[-2:])
    params["blocks"] = [params.pop(f"h{i}") for i in range(len(params) - 3)]  # not wte, wpe, ln_f
    return params


# ---- Download --------------------------------------------------------------------------------

SIZES = ("124M", "355M", "774M", "1558M")
URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
# in download order
FILES = ["encoder.json", "hparams.json", "vocab.bpe", "checkpoint"]
FILES += ["model.ckpt.meta", f"model.ckpt{DATA}", "model.ckpt.index"]


def download_gpt2_files(model_size, model_dir):
    """Download whichever of OpenAI's seven files are missing from the folder model_dir.

    If it has a complete checkpoint, or names one of the user's own, only the vocabulary and
    hparams.json are downloaded. Raises UserError (a ValueError) or OSError.
    """
    if model_size not in SIZES:
        raise UsageError(f"model_size must be one of {', '.join(SIZES)}, not {model_size!r}")
    os.makedirs(model_dir, exist_ok=True)
    prefix = checkpoint_prefix(model_dir)
    has_data = any(Path(model_dir).glob("model.ckpt.data-*[0-9]"))  # not the partial file
    is_complete = has_data and os.path.exists(f"{prefix}.index")
    for name in FILES[:3] if is_complete or os.path.basename(prefix) != "model.ckpt" else FILES:
        download_file(f"{URL}/{model_size}/{name}", os.path.join(model_dir, name))


def download_file(url, path):
    """Download url to the partial file <path>.part, and rename it to path when it is complete.

    An interrupted download is resumed. Several processes may download the same file at once: all
    write the same bytes to the same positions, and none leaves a gap. Raises UserError after four
    attempts in a row without progress, or at once if trying again cannot help.
    """
    part = f"{path}.part"
    sizes = [0]  # of the partial file after each attempt
    while not os.path.exists(path):
        print(f"downloading {url}", file=sys.stderr)
        try:
            fetch_rest(url, part)
            os.replace(part, path)
        except (OSError, ValueError) as error:  # from the network or the disk; a malformed reply
            sizes.append(file_size(part))
            failures = len(sizes) - 1 - sizes.index(max(sizes))  # attempts since it last grew
            if failures == 4 or isinstance(error, UserError):
                raise UserError(f"cannot download {url} ({error}); rerun to resume")
            time.sleep(failures)


def file_size(path):
    """Return the size of a file in bytes, or 0 if there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def fetch_rest(url, part):
    """Request the rest of url, which the partial file lacks, and write it there.

    The request starts one byte early: the rest of a complete file would be empty, which is an error
    in HTTP. Raises UserError if trying again cannot help, OSError or ValueError if it may.
    """
    Path(part).touch()  # before the slow import, during which another process may complete it
    import requests

    with open(part, "r+b") as file:
        start = max(file.seek(0, os.SEEK_END) - 1, 0)
        # a compressed file could not be resumed
        headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
        with requests.get(url, headers=headers, stream=True, timeout=(5, 10)) as reply:  # seconds
            if reply.status_code != 416:
                check_reply(reply, start)
                return write_body(reply, file, start if reply.status_code == 206 else 0)
    os.remove(part)  # closed before, for Windows
    raise OSError("416: the partial file was too long")


def check_reply(reply, start):
    """Check that a reply has the whole file (200) or the bytes from `start` on (206).

    Raises UserError if trying again cannot help, OSError if it may.
    """
    is_rest = reply.headers.get("Content-Range", "").startswith(f"bytes {start}-")
    if reply.status_code != 200 and not (reply.status_code == 206 and is_rest):
        # 206: the wrong part of the file, 408: timeout, 429: too many requests, 5xx: server error
        kind = OSError if reply.status_code in (206, 408, 429, *range(500, 600)) else UserError
        raise kind(f"{reply.status_code} {reply.reason}")
    if "html" in reply.headers.get("Content-Type", "").lower():
        raise UserError("got a web page instead of the file: a login or proxy page?")


def write_body(reply, file, start):
    """Write the body of a reply to the file, from position `start` on, with a progress bar.

    Raises OSError if the connection breaks, the disk is full, or the size is not what it should be:
    another process may have completed and renamed the file meanwhile, and a third begun it anew.
    """
    header = reply.headers.get("Content-Range") or reply.headers.get("Content-Length", "")
    total = int(re.search(r"\d*$", header)[0] or 0)  # the 10 of "bytes 5-9/10" or of "10"
    with tqdm(total=total, initial=start, unit="B", unit_scale=True) as bar:
        file.seek(start)
        for piece in reply.iter_content(8192):
            bar.update(file.write(piece))
    file.flush()
    total = total or (file.tell() if reply.raw.chunked else 0)  # chunked: no size
    if not 0 < total == file.tell() == file_size(file.name):
        raise OSError(f"got {file.tell():,} of {total:,} bytes; {file_size(file.name):,} on disk")


# ---- Command line ----------------------------------------------------------------------------

USAGE = '; usage: python gpt2.py "PROMPT" [--OPTION=VALUE ...]; --prompt="..." takes any text'


def run_command_line(main, stream_text):
    """Print the text that main returns for the arguments of the command line, as it is generated.

    main has the parameters and the help. stream_text takes the same, and whether to hide the
    progress bar, and yields the text in pieces.
    An error the user can fix becomes one line on stderr and exit status 1, or 0 in IPython and
    Jupyter, which then do not show it as an exception.
    """
    # silence TensorFlow and oneDNN, unless the user wants to see their messages
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"} | os.environ
    in_session = hasattr(sys, "ps1") or sys.flags.interactive
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler and not in_session:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program without a traceback
    try:
        for piece in call(main, stream_text, sys.argv[1:]):
            print_piece(piece)
    except (UserError, OSError, MemoryError) as error:
        line = " ".join(str(error).split()) or "out of memory"
        print(line + USAGE * isinstance(error, UsageError), file=sys.stderr)
        sys.exit(0 if in_session else 1)
    finally:
        signal.signal(signal.SIGINT, handler)


def call(main, stream_text, arguments):
    """Parse the arguments and call stream_text. Returns its pieces of text, or those of the help.

    Raises UsageError for a missing, unknown or extra argument, and for an option without a value.
    """
    import fire

    if {"-h", "--help"} & set(arguments):
        return [fire.helptext.HelpText(main, trace=fire.trace.FireTrace(main, "gpt2.py")), "\n"]
    for argument, following in itertools.pairwise([*arguments, "--"]):
        if re.fullmatch("(--|-[a-zA-Z])[^=]*", argument) and re.match("--|-[a-zA-Z]", following):
            raise UsageError(f"{argument} needs a value")  # Fire would set it to True
    # on a terminal or in a notebook, the progress bar would run through the text
    hide = os.isatty(1) or hasattr(sys, "ps1")
    # Fire finds extra arguments only after the call; by then, a generator has not begun yet
    run = functools.wraps(main)(lambda *values: itertools.chain(stream_text(*values, hide), "\n"))
    fire.decorators.SetParseFn(str)(run)  # the prompt "12345" is not a number
    try:
        with open(os.devnull, "w", errors="replace") as null, contextlib.redirect_stderr(null):
            # by default, Fire takes the prompt "-" as a separator between two calls
            return fire.Fire(run, [*arguments, "--", "--separator=\0"], serialize=lambda _: None)
    except fire.core.FireExit as error:
        raise UsageError(error.trace.elements[-1].ErrorAsStr()) from None


def check_n_tokens(n_new, n_seq=0, n_ctx=float("inf")):
    """Return n_new (an integer >= 0, or its digits) as an int.

    Raises UserError if it is not one, or if n_seq tokens of a prompt and n_new more exceed n_ctx.
    """
    if not re.fullmatch("[0-9]{1,4300}", str(n_new)):  # int() takes no more digits
        raise UsageError(f"n_tokens_to_generate must be a whole number, not {n_new!r}")
    if n_seq + int(n_new) > n_ctx:
        raise UserError(f"{n_seq} prompt tokens and {n_new} new ones exceed the context of {n_ctx}")
    return int(n_new)


def print_piece(text):
    """Print a piece of text at once. What stdout cannot show becomes "?"."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)
    try:
        print(text, end="", flush=hasattr(sys.stdout, "flush"))
    except OSError as error:
        # Python flushes stdout at exit, and would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # a broken pipe: its reader has gone, as in `... | head`
        sys.exit(None if isinstance(error, BrokenPipeError) else f"cannot print the text ({error})")


# ---- Errors ----------------------------------------------------------------------------------


class UserError(ValueError):
    """An error the user can fix: the command line prints its message instead of a traceback."""


class UsageError(UserError):
    """A mistake in the arguments: the command line also prints its usage."""


@contextlib.contextmanager
def damage_reported(path, errors=(ValueError, TypeError, LookupError, ArithmeticError)):
    """Re-raise the errors that a file's contents can cause as a UserError that names the file."""
    try:
        yield
    except errors as error:
        raise UserError(f"cannot read {path} ({error}); if damaged, move it and rerun") from error
