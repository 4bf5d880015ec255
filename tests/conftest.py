"""What several tests share."""

import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
TOY = ROOT / "tests" / "models"  # a models_dir
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
    options["env"] = {**os.environ, "PYTHONUNBUFFERED": "", **options.get("env", {})}
    return subprocess.run([sys.executable, *arguments], check=False, **options)


def random_params(n_vocab, n_ctx, n_embd, n_layer, seed=0):
    """The tree of float32 arrays that gpt2.gpt2 takes, filled with normally distributed numbers."""
    rng = np.random.default_rng(seed)

    def normal(*shape, mean=0):
        return rng.normal(mean, 0.2, shape).astype(np.float32)

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
