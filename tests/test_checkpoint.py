"""Checkpoints written by TensorFlow load bit for bit, or are refused with a reason."""

import copy
import json
import os
import pathlib
import shutil
import sys
import tempfile

import numpy as np
import pytest
from random_weights import random_params, save, variables
from textbook import textbook_load

import utils

tf = pytest.importorskip("tensorflow")
HPARAMS = {"n_vocab": 300, "n_ctx": 16, "n_embd": 12, "n_head": 3, "n_layer": 12}
PARAMS = random_params(300, 16, 12, 12)
OTHER_PARAMS = random_params(300, 16, 12, 12, seed=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a checkpoint of PARAMS, written by TensorFlow's Saver, as OpenAI's was."""
    folder = tmp_path_factory.mktemp("saved")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, value in variables(PARAMS).items():
            tf.compat.v1.get_variable(name, initializer=value)
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(folder / "model.ckpt"))
    return folder


@pytest.fixture
def prefix(tmp_path, saved):
    """A copy of this checkpoint, not yet loaded."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return str(tmp_path / "model.ckpt")


def save_in_two_shards(prefix, values):
    items = list(values.items())
    halves = dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])
    parts = [save(f"{prefix}_{i}", half) for i, half in enumerate(halves)]
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(prefix))
    return str(prefix)


def load(prefix, **changes):
    return utils.load_gpt2_params_from_tf_ckpt(prefix, {**HPARAMS, **changes})


def load_toy(models_dir):
    return utils.load_encoder_hparams_and_params("124M", str(models_dir))


def assert_same(loaded, params=PARAMS):
    """Equal keys, float32, equal bits."""
    flat, expected = variables(loaded), variables(params)
    assert flat.keys() == expected.keys()
    for name, value in expected.items():
        assert flat[name].dtype == np.float32
        assert flat[name].shape == value.shape, name
        assert flat[name].tobytes() == value.tobytes(), name


def flip_a_bit(path, position):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def no_tensorflow(monkeypatch):
    """From now on `import tensorflow` fails: call it when the test is ready for that."""
    return lambda: monkeypatch.setitem(sys.modules, "tensorflow", None)


def test_nan_and_negative_zero_load_bit_for_bit(tmp_path):
    params = copy.deepcopy(PARAMS)
    params["ln_f"]["g"][:3] = [np.nan, -0.0, np.inf]
    prefix = save(tmp_path / "model.ckpt", variables(params))
    for _ in range(2):
        assert_same(load(prefix), params)


def test_twelve_layers_load_as_by_the_textbook_and_then_without_tensorflow_or_copies(
    prefix, no_tensorflow
):
    assert_same(textbook_load(prefix, n_layer=12))
    assert_same(load(pathlib.Path(prefix)))
    no_tensorflow()
    again = load(prefix)
    assert_same(again)
    assert all(isinstance(a.base.base, np.memmap) for a in variables(again).values())


def test_weights_can_be_changed_and_the_file_keeps_its_bytes(prefix):
    for _ in range(2):
        loaded = load(prefix)
        loaded["wte"][0] = 0
        loaded["blocks"][3]["attn"]["c_proj"]["w"][:4] = 0  # silences the first head
        assert not loaded["wte"][0].any()
    assert_same(load(prefix))


ADAM = {
    "beta1_power": np.float32(0.9),
    "global_step": np.int64(7),
    "model/h0/ln_1/g/Adam": np.ones(12, np.float32),
    "model/wte/Adam_1": np.ones((300, 12), np.float32),
}


@pytest.mark.parametrize("others", [ADAM, {"an_unaligned_flag": np.bool_(True)}])
def test_other_variables_are_ignored_at_every_load(tmp_path, others, capsys):
    """They move the weights to other places in the file, which is read with one progress bar."""
    prefix = save(tmp_path / "model-1000", dict(sorted((others | variables(PARAMS)).items())))
    for _ in range(2):
        assert_same(load(prefix))
        assert capsys.readouterr().err.count("  0%") == 1


@pytest.mark.parametrize("save", [save, save_in_two_shards])
def test_arrays_in_any_order_and_in_several_shards_are_read(tmp_path, save):
    prefix = save(tmp_path / "model.ckpt", dict(reversed(variables(PARAMS).items())))
    for _ in range(2):
        assert_same(load(prefix))


def test_other_floats_become_float32(tmp_path):
    values = {name: value.astype(np.float64) for name, value in variables(PARAMS).items()}
    assert_same(load(save(tmp_path / "model.ckpt", values)))


@pytest.mark.parametrize(
    "saved_as",
    ["model-1", "{}/model-1", "/home/alice/model-1", "../model-1", r"C:\run\model-1", None],
)
def test_a_checkpoint_is_found_by_its_name_wherever_it_was_saved(toy, saved_as):
    """Without the file `checkpoint` (None), by the name of its index."""
    folder = toy / "124M"
    for suffix in (utils.DATA, ".index"):
        (folder / f"model.ckpt{suffix}").rename(folder / f"model-1{suffix}")
    (folder / "checkpoint").unlink()
    if saved_as:
        text = f'model_checkpoint_path: "{saved_as.format(folder)}"\n'
        text += 'all_model_checkpoint_paths: "model-0"\n'
        (folder / "checkpoint").write_text(text)
    _, hparams, params = load_toy(toy)
    assert params["wte"].shape == (hparams["n_vocab"], hparams["n_embd"])


def test_of_several_checkpoints_the_file_must_name_one(toy):
    shutil.copy(toy / "124M" / "model.ckpt.index", toy / "124M" / "model-1.index")
    load_toy(toy)
    (toy / "124M" / "checkpoint").unlink()
    with pytest.raises(FileNotFoundError, match="124M/checkpoint"):
        load_toy(toy)


def test_a_leading_tilde_is_the_home_folder(toy, monkeypatch):
    monkeypatch.setenv("HOME", str(toy.parent))
    monkeypatch.setenv("USERPROFILE", str(toy.parent))  # on Windows
    monkeypatch.chdir(toy)
    load_toy(f"~/{toy.name}")
    assert os.listdir() == ["124M"]


def test_the_user_is_told_before_tensorflow_is_imported(prefix, no_tensorflow, capsys):
    no_tensorflow()
    with pytest.raises(ImportError):
        load(prefix)
    assert capsys.readouterr().err == f"reading {prefix} with TensorFlow\n"


def test_other_weights_with_the_same_modification_time_are_read_anew(prefix):
    load(prefix)
    stat = os.stat(prefix + utils.DATA)
    save(prefix, dict(sorted(variables(OTHER_PARAMS).items())))
    os.utime(prefix + utils.DATA, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert_same(load(prefix), OTHER_PARAMS)


def test_data_with_another_modification_time_is_read_anew(prefix):
    load(prefix)
    flip_a_bit(pathlib.Path(prefix + utils.DATA), 5000)
    os.utime(prefix + utils.DATA, (1, 1))
    with pytest.raises(ValueError, match="Checksum"):
        load(prefix)


@pytest.mark.parametrize("content", ["", "{}", "7", '{"x": ', '["of", "an", "earlier", "version"]'])
def test_a_damaged_note_is_rewritten(prefix, content, no_tensorflow):
    pathlib.Path(f"{prefix}.mapped").write_text(content)
    assert_same(load(prefix))
    no_tensorflow()
    assert_same(load(prefix))


def test_a_note_that_lacks_an_array_is_not_used(prefix):
    load(prefix)
    note = pathlib.Path(f"{prefix}.mapped")
    ((fingerprint, shapes),) = json.loads(note.read_text()).items()
    del shapes["model/ln_f/b"]
    note.write_text(json.dumps({fingerprint: shapes}))
    assert_same(load(prefix))


def test_a_folder_with_the_checkpoints_name_is_ignored(prefix):
    os.mkdir(prefix)
    for _ in range(2):
        assert_same(load(prefix))


def test_a_copy_in_a_read_only_folder_needs_no_tensorflow(tmp_path, prefix, no_tensorflow):
    """Copied as `cp -a` or an image layer does: with modification times, to the second at least."""
    load(prefix)
    folder = shutil.copytree(tmp_path, tmp_path.with_name("copied"))
    for path in folder.iterdir():
        seconds = int(path.stat().st_mtime)
        os.utime(path, (seconds, seconds))
        path.chmod(0o444)
    folder.chmod(0o555)
    no_tensorflow()
    assert_same(load(str(folder / "model.ckpt")))


def test_a_note_that_cannot_be_written_does_no_harm(prefix):
    os.mkdir(f"{prefix}.mapped")
    for _ in range(2):
        assert_same(load(prefix))


@pytest.mark.parametrize("name", HPARAMS)
def test_hparams_that_do_not_describe_the_weights_are_refused_at_every_load(prefix, name):
    for _ in range(2):
        with pytest.raises(ValueError, match=r"model\.ckpt or hparams\.json .*the weights are "):
            load(prefix, **{name: 7})
        load(prefix)


def test_heads_that_are_none_are_refused(prefix):
    with pytest.raises(ValueError, match=r"cannot read .*hparams\.json .*modulo by zero"):
        load(prefix, n_head=0)


@pytest.mark.parametrize("name", ["bert/w", "model/conv/w"])
def test_a_checkpoint_of_another_model_is_refused(tmp_path, name):
    prefix = save(tmp_path / "model.ckpt", {name: np.ones((3, 3, 8, 8), np.float32)})
    with pytest.raises(ValueError, match=r"cannot read .*model\.ckpt"):
        load(prefix)


@pytest.mark.parametrize("position", [0, 5000, -1])
def test_a_flipped_bit_in_the_data_is_found_at_the_first_load(prefix, position):
    flip_a_bit(pathlib.Path(prefix + utils.DATA), position)
    with pytest.raises(ValueError, match=r"model\.ckpt .*Checksum .*move it and rerun"):
        load(prefix)


@pytest.mark.parametrize("loads_before", [0, 1])
@pytest.mark.parametrize("suffix", [utils.DATA, ".index"])
@pytest.mark.parametrize("size", [0, 100])
def test_a_truncated_file_is_refused(prefix, suffix, size, loads_before):
    for _ in range(loads_before):
        load(prefix)
    os.truncate(prefix + suffix, size)
    with pytest.raises(ValueError, match=r"cannot read .*model\.ckpt .*move it and rerun"):
        load(prefix)


def test_an_index_with_other_line_ends_is_refused(toy):
    index = toy / "124M" / "model.ckpt.index"
    index.write_bytes(index.read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(ValueError, match=r"124M/model\.ckpt .*move it and rerun"):
        load_toy(toy)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="Windows has other permissions")
@pytest.mark.parametrize("suffix", [utils.DATA, ".index"])
def test_a_file_that_may_not_be_read_keeps_the_systems_words(saved, suffix):
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        os.chmod(folder, 0o755)
        os.chmod(f"{folder}/model.ckpt{suffix}", 0)
        try:
            os.seteuid(user or 65534)  # root may read every file, nobody may not
            with pytest.raises(PermissionError, match=rf"denied: .*model\.ckpt{suffix}"):
                load(f"{folder}/model.ckpt")
        finally:
            os.seteuid(user)


def test_a_missing_shard_is_named(tmp_path):
    prefix = save_in_two_shards(tmp_path / "model.ckpt", variables(PARAMS))
    os.remove(f"{prefix}.data-00001-of-00002")
    with pytest.raises(ValueError, match=r"data-00001-of-00002; No such file"):
        load(prefix)


def test_a_missing_checkpoint_is_named(toy):
    (toy / "124M" / "checkpoint").write_text('model_checkpoint_path: "model-7"\n')
    with pytest.raises(FileNotFoundError, match=r"124M/model-7\.index"):
        load_toy(toy)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", json.dumps(HPARAMS).encode()])
@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe", "hparams.json", "checkpoint"])
def test_a_damaged_file_is_named(toy, name, content):
    (toy / "124M" / name).write_bytes(content)
    path = f"124M/((encoder.json|model.ckpt) or )?{name}"
    with pytest.raises(ValueError, match=rf"cannot read \S*{path} .* move it and rerun"):
        load_toy(toy)


@pytest.mark.parametrize("size", ["117M", "124m", "", "../124M", "124M/", None, 124])
def test_only_the_four_sizes_reach_a_path(tmp_path, size):
    with pytest.raises(utils.UserError, match=f"124M, 355M, 774M, 1558M, not {size!r}$"):
        utils.load_encoder_hparams_and_params(size, str(tmp_path / "models"))
    assert not (tmp_path / "models").exists()
