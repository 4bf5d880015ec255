"""The world around the model: the four sizes, the download of OpenAI's files, the weights in the checkpoint."""

import base64
import contextlib
import hashlib
import json
import mmap
import os
import shutil
import time

import numpy as np

from encoder import UserError, blame, get_encoder

MODEL_SIZES = ("124M", "355M", "774M", "1558M")
URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
DATA, INDEX = ".data-00000-of-00001", ".index"  # what the names of a checkpoint's two files end in
CHECKPOINT_FILES = ("checkpoint", f"model.ckpt{DATA}", f"model.ckpt{INDEX}", "model.ckpt.meta")
FILES = ("encoder.json", "hparams.json", "vocab.bpe", *CHECKPOINT_FILES)
BUSY = (429, 500, 502, 503, 504)  # what a server answers that may do better in a second
ADVICE = 'run this again; offline: python gpt2.py "Twas brillig, and the slithy" --models_dir tests/models'


def check_size(model_size):
    """Raise UserError (a ValueError) unless model_size is one of the four: no other reaches a path or a URL."""
    if model_size not in MODEL_SIZES:
        raise UserError(f"model_size must be one of {', '.join(MODEL_SIZES)}, not {model_size!r}")


def map_file(path):
    """The bytes of a file, which must not be empty, as a read-only uint8 array [size]: a map of the file, no copy."""
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def fetch(session, url, path):
    """Download url to <path>.part, going on where an earlier try ended, and rename it to path once it is whole.

    Raises UserError if it arrives damaged or the disk has no room, OSError if the network, server or disk fails.
    """
    import urllib3
    from tqdm import tqdm

    part, failures, timeout = f"{path}.part", 0, (5, 10)  # seconds to connect, and to wait for the next bytes
    while True:
        start = before = os.path.getsize(part) if os.path.exists(part) else 0
        reply = session.get(url, headers={"Range": f"bytes={start}-"} if start else {}, stream=True, timeout=timeout)
        if reply.status_code == 416:  # there is nothing after start: is the part whole, or not of this file?
            reply = session.head(url, timeout=timeout)
        elif reply.status_code == 200:  # the file comes from its beginning
            start = 0
        if reply.status_code not in (200, 206) or "html" in reply.headers.get("Content-Type", ""):
            raise OSError(f"{url} brings {reply.status_code} {reply.reason}, or the page of a log-in")
        length = (reply.headers.get("Content-Range") or reply.headers.get("Content-Length") or "").rpartition("/")[2]
        total = int(length) if length.isdecimal() else 0  # of "bytes 5-9/10" or "10"; 0 if the server does not say
        if total - start > (free := shutil.disk_usage(os.path.dirname(part)).free):
            raise UserError(f"{path} needs {total - start:,} bytes, and the disk has {free:,}: make room")
        try:
            bar = tqdm(desc=path, total=total, initial=start, unit="B", unit_scale=True, mininterval=1)
            with bar, open(part, "ab" if start else "wb", buffering=0) as file:
                while piece := reply.raw.read1(1 << 16):  # what has come; iter_content loses some of it at a cut
                    bar.update(file.write(piece))
                os.fsync(file.fileno())  # or a power cut could leave the name without the content
            size = os.path.getsize(part)
            if size and size >= total:
                break
            raise urllib3.exceptions.ProtocolError(f"{size:,} bytes came of {total:,}")
        except urllib3.exceptions.HTTPError as error:
            failures = 0 if os.path.exists(part) and os.path.getsize(part) > before else failures + 1
            if failures == 4:
                raise OSError(f"{url}: {error}") from error
            time.sleep(2**failures / 2)
    # the MD5 of the whole file; in a 206, Content-MD5 would be that of the piece
    md5 = reply.headers.get("x-ms-blob-content-md5") or (reply.status_code == 200 and reply.headers.get("Content-MD5"))
    intact = total in (0, size) and (not md5 or base64.b64decode(md5) == hashlib.md5(map_file(part)).digest())
    if not intact or b"<html" in map_file(part)[:1024].tobytes().lower():
        os.remove(part)
        raise UserError(f"{url} did not arrive as it was sent, and was deleted: run this again")
    os.replace(part, path)


def download_gpt2_files(model_size, model_dir):
    """Fetch those of OpenAI's seven files for model_size that model_dir lacks; if it has all, no network is used.

    A checkpoint of another name (see `checkpoint_prefix`) is not mixed with OpenAI's. Raises UserError (a ValueError).
    """
    check_size(model_size)
    names = os.listdir(model_dir) if os.path.isdir(model_dir) else []
    other = any(name.endswith(INDEX) and name not in CHECKPOINT_FILES for name in names)
    openais = os.path.basename(checkpoint_prefix(model_dir)) == "model.ckpt" if "checkpoint" in names else not other
    missing = [name for name in FILES if name not in names and (openais or name not in CHECKPOINT_FILES)]
    if not missing:
        return
    import requests

    retry = requests.adapters.Retry(3, backoff_factor=1, status_forcelist=BUSY, respect_retry_after_header=False)
    try:
        os.makedirs(model_dir, exist_ok=True)
        with open(os.path.join(model_dir, ".lock"), "w") as lock, requests.Session() as session:
            with contextlib.suppress(ImportError):  # Windows has no fcntl; there, the MD5 tells if two wrote at once
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, however the process ends
            session.mount(URL, requests.adapters.HTTPAdapter(max_retries=retry))
            session.headers["Accept-Encoding"] = "identity"  # what is counted are the bytes of the file
            for name in missing:
                if not os.path.exists(path := os.path.join(model_dir, name)):  # another process may have been faster
                    fetch(session, f"{URL}/{model_size}/{name}", path)
    except OSError as error:  # of the disk or the network: requests.RequestException is one
        # .reason: urllib3's own words rather than its wrapping
        raise UserError(f"{model_dir} is not complete ({getattr(error.args[0], 'reason', error)}): {ADVICE}") from error


def checkpoint_prefix(model_dir):
    """What the names of a checkpoint's files begin with, such as models/124M/model.ckpt: the file `checkpoint` says it.

    Raises UserError (a ValueError) if it says nothing or leads out of model_dir, OSError if it cannot be read.
    """
    path = os.path.join(model_dir, "checkpoint")
    with blame(path), open(path, encoding="utf-8") as file:
        name = file.read().partition('model_checkpoint_path: "')[2].partition('"')[0]
        prefix = os.path.join(model_dir, name)
        if os.path.dirname(os.path.realpath(prefix)) != os.path.realpath(model_dir):
            raise ValueError(f"{name!r} is no checkpoint in this folder")
    return prefix


def variable_shapes(hparams):
    """{name: shape} of GPT-2's variables in a checkpoint (OpenAI's src/model.py), where each w is [1, n_in, n_out]."""
    n_embd = hparams["n_embd"]
    layer = {f"{norm}/{name}": [n_embd] for norm in ("ln_1", "ln_2") for name in "gb"}
    for linear, n_in, n_out in (("attn/c_attn", 1, 3), ("attn/c_proj", 1, 1), ("mlp/c_fc", 1, 4), ("mlp/c_proj", 4, 1)):
        layer |= {f"{linear}/w": [n_in * n_embd, n_out * n_embd], f"{linear}/b": [n_out * n_embd]}
    shapes = {f"model/h{i}/{name}": shape for i in range(hparams["n_layer"]) for name, shape in layer.items()}
    shapes |= {"model/wte": [hparams["n_vocab"], n_embd], "model/wpe": [hparams["n_ctx"], n_embd]}
    return shapes | {"model/ln_f/g": [n_embd], "model/ln_f/b": [n_embd]}


def read_with_tensorflow(prefix, shapes):
    """{name: float32 array} of these variables; TensorFlow checks each one's CRC. Raises UserError (a ValueError)."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up messages
    import tensorflow as tf

    with blame(prefix + INDEX, tf.errors.OpError):
        reader = tf.train.load_checkpoint(prefix)
    tensors, saved = {}, reader.get_variable_to_shape_map()
    for name, shape in shapes.items():
        if saved.get(name) not in (shape, [1, *shape]):
            raise UserError(f"{prefix}: by hparams.json {name} is {shape}, but here it is {saved.get(name, 'missing')}")
        with blame(prefix + DATA, tf.errors.OpError):
            tensors[name] = np.asarray(reader.get_tensor(name), np.float32).reshape(shape)
    return tensors


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """The weights as `gpt2.gpt2` takes them: nested dicts of float32 arrays, read-only.

    tf_ckpt_path: what the names of the checkpoint's files begin with, e.g. models/124M/model.ckpt. hparams: n_vocab,
    n_ctx, n_embd, n_head, n_layer. Raises UserError (a ValueError) for a checkpoint that is damaged or not as hparams
    says, OSError for one that cannot be read.

    TensorFlow's Saver writes tensors raw (float32, little-endian, as NumPy keeps them), back to back, in the order of
    their names. So an array can be a map of its place in the file: the system brings a page when it is first touched,
    and keeps it for the next start. Nothing promises this layout, so at the first start TensorFlow reads the arrays and
    each is compared with its place. If all agree, <tf_ckpt_path>.mapped is written: hparams, and size and times of
    the two files. As long as it says what is true, TensorFlow is not needed; else it reads the arrays again.
    """
    shapes, data, facts, known = variable_shapes(hparams), np.empty(0, np.uint8), None, False
    with contextlib.suppress(OSError, ValueError):  # several shards or an empty file: TensorFlow knows; no .mapped yet
        files = [os.stat(tf_ckpt_path + suffix) for suffix in (DATA, INDEX)]
        data = map_file(tf_ckpt_path + DATA)
        facts = json.dumps([hparams, [[file.st_size, file.st_mtime_ns, file.st_ctime_ns] for file in files]])
        with open(f"{tf_ckpt_path}.mapped", encoding="utf-8") as file:
            known = file.read() == facts
    tensors, offset = {} if known else read_with_tensorflow(tf_ckpt_path, shapes), 0
    params = {"blocks": [{} for _ in range(hparams["n_layer"])]}
    for name, shape in sorted(shapes.items()):
        raw = data[offset : offset + 4 * np.prod(shape)]  # bytes
        offset += raw.size
        mapped = known or np.array_equal(raw, tensors[name].reshape(-1).view(np.uint8))
        facts = facts if mapped else None  # one array stands elsewhere: no .mapped will be written
        (*path, last), group = name.split("/")[1:], params  # model/h0/attn/c_attn/w -> h0, attn, c_attn and w
        for key in path:
            group = params["blocks"][int(key[1:])] if key[0] == "h" else group.setdefault(key, {})
        group[last] = raw.view(np.float32).reshape(shape) if mapped else tensors[name]
    if facts and not known:
        new = f"{tf_ckpt_path}.mapped.{os.getpid()}"
        with contextlib.suppress(OSError):  # where nothing can be written, TensorFlow reads it again next time
            with open(new, "w", encoding="utf-8") as file:
                file.write(facts)
            os.replace(new, f"{tf_ckpt_path}.mapped")
    return params


def load_encoder_hparams_and_params(model_size, models_dir):
    """Everything that generating takes, downloaded first if it is not there: (Encoder, hparams dict, params dict).

    model_size: one of MODEL_SIZES, in the folder <models_dir>/<model_size>. Raises UserError (a ValueError) or OSError.
    """
    model_dir = os.path.join(models_dir, str(model_size))
    download_gpt2_files(model_size, model_dir)
    encoder, path = get_encoder(model_size, models_dir), os.path.join(model_dir, "hparams.json")
    with blame(path), open(path, encoding="utf-8") as file:
        hparams = json.load(file)
        sizes = [hparams[key] for key in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")]
        if any(type(size) is not int or not 0 < size < 10**5 for size in sizes) or sizes[0] != len(encoder.encoder):
            raise ValueError(f"five whole numbers are expected, and n_vocab to be {len(encoder.encoder)}")
        if hparams["n_embd"] % hparams["n_head"]:
            raise ValueError("n_head does not divide n_embd")
    return encoder, hparams, load_gpt2_params_from_tf_ckpt(checkpoint_prefix(model_dir), hparams)
