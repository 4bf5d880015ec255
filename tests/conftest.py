"""What several tests share. No TensorFlow here: the model's tests run without it."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import utils

ROOT = pathlib.Path(__file__).parent.parent
TOY = ROOT / "tests" / "models"


@pytest.fixture
def toy(tmp_path):
    """A models_dir of the test's own, with nothing in it but the toy; its next run is the first."""
    (tmp_path / "124M").mkdir()
    for name in utils.FILES:
        shutil.copy2(TOY / "124M" / name, tmp_path / "124M")
    return tmp_path


@pytest.fixture
def run():
    """run(*arguments) runs `python gpt2.py *arguments` and returns what subprocess.run does."""

    def run(*arguments, **options):
        command = [sys.executable, ROOT / "gpt2.py", *arguments]
        options = {"capture_output": True, "text": True, "timeout": 120, "check": False, **options}
        options["env"] = {**os.environ, **options.get("env", {})}
        return subprocess.run(command, **options)  # noqa: PLW1510 (check is among the options)

    return run
