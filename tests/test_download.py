"""The download, from a local server that behaves as OpenAI's does, or misbehaves on command."""

import gzip
import itertools
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import FILES, ROOT, TOY

import utils

CONTENT = {name: (TOY / "124M" / name).read_bytes() for name in FILES}
DATA = "model.ckpt.data-00000-of-00001"
SIZE = len(CONTENT[DATA])
HALF = SIZE // 2


@pytest.fixture
def folder(tmp_path):
    """models/124M, not made yet."""
    return tmp_path / "models" / "124M"


def download(folder):
    utils.download_gpt2_files("124M", str(folder))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_files_come_from_the_address_that_the_readme_names():
    assert f"{utils.URL}/124M/" in (ROOT / "README.md").read_text("utf-8")


def test_an_empty_folder_gets_the_seven_files_checkpoint_last(folder, server):
    download(folder)
    assert contents(folder) == CONTENT
    assert server.asked == {name: [0] for name in FILES}
    assert list(server.asked)[-1] == "checkpoint"


def test_a_complete_folder_needs_no_network(folder, server):
    shutil.copytree(TOY / "124M", folder)
    download(folder)
    assert not server.asked


def test_a_checkpoint_of_the_users_own_gets_only_the_vocabulary_and_hparams(folder, server):
    folder.mkdir(parents=True)
    (folder / "checkpoint").write_text('model_checkpoint_path: "model-1000"')
    download(folder)
    assert list(server.asked) == ["encoder.json", "hparams.json", "vocab.bpe"]


def test_a_broken_connection_is_resumed_where_it_broke(folder, server):
    """As often as it breaks, if each time some bytes come. 8 KB may be asked for again."""
    server.faults[DATA] = lambda handler, start: handler.send_range(
        start, CONTENT[DATA], cut=100_000
    )
    download(folder)
    assert contents(folder) == CONTENT
    starts = server.asked[DATA]
    assert len(starts) > 4
    steps = [b - a for a, b in itertools.pairwise(starts)]
    assert all(100_000 - 8192 <= step <= 100_000 for step in steps)


@pytest.mark.parametrize("missing", [HALF, 1, 0])
def test_a_later_run_resumes_the_partial_file(folder, server, missing):
    """One byte early, so that there is something to ask for even if the file is complete."""
    folder.mkdir(parents=True)
    size = len(CONTENT[DATA]) - missing
    (folder / f"{DATA}.part").write_bytes(CONTENT[DATA][:size])
    download(folder)
    assert contents(folder) == CONTENT
    assert server.asked[DATA] == [size - 1]


def cut_at_once(handler, start):
    handler.send_range(start, CONTENT[DATA], cut=0)


def nothing_there(handler, start):
    handler.reply(404)


def login_page(handler, start):
    handler.reply(200, b"<html>")


def without_the_last_byte(handler, start):
    span = f"bytes {start}-{SIZE - 2}/{SIZE}"
    handler.reply(206, CONTENT[DATA][start:-1], **{"Content-Range": span})


def from_an_earlier_byte(handler, start):
    handler.send_range(start - 1000, CONTENT[DATA])


def without_content_range(handler, start):
    handler.reply(206, CONTENT[DATA][start:])


def of_unknown_size(handler, start):
    span = f"bytes {start}-{SIZE - 1}/*"
    handler.reply(206, CONTENT[DATA][start:], **{"Content-Range": span})


def silence(handler, start):
    time.sleep(3)
    handler.send_range(start, CONTENT[DATA])


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (cut_at_once, "Connection broken"),
        (nothing_there, "got 404 Not Found instead of the file"),
        (login_page, "got 200 OK instead of the file"),
        (without_the_last_byte, "got 487,103 of 487,104 bytes"),
        (
            from_an_earlier_byte,
            f"asked for bytes {HALF - 1}-, got a Content-Range of 'bytes 242551-",
        ),
        (without_content_range, f"asked for bytes {HALF - 1}-, got a Content-Range of ''"),
        (of_unknown_size, f"asked for bytes {HALF - 1}-, got a Content-Range of 'bytes .*/\\*'"),
        (silence, "Read timed out"),
    ],
)
def test_a_failure_says_what_to_do_and_why_and_what_came_is_kept(
    folder, server, monkeypatch, fault, reason
):
    folder.mkdir(parents=True)
    (folder / f"{DATA}.part").write_bytes(CONTENT[DATA][:HALF])
    server.faults[DATA] = fault
    monkeypatch.setattr(utils, "TIMEOUT", 0.5)
    what_to_do = re.escape(f"cannot download {folder / DATA}; rerun to resume")
    with pytest.raises(utils.UserError, match=rf"^{what_to_do} \(.*{reason}.*\)$"):
        download(folder)
    kept = contents(folder)[f"{DATA}.part"]
    assert len(kept) >= HALF
    assert CONTENT[DATA].startswith(kept)
    assert not {DATA, "checkpoint"} & contents(folder).keys()
    server.faults.clear()
    download(folder)
    assert contents(folder) == CONTENT


def test_a_server_that_pauses_is_waited_for(folder, server, monkeypatch):
    def pause(handler, start):
        time.sleep(0.5)
        handler.send_range(start, CONTENT["vocab.bpe"])

    server.faults["vocab.bpe"] = pause
    monkeypatch.setattr(utils, "TIMEOUT", 5)
    download(folder)
    assert server.asked["vocab.bpe"] == [0]


def test_the_patience_is_a_minute():
    assert utils.TIMEOUT == 60


def test_a_file_is_asked_for_as_it_is_even_if_the_server_could_compress_it(folder, server):
    def compress(handler, start):
        if "gzip" in handler.headers["Accept-Encoding"]:
            body = gzip.compress(CONTENT["vocab.bpe"])
            span = {"Content-Range": f"bytes 0-{len(body) - 1}/{len(body)}"}
            handler.reply(206, body, **span, **{"Content-Encoding": "gzip"})
        else:
            handler.send_range(start, CONTENT["vocab.bpe"])

    server.faults["vocab.bpe"] = compress
    download(folder)
    assert contents(folder) == CONTENT


def test_without_a_network_there_is_one_attempt(folder, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(utils, "URL", "http://127.0.0.1:9/where-nothing-listens")
    what_to_do = re.escape(f"cannot download {folder / 'encoder.json'}; rerun to resume")
    with pytest.raises(utils.UserError, match=rf"^{what_to_do} \(.*refused.*\)$"):
        download(folder)


@pytest.mark.parametrize(
    "proxy",
    ["http://.corp.example:8080", "http://zo\u00eb:\u0434\u0430@127.0.0.1:9", "http://[::1"],
)
def test_a_proxy_address_that_cannot_be_right_is_one_error(folder, monkeypatch, proxy):
    monkeypatch.setattr(utils, "URL", "http://host.example/gpt-2/models")
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(utils.UserError, match="encoder.json; rerun to resume .*proxy"):
        download(folder)


def test_a_full_disk_is_named_and_what_came_is_kept(folder, server):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, limits[1]))  # bytes in a file
        with pytest.raises(utils.UserError, match=rf"{DATA}; rerun to resume \(.*too large\)$"):
            download(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    download(folder)
    assert server.asked[DATA][-1] == HALF - 1


def test_a_partial_file_that_cannot_be_written_is_named(folder, server):
    shutil.copytree(TOY / "124M", folder)
    (folder / "vocab.bpe").unlink()
    (folder / "vocab.bpe.part").mkdir()
    with pytest.raises(utils.UserError, match=r"vocab\.bpe; .* \(.*vocab\.bpe\.part'\)$"):
        download(folder)


def test_the_program_downloads_once_and_then_only_generates(tmp_path, server):
    """The README's command: the first run also reads the weights with TensorFlow."""
    setup = f"import runpy, utils; utils.URL = {utils.URL!r}; "
    code = setup + "runpy.run_path('gpt2.py', run_name='__main__')"
    command = [sys.executable, "-c", code, "Alan Turing", "--models_dir", str(tmp_path)]
    options = {"cwd": ROOT, "capture_output": True, "text": True}
    first, second = (subprocess.run(command, check=True, **options) for _ in range(2))
    assert first.stdout == second.stdout
    assert len(first.stdout) > 40
    assert "reading model.ckpt with TensorFlow: 100%" in first.stderr
    bars = [line for line in re.split(r"[\r\n]+", first.stderr) if line]
    assert [line for line in bars if "%|" not in line] == []  # no messages of TensorFlow
    assert second.stderr == ""
    assert server.asked == {name: [0] for name in FILES}
