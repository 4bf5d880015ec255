"""The download, from a local server that behaves as OpenAI's does, or misbehaves on command."""

import base64
import collections
import errno
import hashlib
import http.server
import itertools
import os
import re
import shlex
import shutil
import signal
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
HALF = len(CONTENT[DATA]) // 2


class Server(http.server.ThreadingHTTPServer):
    """Serves the toy as if it were OpenAI's 124M, except for what .faults makes go wrong."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/gpt-2/models"
        # file name -> a function of (handler, start, body) that answers, or returns a false value
        self.faults = {}
        self.asked = collections.defaultdict(list)  # file name -> the Range headers
        self.sent = collections.Counter()  # file name -> bytes


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        wanted = self.headers.get("Range")
        self.server.asked[name].append(wanted)
        if self.path not in (f"/gpt-2/models/124M/{name}", f"/moved/{name}") or name not in CONTENT:
            self.reply(404, {"Content-Length": 0})
            return
        start, body = int(wanted[6:-1]) if wanted else 0, CONTENT[name]
        fault = self.server.faults.get(name)
        if fault and fault(self, start, body):
            return
        if start >= len(body):
            self.reply(416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": 0})
        elif wanted:
            span = {
                "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}",
                "x-ms-blob-content-md5": md5(body),
            }
            self.reply(206, {"Content-Length": len(body) - start, **span}, body[start:])
        else:
            self.reply(200, {"Content-Length": len(body), "Content-MD5": md5(body)}, body)

    def reply(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)
        self.server.sent[self.path.rpartition("/")[2]] += len(body)

    def cut(self, start, body, end):
        """Promise the rest of the body, send it up to end, and hang up."""
        status, headers = 200, {"Content-Length": len(body) - start, "Content-MD5": md5(body)}
        if start:
            status = 206
            headers = {
                "Content-Length": len(body) - start,
                "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}",
            }
        self.reply(status, headers, body[start:end])
        self.close_connection = True
        return True


def md5(body):
    return base64.b64encode(hashlib.md5(body).digest()).decode()


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path, server, monkeypatch):
    """An empty models/124M, to download from the server, a hundred times more impatiently."""
    monkeypatch.setattr(utils, "URL", server.url)
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(seconds / 100))
    return tmp_path / "models" / "124M"


def download(folder):
    utils.download_gpt2_files("124M", str(folder))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def resumed_at(server):
    """The positions from which the data file was requested again."""
    return [int(wanted[6:-1]) for wanted in server.asked[DATA] if wanted]


def make(folder):
    folder.mkdir(parents=True)
    return folder


def first(times, act):
    """A fault that acts on the first requests alone."""
    left = [times]

    def fault(*arguments):
        left[0] -= 1
        return act(*arguments) if left[0] >= 0 else None

    return fault


def test_the_projects_url_is_openais():
    assert utils.URL == "https://openaipublic.blob.core.windows.net/gpt-2/models"


def test_an_empty_folder_gets_the_seven_files_and_no_byte_twice(folder, server):
    download(folder)
    assert contents(folder) == CONTENT
    assert server.sent == {name: len(body) for name, body in CONTENT.items()}


def test_a_complete_folder_asks_the_network_nothing(folder, server, monkeypatch):
    shutil.copytree(TOY / "124M", folder)
    monkeypatch.setattr(requests, "Session", None)
    download(folder)
    assert not server.asked


@pytest.mark.parametrize("name", [name for name in CONTENT if name != "model.ckpt.meta"])
def test_only_what_is_missing_is_fetched(folder, server, name):
    shutil.copytree(TOY / "124M", folder)
    (folder / name).unlink()
    download(folder)
    assert list(server.asked) == [name]
    assert (folder / name).read_bytes() == CONTENT[name]


@pytest.mark.parametrize(
    ("files", "fetched"),
    [
        ({"checkpoint": 'model_checkpoint_path: "model-1000"'}, []),
        ({"model-1000.index": "mine"}, []),
        ({"model-1000.data-00000-of-00001": "mine"}, []),
        ({"model-1000.index": "mine", "model-1000.data-00000-of-00002": "mine"}, []),
        ({"model.ckpt.index": "mine", DATA: "mine"}, ["checkpoint"]),
        ({"model.ckpt.index": "mine", "model.ckpt.data-00000-of-00002": "mine"}, ["checkpoint"]),
        (
            {
                "checkpoint": 'model_checkpoint_path: "model.ckpt"',
                "model.ckpt.index": "mine",
                "model.ckpt.data-00001-of-00002": "mine",
            },
            [],
        ),
    ],
)
def test_a_checkpoint_of_the_users_own_is_not_mixed_with_openais(folder, server, files, fetched):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    download(folder)
    assert list(server.asked) == ["encoder.json", "hparams.json", "vocab.bpe", *fetched]
    assert all((folder / name).read_text() == text for name, text in files.items())


def test_a_complete_checkpoint_without_its_meta_file_needs_no_network(folder, server):
    shutil.copytree(TOY / "124M", folder)
    (folder / "model.ckpt.meta").unlink()
    download(folder)
    assert not server.asked


def test_the_index_comes_last(folder, server):
    download(folder)
    assert list(server.asked)[-1] == "model.ckpt.index"


def test_one_line_says_what_is_downloaded_from_where_to_where(folder, server, capsys):
    download(folder)
    line = capsys.readouterr().err.splitlines()[0]
    for word in ("124M", "0.5 GB", server.url, str(folder)):
        assert word in line


def test_a_broken_connection_is_resumed_where_it_broke_but_for_8_kb(folder, server):
    server.faults[DATA] = first(1, lambda handler, start, body: handler.cut(start, body, HALF))
    download(folder)
    assert contents(folder) == CONTENT
    (start,) = resumed_at(server)
    assert HALF - 8192 <= start < HALF


def test_a_redirected_file_is_resumed_like_any_other(folder, server):
    def redirect(handler, start, body):
        if handler.path.startswith("/moved/"):
            return not start and handler.cut(start, body, HALF)
        headers = {"Location": f"/moved/{DATA}", "Content-Length": 0}
        return handler.reply(302, headers) or True

    server.faults[DATA] = redirect
    download(folder)
    assert contents(folder) == CONTENT
    assert all(HALF - 8192 <= start < HALF for start in resumed_at(server))
    assert len(resumed_at(server)) == 2  # at the first address, then at the second


def test_attempts_are_not_counted_as_long_as_something_arrives(folder, server):
    def cut_often(handler, start, body):
        return handler.cut(start, body, start + len(body) // 12)

    server.faults[DATA] = cut_often
    download(folder)
    assert contents(folder) == CONTENT
    assert len(server.asked[DATA]) > 10


def test_a_connection_that_breaks_before_the_first_byte_is_tried_again(folder, server):
    server.faults[DATA] = first(3, lambda handler, start, body: handler.cut(start, body, start))
    download(folder)
    assert contents(folder) == CONTENT
    assert server.asked[DATA] == [None] * 4


def test_an_empty_reply_is_refused(folder, server):
    server.faults["vocab.bpe"] = lambda handler, start, body: (
        handler.reply(200, {"Content-Length": 0}) or True
    )
    with pytest.raises(ValueError, match=r"vocab\.bpe \(got 0 of 0 bytes\)"):
        download(folder)
    assert "vocab.bpe" not in contents(folder)


def test_a_connection_that_always_breaks_at_once_is_given_up_and_what_came_is_kept(folder, server):
    server.faults[DATA] = lambda handler, start, body: handler.cut(start, body, HALF)
    with pytest.raises(ValueError, match=rf"cannot download .*{DATA}.* run this again to resume"):
        download(folder)
    kept = contents(folder)[f"{DATA}.part"]
    assert len(kept) >= HALF - 8192
    assert CONTENT[DATA].startswith(kept)
    assert DATA not in contents(folder)


def test_a_stalled_connection_is_left_and_resumed(folder, server, monkeypatch):
    get = requests.get
    short = {"timeout": (1, 0.5)}
    monkeypatch.setattr(requests, "get", lambda *args, **options: get(*args, **options | short))

    def stall(handler, start, body):
        handler.reply(200, {"Content-Length": len(body)}, body[:50_000])
        time.sleep(300)

    server.faults[DATA] = first(1, stall)
    download(folder)
    assert contents(folder) == CONTENT
    (start,) = resumed_at(server)
    assert 50_000 - 8192 <= start < 50_000


def test_every_request_has_a_timeout_and_asks_for_the_bytes_as_they_are(folder, monkeypatch):
    requested, send = [], requests.Session.send
    monkeypatch.setattr(
        requests.Session, "send", lambda *a, **k: requested.append((a[1], k)) or send(*a, **k)
    )
    download(folder)
    assert len(requested) == 7
    for request, options in requested:
        assert all(0 < seconds <= 15 for seconds in options["timeout"])
        assert request.headers["Accept-Encoding"] == "identity"


def test_a_proxy_that_always_starts_over_and_breaks_is_given_up(folder, server):
    sizes = itertools.cycle([100_000, 50_000])

    def start_over(handler, start, body):
        if len(server.asked[DATA]) > 50:
            return False  # enough: now the download succeeds
        headers = {"Content-Length": len(body), "Content-MD5": md5(body)}
        handler.reply(200, headers, body[: next(sizes)])
        handler.close_connection = True
        return True

    server.faults[DATA] = start_over
    with pytest.raises(ValueError, match="cannot download"):
        download(folder)


def test_a_206_that_was_not_requested_is_refused(folder, server):
    def tail(handler, start, body):
        span = {"Content-Range": f"bytes 5-{len(body) - 1}/{len(body) - 5}"}
        return handler.reply(206, {"Content-Length": len(body) - 5, **span}, body[5:]) or True

    server.faults["vocab.bpe"] = tail
    with pytest.raises(ValueError, match="206 Partial Content"):
        download(folder)
    assert "vocab.bpe" not in contents(folder)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_that_is_busy_for_a_moment_is_asked_again(folder, server, status):
    busy = {"Content-Length": 0, "Retry-After": 3600}
    server.faults["vocab.bpe"] = first(
        2, lambda handler, start, body: handler.reply(status, busy) or True
    )
    download(folder)
    assert contents(folder) == CONTENT
    assert len(server.asked["vocab.bpe"]) == 3


def test_an_error_page_with_a_range_is_not_appended(folder, server):
    def error(handler, start, body):
        span = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        return handler.reply(500, {"Content-Length": 5, **span}, b"error") or True

    server.faults["vocab.bpe"] = first(2, error)
    download(folder)
    assert contents(folder) == CONTENT


def test_a_server_that_ignores_ranges_restarts_the_file(folder, server):
    def whole(handler, start, body):
        return (
            handler.reply(200, {"Content-Length": len(body), "Content-MD5": md5(body)}, body)
            or True
        )

    def cut_first(handler, start, body):
        return whole(handler, start, body) if start else handler.cut(start, body, HALF)

    server.faults[DATA] = cut_first
    download(folder)
    assert contents(folder) == CONTENT


@pytest.mark.parametrize("total", ["*", "?"])
def test_a_server_that_does_not_tell_the_size_of_the_whole_file_is_resumed(folder, server, total):
    def rest(handler, start, body):
        span = {
            "Content-Range": f"bytes {start}-{len(body) - 1}/{total}",
            "Content-Length": len(body) - start,
        }
        return start and (handler.reply(206, span, body[start:]) or True)

    make(folder)
    (folder / f"{DATA}.part").write_bytes(CONTENT[DATA][:HALF])
    server.faults[DATA] = rest
    download(folder)
    assert contents(folder) == CONTENT
    assert server.sent[DATA] == len(CONTENT[DATA]) - HALF + 1


def test_a_partial_file_that_is_whole_is_verified_and_renamed(folder, server):
    make(folder)
    (folder / f"{DATA}.part").write_bytes(CONTENT[DATA])
    download(folder)
    assert contents(folder) == CONTENT
    assert server.sent[DATA] == 1


def test_a_partial_file_that_is_too_long_is_downloaded_anew(folder, server):
    make(folder)
    (folder / f"{DATA}.part").write_bytes(b"x" * (len(CONTENT[DATA]) + 1))
    download(folder)
    assert contents(folder) == CONTENT


@pytest.mark.parametrize("shift", [-1, 1, -HALF])
def test_a_range_that_begins_elsewhere_is_not_appended(folder, server, shift):
    def shifted(handler, start, body):
        start += shift
        span = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        headers = {"Content-Length": len(body) - start, **span}
        return start != shift and (handler.reply(206, headers, body[start:]) or True)

    make(folder)
    (folder / f"{DATA}.part").write_bytes(CONTENT[DATA][: HALF + 1])
    server.faults[DATA] = shifted
    download(folder)
    assert contents(folder) == CONTENT


def test_a_server_that_sends_a_range_in_pieces_is_asked_for_the_rest(folder, server):
    def piece(handler, start, body):
        end = min(start + 100_000, len(body))
        span = {"Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
        headers = {"Content-Length": end - start, **span}
        return start and (handler.reply(206, headers, body[start:end]) or True)

    make(folder)
    (folder / f"{DATA}.part").write_bytes(CONTENT[DATA][:10])
    server.faults[DATA] = piece
    download(folder)
    assert contents(folder) == CONTENT


@pytest.mark.parametrize("wrong", [b"x" * len(CONTENT[DATA]), b"x" * 100])
def test_a_partial_file_of_another_content_is_found_out_and_deleted(folder, server, wrong):
    make(folder)
    (folder / f"{DATA}.part").write_bytes(wrong)
    with pytest.raises(
        ValueError, match=rf"checksum mismatch.*{DATA}\.part was deleted, run this again"
    ):
        download(folder)
    assert not {DATA, f"{DATA}.part"} & contents(folder).keys()
    download(folder)
    assert contents(folder) == CONTENT


def test_a_wrong_md5_is_refused_and_nothing_of_it_kept(folder, server):
    headers = {"Content-Length": len(CONTENT["vocab.bpe"]), "Content-MD5": md5(b"something else")}
    server.faults["vocab.bpe"] = lambda handler, start, body: (
        handler.reply(200, headers, body) or True
    )
    with pytest.raises(ValueError, match=r"checksum mismatch.*vocab\.bpe\.part"):
        download(folder)
    assert not {"vocab.bpe", "vocab.bpe.part"} & contents(folder).keys()


def test_without_a_length_the_bar_has_no_total_and_the_file_is_whole(folder, server, capsys):
    def chunked(handler, start, body):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n")
        return True

    server.faults[DATA] = chunked
    download(folder)
    assert contents(folder) == CONTENT
    assert re.search(rf"{DATA}\.part: 487kB", capsys.readouterr().err)


def test_a_404_is_said_with_the_file_and_nothing_is_kept(folder, server):
    server.faults["vocab.bpe"] = lambda handler, start, body: (
        handler.reply(404, {"Content-Length": 3}, b"<x>") or True
    )
    with pytest.raises(ValueError, match=r"vocab\.bpe \(404 Not Found\)"):
        download(folder)
    assert not {"vocab.bpe", "vocab.bpe.part"} & contents(folder).keys()


def test_a_web_page_is_no_model_file(folder, server):
    page = b"<html>please log in</html>"
    headers = {"Content-Type": "text/html; charset=utf-8", "Content-Length": len(page)}
    server.faults["encoder.json"] = lambda handler, *_: handler.reply(200, headers, page) or True
    with pytest.raises(ValueError, match=r"encoder\.json \(got a web page"):
        download(folder)
    assert contents(folder) == {}


def test_a_web_page_does_not_cost_what_has_come_so_far(folder, server):
    make(folder)
    (folder / f"{DATA}.part").write_bytes(CONTENT[DATA][: HALF + 1])
    page = {"Content-Type": "text/html", "Content-Length": 13}
    server.faults[DATA] = lambda handler, *_: handler.reply(200, page, b"<html></html>") or True
    with pytest.raises(ValueError, match="web page"):
        download(folder)
    del server.faults[DATA]
    download(folder)
    assert server.asked[DATA][-1] == f"bytes={HALF}-"
    assert contents(folder) == CONTENT


def test_a_disk_that_fills_up_keeps_what_came(folder, server, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device"):
        download(folder)
    assert list(contents(folder)) == ["encoder.json.part"]


def test_a_folder_that_cannot_be_made_is_an_error_with_its_path(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"Not a directory.*file/124M"):
        utils.download_gpt2_files("124M", str(tmp_path / "file" / "124M"))


@pytest.mark.parametrize(
    ("url", "reason"),
    [("http://127.0.0.1:9/models", "refused"), ("https://no-such-host.invalid/models", "resolve")],
)
def test_no_network_is_one_plain_line_with_the_toys_command(tmp_path, monkeypatch, url, reason):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(utils, "URL", url)
    toy = r'python gpt2\.py ".*" --models_dir tests/models'
    with pytest.raises(ValueError, match=rf"{url}/124M/encoder\.json .*{reason}.*{toy}") as caught:
        utils.download_gpt2_files("124M", str(tmp_path / "124M"))
    assert "\n" not in str(caught.value)
    assert "Max retries" not in str(caught.value)  # requests' own wrapping


def test_progress_is_one_bar_a_file_in_bytes_from_where_it_resumed(folder, server, capsys):
    make(folder)
    (folder / f"{DATA}.part").write_bytes(CONTENT[DATA][:HALF])
    download(folder)
    err = capsys.readouterr().err
    assert re.search(rf"{DATA}\.part:  50%.* 244k/487k ", err)
    assert all(f"{name}.part: 100%" in err for name in CONTENT)


def program(server):
    """A command that runs gpt2.py, but downloads from the server; the arguments follow."""
    code = (
        f"import runpy, sys; sys.path[0] = {str(ROOT)!r}\n"
        f"import utils; utils.URL = {server.url!r}\n"
        f"runpy.run_path({str(ROOT / 'gpt2.py')!r}, None, '__main__')"
    )
    return [sys.executable, "-c", code]


def test_the_readmes_first_command_downloads_once_and_continues_the_prompt(tmp_path, server):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    arguments = shlex.split(re.search(r' gpt2\.py ("Alan .*")$', readme, re.MULTILINE)[1])
    for _ in range(2):
        done = subprocess.run(
            [*program(server), *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert "40/40" in done.stderr
        assert len(done.stdout) > 40
    assert server.asked == {name: [None] for name in CONTENT}
    assert contents(tmp_path / "models" / "124M").items() >= CONTENT.items()


def test_after_a_kill_in_the_middle_of_a_file_the_next_run_resumes(tmp_path, server):
    server.faults[DATA] = first(
        1,
        lambda handler, start, body: (
            handler.reply(200, {"Content-Length": len(body)}, body[:HALF]) or time.sleep(300)
        ),
    )
    command = [*program(server), "Twas brillig, and the slithy", "5", "--models_dir", tmp_path]
    part = tmp_path / "124M" / f"{DATA}.part"
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not part.exists() or part.stat().st_size < HALF - (1 << 14):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    size = part.stat().st_size
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(" toves"), done.stderr
    assert server.asked[DATA] == [None, f"bytes={size - 1}-"]
    assert not part.exists()


def test_three_processes_in_one_empty_folder_end_with_whole_files_and_three_texts(tmp_path, server):
    def slowly(handler, start, body):
        time.sleep(0.2)

    server.faults = dict.fromkeys(CONTENT, slowly)
    command = [*program(server), "Twas brillig, and the slithy", "5", "--models_dir", tmp_path]
    runs = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for process in runs:
        stdout, stderr = process.communicate(timeout=120)
        assert stdout.startswith(" toves"), stderr
    assert {name: (tmp_path / "124M" / name).read_bytes() for name in CONTENT} == CONTENT
    assert server.sent == {name: len(body) for name, body in CONTENT.items()}


def test_a_file_system_without_locks_does_no_harm(folder, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", no_locks)
    download(folder)
    assert contents(folder) == CONTENT


def test_a_download_that_fails_is_one_line_on_the_command_line(tmp_path, server):
    server.faults["encoder.json"] = lambda handler, *_: (
        handler.reply(404, {"Content-Length": 0}) or True
    )
    command = [*program(server), "x", "--models_dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    downloading, failed = done.stderr.splitlines()
    assert downloading.startswith("downloading GPT-2 124M")
    assert failed.startswith("cannot download") and "404 Not Found" in failed
