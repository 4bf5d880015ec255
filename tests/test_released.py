"""What only OpenAI's released weights can show. Skipped for a size that models/ does not have."""

import hashlib
import os

import pytest
from conftest import ROOT

import gpt2
import utils

SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# in the order of utils.FILES
BYTES = {
    "124M": [1_042_301, 90, 456_318, 77, 471_155, 497_759_232, 5_215],
    "355M": [1_042_301, 91, 456_318, 77, 926_519, 1_419_292_672, 10_399],
}
PROMPT = "Alan Turing theorized that computers would one day become"
CONTINUATION = (  # picoGPT's published result for these weights, this prompt and 40 tokens
    " the most powerful machines on the planet.\n\n"
    "The computer is a machine that can perform complex calculations, and it can perform these "
    "calculations in a way that is very similar to the human brain."
)


def folder(size):
    """models/<size>, or skip the test where it is not there."""
    path = ROOT / "models" / size
    if not (path / "model.ckpt.index").exists():
        pytest.skip(f'no {size} in models/: python gpt2.py "" 1 --model_size {size} downloads it')
    return path


@pytest.mark.parametrize("size", BYTES)
def test_the_files_have_the_sizes_of_the_released_ones(size):
    path = folder(size)
    assert [os.path.getsize(path / name) for name in utils.FILES] == BYTES[size]


@pytest.mark.parametrize("name", SHA256)
@pytest.mark.parametrize("size", utils.SIZES)
def test_the_vocabulary_is_the_released_one(size, name):
    content = (folder(size) / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256[name]


def test_the_released_124m_continues_the_turing_prompt_as_picogpt_does():
    models_dir = folder("124M").parent
    assert gpt2.main(PROMPT, models_dir=str(models_dir)).startswith(CONTINUATION)
