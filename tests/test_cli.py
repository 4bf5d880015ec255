"""The program as a user meets it: `python gpt2.py ...` in a process of its own, on the toy model."""

import os
import random
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, TOY

VERSE = " toves\nDid gyre and gimble in the wabe:\nAll mimsy were the borogoves,\nAnd the mome raths outgrabe.\n"
PROMPT = "Twas brillig, and the slithy"


def one_line(text):
    return text.endswith("\n") and text.count("\n") == 1 and "Traceback" not in text


def test_it_recites_the_poem_and_stdout_holds_nothing_else(run):
    done = run(PROMPT, "--models_dir", TOY)
    assert done.returncode == 0
    assert done.stdout.startswith(VERSE[:60])
    assert "40/40" in done.stderr


def test_the_first_start_reads_with_tensorflow_silently_and_says_the_same(run, toy):
    first, second = run(PROMPT, "--models_dir", toy), run(PROMPT, "--models_dir", toy)
    assert first.stdout == second.stdout
    for done in (first, second):
        assert all("generating" in line for line in done.stderr.split("\n") if line), done.stderr


def test_the_second_start_imports_neither_tensorflow_nor_requests(run, toy):
    run(PROMPT, "1", "--models_dir", toy)
    program = (
        f"import sys, gpt2; gpt2.main({PROMPT!r}, 1, models_dir={str(toy)!r}); "
        "print({'tensorflow', 'requests', 'fire'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("count", [0, 1, 7])
def test_it_generates_as_many_tokens_as_it_is_told(run, count):
    done = run(PROMPT, "--n_tokens_to_generate", str(count), "--models_dir", TOY)
    assert done.returncode == 0
    assert VERSE.startswith(done.stdout.removesuffix("\n"))
    assert f"{count}/{count}" in done.stderr or count == 0
    assert (done.stdout == "\n") == (count == 0)


def test_arguments_may_come_by_position(run):
    assert run(PROMPT, "1", "124M", TOY).stdout == run(PROMPT, "--models_dir", TOY, "--n_tokens_to_generate=1").stdout


def test_an_empty_prompt_begins_where_texts_begin(run):
    assert run("", "--models_dir", TOY).stdout.startswith("'Twas brillig, and the slithy toves\nDid gyre")


@pytest.mark.parametrize(
    "prompt", ["12345", "[1, 2]", "None", "1e5", "a,b", "{'a': 1}", "True", "'quoted'", "(", "-", "-5", "FIRE_METADATA"]
)
def test_every_prompt_is_text(run, prompt):
    """As text it gives what it gives in the middle of a Python call."""
    done = run(prompt, "3", "--models_dir", TOY)
    program = f"import gpt2; print(gpt2.main({prompt!r}, 3, models_dir={str(TOY)!r}))"
    expected = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, expected.stdout)


def test_a_size_or_folder_that_looks_like_a_number_is_text(run, tmp_path):
    assert "not '124'" in run("x", "--model_size", "124").stderr
    (tmp_path / "007").symlink_to(TOY)
    assert run(PROMPT, "1", "--models_dir", "007", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "prompt"),
        ([PROMPT, "--n_tokens_to_generate", "-1"], "-1"),
        ([PROMPT, "--n_tokens_to_generate", "ten"], "'ten'"),
        ([PROMPT, "--n_tokens_to_generate", "2.5"], "2.5"),
        ([PROMPT, "--n_tokens_to_generate"], "True"),
        (["Alan", "Turing", "theorized"], "'Turing'"),
        ([PROMPT, "--model_size", "125M"], "124M, 355M, 774M, 1558M, not '125M'"),
        ([PROMPT, "--model_size", "../124M"], "'../124M'"),
        ([PROMPT, "--size", "124M"], "--size"),
        ([PROMPT, "1", "124M", str(TOY), "upper"], "upper"),
        ([PROMPT, "--n_tokens_to_generate", "256", "--models_dir", str(TOY)], "+ 256 new"),
        ([PROMPT, "1", "124M", str(TOY), "two\nlines"], "lines"),
        ([PROMPT, "1", "124M", "/dev/null/two\nlines"], "lines"),
        (["and " * 300, "--models_dir", str(TOY)], "256 at most"),
        ([PROMPT, "--models_dir", "/dev/null"], "/dev/null"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_a_failure(run, tmp_path, arguments, said):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode not in (0, None)
    assert done.stdout == ""
    assert one_line(done.stderr), done.stderr
    assert said in done.stderr
    assert os.listdir(tmp_path) == []  # above all, no model was fetched for it


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], [PROMPT, "--help"]])
def test_help_tells_what_the_four_options_mean(run, arguments):
    done = run(*arguments)
    assert done.returncode == 0
    for word in ("PROMPT", "--n_tokens_to_generate", "--model_size", "--models_dir", "1558M", "tokens to add"):
        assert word in done.stderr
    assert "FIRE" not in done.stderr


def test_a_90_kb_prompt_and_a_word_of_100_000_letters_fail_with_their_token_count(run):
    for prompt in ("the cat " * 11_500, "".join(random.Random(0).choices("abcdefgh", k=100_000))):
        done = run(prompt, "--models_dir", TOY)
        assert done.returncode == 1
        assert one_line(done.stderr)
        assert " tokens + 40 new" in done.stderr
        assert "256" in done.stderr


def test_bytes_that_are_no_utf8_are_no_traceback(run):
    assert run(b"Twas \xff\xfe brillig", "1", "--models_dir", TOY).returncode == 0


def test_a_terminal_without_the_characters_shows_question_marks():
    program = (
        f"import encoder, runpy, sys; sys.argv = ['gpt2.py', 'x', '1', '--models_dir', {str(TOY)!r}]\n"
        "encoder.Encoder.decode = lambda self, ids: 'caf\u00e9'\n"
        "runpy.run_path('gpt2.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "caf?\n"), done.stderr


def test_a_prompt_that_is_half_a_character_is_read(run):
    assert run("Twas\ud800".encode("utf-8", "surrogatepass"), "5", "--models_dir", TOY).returncode == 0


@pytest.mark.parametrize(("reader", "shown"), [("head -c 1", " "), ("true", "")])
def test_a_closed_pipe_is_quiet(reader, shown):
    """Python writes what it has buffered once more when it exits, unless PYTHONUNBUFFERED is set."""
    command = f'PYTHONUNBUFFERED= "{sys.executable}" gpt2.py "{PROMPT}" --models_dir tests/models | {reader}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == shown
    assert all("generating" in line for line in done.stderr.split("\n") if line), done.stderr


@pytest.mark.parametrize(("closed", "shown"), [(">&-", ""), ("2>&-", " toves\nDid\n")])
def test_a_stream_that_the_caller_has_closed_does_no_harm(closed, shown):
    command = f'"{sys.executable}" gpt2.py "{PROMPT}" 3 --models_dir tests/models {closed}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, shown)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("moment", ["numpy", "tqdm", "fire.core", "regex", "tensorflow.python.eager", "generating"])
def test_ctrl_c_at_any_moment_is_status_130_without_a_traceback(toy, moment):
    """-X importtime tells on stderr what is being imported; TensorFlow is, at the toy's first start."""
    command = [sys.executable, "-X", "importtime", ROOT / "gpt2.py", PROMPT, "200", "--models_dir", toy]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        seen = b""
        while moment.encode() not in seen and (piece := process.stderr.read1()):
            seen += piece
        process.send_signal(signal.SIGINT)
        stdout, rest = process.communicate(timeout=60)
    assert moment.encode() in seen
    assert (process.returncode, stdout) == (130, b"")
    assert b"Traceback" not in seen + rest


def test_who_imports_it_keeps_its_own_ctrl_c():
    program = "import signal; before = signal.getsignal(signal.SIGINT)\n"
    program += "import gpt2; print(signal.getsignal(signal.SIGINT) is before)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


def test_a_bug_of_ours_keeps_its_traceback(toy):
    program = (
        f"import runpy, sys, utils; sys.argv = ['gpt2.py', 'x', '1', '--models_dir', {str(toy)!r}]\n"
        "def buggy(*arguments): raise ValueError('our own')\n"
        "utils.load_encoder_hparams_and_params = buggy\n"
        "runpy.run_path('gpt2.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "our own" in done.stderr
