"""Everything around the model: download, checkpoint, command line.

`load_encoder_hparams_and_params` comes first, as the table of contents. The functions it calls
follow in the order of the calls.
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
    models_dir = os.path.expanduser(models_dir)  # ~ is the home folder
    model_dir = os.path.join(models_dir, str(model_size))
    download_gpt2_files(model_size, model_dir)
    with damage_reported(f"{model_dir}/encoder.json or vocab.bpe"):
        encoder = get_encoder(model_size, models_dir)
    with damage_reported(f"{model_dir}/hparams.json"):
        hparams = json.loads(pathlib.Path(model_dir, "hparams.json").read_text("utf-8"))
        if hparams["n_vocab"] != len(encoder.encoder):
            raise ValueError(f"n_vocab is not {len(encoder.encoder)}, the size of the vocabulary")
    return encoder, hparams, load_gpt2_params_from_tf_ckpt(checkpoint_prefix(model_dir), hparams)


# ---- Errors ----------------------------------------------------------------------------------


class UserError(ValueError):
    """An error the user can fix: the command line prints its message instead of a traceback."""


@contextlib.contextmanager
def damage_reported(path, errors=(ValueError, TypeError, AttributeError, LookupError)):
    """Turn the errors that the contents of a file can cause into a UserError that names it."""
    try:
        yield
    except errors as error:
        advice = "if it is damaged, move it to another folder and run this again"
        raise UserError(f"cannot read {path} ({error}); {advice}") from error


# ---- Download --------------------------------------------------------------------------------

SIZES = ("124M", "355M", "774M", "1558M")
URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
DATA = ".data-00000-of-00001"  # the suffixes of a checkpoint's two main files
INDEX = ".index"
# in the order of the download
FILES = ["encoder.json", "hparams.json", "vocab.bpe", "checkpoint"]
FILES += ["model.ckpt.meta", f"model.ckpt{DATA}", f"model.ckpt{INDEX}"]
TOY = 'try the toy model offline: python gpt2.py "Twas brillig" --models_dir tests/models'


def download_gpt2_files(model_size, model_dir):
    """Download those of OpenAI's seven files that are missing in the folder model_dir.

    A complete checkpoint, or one with another name than OpenAI's, needs no weights. Uses no network
    if nothing is missing. Raises UserError (a ValueError) or OSError.
    """
    if model_size not in SIZES:
        raise UserError(f"model_size must be one of {', '.join(SIZES)}, not {model_size!r}")
    os.makedirs(model_dir, exist_ok=True)
    prefix = checkpoint_prefix(model_dir)
    has_data = any(pathlib.Path(model_dir).glob("model.ckpt.data-*-of-*[0-9]"))
    is_complete = has_data and os.path.exists(prefix + INDEX)
    is_own = os.path.basename(prefix) != "model.ckpt"
    for name in FILES[:3] if is_complete or is_own else FILES:
        download_file(f"{URL}/{model_size}/{name}", os.path.join(model_dir, name))


def checkpoint_prefix(model_dir):
    """The path of the checkpoint in model_dir, without suffix, as in models/124M/model.ckpt.

    Its name is in the file `checkpoint`, perhaps with the folder in which it was saved. Without
    that file, it is the name of an index, or else OpenAI's. Raises UserError or OSError.
    """
    path = pathlib.Path(model_dir, "checkpoint")
    with contextlib.suppress(FileNotFoundError), damage_reported(path):
        pattern = r'model_checkpoint_path: "(?:[^"]*[/\\])?([^"]+)"'
        return os.path.join(model_dir, re.search(pattern, path.read_text("utf-8"))[1])
    indexes = [*path.parent.glob(f"*{INDEX}"), path.with_name(f"model.ckpt{INDEX}")]
    return str(indexes[0]).removesuffix(INDEX)


def download_file(url, path):
    """Download url to the partial file <path>.part, and rename it to path when it is complete.

    An interrupted download is resumed. Several processes may download the same file at once: all
    write the same bytes to the same positions, and none leaves a gap. Raises UserError after four
    attempts in a row without progress, or at once if another attempt would be no use.
    """
    part = f"{path}.part"
    failures = 0
    while not os.path.exists(path):
        print(f"downloading {url}", file=sys.stderr)
        size = file_size(part)
        try:
            fetch_rest(url, part)
            os.replace(part, path)
        except OSError as error:  # from the network or the disk
            failures = 0 if file_size(part) > size else failures + 1
            if failures == 4:
                raise UserError(f"cannot download {url} ({error}); rerun to resume, or {TOY}")
            time.sleep(failures)


def file_size(path):
    """The size of a file in bytes, 0 if there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def fetch_rest(url, part):
    """Request what the partial file lacks of url, and write it there. Raises OSError or UserError.

    The request starts one byte early: the rest of a complete file would be empty, which is an error
    in HTTP.
    """
    import requests

    pathlib.Path(part).touch()
    with open(part, "r+b", buffering=0) as file:
        start = max(file.seek(0, os.SEEK_END) - 1, 0)
        # a compressed file could not be resumed
        headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
        with requests.get(url, headers=headers, stream=True, timeout=(5, 10)) as reply:  # seconds
            if reply.status_code == 416:  # the partial file is longer than the file: start over
                file.truncate(0)
            check_reply(reply, start)
            write_body(reply, file, start if reply.status_code == 206 else 0)


def check_reply(reply, start):
    """Check that a reply has the whole file (200) or the bytes from `start` on (206).

    Raises OSError if another attempt may help, UserError if not.
    """
    status = f"{reply.status_code} {reply.reason}"
    if re.match("4(?!08|16|29)", status):  # those three are worth another attempt
        raise UserError(f"cannot download {reply.url}: {status}")
    is_rest = reply.headers.get("Content-Range", "").startswith(f"bytes {start}-")
    if reply.status_code != 200 and not (reply.status_code == 206 and is_rest):
        raise OSError(status)
    if "html" in reply.headers.get("Content-Type", "").lower():
        raise UserError(f"cannot download {reply.url}: got a web page (of a login or a proxy?)")


def write_body(reply, file, start):
    """Write the body of a reply to the file, from position `start` on, with a progress bar.

    Raises OSError if the connection breaks or the disk is full, or if another process has completed
    and renamed the file meanwhile: its name may then belong to a new partial file.
    """
    header = reply.headers.get("Content-Range") or reply.headers.get("Content-Length", "")
    total = int(re.search(r"\d*$", header)[0] or 0)  # the 10 of "bytes 5-9/10" or "10", if known
    with tqdm(desc=file.name, total=total, initial=start, unit="B", unit_scale=True) as bar:
        file.seek(start)
        for piece in reply.iter_content(8192):
            bar.update(file.write(piece))
    if min(file.tell(), file_size(file.name)) < max(total, 1):
        raise OSError(f"got {file.tell():,} of {total:,} bytes")


# ---- Checkpoint ------------------------------------------------------------------------------


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """Load the weights as `gpt2.gpt2` takes them: nested dicts of float32 arrays.

    tf_ckpt_path: the checkpoint's files without their suffixes, as in models/124M/model.ckpt.
    hparams: n_vocab, n_ctx, n_embd, n_head, n_layer.
    Raises UserError for a damaged checkpoint or one that hparams does not describe, OSError for
    one that cannot be opened.

    In practice, a checkpoint's data file is its arrays back to back, so they can be memory-mapped,
    which takes no time and no memory of its own. But no specification says so. Therefore, the first
    run reads every array with TensorFlow and compares. If all are equal, it saves a note with their
    shapes and the fingerprint of the checkpoint. As long as that matches, TensorFlow is not needed.
    (Damage that leaves the size and the modification time alone goes unnoticed.) The arrays can be
    changed; the file cannot be changed through them.
    """
    keep_freed_memory()
    open(tf_ckpt_path + INDEX, "rb").close()  # if that is impossible, OSError says why
    try:
        note = json.loads(pathlib.Path(f"{tf_ckpt_path}.mapped").read_text("utf-8"))
        arrays = map_arrays(tf_ckpt_path, note[fingerprint(tf_ckpt_path)])
    except (OSError, ValueError, TypeError, LookupError):  # there is no note of this checkpoint
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
    to that size. This frees one.
    """
    np.empty(2**25 - 2**16, np.uint8)


def fingerprint(prefix):
    """Identify a checkpoint, wherever it is copied with its modification time. Raises OSError.

    Copying may round the time to seconds. The index has the CRC of every array.
    """
    data = os.stat(prefix + DATA)
    return f"{data.st_size} {int(data.st_mtime)} {pathlib.Path(prefix + INDEX).read_bytes().hex()}"


def map_arrays(prefix, shapes):
    """{name: array}: the data file, memory-mapped and cut into arrays of these shapes.

    Returns {} if the file is not exactly as long as the arrays. Raises OSError.
    """
    sizes = [np.prod(shape) for shape in shapes.values()]
    if file_size(prefix + DATA) != 4 * sum(sizes):  # bytes per float32
        return {}
    data = np.memmap(prefix + DATA, np.float32, "c")  # copy-on-write
    parts = np.split(np.asarray(data), np.cumsum(sizes)[:-1])
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def read_with_tensorflow(prefix):
    """{name: array}: each array memory-mapped if the map has the same bits, otherwise as read.

    TensorFlow verifies the CRCs. Saves a note for the next run if all are mapped. Raises UserError
    or OSError.
    """
    print(f"reading {prefix} with TensorFlow", file=sys.stderr)  # importing it takes seconds
    import tensorflow as tf

    with damage_reported(prefix, (tf.errors.OpError, IndexError)):
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
    """{name: shape} of GPT-2's variables, without the leading 1 of OpenAI's [1, n_in, n_out].

    variables: pairs of name and shape. Others, such as an optimizer's model/wte/Adam, are ignored.
    """
    return {n: shape[-2:] for n, shape in variables if re.fullmatch(r"model/(w[tp]e|.*/[gbw])", n)}


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
        sys.exit(" ".join(str(error).split()))  # one line, even if a file name has a line break


def call(main, arguments):
    """Parse the arguments with Fire and call main. Returns its result, or the text for --help.

    Raises UserError for a missing, unknown or extra argument, and for an option without a value.
    """
    import fire

    if {"-h", "--help"} & set(arguments):
        return fire.helptext.HelpText(main, trace=fire.trace.FireTrace(main, name="gpt2.py"))
    check_options(arguments)
    # Fire calls a function before it finds extra arguments, so this one only records the values
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
    """Raise UserError for an option without a value, which Fire would set to True."""
    is_option = re.compile("--|-[a-zA-Z]").match
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        if is_option(argument) and "=" not in argument and is_option(following):
            raise UserError(f"{argument} needs a value; {USAGE}")


def check_n_tokens(n_tokens):
    """Return n_tokens (an integer or its digits) as an int. Raises UserError if it is neither."""
    if not re.fullmatch(r"\d{1,9}", str(n_tokens)):
        raise UserError(f"n_tokens_to_generate must be a whole number, not {n_tokens!r}; {USAGE}")
    return int(n_tokens)
