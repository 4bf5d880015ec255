"""Checkpoints written by TensorFlow load bit for bit, or are refused with a reason."""

import json
import os
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import random_params, run, save, save_in_two_shards, save_with_saver, variables

import utils

HPARAMS = {"n_vocab": 300, "n_ctx": 16, "n_embd": 12, "n_head": 3, "n_layer": 12}
PARAMS = random_params(300, 16, 12, 12)
OTHER_PARAMS = random_params(300, 16, 12, 12, seed=1)
DATA = ".data-00000-of-00001"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a checkpoint of PARAMS."""
    folder = tmp_path_factory.mktemp("saved")
    save_with_saver(folder / "model.ckpt", variables(PARAMS))
    return folder


@pytest.fixture
def prefix(tmp_path, saved):
    """A copy of this checkpoint, not yet loaded."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return str(tmp_path / "model.ckpt")


@pytest.fixture
def no_tensorflow(monkeypatch):
    """From now on `import tensorflow` fails: call it when the test is ready for that."""
    return lambda: monkeypatch.setitem(sys.modules, "tensorflow", None)


def load(prefix, **changes):
    return utils.load_gpt2_params_from_tf_ckpt(prefix, {**HPARAMS, **changes})


def load_toy(models_dir):
    utils.load_encoder_hparams_and_params("124M", str(models_dir))


def assert_same(loaded, params):
    """Equal keys, float32, equal bits."""
    flat, expected = variables(loaded), variables(params)
    assert flat.keys() == expected.keys()
    for name, value in expected.items():
        assert (flat[name].dtype, flat[name].shape) == (np.float32, value.shape), name
        assert flat[name].tobytes() == value.tobytes(), name


def flip_a_bit(path, position):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


# ---- What loads ------------------------------------------------------------------------------


def test_the_first_load_gives_what_tensorflow_saved(prefix):
    assert_same(load(prefix), PARAMS)


def test_a_later_load_needs_no_tensorflow_and_copies_nothing(prefix, no_tensorflow):
    load(prefix)
    no_tensorflow()
    again = load(prefix)
    assert_same(again, PARAMS)
    assert all(isinstance(a.base.base, np.memmap) for a in variables(again).values())


def test_weights_can_be_changed_and_the_file_keeps_its_bytes(prefix):
    load(prefix)["wte"][0] = 0
    assert_same(load(prefix), PARAMS)


ADAM = {
    "beta1_power": np.float32(0.9),
    "global_step": np.int64(7),
    "model/h0/ln_1/g/Adam": np.ones(12, np.float32),
    "model/wte/Adam_1": np.ones((300, 12), np.float32),
}
WEIGHTS = variables(PARAMS)
FLOAT16 = {name: value.astype(np.float16) for name, value in WEIGHTS.items()}
UNALIGNED = WEIGHTS | {"a_flag": np.bool_(True)}


@pytest.mark.parametrize("values", [WEIGHTS | ADAM, UNALIGNED, FLOAT16])
@pytest.mark.parametrize("save", [save, save_in_two_shards])
def test_a_checkpoint_that_cannot_be_mapped_is_read_at_every_load(tmp_path, save, values):
    """With other variables, another type of numbers, or in several shards."""
    prefix = save(tmp_path / "model-1000", values)
    for _ in range(2):
        assert_same(load(prefix), PARAMS)


@pytest.mark.parametrize(
    "checkpoint",
    [
        'all_model_checkpoint_paths: "model-1000"\nmodel_checkpoint_path: "model-500"\n',
        '#model_checkpoint_path: "model-1000"\nmodel_checkpoint_path: "model-500"\n',
        'model_checkpoint_path: "model-500"\n#model_checkpoint_path: "model-1000"\n',
        'model_checkpoint_path: "model-1000"\nmodel_checkpoint_path: "model-500"\n',
        'model_checkpoint_path: "/home/zo\\303\\251/model-500"\n',
        'model_checkpoint_path: "C:\\\\run\\\\model-500"\n',
    ],
)
def test_of_several_checkpoints_the_one_that_tensorflow_names_is_loaded(toy, checkpoint):
    folder = toy / "124M"
    for path in folder.glob("model.ckpt.*"):
        shutil.copy(path, folder / path.name.replace("model.ckpt", "model-500"))
        path.rename(folder / path.name.replace("model.ckpt", "model-1000"))
    flip_a_bit(folder / f"model-1000{DATA}", 0)  # to load this one would be an error
    (folder / "checkpoint").write_text(checkpoint)
    load_toy(toy)
    # TensorFlow does not find what was saved in another folder
    assert tf.train.latest_checkpoint(str(folder)) in (str(folder / "model-500"), None)


def test_a_folder_in_which_no_stamp_can_be_written_loads_at_every_run(prefix):
    """As if it were read-only, which it cannot be for root."""
    os.mkdir(f"{prefix}.verified")
    for _ in range(2):
        assert_same(load(prefix), PARAMS)


def test_a_path_may_have_a_tilde_spaces_unicode_and_symlinks(toy, monkeypatch):
    (toy / "zwei W\u00f6rter").mkdir()
    (toy / "124M").rename(toy / "zwei W\u00f6rter" / "124M")
    (toy / "link").symlink_to(toy / "zwei W\u00f6rter", target_is_directory=True)
    monkeypatch.setenv("HOME", str(toy))
    monkeypatch.setenv("USERPROFILE", str(toy))  # on Windows
    load_toy("~/link")


# ---- What is verified again ------------------------------------------------------------------


def test_a_checkpoint_replaced_by_an_older_one_is_verified_again(prefix, tmp_path):
    load(prefix)
    save(prefix, variables(OTHER_PARAMS))
    os.utime(prefix + DATA, (1, 1))
    assert_same(load(prefix), OTHER_PARAMS)


def test_half_a_stamp_matches_nothing(prefix, no_tensorflow):
    load(prefix)
    stamp = pathlib.Path(f"{prefix}.verified")
    stamp.write_text(stamp.read_text()[:-1])
    no_tensorflow()
    with pytest.raises(ImportError):
        load(prefix)


@pytest.mark.parametrize(("position", "loads_before"), [(0, 0), (5000, 1), (-1, 0)])
def test_a_flipped_bit_is_found_at_the_next_load(prefix, position, loads_before):
    for _ in range(loads_before):
        load(prefix)
    flip_a_bit(pathlib.Path(prefix + DATA), position)
    with pytest.raises(ValueError, match="Checksum"):
        load(prefix)


# ---- What is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["117M", "124m", "", "../124M", "124M/", None, 124])
def test_only_the_four_sizes_reach_a_path(tmp_path, size):
    with pytest.raises(utils.UserError, match=f"124M, 355M, 774M, 1558M, not {size!r}$"):
        utils.load_encoder_hparams_and_params(size, str(tmp_path / "models"))
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    "changes", [{"n_layer": 11}, {"n_layer": 13}, {"n_vocab": 7}, {"n_ctx": 7}, {"n_embd": 6}]
)
def test_weights_of_another_size_are_refused(prefix, changes):
    """A layer too many, or too few, and so on. Also when the stamp is there."""
    load(prefix)
    with pytest.raises(ValueError, match=r"not a GPT-2 of this size: \('model/"):
        load(prefix, **changes)


TRANSPOSED = WEIGHTS | {"model/wte": WEIGHTS["model/wte"].T}  # the file is as long
FOREIGN = {f"newslm{name[5:]}": value for name, value in WEIGHTS.items()}


@pytest.mark.parametrize("values", [TRANSPOSED, FOREIGN])
def test_weights_with_other_shapes_or_names_are_refused(tmp_path, values):
    with pytest.raises(ValueError, match=r"not a GPT-2 of this size: \('model/"):
        load(save(tmp_path / "model.ckpt", values))


@pytest.mark.parametrize("changes", [{"n_vocab": 513}, {"n_head": 7}, {"n_head": 0}])
def test_hparams_that_cannot_be_right_are_refused_before_tensorflow(toy, changes, no_tensorflow):
    path = toy / "124M" / "hparams.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    no_tensorflow()
    with pytest.raises(utils.UserError, match="cannot load"):
        load_toy(toy)


def test_a_vocabulary_with_more_tokens_than_wte_has_rows_is_refused(toy):
    folder = toy / "124M"
    encoder = json.loads((folder / "encoder.json").read_text("utf-8"))
    encoder |= {"\u0120xyzzy": 511, "<|endoftext|>": 512}
    (folder / "encoder.json").write_text(json.dumps(encoder))
    with open(folder / "vocab.bpe", "a", encoding="utf-8") as file:
        file.write("\u0120xyz zy\n")
    hparams = json.loads((folder / "hparams.json").read_text()) | {"n_vocab": 513}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    with pytest.raises(utils.UserError, match=r"\('model/wte', \(512, 48\)\)"):
        load_toy(toy)


DAMAGE = [("encoder.json", text) for text in ("", "[]", "7", "{}")]
DAMAGE += [("vocab.bpe", text) for text in ("", "#version: 0.2\n")]
DAMAGE += [("hparams.json", text) for text in ("", "[]", "7", "{}", '{"n_vocab": "512"}')]
DAMAGE += [("checkpoint", text) for text in ("", 'model_checkpoint_path: "model-7"')]
DAMAGE += [("model.ckpt.index", text) for text in ("", "x" * 100, None)]  # None: missing
DAMAGE += [(f"model.ckpt{DATA}", text) for text in ("", "x" * 100, None)]


@pytest.mark.parametrize(("name", "content"), DAMAGE)
def test_a_damaged_or_missing_file_is_one_error_that_names_the_folder(toy, name, content):
    path = toy / "124M" / name
    path.unlink() if content is None else path.write_text(content)
    advice = "if its files are OpenAI's, delete it to download them again"
    message = rf"(?s)cannot load {re.escape(str(toy / '124M'))} \(.+\); {advice}"
    with pytest.raises(utils.UserError, match=message):
        load_toy(toy)


@pytest.mark.parametrize("error", ["ImportError", "ValueError", "TypeError"])
def test_a_broken_tensorflow_is_one_line_and_no_advice_to_delete_a_model(toy, tmp_path, error):
    (tmp_path / "tensorflow.py").write_text(f"raise {error}('DLL load failed')")
    arguments = ["gpt2.py", "Twas", "1", "124M", toy]
    done = run(*arguments, env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (1, "")
    last_line = done.stderr.splitlines()[-1]
    assert last_line == "cannot import TensorFlow: DLL load failed"
    assert "Traceback" not in done.stderr
