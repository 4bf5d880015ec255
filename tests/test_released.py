"""What only OpenAI's released weights can show. Skipped for a size that models/ does not have.

The continuations were published by others, each by running the released weights.
"""

import hashlib
import os

import pytest
from conftest import FILES, ROOT

import gpt2
import utils

SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
BYTES = {  # in the order of FILES
    "124M": [1_042_301, 90, 456_318, 471_155, 497_759_232, 5_215, 77],
    "355M": [1_042_301, 91, 456_318, 926_519, 1_419_292_672, 10_399, 77],
}
TURING = (
    " the most powerful machines on the planet.\n\n"
    "The computer is a machine that can perform complex calculations, and it can perform these "
    "calculations in a way that is very similar to the human brain."
)
LIFE = "What is the answer to life, the universe, and everything?"
CONTINUATIONS = [  # model, prompt, number of new tokens, how the text goes on
    # jaymody/picoGPT, README.md
    ("124M", "Alan Turing theorized that computers would one day become", 40, TURING),
    # tinygrad/tinygrad, examples/gpt2.py
    ("355M", "Hello.", 10, " I'm a little late to the party, but"),
    ("355M", LIFE, 10, "\n\nThe answer is that we are all one"),
]


def folder(size):
    """models/<size>, or skip the test where it is not there."""
    path = ROOT / "models" / size
    if not (path / "checkpoint").exists():
        pytest.skip(f'no {size} in models/: python gpt2.py "" 1 --model_size={size} downloads it')
    return path


@pytest.mark.parametrize(("size", "prompt", "n_new", "text"), CONTINUATIONS)
def test_the_continuation_is_the_published_one(size, prompt, n_new, text):
    models_dir = folder(size).parent
    assert gpt2.main(prompt, n_new, size, models_dir).startswith(text)


def test_the_dog_goes_on_as_in_the_tests_of_transformers():
    """huggingface/transformers, tests/models/gpt2/test_modeling_gpt2.py, test_lm_generate_gpt2."""
    models_dir = folder("124M").parent
    _encoder, hparams, params = utils.load_encoder_hparams_and_params("124M", models_dir)
    expected = [373, 1043, 287, 257, 2214, 1474, 262, 16246, 286]  # was found in a field near the
    expected += [2688, 290, 2688, 27262, 13, 198, 198, 464, 3290]  # intersection of West and ...
    assert gpt2.generate([464, 3290], params, hparams["n_head"], 18) == expected


@pytest.mark.parametrize("size", BYTES)
def test_the_files_have_the_sizes_of_the_released_ones(size):
    assert [os.path.getsize(folder(size) / name) for name in FILES] == BYTES[size]


@pytest.mark.parametrize("name", SHA256)
@pytest.mark.parametrize("size", utils.SIZES)
def test_the_vocabulary_is_the_released_one(size, name):
    content = (folder(size) / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256[name]
