"""What several tests share: the toy, a local server in place of OpenAI's, random checkpoints."""

import collections
import http.server
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

import utils

collect_ignore = ["tools"]  # scripts, not tests
ROOT = pathlib.Path(__file__).parent.parent
TOY = ROOT / "tests/toy"  # a models_dir
FILES = ["encoder.json", "hparams.json", "vocab.bpe", "model.ckpt.meta"]
FILES += ["model.ckpt.data-00000-of-00001", "model.ckpt.index", "checkpoint"]


@pytest.fixture
def toy(tmp_path):
    """A models_dir of the test's own, with nothing in it but the toy; its next run is the first."""
    (tmp_path / "124M").mkdir()
    for name in FILES:
        shutil.copy2(TOY / "124M" / name, tmp_path / "124M")
    return tmp_path


def run(*arguments, **options):
    """Run `python *arguments` in the project's folder, as subprocess.run does."""
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120, **options}
    # with PYTHONUNBUFFERED, Python would flush nothing at exit, where some errors would show
    options["env"] = {**os.environ, "PYTHONUNBUFFERED": "", **options.get("env", {})}
    return subprocess.run([sys.executable, *arguments], check=False, **options)


def random_params(n_vocab, n_ctx, n_embd, n_layer, seed=0):
    """The tree of float32 arrays that gpt2.gpt2 takes, filled with random numbers.

    They are normally distributed, and rounded to numbers that float16 has, too.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape, mean=0):
        return rng.normal(mean, 0.2, shape).astype(np.float16).astype(np.float32)

    def norm():
        return {"g": normal(n_embd, mean=1), "b": normal(n_embd)}

    def linear(n_in, n_out):
        return {"w": normal(n_in, n_out), "b": normal(n_out)}

    def block():
        attn = {"c_attn": linear(n_embd, 3 * n_embd), "c_proj": linear(n_embd, n_embd)}
        mlp = {"c_fc": linear(n_embd, 4 * n_embd), "c_proj": linear(4 * n_embd, n_embd)}
        return {"ln_1": norm(), "attn": attn, "ln_2": norm(), "mlp": mlp}

    wte, wpe = normal(n_vocab, n_embd), normal(n_ctx, n_embd)
    return {"wte": wte, "wpe": wpe, "blocks": [block() for _ in range(n_layer)], "ln_f": norm()}


def variables(params, prefix="model"):
    """The same arrays, named and shaped as in OpenAI's checkpoints.

    {"model/h0/attn/c_attn/w": float32 [1, n_in, n_out], ...}
    """
    flat = {}
    for name, value in params.items():
        if name == "blocks":
            for i, block in enumerate(value):
                flat |= variables(block, f"{prefix}/h{i}")
        elif isinstance(value, dict):
            flat |= variables(value, f"{prefix}/{name}")
        else:
            flat[f"{prefix}/{name}"] = value[None] if name == "w" else value
    return flat


def save_with_saver(prefix, values):
    """Write {variable: value} with TensorFlow's Saver, as OpenAI did. Returns the prefix."""
    import tensorflow as tf

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, value in values.items():
            tf.compat.v1.get_variable(name, initializer=value)
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver(save_relative_paths=True)
        return saver.save(session, str(prefix))


def save(prefix, values, order=sorted):
    """The same with the operation that the Saver uses, much faster. The Saver sorts the names."""
    import tensorflow as tf

    names = order(values)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[values[name] for name in names],
    )
    return str(prefix)


def save_in_two_shards(prefix, values):
    import tensorflow as tf

    halves = list(values)[::2], list(values)[1::2]
    parts = [
        save(f"{prefix}_{i}", {name: values[name] for name in half})
        for i, half in enumerate(halves)
    ]
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(prefix))
    return str(prefix)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the toy as if it were OpenAI's 124M, except for the server's faults."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        self.server.asked[name].append(start)
        if self.path != f"/gpt-2/models/124M/{name}":
            self.reply(404)
        elif name in self.server.faults:
            self.server.faults[name](self, start)
        else:
            self.send_range(start, (TOY / "124M" / name).read_bytes())

    def send_range(self, start, body, cut=None):
        if start >= len(body):
            self.reply(416, **{"Content-Range": f"bytes */{len(body)}"})
        else:
            span = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.reply(206, body[start:], cut, **{"Content-Range": span})

    def reply(self, status, body=b"", cut=None, **headers):
        """Promise the whole body; send so many bytes of it, and hang up."""
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.faults = {}  # file name -> a function of (handler, start) that answers
        server.asked = collections.defaultdict(list)  # file name -> where the ranges start
        monkeypatch.setattr(utils, "URL", f"http://127.0.0.1:{server.server_port}/gpt-2/models")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
