"""Everything around the model: errors, arguments, download, checkpoint, command line.

The functions are in groups with headings. The last group, the command line, uses the others.
"""

import base64
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import signal
import sys
import time
import types

import numpy as np
from tqdm import tqdm

from encoder import get_encoder

# ---- Errors ----------------------------------------------------------------------------------


class UserError(ValueError):
    """An error the user can fix: the command line prints its message instead of a traceback."""


MALFORMED = (ValueError, TypeError, AttributeError, LookupError, RecursionError)  # text and JSON


@contextlib.contextmanager
def damage_reported(path, errors=MALFORMED):
    """Turn errors that the contents of a file cause into a UserError that names the file."""
    try:
        yield
    except errors as error:
        raise UserError(f"{path} is damaged ({error}); move it away and run this again") from error


# ---- Arguments -------------------------------------------------------------------------------


def check_n_tokens(n_tokens):
    """Return n_tokens, an integer of any type, as an int. Raises UserError unless it is >= 0."""
    if isinstance(n_tokens, bool) or not hasattr(n_tokens, "__index__") or n_tokens < 0:
        raise UserError(f"n_tokens_to_generate must be a whole number >= 0, not {n_tokens!r}")
    return n_tokens.__index__()


def check_lengths(n_seq, n_tokens, n_ctx):
    """Return n_tokens as an int. Raises UserError unless they fit into the context."""
    n_new = check_n_tokens(n_tokens)
    if n_seq == 0:
        raise UserError("the prompt has 0 tokens, but at least 1 is needed")
    if n_seq + n_new > n_ctx:
        raise UserError(f"{n_seq} prompt tokens and {n_new} new ones exceed the context of {n_ctx}")
    return n_new


# ---- Download --------------------------------------------------------------------------------

SIZES = {"124M": "0.5 GB", "355M": "1.4 GB", "774M": "3.1 GB", "1558M": "6.2 GB"}  # of the files
URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
DATA = ".data-00000-of-00001"  # the suffixes of a checkpoint's two main files
INDEX = ".index"
# in the order of the download: with the index, which comes last, a checkpoint is complete
CHECKPOINT_FILES = ("checkpoint", "model.ckpt.meta", f"model.ckpt{DATA}", f"model.ckpt{INDEX}")
FILES = ("encoder.json", "hparams.json", "vocab.bpe", *CHECKPOINT_FILES)
TOY = 'python gpt2.py "Twas brillig, and the slithy" --models_dir tests/models'


def download_gpt2_files(model_size, model_dir):
    """Download those of OpenAI's seven files that are missing in model_dir.

    Uses no network if none is missing. Raises UserError (a ValueError) or OSError.
    """
    if model_size not in SIZES:
        raise UserError(f"model_size must be one of {', '.join(SIZES)}, not {model_size!r}")
    if not missing_files(model_dir):
        return
    os.makedirs(model_dir, exist_ok=True)
    what = f"GPT-2 {model_size} ({SIZES[model_size]} at most)"
    print(f"downloading {what} from {URL} to {model_dir}", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        lock(model_dir, stack)
        for name in missing_files(model_dir):  # again: another process may have downloaded some
            download_file(f"{URL}/{model_size}/{name}", os.path.join(model_dir, name))


def missing_files(model_dir):
    """The names of the files to download into model_dir, in order. Raises UserError or OSError.

    Nothing is added to a checkpoint that is complete, or that has another name than OpenAI's.
    """
    names = os.listdir(model_dir) if os.path.isdir(model_dir) else []
    named = {os.path.basename(checkpoint_prefix(model_dir))} if "checkpoint" in names else set()
    with_index = {name.removesuffix(INDEX) for name in names if name.endswith(INDEX)}
    with_data = {n.rpartition(".data-")[0] for n in names if re.search(r"\.data-\d+-of-\d+$", n)}
    wanted = FILES
    if with_index & with_data or (with_index | with_data | named) - {"model.ckpt"}:
        # except for the fourth file, "checkpoint", which only says that the name is model.ckpt
        wanted = FILES[:4] if "model.ckpt" in with_index else FILES[:3]
    return [name for name in wanted if name not in names]


def lock(folder, stack):
    """Wait until no other process is downloading into this folder; lock it until stack is closed.

    Windows and some network file systems have no such locks. If two processes then write to the
    same partial file, `verify` detects it, given a checksum.
    """
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def download_file(url, path):
    """Download url to <path>.part, resuming whenever the connection breaks, and rename it to path.

    Raises UserError for a checksum mismatch, and after four attempts in a row without progress.
    """
    part = f"{path}.part"
    largest = file_size(part)
    failures = 0
    while failures < 4:
        time.sleep(failures)  # 0 to 3 seconds
        try:
            reply, start = request_rest(url, file_size(part))
            append(reply, part, start)
            verify(reply, part)
            os.replace(part, path)
            return
        except OSError as error:  # from the network or the disk: requests.RequestException is one
            # requests wraps the original error
            reason = next((arg.reason for arg in error.args if hasattr(arg, "reason")), error)
        failures = 0 if file_size(part) > largest else failures + 1
        largest = max(largest, file_size(part))
    raise UserError(f"cannot download {url} ({reason}); run this again to resume, or offline {TOY}")


def file_size(path):
    """The size of a file in bytes, 0 if there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def request_rest(url, size):
    """Request the part of url that follows the first `size` bytes, starting one byte early.

    Without that byte, the rest of a complete file would be empty, which is an error in HTTP.
    Returns the reply and the position of its first byte: 0 if the server sends the whole file.
    Raises OSError.
    """
    import requests

    start = max(size - 1, 0)
    # a compressed file could not be resumed; requests omits a header whose value is None
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-" if start else None}
    reply = requests.get(url, headers=headers, stream=True, timeout=(5, 10))  # seconds
    resumed = reply.headers.get("Content-Range", "").startswith(f"bytes {start}-")
    if start and reply.status_code in (206, 416) and not resumed:
        return request_rest(url, 0)  # not the range that was requested, or no such range
    if reply.status_code != (206 if resumed else 200):
        raise OSError(f"{reply.status_code} {reply.reason}")
    if "html" in reply.headers.get("Content-Type", ""):
        raise OSError("got a web page instead of the file: a login or proxy page?")
    return reply, start if resumed else 0


def append(reply, part, start):
    """Write the reply's body to the file `part` from position `start` on, with a progress bar.

    Raises OSError if the connection breaks or the disk is full.
    """
    header = reply.headers.get("Content-Range") or reply.headers.get("Content-Length", "")
    digits = header.rpartition("/")[2]  # the 10 of "bytes 5-9/10" or "10"; it may be "*" or missing
    total = int(digits) if digits.isdecimal() else 0
    bar = tqdm(desc=os.path.basename(part), total=total, initial=start, unit="B", unit_scale=True)
    with bar, open(part, "r+b" if start else "wb", buffering=0) as file:
        file.seek(start)
        for piece in reply.iter_content(8192):
            bar.update(file.write(piece))
        os.fsync(file.fileno())  # the contents must be on disk before the file gets its final name
    if file_size(part) < max(total, 1):
        raise OSError(f"got {file_size(part):,} of {total:,} bytes")


def verify(reply, part):
    """Compare the file with the MD5 that Azure Blob Storage sends, if any. Raises UserError."""
    # in a 206 reply, Content-MD5 covers only the part that was sent
    header = "Content-MD5" if reply.status_code == 200 else "x-ms-blob-content-md5"
    digest = hashlib.md5(np.memmap(part, np.uint8, "r"), usedforsecurity=False).digest()
    if reply.headers.get(header) not in (None, base64.b64encode(digest).decode()):
        os.remove(part)
        raise UserError(f"checksum mismatch; the partial file {part} was deleted, run this again")


# ---- Checkpoint ------------------------------------------------------------------------------


def checkpoint_prefix(model_dir):
    """The path of the checkpoint that the file `checkpoint` names, as in models/124M/model.ckpt.

    The file may have the full path under which the checkpoint was once saved; only its last
    component counts. Raises UserError if it names no checkpoint, OSError if it cannot be read.
    """
    path = os.path.join(model_dir, "checkpoint")
    with damage_reported(path), open(path, encoding="utf-8") as file:
        match = re.search(r'model_checkpoint_path: "(?:[^"]*[/\\])?([^"]+)"', file.read())
        if not match:
            raise ValueError("it names no checkpoint")
    return os.path.join(model_dir, match[1])


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """Load the weights as `gpt2.gpt2` takes them: nested dicts of float32 arrays.

    tf_ckpt_path: the checkpoint's files without their endings, as in models/124M/model.ckpt.
    hparams: n_vocab, n_ctx, n_embd, n_head, n_layer.
    Raises UserError for a damaged checkpoint or one that hparams does not describe, OSError for
    one that cannot be read.

    In practice, a checkpoint's data file is its arrays back to back, so they can be memory-mapped
    (and are then read-only), which takes no time and no memory of its own. But no specification
    says so. Therefore, the first run reads every array with TensorFlow and compares. If all are
    equal, the fingerprint of the checkpoint is saved in <tf_ckpt_path>.mapped. As long as it
    matches, TensorFlow is not needed. (Damage that leaves size and mtime alone goes unnoticed.)
    """
    shapes = variable_shapes(hparams)
    note = pathlib.Path(f"{tf_ckpt_path}.mapped")
    try:
        mapped = map_arrays(tf_ckpt_path, shapes)
        expected = fingerprint(tf_ckpt_path, hparams)
        is_verified = note.exists() and note.read_bytes() == expected
    except (OSError, ValueError):  # several data files, or damaged: TensorFlow reads it or says why
        return nest(dict(read_with_tensorflow(tf_ckpt_path, shapes)))
    if not is_verified:
        arrays = read_with_tensorflow(tf_ckpt_path, shapes)  # one at a time: they are only compared
        # compare the bits, because NaN != NaN
        if not all(np.array_equal(a.view("u4"), mapped[name].view("u4")) for name, a in arrays):
            return nest(dict(read_with_tensorflow(tf_ckpt_path, shapes)))
        with contextlib.suppress(OSError):  # in a read-only folder, the next run compares again
            note.write_bytes(expected)
    return nest(mapped)


def variable_shapes(hparams):
    """{name: shape} of GPT-2's variables (OpenAI's src/model.py), sorted as in the data file."""
    n = hparams["n_embd"]
    layer = {f"{norm}/{name}": [n] for norm in ("ln_1", "ln_2") for name in "gb"}
    layer |= {"attn/c_attn/w": [n, 3 * n], "attn/c_attn/b": [3 * n]}
    layer |= {"attn/c_proj/w": [n, n], "attn/c_proj/b": [n]}
    layer |= {"mlp/c_fc/w": [n, 4 * n], "mlp/c_fc/b": [4 * n]}
    layer |= {"mlp/c_proj/w": [4 * n, n], "mlp/c_proj/b": [n]}
    shapes = {f"model/h{i}/{k}": v for i in range(hparams["n_layer"]) for k, v in layer.items()}
    shapes |= {"model/wte": [hparams["n_vocab"], n], "model/wpe": [hparams["n_ctx"], n]}
    shapes |= {"model/ln_f/g": [n], "model/ln_f/b": [n]}
    return dict(sorted(shapes.items()))


def map_arrays(prefix, shapes):
    """{name: array}: the data file as a memory map, cut into arrays of these shapes.

    Raises OSError or ValueError if there is no such file or it is too short.
    """
    sizes = [np.prod(shape) for shape in shapes.values()]
    data = np.memmap(prefix + DATA, np.float32, "r", shape=sum(sizes))
    parts = np.split(np.asarray(data), np.cumsum(sizes)[:-1])
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def fingerprint(prefix, hparams):
    """Bytes that identify a checkpoint, wherever it is copied with its modification time.

    Copying may round that to seconds. The index file has the CRC of every array.
    """
    data = os.stat(prefix + DATA)
    index_hash = hashlib.sha256(pathlib.Path(prefix + INDEX).read_bytes()).hexdigest()
    return json.dumps([hparams, data.st_size, int(data.st_mtime), index_hash]).encode()


def read_with_tensorflow(prefix, shapes):
    """Yield the (name, float32 array) of each variable. TensorFlow verifies their CRCs.

    Raises UserError for a damaged checkpoint or one that does not match hparams.json, OSError if
    there is none.
    """
    with tqdm(shapes.items(), f"reading {os.path.basename(prefix)}") as bar:
        import tensorflow as tf  # takes seconds, so the bar comes first

        reader = open_with_tensorflow(prefix)
        saved = reader.get_variable_to_shape_map()
        for name in saved:
            if re.fullmatch(r"model/h\d+/ln_1/g", name) and name not in shapes:
                raise UserError(f"{prefix} has more layers than hparams.json says: {name}")
        for name, shape in bar:
            found = saved.get(name, "missing")
            if found not in (shape, [1, *shape]):  # OpenAI's matrices are [1, n_in, n_out]
                raise UserError(f"{prefix}: by hparams.json, {name} is {shape}, here it is {found}")
            with damage_reported(prefix + DATA, (*MALFORMED, tf.errors.OpError)):
                yield name, np.asarray(reader.get_tensor(name), np.float32).reshape(shape)


def open_with_tensorflow(prefix):
    """TensorFlow's reader of a checkpoint. Raises UserError, or OSError if there is none."""
    import tensorflow as tf

    os.stat(prefix + INDEX)  # raises OSError
    with damage_reported(prefix + INDEX, tf.errors.OpError):
        try:
            return tf.train.load_checkpoint(prefix)
        except (tf.errors.NotFoundError, UnicodeError):  # although the file is there
            raise UserError(f"TensorFlow cannot open {prefix}: is there a [ or \\ in it?") from None


def nest(arrays):
    """{"model/h0/attn/c_attn/w": array} -> {"blocks": [{"attn": {"c_attn": {"w": array}}}]}."""
    params = {}
    for name, array in arrays.items():
        *path, last = name.split("/")[1:]
        group = params
        for key in path:
            group = group.setdefault(key, {})
        group[last] = array
    params["blocks"] = [params.pop(f"h{i}") for i in range(len(params) - 3)]  # not wte, wpe, ln_f
    return params


# ---- Encoder, hparams and params -------------------------------------------------------------


def load_encoder_hparams_and_params(model_size, models_dir):
    """Load all that `gpt2.generate` needs: returns an Encoder, the hparams dict, the params dict.

    model_size: 124M, 355M, 774M or 1558M, in the folder <models_dir>/<model_size>. What is missing
    there is downloaded first. Raises UserError (a ValueError) or OSError.
    """
    model_dir = os.path.join(models_dir, str(model_size))
    download_gpt2_files(model_size, model_dir)
    with damage_reported(f"the vocabulary ({model_dir}/encoder.json and {model_dir}/vocab.bpe)"):
        encoder = get_encoder(model_size, models_dir)
    hparams = load_hparams(model_dir, len(encoder.encoder))
    return encoder, hparams, load_gpt2_params_from_tf_ckpt(checkpoint_prefix(model_dir), hparams)


def load_hparams(model_dir, n_vocab):
    """Read hparams.json. Raises UserError if it is damaged or does not fit n_vocab tokens."""
    path = os.path.join(model_dir, "hparams.json")
    with damage_reported(path), open(path, encoding="utf-8") as file:
        hparams = json.load(file)
        sizes = [hparams[name] for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")]
        if any(type(size) is not int or not 0 < size < 10**5 for size in sizes):
            raise ValueError(f"the sizes are {sizes}")
        if hparams["n_vocab"] != n_vocab:
            raise ValueError(f"n_vocab is not {n_vocab}, the number of tokens in encoder.json")
        if hparams["n_embd"] % hparams["n_head"]:
            raise ValueError("n_embd is not divisible by n_head")
    return hparams


# ---- Command line ----------------------------------------------------------------------------

USAGE = 'usage: python gpt2.py "PROMPT" [--OPTION=VALUE ...]; --prompt="..." takes any text'


def run_command_line(main):
    """Call main with the arguments of the command line and print the text that it returns.

    An error the user can fix becomes one line on stderr and exit status 1. The settings made here
    affect the whole process, so only a program should call this function.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program without a traceback
    # silence TensorFlow and oneDNN, unless the user wants to see their messages
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (None if closed by the caller)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")  # "?" for what the terminal cannot show
    keep_freed_memory()
    try:
        print(call(main, sys.argv[1:]), flush=True)
    except BrokenPipeError:  # as in `... | head`; without dup2, the flush at exit would fail, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        sys.exit(" ".join(str(error).split()))  # one line, even if a file name has a line break


def keep_freed_memory():
    """Make malloc on Linux keep freed memory for the next array.

    By default, glibc returns large blocks to the system when they are freed, and getting new ones
    costs page faults: tens of thousands for a long prompt, a third of its time. But once it has
    returned a block of up to 32 MiB, it keeps all later ones up to that size. This frees one.
    """
    np.empty(2**25 - 2**16, np.uint8)


def call(main, arguments):
    """Parse the arguments and call main. Returns its result, or the help text for --help."""
    import fire

    if {"-h", "--help"} & set(arguments):
        return fire.helptext.HelpText(main, trace=fire.trace.FireTrace(main, name="gpt2.py"))
    prompt, n_new, model_size, models_dir = parse(main, arguments)
    if not re.fullmatch(r"\d{1,99}", str(n_new)):
        raise UserError(f"n_tokens_to_generate must be a whole number >= 0, not {n_new!r}; {USAGE}")
    # the shell does not expand the ~ in --models_dir=~/models
    return main(prompt, int(n_new), model_size, os.path.expanduser(models_dir))


class Parsed(types.SimpleNamespace):
    """A parsed call. Fire looks for extra arguments among the members of a result: it has none."""

    def __dir__(self):
        return []


def parse(main, arguments):
    """Parse the command line with Fire. Returns a string or the default for each parameter of main.

    Raises UserError for a missing, unknown or extra argument.
    """
    import fire

    # Fire calls a function before it finds extra arguments, so this one only records
    record = functools.wraps(main)(lambda *values: Parsed(values=values))
    fire.decorators.SetParseFn(str)(record)  # the prompt "12345" is not a number
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            # by default, Fire takes the prompt "-" as a separator between two calls
            command = [*arguments, "--", "--separator=\0"]
            return fire.Fire(record, command, serialize=lambda result: None).values
    except fire.core.FireExit as error:
        raise UserError(f"{error.trace.elements[-1].ErrorAsStr()}; {USAGE}") from None
