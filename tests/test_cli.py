"""The command line: what it accepts, what it refuses, and what arrives on stdout and stderr."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types

import pytest
from conftest import ROOT, TOY, run

import gpt2
import utils

PROMPT = "Twas brillig, and the slithy"
VERSE = " toves\nDid gyre and gimble in the wabe:\nAll mimsy were the borogoves,\n"
PLAIN_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def call(*arguments):
    """The text that `python gpt2.py *arguments` prints, without a process of its own."""
    text = "".join(utils.call(gpt2.main, gpt2.stream_text, list(map(str, arguments))))
    assert text.endswith("\n")
    return text[:-1]


def shell(command):
    """Run a shell command in the project's folder; "python" is the Python of the tests."""
    command = command.replace("python", shlex.quote(sys.executable), 1)
    options = {"cwd": ROOT, "capture_output": True, "text": True}
    return subprocess.run(["bash", "-c", command], check=False, **options)


def program(body):
    """The code of a program that prints what this body of a generator yields."""
    stream = f"def stream(prompt, hide_bar): {body}"
    imports = "import os, signal, time, utils"
    return f"{imports}\n{stream}\nutils.run_command_line(lambda prompt: '', stream)"


@pytest.fixture
def loaded_toy(toy):
    """A copy of the toy that starts without TensorFlow."""
    gpt2.main("", 0, models_dir=toy)
    return toy


def test_the_text_goes_to_stdout_and_everything_else_to_stderr():
    done = run("gpt2.py", PROMPT, "--models_dir", TOY)
    assert done.returncode == 0
    assert done.stdout.startswith(VERSE)
    assert "40/40" in done.stderr


@pytest.mark.parametrize("count", [0, 1, 7])
def test_it_generates_as_many_tokens_as_it_is_told(count):
    text = call(PROMPT, "--n_tokens_to_generate", count, "--models_dir", TOY)
    assert text == {0: "", 1: " toves", 7: " toves\nDid gyre and gimble in"}[count]


@pytest.mark.parametrize(
    "arguments",
    [
        [PROMPT, "7", "124M", TOY],
        [f"--prompt={PROMPT}", "--n_tokens_to_generate=7", f"--models_dir={TOY}"],
        ["--n_tokens_to_generate", "7", "--models_dir", TOY, "--model_size", "124M", PROMPT],
        ["-n", "7", "-p", PROMPT, "--models-dir", TOY],
    ],
)
def test_arguments_may_come_by_position_by_name_and_in_any_order(arguments):
    assert call(*arguments) == gpt2.main(PROMPT, 7, models_dir=TOY)


def test_an_empty_prompt_starts_from_endoftext():
    assert call("", "--models_dir", TOY).startswith("'Twas brillig, and the slithy toves\nDid gyre")


TEXTS = ["12345", "[1, 2]", "None", "1e5", "a,b", "{'a': 1}", "True", "'quoted'", "(", "-", "-5"]
TEXTS += ["caf\u00e9", "two\nlines", "Twas\ud800", "\udcff"]
DASHED = ["-Alan", "-- SELECT all users", "--", "--help", "--models_dir"]


@pytest.mark.parametrize("prompt", TEXTS)
def test_every_prompt_is_text(prompt):
    assert call(prompt, "3", "--models_dir", TOY) == gpt2.main(prompt, 3, models_dir=TOY)


@pytest.mark.parametrize("prompt", DASHED)
def test_a_prompt_that_begins_with_a_dash_can_be_given_by_name(prompt):
    expected = gpt2.main(prompt, 3, models_dir=TOY)
    assert call(f"--prompt={prompt}", "3", "--models_dir", TOY) == expected


def test_help_goes_to_stdout_and_tells_what_the_options_mean():
    done = run("gpt2.py", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("gpt2.py PROMPT", "--n_tokens_to_generate", "1558M", "how many tokens to add"):
        assert words in done.stdout
    for arguments in (["-h"], [PROMPT, "--help"]):
        assert call(*arguments) + "\n" == done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "argument: prompt"),
        (["Alan", "Turing", "theorized"], "not 'Turing'$"),
        (["Alan", "Turing", "theorized", "that", "computers"], "computers$"),
        ([PROMPT, "1", "124M", TOY, "0"], "0$"),
        ([PROMPT, "--size", "124M"], "--size$"),
        ([PROMPT, "--models_dir", TOY, "--temperature=1"], "--temperature=1$"),
        ([PROMPT, "--n_tokens_to_generate", "-1"], "whole number, not '-1'$"),
        ([PROMPT, "--n_tokens_to_generate", "2.5"], "'2.5'$"),
        ([PROMPT, "\N{SUPERSCRIPT TWO}"], "'\N{SUPERSCRIPT TWO}'$"),
        ([PROMPT, "--n_tokens_to_generate", "9" * 5000], "'999"),
        ([PROMPT, "--model_size", "124"], "124M, 355M, 774M, 1558M, not '124'"),
        ([PROMPT, "--models_dir"], "--models_dir needs a value$"),
        ([PROMPT, "--models_dir", "--model_size", "355M"], "--models_dir needs a value$"),
        (["--prompt"], "--prompt needs a value$"),
        (["--noprompt"], "--noprompt needs a value$"),
        (["-p"], "-p needs a value$"),
        (["-Alan", "--models_dir", TOY], "^-Alan needs a value$"),
        (["-- SELECT all", "--models_dir", TOY], "^-- SELECT all needs a value$"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_downloaded(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(utils.UsageError, match=said):
        call(*arguments)
    assert os.listdir(tmp_path) == []


def test_a_mistake_in_the_arguments_comes_with_the_usage_and_another_error_without():
    mistaken = run("gpt2.py", "Alan", "Turing")
    assert mistaken.stderr.endswith(f" whole number, not 'Turing'{utils.USAGE}\n")
    for done in (mistaken, run("gpt2.py", "Alan", "--models_dir", "/dev/null")):
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert re.fullmatch(r".*Not a directory: '/dev/null/124M'\n", done.stderr)


def test_the_prompt_and_the_new_tokens_may_fill_the_context_and_not_exceed_it():
    assert utils.check_n_tokens("40", n_seq=216, n_ctx=256) == 40
    with pytest.raises(utils.UserError, match="217 prompt tokens and 40 new ones exceed .* 256"):
        utils.check_n_tokens("40", n_seq=217, n_ctx=256)


def test_an_error_is_one_line_on_stderr_even_with_a_line_break_in_a_path(toy):
    folder = toy / "two\nlines"
    folder.mkdir()
    shutil.move(toy / "124M", folder)
    (folder / "124M" / "hparams.json").write_text("")
    done = run("gpt2.py", PROMPT, "--models_dir", folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"cannot read .*two lines/124M/.*hparams\.json .*\n", done.stderr)


@pytest.mark.parametrize("prompt", ["caf\u00e9".encode(), b"\xff\xfe"])
def test_a_mistake_beside_a_prompt_of_another_encoding_is_one_line(prompt):
    done = run("gpt2.py", prompt, "--temperature", "1", env=PLAIN_LOCALE)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r".*--temperature.*\n", done.stderr)


def test_too_little_memory_is_one_line():
    done = run("-c", program("yield from [1][:0]; raise MemoryError"), "x")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "out of memory\n")


def test_an_internal_error_keeps_its_traceback():
    done = run("-c", program("yield 'text'; raise ValueError('our own')"), "x")
    assert (done.returncode, done.stdout) == (1, "text")
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: our own\n")


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_the_locale_does_not_matter(loaded_toy, locale):
    text = 'model_checkpoint_path: "/home/zo\u00e9/model.ckpt"'
    (loaded_toy / "124M" / "checkpoint").write_text(text, encoding="utf-8")
    environment = PLAIN_LOCALE | {"LC_ALL": locale}
    arguments = [b"Twas \xff\xfe brillig", "2", "--models_dir", loaded_toy]
    done = run("gpt2.py", *arguments, env=environment)
    expected = gpt2.main("Twas \udcff\udcfe brillig", 2, models_dir=TOY)
    assert (done.returncode, done.stdout) == (0, expected + "\n")


def test_a_terminal_without_the_characters_shows_question_marks():
    code = program("yield 'caf\u00e9'")
    done = run("-c", code, "x", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "caf?\n"), done.stderr


def test_a_closed_pipe_is_quiet(loaded_toy):
    """Python flushes stdout once more when it exits, unless PYTHONUNBUFFERED is set."""
    command = f'PYTHONUNBUFFERED= python gpt2.py "{PROMPT}" --models_dir {loaded_toy}'
    done = shell(f"{command} | true; echo ${{PIPESTATUS[0]}}")
    assert done.stdout == "0\n"
    assert re.fullmatch(r"(\s+generating: .*\|.*\|.*)*\n?", done.stderr)


@pytest.mark.parametrize("arguments", [[PROMPT, "--models_dir", TOY], [PROMPT, "--wrong"]])
def test_a_broken_pipe_on_stderr_is_a_failure(arguments):
    """And the text is not printed, or only a part of it, as the bar cannot be shown."""
    reader, writer = os.pipe()
    os.close(reader)
    options = {"capture_output": False, "stdout": subprocess.PIPE, "stderr": writer}
    done = run("gpt2.py", *arguments, env={"PYTHONUNBUFFERED": "1"}, **options)
    os.close(writer)
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_text_that_does_not_fit_on_the_disk_is_a_failure():
    done = shell(f'python gpt2.py "{PROMPT}" 3 --models_dir tests/models >/dev/full')
    assert done.returncode == 1
    assert done.stderr.endswith("\ncannot print the text ([Errno 28] No space left on device)\n")


def test_the_second_start_imports_neither_tensorflow_nor_requests(loaded_toy):
    code = (
        f"import sys, gpt2; gpt2.main({PROMPT!r}, 1, models_dir={str(loaded_toy)!r})\n"
        "print({'tensorflow', 'requests', 'fire'} & sys.modules.keys())"
    )
    assert run("-c", code).stdout == "set()\n"


def test_tensorflow_is_quiet_unless_the_user_has_set_its_variables(monkeypatch):
    names = "TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS"
    code = program(f"yield from map(os.environ.get, {names})")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert run("-c", code, "x").stdout == "30\n"
    assert run("-c", code, "x", env=dict.fromkeys(names, "1")).stdout == "11\n"


def start(*arguments):
    """Start `python *arguments` with pipes, and with Python's own Ctrl-C."""
    options = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE) | {"cwd": ROOT}
    if os.name != "nt":
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, *arguments], **options)


def test_each_piece_of_the_text_is_printed_before_the_next_is_generated():
    """This program goes on when its reader says so."""
    with start("-c", program("yield 'one '; input(); yield 'two'"), "x") as process:
        assert process.stdout.read(4) == b"one "
        assert process.communicate(b"\n", timeout=60) == (b"two" + os.linesep.encode(), b"")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_kills_the_program_by_its_signal_without_a_traceback_and_leaves_the_text():
    with start("-c", program("yield 'one '; time.sleep(60)"), "x") as process:
        assert process.stdout.read(4) == b"one "
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == -signal.SIGINT


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_kills_the_program_during_the_import_of_tensorflow(toy):
    """-X importtime tells on stderr what is being imported, TensorFlow at the toy's first start."""
    with start("-X", "importtime", "gpt2.py", PROMPT, "200", "124M", toy) as process:
        seen = b""
        while b"tensorflow.python.eager" not in seen and (piece := process.stderr.read1()):
            seen += piece
        process.send_signal(signal.SIGINT)
        stdout, rest = process.communicate(timeout=30)
    assert b"tensorflow.python.eager" in seen
    assert (process.returncode, stdout) == (-signal.SIGINT, b"")
    assert b"Traceback" not in seen + rest


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_program_in_the_background_still_ignores_ctrl_c():
    """A shell without job control starts `command &` with SIGINT ignored."""
    code = program("yield signal.getsignal(signal.SIGINT).name")
    done = run("-c", code, "x", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert done.stdout == "SIG_IGN\n"


# ---- In the tools of a learner ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "its_input", "its_output"),
    [
        (["-m", "cProfile"], "", "function calls"),
        (["-m", "pdb", "-c", "continue"], "quit\n", "The program finished"),
        (["-i"], "print(type(gpt2))\n", "<class 'function'>"),
    ],
)
def test_a_tool_has_its_say_after_the_text(loaded_toy, tool, its_input, its_output):
    done = run(*tool, "gpt2.py", PROMPT, "40", "124M", loaded_toy, input=its_input)
    assert done.returncode == 0
    assert done.stdout.startswith(VERSE)
    assert its_output in done.stdout.partition(VERSE)[2]
    assert "Traceback (most" not in done.stdout + done.stderr


def test_any_stdout_will_do_and_it_and_ctrl_c_stay_as_they_were(monkeypatch):
    """It is enough that print can use it. The command line can run twice in one process."""
    monkeypatch.setattr(sys, "argv", ["gpt2.py", PROMPT, "3", "--models_dir", str(TOY)])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` would ignore Ctrl-C

    for _ in range(2):
        pieces = []
        monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=pieces.append))
        before = sys.stdout, sys.excepthook
        utils.run_command_line(gpt2.main, gpt2.stream_text)
        assert (sys.stdout, sys.excepthook) == before
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert "".join(pieces) == " toves\nDid\n"


@pytest.mark.parametrize("is_session", [True, False])
def test_no_bar_runs_through_the_text_on_a_terminal_and_in_a_session(
    monkeypatch, capsys, is_session
):
    if is_session:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    monkeypatch.setattr(os, "isatty", lambda fd: not is_session)
    monkeypatch.setattr(sys, "argv", ["gpt2.py", PROMPT, "3", "--models_dir", str(TOY)])
    utils.run_command_line(gpt2.main, gpt2.stream_text)
    assert capsys.readouterr() == (" toves\nDid\n", "")


def test_a_mistake_in_ipython_or_jupyter_is_one_line(monkeypatch, capsys):
    """They do not show an exit with status 0 as an exception."""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    monkeypatch.setattr(sys, "argv", ["gpt2.py", PROMPT, "--size", "1"])
    with pytest.raises(SystemExit, match="^0$"):
        utils.run_command_line(gpt2.main, gpt2.stream_text)
    assert capsys.readouterr() == ("", f"Could not consume arg: --size{utils.USAGE}\n")
