"""Everything around the model. None of it is needed to understand GPT-2.

gpt2.py calls three of these functions. Here they are in the order of this file, with the functions
that they call:

    load_encoder_hparams_and_params         load everything that the model needs
        download_gpt2_files                 download the files that are missing
            download_file                   download one file, with as many requests as it takes
                download_rest               send one request
                    check_reply             check that the reply is what was asked for
        read_encoder                        load the tokenizer
        read_hparams                        load the hyperparameters
        ckpt_prefix                         find the checkpoint
        load_gpt2_params_from_tf_ckpt       load the weights
            load_weights                    map the data file, or read it with TensorFlow, or both
                weight_shapes               list what GPT-2 must have
                can_be_mapped               compare the size of the data file
                read_with_tensorflow        read the weights, and verify their checksums
                    import_tensorflow       without its log messages
                    damage_as_user_error    name the file, and say what to do
                    check_names_and_shapes  compare with weight_shapes
                make_stamp                  tell which data file this is
                is_verified                 see whether an earlier run has verified it
                map_weights                 map the data file
                map_and_compare             map it, and compare it with what TensorFlow reads
            nest                            make a tree of the weights
    parse_arguments                         read the command line
    one_line_errors                         print errors that the user can fix
        replace_unencodable_characters      print "?" instead
        flush_stdout                        or discard what it holds
"""

import contextlib
import functools
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from encoder import MismatchError, get_encoder

SIZES = ("124M", "355M", "774M", "1558M")


class UserError(ValueError):
    """An error the user can fix: the command line prints its message instead of a traceback."""


def load_encoder_hparams_and_params(model_size, models_dir):
    """Load what is needed to generate: an Encoder, the hparams dict and the params dict.

    hparams are the hyperparameters: n_vocab, n_ctx, n_embd, n_head and n_layer. params are the
    weights, in the tree that `gpt2.transformer` takes. model_size: 124M, 355M, 774M or 1558M. Its
    files are in <models_dir>/<model_size>; missing ones are downloaded first.
    Raises UserError (a ValueError), OSError, or ImportError if a package is missing or broken.
    """
    if model_size not in SIZES:
        raise UserError(f"model_size must be one of {', '.join(SIZES)}, not {model_size!r}")
    models_dir = os.path.expanduser(models_dir)  # no shell expands the ~ in --models_dir=~/models
    model_dir = Path(models_dir, model_size)

    download_gpt2_files(model_size, model_dir)
    encoder = read_encoder(model_size, models_dir)
    hparams = read_hparams(model_dir / "hparams.json")
    params = load_gpt2_params_from_tf_ckpt(ckpt_prefix(model_dir), hparams)
    return encoder, hparams, params


# ---- Download --------------------------------------------------------------------------------

URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
TIMEOUT = 60  # seconds to wait for a connection, or for the next bytes


def download_gpt2_files(model_size, model_dir):
    """Download whichever of OpenAI's seven files are missing from the folder model_dir.

    `checkpoint` comes last. So if it is there, the weights are complete, or are the user's own, and
    only the three small files are downloaded. Raises UserError, OSError or ImportError.
    """
    model_dir = Path(model_dir)
    model_dir.mkdir(parents=True, exist_ok=True)
    names = ["encoder.json", "hparams.json", "vocab.bpe"]
    if not (model_dir / "checkpoint").exists():
        names += [
            "model.ckpt.meta",
            "model.ckpt.data-00000-of-00001",
            "model.ckpt.index",
            "checkpoint",
        ]
    for name in names:
        path = model_dir / name
        if not path.exists():
            download_file(f"{URL}/{model_size}/{name}", path)


def download_file(url, path):
    """Download url to the partial file <path>.part, and rename it to path when it is complete.

    If the connection breaks, request the rest, as long as each request brings some bytes. What has
    been downloaded is kept: a later run requests the rest, too. Raises UserError or OSError.
    """
    part = path.with_name(f"{path.name}.part")
    part.touch()  # download_rest needs the file to exist
    while True:
        size_before = part.stat().st_size
        try:
            download_rest(url, part)
        except OSError as error:  # exceptions of requests are OSErrors, too
            if part.stat().st_size == size_before:
                raise UserError(f"cannot download {path}; rerun to resume ({error})") from error
        else:
            break
    part.replace(path)


def download_rest(url, part):
    """Request what the partial file still lacks, and append it. Raises OSError."""
    import requests  # here, because a run without a download does not need it

    # one byte early, because a complete file has no rest, and a request for it is an HTTP error
    start = max(part.stat().st_size - 1, 0)
    headers = {
        "Range": f"bytes={start}-",
        "Accept-Encoding": "identity",  # not compressed, since the range counts the file's bytes
    }
    try:
        reply = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except ValueError as error:  # some malformed proxy addresses raise it
        raise OSError(f"invalid proxy or URL: {error}") from error

    with reply, open(part, "r+b") as file:  # not "ab": the last byte is written again
        total = check_reply(reply, start)
        file.seek(start)
        with tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True) as bar:
            for chunk in reply.iter_content(8192):
                file.write(chunk)
                bar.update(len(chunk))
    size = part.stat().st_size
    if size != total:
        raise OSError(f"got {size:,} of {total:,} bytes")


def check_reply(reply, start):
    """Check that the reply has the bytes from `start` on, and return the size of the whole file.

    Raises OSError if it does not: nothing else may be appended to the partial file.
    """
    if reply.status_code != 206:  # Partial Content; a login page, for instance, would be 200 OK
        raise OSError(f"got {reply.status_code} {reply.reason} instead of the file")
    content_range = reply.headers.get("Content-Range", "")
    match = re.fullmatch(rf"bytes {start}-\d+/(\d+)", content_range)
    if match is None:
        raise OSError(f"asked for bytes {start}-, got a Content-Range of {content_range!r}")
    return int(match[1])


# ---- The three small files -------------------------------------------------------------------

# what reading a truncated or corrupt JSON file raises
JSON_ERRORS = (json.JSONDecodeError, UnicodeDecodeError)

DELETE_IT = "delete it to download OpenAI's copy"


def read_encoder(model_size, models_dir):
    """Return the Encoder. Raises UserError if one of its two files is damaged."""
    try:
        return get_encoder(model_size, models_dir)
    except JSON_ERRORS as error:  # from encoder.json; a damaged vocab.bpe raises MismatchError
        path = Path(models_dir, model_size, "encoder.json")
        raise UserError(f"cannot read {path}; {DELETE_IT} ({error})") from error
    except MismatchError as error:
        raise UserError(f"{error}; delete both to download OpenAI's copies") from error


def read_hparams(path):
    """Return the hyperparameters, a dict. Raises UserError if the file is damaged."""
    try:
        hparams = json.loads(path.read_text("utf-8"))
    except JSON_ERRORS as error:
        raise UserError(f"cannot read {path}; {DELETE_IT} ({error})") from error
    for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"):
        if name not in hparams:
            raise UserError(f"{path} has no {name}; {DELETE_IT}")
    return hparams


# ---- The checkpoint --------------------------------------------------------------------------
#
# A TensorFlow checkpoint is two files (or more, if the data is in several shards). What their names
# begin with, here model.ckpt, is called the prefix.
#
#     model.ckpt.index                  the names, shapes and checksums of the variables
#     model.ckpt.data-00000-of-00001    their values
#
# In OpenAI's data file, the values are float32 arrays one after another, in the order of their
# names, and nothing else. So it can be memory-mapped: the arrays are then parts of the file, which
# the operating system reads when they are used. This is instant and needs no second copy in memory,
# but it verifies no checksums. TensorFlow verifies them, but it takes seconds to import, and reads
# everything. So the first run maps the file, reads it with TensorFlow as well, and compares. Later
# runs rely on the map.

# it names `checkpoint`, too, because as long as that exists, no weights are downloaded
DELETE_CHECKPOINT = "if it is OpenAI's, delete model.ckpt.* and checkpoint to download them again"


def ckpt_prefix(model_dir):
    """Return the prefix of the checkpoint that is named in the file `checkpoint`.

    The line model_checkpoint_path: "/home/ann/run1/model-500" stands for <model_dir>/model-500: the
    folder in which the checkpoint was saved does not matter.
    """
    file = model_dir / "checkpoint"
    text = file.read_text("utf-8", errors="replace")
    paths = re.findall(r'^model_checkpoint_path: *"(.+)"', text, re.MULTILINE)
    if not paths:
        raise UserError(f'{file} has no line model_checkpoint_path: "..."; {DELETE_IT}')
    path = paths[-1]  # TensorFlow, too, uses the last one
    name = re.split(r"[/\\]", path)[-1]  # it may have been saved on Windows
    return model_dir / name


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """Load the weights as `gpt2.transformer` takes them: nested dicts of float32 arrays.

    tf_ckpt_path: the prefix. hparams: n_vocab, n_ctx, n_embd and n_layer. Raises UserError (a
    ValueError) if the checkpoint is damaged or does not fit hparams, ImportError if TensorFlow is
    needed but cannot be imported.

    The arrays can be changed. Even if they are memory-mapped, the file stays as it is, because the
    map is copy-on-write.
    """
    weights = load_weights(tf_ckpt_path, hparams)
    return nest(weights, hparams["n_layer"])


def load_weights(prefix, hparams):
    """Return {name: array} of a checkpoint. Raises what `load_gpt2_params_from_tf_ckpt` raises."""
    shapes = weight_shapes(hparams)
    data_file = Path(f"{prefix}.data-00000-of-00001")
    stamp_file = Path(f"{prefix}.verified")

    # case 1: it cannot be mapped, because its size differs: float16 numbers, several shards, or an
    # optimizer's variables. Or it is incomplete, and TensorFlow will say so
    if not can_be_mapped(data_file, shapes):
        return dict(read_with_tensorflow(prefix, shapes))

    # case 2: an earlier run has compared the map with what TensorFlow reads, and all was equal
    stamp = make_stamp(data_file, hparams)
    if is_verified(stamp_file, stamp):
        return map_weights(data_file, shapes)

    # case 3: compare them now. The stamp was made before, so if the file changes meanwhile, it will
    # not match, and the next run compares again
    weights, all_equal = map_and_compare(prefix, data_file, shapes)
    if all_equal:
        with contextlib.suppress(OSError):  # in a read-only folder, every run compares
            stamp_file.write_text(stamp)
    return weights


def weight_shapes(hparams):
    """Return {name: shape} of GPT-2's weights, as they are listed in `gpt2.transformer`."""
    n_embd = hparams["n_embd"]
    block = {
        "ln_1/g": (n_embd,),
        "ln_1/b": (n_embd,),
        "attn/c_attn/w": (n_embd, 3 * n_embd),
        "attn/c_attn/b": (3 * n_embd,),
        "attn/c_proj/w": (n_embd, n_embd),
        "attn/c_proj/b": (n_embd,),
        "ln_2/g": (n_embd,),
        "ln_2/b": (n_embd,),
        "mlp/c_fc/w": (n_embd, 4 * n_embd),
        "mlp/c_fc/b": (4 * n_embd,),
        "mlp/c_proj/w": (4 * n_embd, n_embd),
        "mlp/c_proj/b": (n_embd,),
    }
    shapes = {}
    shapes["model/wte"] = (hparams["n_vocab"], n_embd)
    shapes["model/wpe"] = (hparams["n_ctx"], n_embd)
    for i in range(hparams["n_layer"]):
        for name, shape in block.items():
            shapes[f"model/h{i}/{name}"] = shape
    shapes["model/ln_f/g"] = (n_embd,)
    shapes["model/ln_f/b"] = (n_embd,)
    return shapes


def can_be_mapped(data_file, shapes):
    """Whether the data file is exactly as long as all weights together, at 4 bytes per float32."""
    n_weights = sum(math.prod(shape) for shape in shapes.values())
    return data_file.exists() and data_file.stat().st_size == 4 * n_weights


def read_with_tensorflow(prefix, shapes):
    """Yield (name, float32 array) for each of the weights. TensorFlow verifies their checksums.

    Raises UserError if the checkpoint is damaged or has other weights, ImportError if TensorFlow
    cannot be imported.
    """
    # the bar is shown before the import, because that takes seconds, too
    with tqdm(desc=f"reading {Path(prefix).name} with TensorFlow", total=len(shapes)) as bar:
        tf = import_tensorflow()
        with damage_as_user_error(prefix, tf):
            reader = tf.train.load_checkpoint(str(prefix))
            variables = reader.get_variable_to_shape_map()
        check_names_and_shapes(prefix, variables, shapes)
        for name, shape in shapes.items():
            with damage_as_user_error(prefix, tf):
                array = reader.get_tensor(name)
            yield name, np.asarray(array, np.float32).reshape(shape)
            bar.update()


def import_tensorflow():
    """Import TensorFlow, without its log messages. Raises ImportError if that fails."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # oneDNN logs a message at any level
    try:
        import tensorflow
    except Exception as error:  # a broken installation can raise anything
        raise ImportError(f"cannot import TensorFlow: {error}") from error
    return tensorflow


@contextlib.contextmanager
def damage_as_user_error(prefix, tf):
    """Turn what TensorFlow raises for a damaged checkpoint into a UserError that says what to do.

    Wrap only TensorFlow's own calls in it: a bug of ours must not end in advice to delete a model.
    tf is the module, which is imported only when it is needed.
    """
    try:
        yield
    except (tf.errors.OpError, IndexError) as error:  # IndexError: the data file is too short
        raise UserError(f"cannot read {prefix}; {DELETE_CHECKPOINT} ({error})") from error


def check_names_and_shapes(prefix, variables, shapes):
    """Raise UserError unless the variables of the checkpoint are GPT-2's weights.

    variables: {name: shape}. Those whose names do not end like a weight's, such as an optimizer's
    "model/wte/Adam", are ignored.
    """
    stored = {}
    for name, shape in variables.items():
        if not name.endswith(("/wte", "/wpe", "/g", "/b", "/w")):
            continue
        if len(shape) == 3 and shape[0] == 1:  # each "w" of OpenAI's has an extra first axis
            stored[name] = tuple(shape[1:])
        else:
            stored[name] = tuple(shape)

    problem = f"{prefix} does not fit hparams.json:"
    for name in sorted(stored.keys() | shapes.keys()):
        if name not in stored:
            raise UserError(f"{problem} {name} is missing")
        if name not in shapes:
            raise UserError(f"{problem} {name} is unexpected")
        if stored[name] != shapes[name]:
            raise UserError(f"{problem} {name} is {stored[name]}, expected {shapes[name]}")


def make_stamp(data_file, hparams):
    """Return the text of <prefix>.verified for this data file and these hparams.

    It includes hparams, because other sizes can add up to the same length, and the file would be
    cut differently. The time is in whole seconds, because archives and container images store no
    fractions of them.
    """
    stamp = {
        "modified": int(data_file.stat().st_mtime),
        "n_vocab": hparams["n_vocab"],
        "n_ctx": hparams["n_ctx"],
        "n_embd": hparams["n_embd"],
        "n_layer": hparams["n_layer"],
    }
    return json.dumps(stamp)


def is_verified(stamp_file, stamp):
    """Whether an earlier run has written exactly this stamp."""
    # bytes, because a damaged file may not be text
    return stamp_file.is_file() and stamp_file.read_bytes() == stamp.encode()


def map_weights(data_file, shapes):
    """Memory-map the data file, and cut it into {name: array}."""
    memmap = np.memmap(data_file, np.float32, mode="c")  # copy-on-write
    data = np.asarray(memmap)  # the same memory as a plain array, which NumPy handles faster
    weights = {}
    start = 0
    for name in sorted(shapes):  # the order of the file; h10 comes before h2
        end = start + math.prod(shapes[name])
        weights[name] = data[start:end].reshape(shapes[name])
        start = end
    return weights


def map_and_compare(prefix, data_file, shapes):
    """Memory-map the data file, and compare each array with what TensorFlow reads.

    Returns {name: array}, and whether all were equal. Where they differ, as they do if the file has
    the variables in another order, the array is TensorFlow's.
    """
    weights = map_weights(data_file, shapes)
    all_equal = True
    for name, array in read_with_tensorflow(prefix, shapes):
        if not np.array_equal(array, weights[name]):
            weights[name] = array
            all_equal = False
    return weights, all_equal


def nest(weights, n_layer):
    """Turn {name: array} into the tree of params.

    weights["model/h0/attn/c_attn/w"] becomes params["blocks"][0]["attn"]["c_attn"]["w"].
    """
    params = {}
    for name, array in weights.items():
        _model, *groups, last = name.split("/")
        group = params
        for key in groups:
            group = group.setdefault(key, {})
        group[last] = array
    params["blocks"] = [params.pop(f"h{i}") for i in range(n_layer)]
    return params


# ---- The command line ------------------------------------------------------------------------


def parse_arguments(main):
    """Return the arguments of the command line as a list, in the order of main's parameters.

    Fire checks them against main's signature, adds main's defaults, and shows main's docstring as
    help.
    """
    import fire

    arguments = []

    # Fire calls its function first, and complains about a misspelled option afterwards: main would
    # already have run. So it gets a stand-in with main's signature and docstring, which only
    # collects the arguments
    @functools.wraps(main)
    def collect(*values):
        arguments.extend(values)

    # Fire would turn a prompt like 12345 or [1, 2] into a number or a list. So while it runs, str
    # takes the place of its value parser. (Its own decorator for this, SetParseFn, shows up in the
    # help)
    parse_value = fire.parser.DefaultParseValue
    fire.parser.DefaultParseValue = str
    try:
        fire.Fire(collect)
    except SystemExit as error:
        if error.code != 0:  # it is 0 after --help
            print("Is the prompt in quotation marks? --help lists the options.", file=sys.stderr)
        raise
    finally:
        fire.parser.DefaultParseValue = parse_value
    return arguments


@contextlib.contextmanager
def one_line_errors():
    """For the command line: print errors that the user can fix as one line, exit with status 1.

    The line goes to stderr. Ctrl+C and a closed output pipe end the program without a traceback.
    Any other exception, such as a bug of ours, keeps its traceback. Characters that stdout cannot
    encode are no error: they are replaced.
    """
    replace_unencodable_characters()
    try:
        yield
    except KeyboardInterrupt:
        # Ctrl+C: raised again, so that Python ends as if killed by the signal. Then a shell script
        # that runs the program stops, too, instead of going on with its next line
        sys.tracebacklimit = 0  # print no traceback
        raise
    except BrokenPipeError:
        # nobody reads the output any more, as after `| head`: there is nobody to tell
        flush_stdout()
        raise SystemExit(1) from None
    except (UserError, OSError, ImportError) as error:
        message = " ".join(str(error).split())  # on one line
        print(message, file=sys.stderr)
        flush_stdout()
        raise SystemExit(1) from None


def replace_unencodable_characters():
    """From now on, print "?" for a character that stdout's encoding does not have."""
    if hasattr(sys.stdout, "reconfigure"):  # not in Jupyter, where stdout encodes nothing
        sys.stdout.reconfigure(errors="replace")


def flush_stdout():
    """Flush stdout. If that fails (the disk is full, or the pipe is closed), discard the rest.

    Otherwise, Python would try again at exit, and print another error.
    """
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
