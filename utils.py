"""Everything around the model. None of it is needed to understand GPT-2.

gpt2.py calls `load_encoder_hparams_and_params`, which calls `download_gpt2_files`, `get_encoder` of
encoder.py and `load_gpt2_params_from_tf_ckpt`. The program at the end of gpt2.py also calls
`parse_arguments` and `one_line_errors`. Each function is followed by those that it calls.
"""

import contextlib
import functools
import json
import os
import sys
from pathlib import Path, PureWindowsPath

import numpy as np
from tqdm import tqdm

from encoder import get_encoder

SIZES = ("124M", "355M", "774M", "1558M")
URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
SMALL_FILES = ("encoder.json", "hparams.json", "vocab.bpe")
WEIGHTS = ("model.ckpt.meta", "model.ckpt.data-00000-of-00001", "model.ckpt.index", "checkpoint")


class UserError(ValueError):
    """An error the user can fix: the command line prints its message instead of a traceback."""


def load_encoder_hparams_and_params(model_size, models_dir):
    """Load everything `gpt2.generate` needs: an Encoder, the hparams dict and the params dict.

    hparams are the hyperparameters: n_vocab, n_ctx, n_embd, n_head and n_layer. params are the
    weights, in the tree that `gpt2.gpt2` takes. model_size: 124M, 355M, 774M or 1558M. Its files
    are in <models_dir>/<model_size>; missing ones are downloaded first.
    Raises UserError (a ValueError), OSError, or ImportError if TensorFlow cannot be imported.
    """
    if model_size not in SIZES:
        raise UserError(f"model_size must be one of {', '.join(SIZES)}, not {model_size!r}")
    model_dir = Path(os.path.expanduser(models_dir), model_size)
    download_gpt2_files(model_size, model_dir)
    try:
        encoder = get_encoder(model_size, model_dir.parent)
        hparams = json.loads((model_dir / "hparams.json").read_text("utf-8"))
        if hparams["n_vocab"] != len(encoder.encoder) or hparams["n_embd"] % hparams["n_head"]:
            raise ValueError(f"wrong n_vocab or n_head in hparams.json: {hparams}")
        return encoder, hparams, load_gpt2_params_from_tf_ckpt(ckpt_prefix(model_dir), hparams)
    # what a missing file, or the contents of a damaged or foreign one, can raise
    except (ValueError, TypeError, LookupError, ArithmeticError, FileNotFoundError) as error:
        advice = "if its files are OpenAI's, delete it to download them again"
        raise UserError(f"cannot load {model_dir} ({error}); {advice}") from error


# ---- Checkpoint ------------------------------------------------------------------------------
#
# A TensorFlow checkpoint is two files (or more, if the data is in several shards). What their names
# begin with, here model.ckpt, is called the prefix.
#
# model.ckpt.index                  the names, shapes and checksums of the variables
# model.ckpt.data-00000-of-00001    their values; in OpenAI's, float32 arrays one after another
ENDINGS = ("/wte", "/wpe", "/w", "/b", "/g")  # not those of an optimizer, as in model/wte/Adam


def ckpt_prefix(model_dir):
    """Return the prefix named by the file `checkpoint`: model_checkpoint_path: "model.ckpt".

    If it names a folder as well, where the checkpoint was once saved, model_dir takes its place.
    """
    lines = (model_dir / "checkpoint").read_text("utf-8").splitlines()
    path = [line for line in lines if line.startswith("model_checkpoint_path:")][-1].split('"')[1]
    return model_dir / PureWindowsPath(path).name  # the part after the last "/" or "\"


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """Load the weights as `gpt2.gpt2` takes them: nested dicts of float32 arrays.

    tf_ckpt_path: the prefix. hparams: n_vocab, n_ctx, n_embd, n_layer. Raises ValueError if the
    checkpoint is damaged or does not fit hparams, ImportError if TensorFlow is needed but broken.

    OpenAI's data file can be memory-mapped, because it holds the weights one after another, in the
    order of their names. This is fast, but checks nothing: so the first run also reads them with
    TensorFlow. If they are equal, <prefix>.verified gets the size and modification time of the data
    file. While those stay the same, later runs do without TensorFlow. Checkpoints that cannot be
    mapped (with an optimizer's variables, float16, or in several shards) need it at every run.

    The arrays can be changed: the map is copy-on-write, so the file stays as it is.
    """
    shapes = weight_shapes(*[hparams[name] for name in ("n_vocab", "n_ctx", "n_embd", "n_layer")])
    data = Path(f"{tf_ckpt_path}.data-00000-of-00001")
    verified = Path(f"{tf_ckpt_path}.verified")
    mapped = map_weights(data, shapes)
    stamp = f"{data.stat().st_size} {data.stat().st_mtime_ns}" if mapped else ""
    if mapped and verified.is_file() and verified.read_bytes() == stamp.encode():
        return nest(mapped, hparams["n_layer"])
    print(f"reading {tf_ckpt_path} with TensorFlow", file=sys.stderr)  # importing it takes seconds
    weights = read_with_tensorflow(tf_ckpt_path, shapes, mapped)
    if all(weights[name] is mapped.get(name) for name in shapes):  # all were equal
        with contextlib.suppress(OSError):  # a read-only folder
            verified.write_text(stamp)
    return nest(weights, hparams["n_layer"])


def weight_shapes(n_vocab, n_ctx, n_embd, n_layer):
    """Return {name: shape} of GPT-2's weights, sorted by name, which is the order of the data file.

    (So h10 comes before h2.) In the checkpoint, each "w" has an extra first axis of length 1.
    """
    shapes = {"model/wte": (n_vocab, n_embd), "model/wpe": (n_ctx, n_embd)}
    for h in [f"model/h{i}" for i in range(n_layer)]:
        shapes |= {f"{h}/ln_1/g": (n_embd,), f"{h}/ln_1/b": (n_embd,)}
        shapes |= {f"{h}/attn/c_attn/w": (n_embd, 3 * n_embd), f"{h}/attn/c_attn/b": (3 * n_embd,)}
        shapes |= {f"{h}/attn/c_proj/w": (n_embd, n_embd), f"{h}/attn/c_proj/b": (n_embd,)}
        shapes |= {f"{h}/ln_2/g": (n_embd,), f"{h}/ln_2/b": (n_embd,)}
        shapes |= {f"{h}/mlp/c_fc/w": (n_embd, 4 * n_embd), f"{h}/mlp/c_fc/b": (4 * n_embd,)}
        shapes |= {f"{h}/mlp/c_proj/w": (4 * n_embd, n_embd), f"{h}/mlp/c_proj/b": (n_embd,)}
    shapes |= {"model/ln_f/g": (n_embd,), "model/ln_f/b": (n_embd,)}
    return dict(sorted(shapes.items()))


def map_weights(path, shapes):
    """Memory-map a data file and cut it into {name: array}, or {} if its length does not fit."""
    sizes = [np.prod(shape, dtype=np.int64) for shape in shapes.values()]
    if not path.exists() or path.stat().st_size != 4 * sum(sizes):  # 4 bytes per float32
        return {}
    data = np.memmap(path, np.float32, mode="c")  # copy-on-write
    pieces = np.split(np.asarray(data), np.cumsum(sizes)[:-1])
    return {name: piece.reshape(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}


def read_with_tensorflow(prefix, shapes, mapped):
    """Read the weights with TensorFlow, which verifies their checksums: {name: array}.

    Of two equal arrays, the mapped one is kept. Raises ValueError if the checkpoint is damaged or
    has other weights, ImportError if TensorFlow cannot be imported.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no log messages
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow as tf
    except Exception as error:  # a broken installation can raise anything
        raise ImportError(f"cannot import TensorFlow: {error}") from error
    try:
        reader = tf.train.load_checkpoint(str(prefix))
        variables = reader.get_variable_to_shape_map().items()
        # without the extra axis of each "w"
        stored = {name: tuple(shape[-2:]) for name, shape in variables if name.endswith(ENDINGS)}
        if stored != shapes:  # ^: what is in only one of them
            raise ValueError(f"not a GPT-2 of this size: {min(stored.items() ^ shapes.items())}")
        weights = {}
        for name, shape in tqdm(shapes.items(), "reading"):
            array = np.asarray(reader.get_tensor(name), np.float32).reshape(shape)
            weights[name] = mapped[name] if np.array_equal(array, mapped.get(name)) else array
    except tf.errors.OpError as error:
        raise ValueError(error.message) from error
    return weights


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


# ---- Download --------------------------------------------------------------------------------


def download_gpt2_files(model_size, model_dir):
    """Download whichever of OpenAI's seven files are missing from the folder model_dir.

    `checkpoint` comes last. So if it is there, the weights are complete, or are the user's own, and
    only encoder.json, hparams.json and vocab.bpe are downloaded. Raises UserError or OSError.
    """
    Path(model_dir).mkdir(parents=True, exist_ok=True)
    for name in SMALL_FILES if Path(model_dir, "checkpoint").exists() else SMALL_FILES + WEIGHTS:
        download_file(f"{URL}/{model_size}/{name}", Path(model_dir, name))


def download_file(url, path):
    """Download url to the partial file <path>.part, and rename it to path when it is complete.

    If the connection breaks, request the rest, as long as each attempt brings some bytes. A later
    run resumes it, too. Two processes can write the same file: each writes the same bytes.
    """
    part = path.with_name(f"{path.name}.part")
    while not path.exists():
        part.touch()
        size = part.stat().st_size
        try:
            fetch_rest(url, part)
            part.replace(path)
        except OSError as err:
            if not path.exists() and part.stat().st_size == size:
                raise UserError(f"cannot download {path.name} ({err}); rerun to resume") from err


def fetch_rest(url, part):
    """Request what the partial file still lacks, and append it. Raises OSError."""
    import requests

    with open(part, "r+b") as file:
        # one byte early: the rest of a complete file would be empty, which is an error in HTTP
        start = file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
        headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
        # with auth, requests does not send a password from ~/.netrc: OpenAI's server refuses any
        with requests.get(url, headers=headers, auth=lambda r: r, stream=True, timeout=10) as reply:
            if reply.status_code != 206:  # for instance 200, for a login page
                raise OSError(f"got {reply.status_code} {reply.reason} instead of the file")
            total = int(reply.headers["Content-Range"].rpartition("/")[2])
            with tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True) as bar:
                for chunk in reply.iter_content(8192):
                    bar.update(file.write(chunk))
    if part.stat().st_size != total:
        raise OSError(f"got {part.stat().st_size:,} of {total:,} bytes")


# ---- Command line ----------------------------------------------------------------------------


def parse_arguments(main):
    """Return the arguments of the command line as a list, in the order of main's parameters.

    Fire checks them against main's signature, adds its defaults, and shows its docstring as help.
    """
    import fire

    arguments = []
    # what Fire calls instead of main; wraps gives it main's signature and docstring
    record = functools.wraps(main)(lambda *values: arguments.extend(values))
    # every argument is text, even 12345 (SetParseFn, Fire's own way, would show up in the help)
    fire.core.parser.DefaultParseValue = str
    fire.Fire(record, [*sys.argv[1:], "--"])  # after "--" come options of Fire itself: none
    return arguments


@contextlib.contextmanager
def one_line_errors():
    """Print an error that the user can fix as one line on stderr, and exit with status 1."""
    if hasattr(sys.stdout, "reconfigure"):  # Jupyter's stdout encodes nothing
        sys.stdout.reconfigure(errors="replace")  # "?" for what it cannot encode
    try:
        yield
    except (UserError, OSError, MemoryError, ImportError, KeyboardInterrupt) as error:
        # a broken pipe means that nobody reads on, as in `... | head`
        if not isinstance(error, (BrokenPipeError, KeyboardInterrupt)):
            print(" ".join(str(error).split()) or "out of memory", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # send stdout nowhere: Python flushes it at exit, and would fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
