"""The download, from a local server that behaves as OpenAI's does, or misbehaves on command."""

import builtins
import collections
import http.server
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time

import pytest
import requests
from conftest import ROOT, TOY

import utils

CONTENT = {name: (TOY / "124M" / name).read_bytes() for name in utils.FILES}
DATA = "model.ckpt.data-00000-of-00001"
SIZE = len(CONTENT[DATA])
HALF = SIZE // 2


class Server(http.server.ThreadingHTTPServer):
    """Serves the toy as if it were OpenAI's 124M, except for what .faults makes go wrong."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/gpt-2/models"
        # file name -> a function of (handler, start, body) that answers, or returns True
        self.faults = {}
        self.asked = collections.defaultdict(list)  # file name -> where the ranges start
        self.sent = collections.Counter()  # file name -> bytes


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.name = self.path.rpartition("/")[2]
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        self.server.asked[self.name].append(start)
        if self.path not in (f"/gpt-2/models/124M/{self.name}", f"/moved/{self.name}"):
            self.reply(404)
        elif self.server.faults.get(self.name, as_usual)(self, start, CONTENT[self.name]):
            self.send_range(start, CONTENT[self.name])

    def send_range(self, start, body, cut=None, stop=None, total=None, **headers):
        """Answer as OpenAI's server does, if there are no other arguments."""
        if start >= len(body):
            self.reply(416, **{"Content-Range": f"bytes */{len(body)}"})
        else:
            piece = body[start:stop]
            span = f"bytes {start}-{start + len(piece) - 1}/{total or len(body)}"
            self.reply(206, piece, cut, **{"Content-Range": span}, **headers)

    def reply(self, status, body=b"", cut=None, **headers):
        """Promise the whole body; send so many bytes of it, and hang up."""
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.server.sent[self.name] += len(body[:cut])
        self.wfile.write(body[:cut])
        self.close_connection = self.close_connection or cut is not None


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path, server, monkeypatch):
    """models/124M, not made yet, to be downloaded from the server, with pauses of 1 %."""
    monkeypatch.setattr(utils, "URL", server.url)
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(seconds / 100))
    return tmp_path / "models" / "124M"


@pytest.fixture
def half(folder):
    """The same, with half of the data file (and one byte) in a partial file."""
    folder.mkdir(parents=True)
    (folder / f"{DATA}.part").write_bytes(CONTENT[DATA][: HALF + 1])
    return folder


def download(folder):
    utils.download_gpt2_files("124M", str(folder))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_projects_url_is_openais():
    assert utils.URL == "https://openaipublic.blob.core.windows.net/gpt-2/models"


def test_an_empty_folder_gets_the_seven_files_and_no_byte_twice(folder, server):
    download(folder)
    assert contents(folder) == CONTENT
    assert server.sent == {name: len(body) for name, body in CONTENT.items()}


def test_a_complete_folder_needs_no_network(folder, server):
    shutil.copytree(TOY / "124M", folder)
    download(folder)
    assert not server.asked


def test_only_what_is_missing_is_fetched(folder, server):
    shutil.copytree(TOY / "124M", folder)
    (folder / "vocab.bpe").unlink()
    download(folder)
    assert contents(folder).items() >= CONTENT.items()
    assert list(server.asked) == ["vocab.bpe"]


NAMED = {"checkpoint": 'model_checkpoint_path: "model.ckpt"'}
SHARDS = {"model.ckpt.index": "mine", "model.ckpt.data-00001-of-00002": "mine"}


@pytest.mark.parametrize(
    "files",
    [
        {"checkpoint": 'model_checkpoint_path: "model-1000"'},
        {"model-1000.index": "mine"},
        {"model-1000.index": "mine", "model-1000.data-00000-of-00002": "mine"},
        {"model.ckpt.index": "mine", DATA: "mine"},
        NAMED | {"model.ckpt.index": "mine", DATA: "mine"},
        NAMED | SHARDS,
    ],
)
def test_a_checkpoint_of_the_users_own_gets_no_weights_of_openais(folder, server, files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    download(folder)
    assert list(server.asked) == ["encoder.json", "hparams.json", "vocab.bpe"]
    assert all((folder / name).read_text() == text for name, text in files.items())


@pytest.mark.parametrize("name", [DATA, "model.ckpt.index"])
@pytest.mark.parametrize("new_name", ["old-{}", "._{}", "{}.part"])
def test_a_file_that_was_renamed_in_its_folder_is_fetched_again(folder, server, name, new_name):
    shutil.copytree(TOY / "124M", folder)
    (folder / name).rename(folder / new_name.format(name))
    download(folder)
    assert list(server.asked) == [name]


def test_each_file_has_a_line_with_its_url_and_a_bar_with_its_bytes(half, server, capsys):
    download(half)
    err = capsys.readouterr().err
    for name in CONTENT:
        assert re.search(rf"downloading {server.url}/124M/{name}\n.*100%\|.*\|", err)
    total = round(SIZE / 1000)
    assert re.search(rf" 50%\|.*\| {round(HALF / 1000)}k/{total}k ", err)  # where it was resumed


# ---- Faults: functions of (handler, start, body) that answer a request for body[start:] ------


def as_usual(handler, start, body):
    return True


def first(times, fault):
    """The fault, for the first requests only."""

    def limited(handler, start, body):
        is_over = len(handler.server.asked[handler.name]) > times
        return is_over or fault(handler, start, body)

    return limited


def sent(**options):
    return lambda handler, start, body: handler.send_range(start, body, **options)


def shifted(by):
    return lambda handler, start, body: handler.send_range(start + by, body)


def replied(*reply, **headers):
    return lambda handler, start, body: handler.reply(*reply, **headers)


def from_the_start(handler, start, body):
    handler.reply(200, body)


def from_the_start_and_cut(handler, start, body):
    handler.reply(200, body, 100_000 // len(handler.server.asked[handler.name]))


def chunked(handler, start, body):
    chunks = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    handler.reply(200, chunks, **{"Transfer-Encoding": "chunked", "Content-Length": ""})


def redirect(handler, start, body):
    is_moved = handler.path.startswith("/moved/")
    return is_moved or handler.reply(302, Location=f"/moved/{handler.name}")


def stall(handler, start, body):
    handler.reply(200, body, HALF)
    threading.Event().wait(60)


HTML = {"Content-Type": "text/html"}
SHOUTED_HTML = {"Content-Type": "Text/HTML; charset=utf-8"}

HARMLESS = {
    "the connection breaks before the first byte, three times": first(3, sent(cut=0)),
    "the connection breaks ten times": first(10, sent(cut=20_000)),
    "the connection stalls": first(1, stall),
    "the server is busy": first(2, replied(503, b"busy", **HTML)),
    "there are too many requests": first(1, replied(429, **{"Retry-After": 3600})),
    "there is a request timeout": first(3, replied(408)),
    "there is an error with a range": first(1, replied(500, **{"Content-Range": "bytes 0-0/1"})),
    "the file has moved": redirect,
    "ranges are ignored": from_the_start,
    "ranges are ignored, and the connection breaks": first(1, from_the_start_and_cut),
    "the range begins earlier": first(2, shifted(-1)),
    "the range begins later": first(2, shifted(1)),
    "the range comes in pieces": lambda h, start, body: h.send_range(
        start, body, stop=start + 99_999
    ),
    "the last byte is missing": first(1, sent(stop=-1)),
    "the reply has no length": chunked,
}


@pytest.mark.parametrize("fault", HARMLESS)
def test_the_file_is_whole_in_the_end_although(half, server, fault, monkeypatch):
    if fault == "the connection stalls":
        get = requests.get
        monkeypatch.setattr(requests, "get", lambda url, **k: get(url, **k | {"timeout": 0.5}))
    server.faults[DATA] = HARMLESS[fault]
    download(half)
    assert contents(half) == CONTENT


FATAL = {  # fault: what is said, number of requests
    "the connection always breaks": (sent(cut=0), ".*rerun to resume", 5),
    "ranges are ignored, and it always breaks": (from_the_start_and_cut, ".*rerun to resume", 5),
    "the server is always busy": (replied(503), "503 Service", 5),
    "the range always begins elsewhere": (shifted(1), "206 Partial Content", 5),
    "there is no size": (sent(total="*"), f"got {SIZE:,} of 0 bytes", 5),
    "there is more than was told": (sent(total=HALF), f"got {SIZE:,} of {HALF:,}", 5),
    "the redirect is malformed": (replied(302, Location="http://["), "Invalid IPv6 URL", 5),
    "the status is unknown": (replied(999, b"x"), "999 ", 1),
    "the file is not found": (replied(404, b"<Error/>"), "404 Not Found", 1),
    "HTML is sent as the range": (sent(**HTML), "got a web page", 1),
    "HTML is sent as the file": (replied(200, b"<html>", **SHOUTED_HTML), "got a web page", 1),
}


@pytest.mark.parametrize("fault", FATAL)
def test_the_url_and_the_reason_are_reported_and_the_partial_file_is_kept(
    half, server, fault, monkeypatch
):
    server.faults[DATA], reason, n_requests = FATAL[fault]
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(ValueError, match=rf"cannot download {server.url}/124M/{DATA} \({reason}"):
        download(half)
    assert len(server.asked[DATA]) == n_requests
    assert pauses[-3:] == [1, 2, 3][: n_requests - 1]  # seconds
    kept = contents(half)[f"{DATA}.part"]
    assert len(kept) > HALF and CONTENT[DATA].startswith(kept)
    assert DATA not in contents(half)
    del server.faults[DATA]
    download(half)
    assert contents(half) == CONTENT


def test_a_broken_connection_is_resumed_where_it_broke_but_for_8_kb(folder, server):
    server.faults[DATA] = first(1, sent(cut=HALF))
    download(folder)
    start, resumed = server.asked[DATA]
    assert start == 0
    assert HALF - 8192 <= resumed < HALF


def test_an_empty_reply_in_an_empty_folder_is_no_file(folder, server):
    server.faults["vocab.bpe"] = replied(200)
    with pytest.raises(utils.UserError, match=r"vocab\.bpe \(got 0 of 0 bytes"):
        download(folder)
    assert "vocab.bpe" not in contents(folder)


@pytest.mark.parametrize("extra", [0, 1, 1000])
def test_a_partial_file_that_is_complete_or_too_long(folder, server, extra):
    """It is renamed if it is complete, and replaced if it is longer than the file.

    Even if the connection breaks all the time, as long as each attempt brings some bytes.
    """
    folder.mkdir(parents=True)
    (folder / f"{DATA}.part").write_bytes(CONTENT[DATA] + b"x" * extra)
    server.faults[DATA] = sent(cut=SIZE // 8)
    download(folder)
    assert contents(folder) == CONTENT
    assert server.asked[DATA][:2] == ([SIZE + extra - 1, 0] if extra else [SIZE - 1])


def test_a_server_that_refuses_ranges_and_breaks_off_in_turn_is_given_up(folder, server):
    def refuse_or_break_off(handler, start, body):
        if len(handler.server.asked[DATA]) % 2:
            handler.reply(416)
        else:
            handler.reply(200, body, HALF)

    server.faults[DATA] = refuse_or_break_off
    with pytest.raises(utils.UserError, match="cannot download"):
        download(folder)


def test_every_request_has_timeouts_and_asks_for_the_bytes_as_they_are(folder, monkeypatch):
    requested, send = [], requests.Session.send

    def spy(session, request, **options):
        requested.append((request.headers["Accept-Encoding"], options["timeout"]))
        return send(session, request, **options)

    monkeypatch.setattr(requests.Session, "send", spy)
    download(folder)
    assert requested == [("identity", (5, 10))] * 7


def test_a_disk_error_is_named_and_what_came_is_kept(half):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (HALF + 50_000, limits[1]))  # bytes in a file
        with pytest.raises(ValueError, match=r"cannot download .*model\.ckpt\.meta .*too large"):
            download(half)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(contents(half)["model.ckpt.meta.part"]) > HALF
    download(half)
    assert contents(half) == CONTENT


DOWNLOAD = "utils.download_gpt2_files('124M', sys.argv[1])"


def python(server, code, *arguments):
    """Start a process that runs this code with the server for OpenAI's."""
    setup = f"import runpy, sys, utils; utils.URL = {server.url!r}; "
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", setup + code, *map(str, arguments)], **options)


def test_the_readmes_command_downloads_once_and_continues_the_prompt(tmp_path, server):
    """The first start reads the weights with TensorFlow. The second only generates."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    arguments = shlex.split(re.search(r' gpt2\.py ("Alan .*")$', readme, re.MULTILINE)[1])
    outputs = []
    for _ in range(2):
        code = "runpy.run_path('gpt2.py', run_name='__main__')"
        process = python(server, code, *arguments, "--models_dir", tmp_path)
        outputs.append(process.communicate(timeout=120))
        assert process.returncode == 0, outputs
    (text, first_stderr), (second_text, second_stderr) = outputs
    assert text == second_text
    assert len(text) > 40
    lines = [line for line in first_stderr.splitlines() if line and "|" not in line]
    urls = [f"downloading {server.url}/124M/{name}" for name in CONTENT]
    assert lines == [*urls, f"reading {tmp_path}/124M/model.ckpt with TensorFlow"]
    assert re.fullmatch(r"(\s+generating: .*\|.*\|.*)+\n", second_stderr)
    assert server.asked == {name: [0] for name in CONTENT}
    assert contents(tmp_path / "124M").items() >= CONTENT.items()


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_second_process_resumes_where_the_first_is_or_was_killed(tmp_path, server, is_killed):
    server.faults[DATA] = first(1, stall)
    part = tmp_path / f"{DATA}.part"
    with python(server, DOWNLOAD, tmp_path) as process:
        while utils.file_size(part) < HALF - (1 << 17) and process.poll() is None:  # a buffer
            time.sleep(0.01)
        if is_killed:
            process.kill()
            process.wait()
        size = part.stat().st_size
        assert python(server, DOWNLOAD, tmp_path).wait(timeout=50) == 0
        process.kill()
    assert server.asked[DATA] == [0, size - 1]
    assert contents(tmp_path) == CONTENT


def test_a_file_that_another_process_completes_during_an_import_is_left_alone(
    half, server, monkeypatch
):
    original = builtins.__import__

    def import_slowly(name, *rest):
        if name == "requests":
            (half / f"{DATA}.part").write_bytes(CONTENT[DATA])
            (half / f"{DATA}.part").rename(half / DATA)
        return original(name, *rest)

    for name in set(CONTENT) - {DATA}:
        (half / name).write_bytes(CONTENT[name])
    monkeypatch.setattr(builtins, "__import__", import_slowly)
    download(half)
    assert contents(half) == CONTENT
    assert not server.asked


def test_a_file_that_another_process_completes_meanwhile_stays_whole(half, server):
    """And that a third one, which did not know of it, has begun to download anew."""
    part, file = half / f"{DATA}.part", half / DATA

    def complete(handler, start, body):
        part.write_bytes(body)
        part.rename(file)
        part.write_bytes(body[:10])
        return as_usual(handler, start, body)

    server.faults[DATA] = complete
    download(half)
    assert file.read_bytes() == CONTENT[DATA]
    assert part.read_bytes() == CONTENT[DATA][:10]


def test_three_processes_in_one_empty_folder_end_with_whole_files(tmp_path, server):
    def slowly(handler, start, body):
        time.sleep(0.1)
        return as_usual(handler, start, body)

    server.faults = dict.fromkeys(CONTENT, slowly)
    processes = [python(server, DOWNLOAD, tmp_path) for _ in range(3)]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    assert contents(tmp_path) == CONTENT
