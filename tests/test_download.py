"""The download, from a local server that behaves as OpenAI's does, or misbehaves on command."""

import itertools
import shutil
import subprocess
import sys

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


def test_the_projects_url_is_openais():
    assert utils.URL == "https://openaipublic.blob.core.windows.net/gpt-2/models"


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


RANGE = {"Content-Range": f"bytes {HALF - 1}-{SIZE - 2}/{SIZE}"}  # without the last byte
FAULTS = [
    (lambda handler, start: handler.send_range(start, CONTENT[DATA], cut=0), "Connection broken"),
    (lambda handler, start: handler.reply(404), "got 404 Not Found instead of the file"),
    (lambda handler, start: handler.reply(200, b"<html>"), "got 200 OK instead of the file"),
    (lambda handler, start: handler.reply(206, CONTENT[DATA][start:-1], **RANGE), "got 487,103 of"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_the_reason_is_one_line_and_what_came_is_kept(folder, server, fault, reason):
    folder.mkdir(parents=True)
    (folder / f"{DATA}.part").write_bytes(CONTENT[DATA][:HALF])
    server.faults[DATA] = fault
    message = rf"^cannot download {DATA} \(.*{reason}.*\); rerun to resume$"
    with pytest.raises(utils.UserError, match=message):
        download(folder)
    kept = contents(folder)[f"{DATA}.part"]
    assert len(kept) >= HALF and CONTENT[DATA].startswith(kept)
    assert not {DATA, "checkpoint"} & contents(folder).keys()
    server.faults.clear()
    download(folder)
    assert contents(folder) == CONTENT


def test_without_a_network_there_is_one_attempt(folder, monkeypatch):
    monkeypatch.setattr(utils, "URL", "http://127.0.0.1:9/where-nothing-listens")
    with pytest.raises(utils.UserError, match=r"^cannot download encoder\.json \(.*refused.*\)"):
        download(folder)


def test_a_full_disk_is_named_and_what_came_is_kept(folder, server):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, limits[1]))  # bytes in a file
        with pytest.raises(utils.UserError, match=rf"cannot download {DATA} \(.*too large\)"):
            download(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    download(folder)
    assert server.asked[DATA][-1] == HALF - 1


def test_credentials_in_netrc_are_not_sent(folder, server, tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("default login anonymous password me@example.com")
    monkeypatch.setenv("NETRC", str(netrc))
    download(folder)
    assert contents(folder) == CONTENT


def test_a_file_that_another_process_completes_meanwhile_stays_whole(folder, server):
    def complete(handler, start):
        part = folder / f"{DATA}.part"
        part.write_bytes(CONTENT[DATA])
        part.rename(folder / DATA)
        handler.send_range(start, CONTENT[DATA])

    server.faults[DATA] = complete
    download(folder)
    assert contents(folder) == CONTENT


def test_a_partial_file_that_cannot_be_written_is_refused_at_once(folder, server):
    shutil.copytree(TOY / "124M", folder)
    (folder / "vocab.bpe").unlink()
    (folder / "vocab.bpe.part").mkdir()
    with pytest.raises(
        utils.UserError, match=r"cannot download vocab\.bpe \(.*vocab\.bpe\.part'\)"
    ):
        download(folder)
    assert not server.asked


def test_the_program_downloads_once_and_then_only_generates(tmp_path, server):
    """The README's command: the first run also reads the weights with TensorFlow."""
    setup = f"import runpy, utils; utils.URL = {utils.URL!r}; "
    code = setup + "runpy.run_path('gpt2.py', run_name='__main__')"
    command = [sys.executable, "-c", code, "Alan Turing", "--models_dir", str(tmp_path)]
    options = {"cwd": ROOT, "capture_output": True, "text": True}
    first, second = (subprocess.run(command, check=True, **options) for _ in range(2))
    assert first.stdout == second.stdout
    assert len(first.stdout) > 40
    assert f"reading {tmp_path}/124M/model.ckpt with TensorFlow\n" in first.stderr
    assert second.stderr == ""
    assert server.asked == {name: [0] for name in FILES}
