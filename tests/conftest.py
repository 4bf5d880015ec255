"""What several tests share. No TensorFlow here: the model's tests run without it."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import utils

collect_ignore = ["benchmark.py", "draw_attention.py", "train_toy.py"]  # scripts, not tests
ROOT = pathlib.Path(__file__).parent.parent
TOY = ROOT / "tests" / "models"


@pytest.fixture
def toy(tmp_path):
    """A models_dir of the test's own, with nothing in it but the toy; its next run is the first."""
    (tmp_path / "124M").mkdir()
    for name in utils.FILES:
        shutil.copy2(TOY / "124M" / name, tmp_path / "124M")
    return tmp_path


def run(*arguments, **options):
    """Run `python *arguments` in the project's folder, as subprocess.run does."""
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120, **options}
    options["env"] = {**os.environ, **options.get("env", {})}
    return subprocess.run([sys.executable, *arguments], check=False, **options)
