"""Checkpoints written by TensorFlow's own Saver load bit for bit, or are refused with a reason."""

import json
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest
from textbook import random_params

import utils

tf = pytest.importorskip("tensorflow")
HPARAMS = {"n_vocab": 300, "n_ctx": 16, "n_embd": 12, "n_head": 3, "n_layer": 12}


def variables(params, prefix="model"):
    """{"model/h0/attn/c_attn/w": array [1, n_in, n_out], ...}, as in OpenAI's checkpoints."""
    flat = {}
    for name, value in params.items():
        if name == "blocks":
            for i, block in enumerate(value):
                flat |= variables(block, f"{prefix}/h{i}")
        elif isinstance(value, dict):
            flat |= variables(value, f"{prefix}/{name}")
        else:
            flat[f"{prefix}/{name}"] = value[None] if name == "w" else value
    return flat


def save(folder, values, name="model.ckpt", **options):
    """Write {variable: value} with TensorFlow's Saver; returns the checkpoint's prefix."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for variable, value in values.items():
            tf.compat.v1.get_variable(variable, initializer=value)
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver(save_relative_paths=True, **options).save(
            session, str(folder / name)
        )
    return str(folder / name)


def assert_same(loaded, params):
    """Equal keys, float32, equal bits."""
    flat, expected = variables(loaded), variables(params)
    assert list(loaded["blocks"][0]) == list(loaded["blocks"][1])
    assert flat.keys() == expected.keys()
    for name, value in expected.items():
        assert flat[name].dtype == np.float32
        assert flat[name].shape == value.shape, name
        assert flat[name].tobytes() == value.tobytes(), name


@pytest.fixture
def params():
    return random_params(300, 16, 12, 12)


@pytest.fixture
def no_tensorflow(monkeypatch):
    """From now on `import tensorflow` fails: call it when the test is ready for that."""
    return lambda: monkeypatch.setitem(sys.modules, "tensorflow", None)


def load(prefix, **changes):
    return utils.load_gpt2_params_from_tf_ckpt(prefix, {**HPARAMS, **changes})


def test_twelve_layers_load_bit_for_bit_in_numeric_order(tmp_path, params):
    assert_same(load(save(tmp_path, variables(params))), params)


def test_nan_and_negative_zero_load_bit_for_bit(tmp_path, params):
    params["ln_f"]["g"][:3] = [np.nan, -0.0, np.inf]
    prefix = save(tmp_path, variables(params))
    assert_same(load(prefix), params)
    assert_same(load(prefix), params)


def test_the_second_load_needs_no_tensorflow_and_copies_nothing(tmp_path, params, no_tensorflow):
    prefix = save(tmp_path, variables(params))
    load(prefix)
    no_tensorflow()
    again = load(prefix)
    assert_same(again, params)
    assert not any(
        array.flags.owndata or array.flags.writeable for array in variables(again).values()
    )


def test_other_variables_such_as_an_optimizers_are_ignored(tmp_path, params):
    """They move the weights to other places in the file; the weights are then not mapped."""
    extra = {
        "beta1_power": np.float32(0.9),
        "global_step": np.int64(7),
        "model/h0/ln_1/g/Adam": np.ones(12, np.float32),
        "model/wte/Adam_1": np.ones((300, 12), np.float32),
    }
    prefix = save(tmp_path, {**extra, **variables(params)}, "model-1000")
    loaded = load(prefix)
    assert_same(loaded, params)
    assert all(array.flags.writeable for array in variables(loaded).values())  # not one is mapped
    assert_same(load(prefix), params)


def test_unaligned_weights_load_bit_for_bit(tmp_path, params):
    prefix = save(tmp_path, {"a_flag": np.bool_(True), **variables(params)})
    assert_same(load(prefix), params)
    assert_same(load(prefix), params)


def test_other_floats_become_float32(tmp_path, params):
    prefix = save(
        tmp_path, {name: value.astype(np.float64) for name, value in variables(params).items()}
    )
    assert_same(load(prefix), params)
    assert not os.path.exists(f"{prefix}.mapped")


def save_in_shards(folder, values):
    """Write {variable: value} as model.ckpt in two shards; returns the checkpoint's prefix."""
    prefix = str(folder / "model.ckpt")
    names, tensors = list(values), list(values.values())
    half = len(names) // 2
    parts = {f"{prefix}_0": slice(half), f"{prefix}_1": slice(half, None)}
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for part, chosen in parts.items():
            whole = [""] * len(names[chosen])  # no slices
            save = tf.raw_ops.SaveV2(
                prefix=part,
                tensor_names=names[chosen],
                shape_and_slices=whole,
                tensors=tensors[chosen],
            )
            session.run(save)
        merge = tf.raw_ops.MergeV2Checkpoints(
            checkpoint_prefixes=list(parts), destination_prefix=prefix
        )
        session.run(merge)
    assert os.path.exists(f"{prefix}.data-00001-of-00002")
    return prefix


def test_several_shards_load_bit_for_bit(tmp_path, params):
    assert_same(load(save_in_shards(tmp_path, variables(params))), params)


@pytest.mark.parametrize("name", ["model/wte", "model/h11/mlp/c_proj/w"])
def test_a_missing_variable_is_named(tmp_path, params, name):
    values = variables(params)
    del values[name]
    with pytest.raises(ValueError, match=f"{name} is .*missing"):
        load(save(tmp_path, values))


def test_a_variable_of_another_shape_is_named_with_both_shapes(tmp_path, params):
    values = variables(params) | {"model/wpe": np.zeros((17, 12), np.float32)}
    prefix = save(tmp_path, values)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"model/wpe is \[16, 12\].*\[17, 12\]"):
            load(prefix)


@pytest.mark.parametrize("n_layer", [11, 13])
def test_another_number_of_layers_is_refused_at_every_load(tmp_path, params, n_layer):
    prefix = save(tmp_path, variables(params))
    for _ in range(2):
        with pytest.raises(ValueError, match="model/h1"):
            load(prefix, n_layer=n_layer)
        load(prefix)


@pytest.mark.parametrize("position", [0, 5000, -1])
def test_a_flipped_bit_in_the_data_is_found_at_the_first_load(tmp_path, params, position):
    prefix = save(tmp_path, variables(params))
    data = pathlib.Path(prefix + utils.DATA)
    raw = bytearray(data.read_bytes())
    raw[position] ^= 1
    data.write_bytes(raw)
    with pytest.raises(
        ValueError, match=r"model\.ckpt\.data-00000-of-00001 is damaged.*move it away"
    ) as error:
        load(prefix)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [utils.DATA, utils.INDEX])
@pytest.mark.parametrize("size", [0, 100])
def test_a_truncated_file_is_named(tmp_path, params, suffix, size):
    prefix = save(tmp_path, variables(params))
    os.truncate(prefix + suffix, size)
    with pytest.raises(ValueError, match=rf"model\.ckpt{suffix} is damaged.*move it away"):
        load(prefix)


@pytest.mark.parametrize("suffix", [utils.DATA, utils.INDEX])
def test_a_file_truncated_after_the_first_load_is_named(tmp_path, params, suffix):
    prefix = save(tmp_path, variables(params))
    load(prefix)
    os.truncate(prefix + suffix, 100)
    with pytest.raises(ValueError, match=rf"model\.ckpt{suffix} is damaged.*move it away"):
        load(prefix)


def test_a_replaced_checkpoint_is_read_anew(tmp_path, params):
    load(save(tmp_path, variables(params)))
    other = random_params(300, 16, 12, 12, seed=1)
    assert_same(load(save(tmp_path, variables(other))), other)


def test_a_damaged_note_is_rewritten(tmp_path, params):
    prefix = save(tmp_path, variables(params))
    load(prefix)
    file = pathlib.Path(f"{prefix}.mapped")
    intact = file.read_bytes()
    damaged = [b"", b"{}", intact[:-9], intact + b"\n", b"\xff" + intact]
    damaged += [
        intact[:i] + bytes([intact[i] ^ 1]) + intact[i + 1 :] for i in range(0, len(intact), 20)
    ]
    for content in damaged:
        file.write_bytes(content)
        assert_same(load(prefix), params)
        assert file.read_bytes() == intact


def test_other_weights_under_the_same_time_stamp_are_read_anew(tmp_path, params):
    prefix = save(tmp_path, variables(params))
    load(prefix)
    times = [
        (prefix + suffix, os.stat(prefix + suffix).st_mtime_ns)
        for suffix in (utils.DATA, utils.INDEX)
    ]
    other = random_params(300, 16, 12, 12, seed=1)
    save(tmp_path, variables(other))
    for path, time in times:
        os.utime(path, ns=(time, time))
    assert_same(load(prefix), other)


def test_the_same_files_read_with_other_hparams_are_checked_again(tmp_path, params):
    prefix = save(tmp_path, variables(params))
    load(prefix)
    with pytest.raises(ValueError, match=r"model/wpe is \[15, 12\].*\[16, 12\]"):
        load(prefix, n_ctx=15)


def test_a_copy_in_a_read_only_folder_needs_no_tensorflow(tmp_path, params, no_tensorflow):
    """Copied as `cp -a` or an image layer does: with modification times, to the second at least."""
    load(save(tmp_path, variables(params)))
    copy = tmp_path.with_name("copy")
    shutil.copytree(tmp_path, copy)
    for path in copy.iterdir():
        seconds = int(path.stat().st_mtime)
        os.utime(path, (seconds, seconds))
        path.chmod(0o444)
    copy.chmod(0o555)
    no_tensorflow()
    assert_same(load(str(copy / "model.ckpt")), params)


def test_a_folder_that_cannot_be_written_is_read_with_tensorflow(tmp_path, params, monkeypatch):
    def read_only(path, content):
        raise OSError(30, "Read-only file system", str(path))

    prefix = save(tmp_path, variables(params))
    monkeypatch.setattr(pathlib.Path, "write_bytes", read_only)
    assert_same(load(prefix), params)
    assert not os.path.exists(f"{prefix}.mapped")


def test_the_bar_is_shown_before_tensorflow_is_imported(tmp_path, params, no_tensorflow, capsys):
    prefix = save(tmp_path, variables(params))
    no_tensorflow()
    with pytest.raises(ImportError):
        load(prefix)
    assert "reading model.ckpt:   0%" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Projects [2024]", "back\\slash", b"not UTF-8 \xff"])
def test_a_path_that_tensorflow_cannot_open_is_named_as_the_cause(toy, name):
    folder = os.path.join(str(toy), os.fsdecode(name))
    os.mkdir(folder)
    shutil.move(toy / "124M", folder)
    with pytest.raises(ValueError, match="TensorFlow cannot open") as caught:
        utils.load_encoder_hparams_and_params("124M", folder)
    assert folder in str(caught.value)


def test_a_relative_path_in_a_folder_with_brackets_loads(toy, monkeypatch):
    folder = toy / "Projects [2024]"
    (folder / "models").mkdir(parents=True)
    shutil.move(toy / "124M", folder / "models")
    monkeypatch.chdir(folder)
    _, hparams, params = utils.load_encoder_hparams_and_params("124M", "models")
    assert params["wte"].shape == (hparams["n_vocab"], hparams["n_embd"])


def test_a_note_that_cannot_be_read_does_no_harm(tmp_path, params):
    prefix = save(tmp_path, variables(params))
    os.mkdir(f"{prefix}.mapped")
    assert_same(load(prefix), params)


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_a_damaged_vocabulary_is_refused_with_the_names_of_both_files(toy, name):
    (toy / "124M" / name).write_text("[]")
    with pytest.raises(ValueError, match=r"124M/encoder\.json and .*124M/vocab\.bpe\) is damaged"):
        utils.load_encoder_hparams_and_params("124M", str(toy))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        "[" * 100_000,
        json.dumps({**HPARAMS, "n_layer": 10**9}),
        json.dumps({**HPARAMS, "n_head": 0}),
        json.dumps({**HPARAMS, "n_head": 5}),
        json.dumps({"n_vocab": 511, "n_ctx": 256, "n_embd": 48, "n_head": 4, "n_layer": 3}),
        json.dumps({"n_vocab": 512, "n_ctx": 256, "n_embd": 48, "n_head": 4.0, "n_layer": 3}),
        json.dumps({"n_vocab": 512, "n_ctx": 256, "n_embd": 48, "n_head": True, "n_layer": 3}),
        "\xff",
    ],
)
def test_damaged_hparams_are_refused_by_name(toy, content):
    (toy / "124M" / "hparams.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"hparams\.json is damaged"):
        utils.load_encoder_hparams_and_params("124M", str(toy))


@pytest.mark.parametrize("content", ["", "nonsense", 'model_checkpoint_path: ""', b"\xff\xfe"])
def test_a_damaged_checkpoint_file_is_refused_by_name(toy, content):
    (toy / "124M" / "checkpoint").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(ValueError, match="checkpoint is damaged"):
        utils.load_encoder_hparams_and_params("124M", str(toy))


@pytest.mark.parametrize(
    "saved_as",
    [
        "model-1000",
        "{}/model-1000",
        "/home/alice/model-1000",
        "../model-1000",
        r"C:\run\model-1000",
    ],
)
def test_a_checkpoint_is_found_by_the_last_component_of_the_path_it_was_saved_under(toy, saved_as):
    folder = toy / "124M"
    for suffix in (utils.DATA, utils.INDEX, ".meta"):
        (folder / f"model.ckpt{suffix}").rename(folder / f"model-1000{suffix}")
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{saved_as.format(folder)}"\n')
    _, hparams, params = utils.load_encoder_hparams_and_params("124M", str(toy))
    assert params["wte"].shape == (hparams["n_vocab"], hparams["n_embd"])
    assert not (folder / "model.ckpt.index").exists()


def test_a_missing_checkpoint_is_an_error_with_its_path(toy):
    (toy / "124M" / "checkpoint").write_text('model_checkpoint_path: "model-7"\n')
    with pytest.raises(OSError, match=r"124M/model-7\.index"):
        utils.load_encoder_hparams_and_params("124M", str(toy))


@pytest.mark.parametrize("size", ["117M", "124m", "", "../124M", "124M/", None, 124])
def test_only_the_four_sizes_reach_a_path(tmp_path, size):
    for call in (utils.load_encoder_hparams_and_params, utils.download_gpt2_files):
        with pytest.raises(ValueError, match=f"124M, 355M, 774M, 1558M, not {size!r}"):
            call(size, str(tmp_path / "models"))
    assert not (tmp_path / "models").exists()
