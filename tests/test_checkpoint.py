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
from conftest import TOY, random_params, run, save, save_in_two_shards, save_with_saver, variables

import gpt2
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
    """As in a bad copy: the file has another modification time, too."""
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)
    os.utime(path, (1, 1))


def tokens_of(models_dir):
    """What the model generates after "'Twas"."""
    encoder, hparams, params = utils.load_encoder_hparams_and_params("124M", str(models_dir))
    return encoder.decode(gpt2.generate(encoder.encode("'Twas"), params, hparams["n_head"], 4))


# ---- What loads ------------------------------------------------------------------------------


def test_the_first_load_gives_what_tensorflow_saved(prefix):
    assert_same(load(prefix), PARAMS)


def test_a_later_load_needs_no_tensorflow_and_copies_nothing(prefix, no_tensorflow):
    load(prefix)
    no_tensorflow()
    again = load(prefix)
    assert_same(again, PARAMS)
    assert all(is_mapped(array) for array in variables(again).values())


def is_mapped(array):
    while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
        array = array.base
    return isinstance(array, np.memmap)


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


def test_a_data_file_in_another_order_gives_the_right_weights_at_every_load(tmp_path):
    """It is as long as OpenAI's, so it can be mapped; but the arrays in the map are wrong."""
    prefix = save(tmp_path / "model.ckpt", WEIGHTS, order=list)
    sorted_prefix = save(tmp_path / "sorted.ckpt", WEIGHTS)
    raw, sorted_raw = (pathlib.Path(name + DATA).read_bytes() for name in (prefix, sorted_prefix))
    assert len(raw) == len(sorted_raw)
    assert raw != sorted_raw
    for _ in range(2):
        assert_same(load(prefix), PARAMS)


def in_two_versions(folder):
    """model-500 is the toy's checkpoint. model-1000 is damaged: to load it would be an error."""
    for path in folder.glob("model.ckpt.*"):
        shutil.copy(path, folder / path.name.replace("model.ckpt", "model-500"))
        path.rename(folder / path.name.replace("model.ckpt", "model-1000"))
    flip_a_bit(folder / f"model-1000{DATA}", 0)


@pytest.mark.parametrize(
    "checkpoint",
    [
        'all_model_checkpoint_paths: "model-1000"\nmodel_checkpoint_path: "model-500"\n',
        '#model_checkpoint_path: "model-1000"\nmodel_checkpoint_path: "model-500"\n',
        'model_checkpoint_path: "model-500"\n#model_checkpoint_path: "model-1000"\n',
        'model_checkpoint_path: "model-1000"\nmodel_checkpoint_path: "model-500"\n',
    ],
)
def test_of_several_checkpoints_the_one_that_tensorflow_names_is_loaded(toy, checkpoint):
    in_two_versions(toy / "124M")
    (toy / "124M" / "checkpoint").write_text(checkpoint)
    load_toy(toy)
    assert tf.train.latest_checkpoint(str(toy / "124M")) == str(toy / "124M" / "model-500")


@pytest.mark.parametrize("path", ["/home/zo\\303\\251/model-500", "C:\\\\run\\\\model-500"])
def test_a_checkpoint_that_was_saved_in_another_folder_is_found_in_this_one(toy, path):
    """TensorFlow does not find it."""
    in_two_versions(toy / "124M")
    (toy / "124M" / "checkpoint").write_text(f'model_checkpoint_path: "{path}"\n')
    load_toy(toy)
    assert tf.train.latest_checkpoint(str(toy / "124M")) is None


def test_a_folder_in_which_no_stamp_can_be_written_loads_at_every_run(prefix):
    """As if it were read-only, which it cannot be for root."""
    os.mkdir(f"{prefix}.verified")
    for _ in range(2):
        assert_same(load(prefix), PARAMS)


def test_a_path_may_have_a_tilde_spaces_and_unicode(toy, monkeypatch):
    (toy / "zwei W\u00f6rter").mkdir()
    (toy / "124M").rename(toy / "zwei W\u00f6rter" / "124M")
    monkeypatch.setenv("HOME", str(toy))
    monkeypatch.setenv("USERPROFILE", str(toy))  # on Windows
    load_toy("~/zwei W\u00f6rter")


@pytest.mark.skipif(os.name == "nt", reason="needs a privilege")
def test_a_path_may_be_a_symlink(toy):
    (toy / "link").symlink_to(toy, target_is_directory=True)
    load_toy(toy / "link")


# ---- What is verified again ------------------------------------------------------------------


def test_a_checkpoint_replaced_by_an_older_one_is_verified_again(prefix, tmp_path):
    load(prefix)
    save(prefix, variables(OTHER_PARAMS))
    os.utime(prefix + DATA, (1, 1))
    assert_same(load(prefix), OTHER_PARAMS)


def test_a_time_without_fractions_of_a_second_is_the_same(prefix, no_tensorflow):
    """Archives and container images keep whole seconds only."""
    os.utime(prefix + DATA, (1_000_000_000.75, 1_000_000_000.75))
    load(prefix)
    os.utime(prefix + DATA, (1_000_000_000, 1_000_000_000))
    no_tensorflow()
    assert_same(load(prefix), PARAMS)


def test_half_a_stamp_matches_nothing(prefix, no_tensorflow):
    load(prefix)
    stamp = pathlib.Path(f"{prefix}.verified")
    stamp.write_text(stamp.read_text()[:-1])
    no_tensorflow()
    with pytest.raises(ImportError):
        load(prefix)


@pytest.mark.parametrize(("position", "loads_before"), [(0, 0), (5000, 1), (-1, 0)])
def test_a_flipped_bit_in_a_file_with_another_time_is_found(prefix, position, loads_before):
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
    ("changes", "difference"),
    [
        ({"n_layer": 11}, "model/h11/attn/c_attn/b is unexpected"),
        ({"n_layer": 13}, "model/h12/attn/c_attn/b is missing"),
        ({"n_vocab": 7}, "model/wte is (300, 12), expected (7, 12)"),
        ({"n_ctx": 7}, "model/wpe is (16, 12), expected (7, 12)"),
        ({"n_embd": 6}, "model/h0/attn/c_attn/b is (36,), expected (18,)"),
        ({"n_vocab": 16, "n_ctx": 300}, "model/wpe is (16, 12), expected (300, 12)"),
    ],
)
def test_weights_that_do_not_fit_hparams_are_refused(prefix, changes, difference):
    """Also when they have been verified, and even if they are as many."""
    load(prefix)
    message = f"{prefix} does not fit hparams.json: {difference}"
    with pytest.raises(utils.UserError, match=f"^{re.escape(message)}$"):
        load(prefix, **changes)


TRANSPOSED = WEIGHTS | {"model/wte": WEIGHTS["model/wte"].T}  # the file is as long
FOREIGN = {f"newslm{name[5:]}": value for name, value in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("values", "difference"),
    [
        (TRANSPOSED, "model/wte is (12, 300), expected (300, 12)"),
        (FOREIGN, "model/h0/attn/c_attn/b is missing"),
    ],
)
def test_weights_with_other_shapes_or_names_are_refused(tmp_path, values, difference):
    with pytest.raises(utils.UserError, match=f"{re.escape(difference)}$"):
        load(save(tmp_path / "model.ckpt", values))


def half_of(name):
    content = (TOY / "124M" / name).read_bytes()
    return content[: len(content) // 2]


NOT_JSON = "cannot read {path}; delete it to download OpenAI's copy (REASON)"
NO_KEY = "{path} has no n_vocab; delete it to download OpenAI's copy"
MISMATCH = "{folder}vocab.bpe does not match encoder.json; delete both to download OpenAI's copies"
NO_NAME = '{path} has no line model_checkpoint_path: "..."; delete it to download OpenAI\'s copy'
OPENAIS = "if it is OpenAI's, delete model.ckpt.* and checkpoint to download them again"
UNREADABLE = f"cannot read {{folder}}model.ckpt; {OPENAIS} (REASON)"
MISSING = f"cannot read {{folder}}model-7; {OPENAIS} (REASON)"
WEIGHTS_FILES = ["model.ckpt.*", "checkpoint"]
DAMAGE = [  # a file, what is in it instead (None: it is missing), the message, what to delete
    ("encoder.json", half_of("encoder.json"), NOT_JSON, ["encoder.json"]),
    ("encoder.json", b"", NOT_JSON, ["encoder.json"]),
    ("encoder.json", b"\xff", NOT_JSON, ["encoder.json"]),
    ("encoder.json", b"{}", MISMATCH, ["encoder.json", "vocab.bpe"]),
    ("vocab.bpe", half_of("vocab.bpe"), MISMATCH, ["encoder.json", "vocab.bpe"]),
    ("vocab.bpe", b"", MISMATCH, ["encoder.json", "vocab.bpe"]),
    ("vocab.bpe", b"#version: 0.2\n\xc4", MISMATCH, ["encoder.json", "vocab.bpe"]),
    ("hparams.json", half_of("hparams.json"), NOT_JSON, ["hparams.json"]),
    ("hparams.json", b"", NOT_JSON, ["hparams.json"]),
    ("hparams.json", b"{}", NO_KEY, ["hparams.json"]),
    ("checkpoint", b"", NO_NAME, ["checkpoint"]),
    ("checkpoint", b'model_checkpoint_path: "model.c', NO_NAME, ["checkpoint"]),
    ("checkpoint", b'model_checkpoint_path: "model-7"', MISSING, WEIGHTS_FILES),
    ("model.ckpt.index", half_of("model.ckpt.index"), UNREADABLE, WEIGHTS_FILES),
    ("model.ckpt.index", b"", UNREADABLE, WEIGHTS_FILES),
    ("model.ckpt.index", b"x" * 100, UNREADABLE, WEIGHTS_FILES),
    ("model.ckpt.index", None, UNREADABLE, WEIGHTS_FILES),
    (f"model.ckpt{DATA}", half_of(f"model.ckpt{DATA}"), UNREADABLE, WEIGHTS_FILES),
    (f"model.ckpt{DATA}", b"", UNREADABLE, WEIGHTS_FILES),
    (f"model.ckpt{DATA}", None, UNREADABLE, WEIGHTS_FILES),
]


def damage(path, content):
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize(("name", "content", "message", "_doomed"), DAMAGE)
def test_a_damaged_file_is_one_error_that_says_what_to_delete(toy, name, content, message, _doomed):
    path = toy / "124M" / name
    damage(path, content)
    expected = re.escape(message.format(folder=f"{toy / '124M'}{os.sep}", path=path))
    with pytest.raises(utils.UserError, match=f"(?s)^{expected.replace('REASON', '.+')}$"):
        load_toy(toy)


@pytest.mark.parametrize(("name", "content", "_message", "doomed"), DAMAGE)
def test_when_just_that_is_deleted_it_is_downloaded_and_the_toy_recites(
    toy, server, name, content, _message, doomed
):
    damage(toy / "124M" / name, content)
    for pattern in doomed:
        for path in (toy / "124M").glob(pattern):
            path.unlink()
    assert tokens_of(toy) == " brillig, and the"


@pytest.mark.parametrize("function", ["nest", "weight_shapes", "map_weights", "get_encoder"])
@pytest.mark.parametrize("error", [TypeError, KeyError, ValueError, ZeroDivisionError])
def test_a_mistake_of_our_own_is_no_user_error(toy, monkeypatch, function, error):
    """So it is a traceback, and no advice to delete a model."""

    def mistake(*arguments):
        raise error("a mistake")

    monkeypatch.setattr(utils, function, mistake)
    with pytest.raises(error) as raised:
        load_toy(toy)
    assert raised.type is error


@pytest.fixture
def wider_toy(toy):
    """The toy with one more row in wte, and n_vocab one larger."""
    folder = toy / "124M"
    hparams = json.loads((folder / "hparams.json").read_text("utf-8"))
    (folder / "hparams.json").write_text(json.dumps(hparams | {"n_vocab": 513}))
    reader = tf.train.load_checkpoint(str(folder / "model.ckpt"))
    values = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    values["model/wte"] = np.pad(values["model/wte"], [(0, 1), (0, 0)])
    save(folder / "model.ckpt", values)
    return toy


def test_a_model_with_n_vocab_padded_above_its_vocabulary_loads(wider_toy):
    assert tokens_of(wider_toy) == " brillig, and the"


def test_a_model_with_an_added_token_loads(wider_toy):
    path = wider_toy / "124M" / "encoder.json"
    encoder = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(encoder | {"<|user|>": 512}))
    assert tokens_of(wider_toy) == " brillig, and the"


@pytest.mark.parametrize("error", ["ImportError", "ValueError", "TypeError"])
def test_a_broken_tensorflow_is_one_line_and_no_advice_to_delete_a_model(toy, tmp_path, error):
    (tmp_path / "tensorflow.py").write_text(f"raise {error}('DLL load failed')")
    arguments = ["gpt2.py", "Twas", "1", "124M", toy]
    done = run(*arguments, env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (1, "")
    last_line = done.stderr.splitlines()[-1]
    assert last_line == "cannot import TensorFlow: DLL load failed"
    assert "Traceback" not in done.stderr
