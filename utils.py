"""Everything around the model: errors, download, checkpoint, command line, arguments.

`load_encoder_hparams_and_params` is the entry point. What it calls follows, in the order of the
calls; the last two sections serve gpt2.py.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import signal
import sys
import time

import numpy as np
from tqdm import tqdm

from encoder import get_encoder


def load_encoder_hparams_and_params(model_size, models_dir):
    """Load everything `gpt2.generate` needs: an Encoder, the hparams dict and the params dict.

    model_size: 124M, 355M, 774M or 1558M. Its files are in <models_dir>/<model_size>; missing ones
    are downloaded first. Raises UserError (a ValueError) or OSError.
    """
    model_dir = os.path.join(os.path.expanduser(models_dir), str(model_size))  # ~/models is at home
    download_gpt2_files(model_size, model_dir)
    with damage_reported(f"{model_dir}/encoder.json or vocab.bpe"):
        encoder = get_encoder(model_size, os.path.dirname(model_dir))
    with damage_reported(f"{model_dir}/hparams.json"):
        hparams = json.loads(pathlib.Path(model_dir, "hparams.json").read_text("utf-8"))
        if hparams["n_vocab"] != len(encoder.encoder):
            raise ValueError(f"n_vocab is not {len(encoder.encoder)}, the size of the vocabulary")
    return encoder, hparams, load_gpt2_params_from_tf_ckpt(checkpoint_prefix(model_dir), hparams)


# ---- Errors ----------------------------------------------------------------------------------


class UserError(ValueError):
    """An error the user can fix: the command line prints its message instead of a traceback."""


@contextlib.contextmanager
def damage_reported(path, errors=(ValueError, TypeError, LookupError)):
    """Re-raise the errors that a file's contents can cause as a UserError that names the file."""
    try:
        yield
    except errors as error:
        advice = "if it is damaged, move it to another folder and run this again"
        raise UserError(f"cannot read {path} ({error}); {advice}") from error


# ---- Download --------------------------------------------------------------------------------

SIZES = ("124M", "355M", "774M", "1558M")
URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
DATA = ".data-00000-of-00001"
# in download order
FILES = ["encoder.json", "hparams.json", "vocab.bpe", "checkpoint"]
FILES += ["model.ckpt.meta", f"model.ckpt{DATA}", "model.ckpt.index"]
TOY = 'try the toy model offline: python gpt2.py "Twas brillig" --models_dir tests/models'


def download_gpt2_files(model_size, model_dir):
    """Download whichever of OpenAI's seven files are missing from the folder model_dir.

    If it has a complete checkpoint, or names one of the user's own, only the vocabulary and
    hparams.json are downloaded. Raises UserError (a ValueError) or OSError.
    """
    if model_size not in SIZES:
        raise UserError(f"model_size must be one of {', '.join(SIZES)}, not {model_size!r}")
    os.makedirs(model_dir, exist_ok=True)
    prefix = checkpoint_prefix(model_dir)
    has_data = any(pathlib.Path(model_dir).glob("model.ckpt.data-*[0-9]"))  # not .part
    is_complete = has_data and os.path.exists(f"{prefix}.index")
    is_own = os.path.basename(prefix) != "model.ckpt"
    for name in FILES[:3] if is_complete or is_own else FILES:
        download_file(f"{URL}/{model_size}/{name}", os.path.join(model_dir, name))


def checkpoint_prefix(model_dir):
    """Find the checkpoint in model_dir: its path without suffix, as in models/124M/model.ckpt.

    Its name is in the file `checkpoint`, perhaps with the folder in which it was once saved.
    Without that file, the index tells the name; without an index, it is OpenAI's. Raises UserError
    or OSError, also for several indexes without that file.
    """
    path = pathlib.Path(model_dir, "checkpoint")
    indexes = [*path.parent.glob("*.index")] or [path.with_name("model.ckpt.index")]
    if len(indexes) == 1 and not path.exists():
        return str(indexes[0].with_suffix(""))
    with damage_reported(path):
        pattern = r'model_checkpoint_path: "(?:[^"]*[/\\])?([^"]+)"'
        return os.path.join(model_dir, re.search(pattern, path.read_text("utf-8"))[1])


def download_file(url, path):
    """Download url to the partial file <path>.part, and rename it to path when it is complete.

    An interrupted download is resumed. Several processes may download the same file at once: all
    write the same bytes to the same positions, and none leaves a gap. Raises UserError after four
    attempts in a row without progress, or at once if trying again cannot help.
    """
    part = f"{path}.part"
    failures = 0
    largest = file_size(part)
    while not os.path.exists(path):
        print(f"downloading {url}", file=sys.stderr)
        try:
            fetch_rest(url, part)
            os.replace(part, path)
        except (OSError, ValueError) as error:  # from the network or the disk; a malformed reply
            failures = 0 if file_size(part) > largest else failures + 1
            largest = max(largest, file_size(part))
            if failures == 4 or isinstance(error, UserError):
                raise UserError(f"cannot download {url} ({error}); rerun to resume, or {TOY}")
            time.sleep(failures)


def file_size(path):
    """Return the size of a file in bytes, or 0 if there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def fetch_rest(url, part):
    """Request the rest of url, which the partial file lacks, and write it there.

    The request starts one byte early: the rest of a complete file would be empty, which is an error
    in HTTP. Raises UserError if trying again cannot help, OSError or ValueError if it may.
    """
    import requests

    pathlib.Path(part).touch()
    with open(part, "r+b") as file:
        start = max(file.seek(0, os.SEEK_END) - 1, 0)
        # a compressed file could not be resumed
        headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
        with requests.get(url, headers=headers, stream=True, timeout=(5, 10)) as reply:  # seconds
            if reply.status_code == 416:  # the partial file is too long: start over
                os.remove(part)  # check_reply raises OSError, so it is requested anew
            check_reply(reply, start)
            write_body(reply, file, start if reply.status_code == 206 else 0)


def check_reply(reply, start):
    """Check that a reply has the whole file (200) or the bytes from `start` on (206).

    Raises UserError if trying again cannot help, OSError if it may.
    """
    status = f"{reply.status_code} {reply.reason}"
    if 400 <= reply.status_code < 500 and reply.status_code not in (408, 416, 429):
        raise UserError(status)
    is_rest = reply.headers.get("Content-Range", "").startswith(f"bytes {start}-")
    if reply.status_code != 200 and not (reply.status_code == 206 and is_rest):
        raise OSError(status)
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
    if not total and reply.headers.get("Transfer-Encoding") == "chunked":
        total = file.tell()  # the reply says where it ends, but not how long it is
    if not 0 < total == file.tell() == file_size(file.name):
        raise OSError(f"got {file.tell():,} of {total:,} bytes; {file_size(file.name):,} on disk")


# ---- Checkpoint ------------------------------------------------------------------------------


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """Load the weights as `gpt2.gpt2` takes them: nested dicts of float32 arrays.

    tf_ckpt_path: the checkpoint's files without their suffixes, as in models/124M/model.ckpt.
    hparams: n_vocab, n_ctx, n_embd, n_head, n_layer.
    Raises UserError if the checkpoint is damaged or has other sizes than hparams, OSError if it
    cannot be opened.

    In practice, the data file is all arrays back to back, sorted by name, so it can be memory-
    mapped, which takes hardly any time or memory. But no specification says so. Therefore, the
    first run also reads each array with TensorFlow and compares. If all are equal, it saves a note
    with their shapes and a fingerprint of the checkpoint. As long as that matches, TensorFlow is
    not needed. (Damage that leaves size and modification time unchanged goes unnoticed.) Other
    files, such as those with an optimizer's arrays, are read with TensorFlow every time.

    The arrays can be changed: the map is copy-on-write, so the file stays as it is.
    """
    keep_freed_memory()
    open(f"{tf_ckpt_path}.index", "rb").close()  # raises OSError here; below, it would be caught
    try:
        note = json.loads(pathlib.Path(f"{tf_ckpt_path}.mapped").read_text("utf-8"))
        arrays = map_arrays(tf_ckpt_path, note[fingerprint(tf_ckpt_path)])
    except (OSError, ValueError, TypeError, LookupError):  # no note that matches
        arrays = read_with_tensorflow(tf_ckpt_path)
    with damage_reported(f"{tf_ckpt_path} or hparams.json"):
        params = nest(arrays)
        found = [len(params["wte"]), *params["wpe"].shape, len(params["blocks"])]
        expected = [hparams[name] for name in ("n_vocab", "n_ctx", "n_embd", "n_layer")]
        if found != expected or hparams["n_embd"] % hparams["n_head"]:
            raise ValueError(f"the weights have the sizes {found}, but hparams are {hparams}")
    return params


def keep_freed_memory():
    """Make malloc on Linux keep freed memory for the next array.

    By default, glibc returns large blocks to the system when they are freed, and getting new ones
    costs page faults. But once it has returned a block of up to 32 MiB, it keeps all later ones up
    to that size. This frees one. It saves a 900-token prompt 110,000 page faults and a tenth of its
    time (124M, as measured on one machine).
    """
    np.empty(2**25 - 2**16, np.uint8)


def fingerprint(prefix):
    """Identify a checkpoint. A copy that keeps the modification time has the same fingerprint.

    (Copying may round the time to seconds.) The index has the CRC of every array. Raises OSError.
    """
    index = pathlib.Path(f"{prefix}.index").read_bytes().hex()
    return f"{file_size(prefix + DATA)} {int(os.path.getmtime(prefix + DATA))} {index}"


def map_arrays(prefix, shapes):
    """Memory-map the data file and cut it into arrays of these shapes: {name: array}.

    Returns {} if the file is not exactly as long as the arrays. Raises OSError.
    """
    sizes = [np.prod(shape, dtype=np.int64) for shape in shapes.values()]
    if file_size(prefix + DATA) != 4 * sum(sizes):  # bytes per float32
        return {}
    data = np.memmap(prefix + DATA, np.float32, "c")  # copy-on-write
    parts = np.split(np.asarray(data), np.cumsum(sizes)[:-1])
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def read_with_tensorflow(prefix):
    """Memory-map the arrays, and replace each that TensorFlow reads differently: {name: array}.

    TensorFlow verifies the CRCs. Saves the note for later runs, which is empty if any was replaced.
    Raises UserError or OSError.
    """
    print(f"reading {prefix} with TensorFlow", file=sys.stderr)  # importing it takes seconds
    import tensorflow as tf

    with damage_reported(prefix, (tf.errors.OpError, ValueError, LookupError)):
        shapes = gpt2_shapes(tf.train.list_variables(prefix))
        arrays = map_arrays(prefix, shapes)
        note = {fingerprint(prefix): shapes} if arrays else {}
        for name, shape in tqdm(shapes.items(), "reading"):
            array = np.asarray(tf.train.load_variable(prefix, name), np.float32).reshape(shape)
            if name not in arrays or not np.array_equal(array, arrays[name]):
                arrays[name] = array
                note = {}
    with contextlib.suppress(OSError):  # a read-only folder
        pathlib.Path(f"{prefix}.mapped").write_text(json.dumps(note))
    return arrays


def gpt2_shapes(variables):
    """Select GPT-2's variables from pairs of name and shape: {name: shape}.

    Others, such as an optimizer's model/wte/Adam, are ignored. OpenAI's [1, n_in, n_out] becomes
    [n_in, n_out].
    """
    return {n: shape[-2:] for n, shape in variables if re.fullmatch(r"model/(w[tp]e|.*/[gbw])", n)}


def nest(arrays):
    """Build the tree of params from {name: array}.

    For instance, "model/h0/attn/c_attn/w" becomes params["blocks"][0]["attn"]["c_attn"]["w"].
    """
    params = {}
    for name, array in arrays.items():
        *path, last = name.split("/")[1:]
        group = functools.reduce(lambda tree, key: tree.setdefault(key, {}), path, params)
        group[last] = array
    params["blocks"] = [params.pop(f"h{i}") for i in range(len(params) - 3)]  # not wte, wpe, ln_f
    return params


# ---- Command line ----------------------------------------------------------------------------

USAGE = 'usage: python gpt2.py "PROMPT" [--OPTION=VALUE ...]; --prompt="..." takes any text'


def run_command_line(main):
    """Call main with the arguments of the command line and print the text that it returns.

    An error the user can fix becomes one line on stderr and exit status 1. The settings made here
    affect the whole process, so only a program should call this function.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program without a traceback
    # silence TensorFlow and oneDNN, unless the user wants to see their messages
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    sys.stdout.reconfigure(errors="replace")  # "?" for what the terminal cannot show
    try:
        text = call(main, sys.argv[1:])
        # closed here, because Python would flush a broken pipe (as in `... | true`) again at exit
        with contextlib.suppress(BrokenPipeError), sys.stdout:
            print(text)
    except (UserError, OSError, MemoryError) as error:
        sys.exit(" ".join(str(error).split()) or "out of memory")  # one line, whatever is in it


def call(main, arguments):
    """Parse the arguments with Fire and call main. Returns its result, or the text for --help.

    Raises UserError for a missing, unknown or extra argument, and for an option without a value.
    """
    import fire

    if {"-h", "--help"} & set(arguments):
        return fire.helptext.HelpText(main, trace=fire.trace.FireTrace(main, name="gpt2.py"))
    check_options(arguments)
    # Fire finds extra arguments only after the call, so let it call a stub that records the values
    calls = []
    record = functools.wraps(main)(lambda *values: calls.append(values))
    fire.decorators.SetParseFn(str)(record)  # the prompt "12345" is not a number
    try:
        with open(os.devnull, "w", errors="replace") as null, contextlib.redirect_stderr(null):
            # by default, Fire takes the prompt "-" as a separator between two calls
            fire.Fire(record, [*arguments, "--", "--separator=\0"])
    except fire.core.FireExit as error:
        raise UserError(f"{error.trace.elements[-1].ErrorAsStr()}; {USAGE}") from None
    return main(*calls[0])


def check_options(arguments):
    """Raise UserError for an option without a value, which Fire would set to True.

    An option has no value if another option or nothing follows it.
    """
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        if re.fullmatch("(--|-[a-zA-Z])[^=]*", argument) and re.match("--|-[a-zA-Z]", following):
            raise UserError(f"{argument} needs a value; {USAGE}")


# ---- Arguments -------------------------------------------------------------------------------


def check_n_tokens(n_tokens):
    """Return n_tokens (an integer >= 0, or its digits) as an int. Raises UserError otherwise."""
    if not re.fullmatch(r"\d{1,4000}", str(n_tokens)):
        raise UserError(f"n_tokens_to_generate must be a whole number, not {n_tokens!r}; {USAGE}")
    return int(n_tokens)
