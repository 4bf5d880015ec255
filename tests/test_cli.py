"""The command line: what it accepts, what it refuses, and what arrives on stdout and stderr."""

import io
import os
import runpy
import shlex
import signal
import subprocess
import sys
import threading

import fire
import pytest
from conftest import ROOT, TOY, run

import gpt2
import utils

PROMPT = "Twas brillig, and the slithy"
VERSE = " toves\nDid gyre and gimble in the wabe:\nAll mimsy were the borogoves,\n"
USAGE = "Usage: gpt2.py"
HINT = "Is the prompt in quotation marks? --help lists the options.\n"


@pytest.fixture(scope="module", autouse=True)
def verified_toy():
    """So that no test but that of the first run imports TensorFlow."""
    gpt2.main("", 0, models_dir=TOY)


def command_line(monkeypatch, *arguments):
    """The text that `python gpt2.py *arguments` generates."""
    monkeypatch.setattr(sys, "argv", ["gpt2.py", *map(str, arguments)])
    return gpt2.main(*utils.parse_arguments(gpt2.main))


# ---- What it prints --------------------------------------------------------------------------


def test_the_text_goes_to_stdout_and_nothing_else_anywhere():
    done = run("gpt2.py", PROMPT, "--models_dir", TOY)
    assert done.stdout.startswith(VERSE)
    assert (done.stdout[-1], done.stderr, done.returncode) == ("\n", "", 0)


def test_main_prints_the_text_that_it_returns(capsys):
    text = gpt2.main(PROMPT, 20, models_dir=TOY)
    assert text.startswith(VERSE)
    assert capsys.readouterr() == (text + "\n", "")


def test_by_default_it_is_40_tokens_by_124m_in_the_folder_models(monkeypatch):
    loaded = utils.load_encoder_hparams_and_params("124M", TOY)
    asked = []

    def load(model_size, models_dir):
        asked.append((model_size, models_dir))
        return loaded

    monkeypatch.setattr(utils, "load_encoder_hparams_and_params", load)
    assert command_line(monkeypatch, PROMPT) == gpt2.main(PROMPT, 40)
    assert asked == [("124M", "models"), ("124M", "models")]


def test_a_later_run_imports_neither_tensorflow_nor_requests():
    code = (
        f"import sys, gpt2; gpt2.main({PROMPT!r}, 1, models_dir={str(TOY)!r})\n"
        "print({'tensorflow', 'requests', 'fire'} & sys.modules.keys())"
    )
    assert run("-c", code).stdout == " toves\nset()\n"


@pytest.mark.parametrize(("count", "text"), [(0, ""), (1, " toves"), (4, " toves\nDid gyre")])
def test_it_generates_as_many_tokens_as_it_is_told(monkeypatch, count, text):
    assert command_line(monkeypatch, PROMPT, count, "--models_dir", TOY) == text


TEXTS = ["12345", "[1, 2]", "None", "1e5", "a,b", "{'a': 1}", "True", "'quoted'", "(", "-5", "#"]
TEXTS += ["caf\u00e9", "two\nlines", "Twas\udcff", "<|endoftext|>", "", "%s"]
DASHED = ["-Alan", "-- SELECT", "--", "-", "--help", "--models_dir"]


@pytest.mark.parametrize("prompt", TEXTS + DASHED)
def test_any_prompt_is_text_and_one_that_begins_with_a_dash_is_given_by_name(monkeypatch, prompt):
    argument = f"--prompt={prompt}" if prompt in DASHED else prompt
    text = command_line(monkeypatch, argument, "3", "--models_dir", TOY)
    assert text == gpt2.main(prompt, 3, models_dir=TOY)


def test_an_empty_prompt_begins_a_new_text():
    assert gpt2.main("", 7, models_dir=TOY) == "'Twas brillig, and the slithy"


def test_what_stdout_cannot_encode_is_a_question_mark():
    code = "import utils\nwith utils.one_line_errors(): print('caf\\u00e9')"
    assert run("-c", code, env={"PYTHONIOENCODING": "ascii"}).stdout == "caf?\n"


# ---- What it refuses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hello", "world"], "'world' is not a token count: is the prompt in quotes?"),
        (
            ["x", "--n_tokens_to_generate=ten"],
            "'ten' is not a token count: is the prompt in quotes?",
        ),
        (["x", "-1"], "'-1' is not a token count: is the prompt in quotes?"),
        (["x", "\u00b2"], "'\u00b2' is not a token count: is the prompt in quotes?"),
        (
            ["x", "--model_size", "124"],
            "model_size must be one of 124M, 355M, 774M, 1558M, not '124'",
        ),
    ],
)
def test_a_wrong_value_is_one_line_before_a_download(
    tmp_path, monkeypatch, capsys, arguments, message
):
    assert exit_status_in_an_empty_folder(tmp_path, monkeypatch, arguments) == 1
    assert capsys.readouterr() == ("", f"{message}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Alan", "Turing", "theorized", "that", "computers"], "Could not consume arg: computers"),
        (["x", "--temperature=1"], "Could not consume arg: --temperature=1"),
        (["--version"], "The function received no value for the required argument: prompt"),
        (["-hello"], "The function received no value for the required argument: prompt"),
        ([], "The function received no value for the required argument: prompt"),
    ],
)
def test_wrong_arguments_are_fires_lines_and_a_hint_before_a_download(
    tmp_path, monkeypatch, capsys, arguments, message
):
    assert exit_status_in_an_empty_folder(tmp_path, monkeypatch, arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"ERROR: {message}\n{USAGE}")
    assert err.endswith(f"\n{HINT}")


def exit_status_in_an_empty_folder(tmp_path, monkeypatch, arguments):
    """Run the program in an empty folder, which stays empty. Returns its exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpt2.py", *arguments])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(ROOT / "gpt2.py"), run_name="__main__")
    assert os.listdir(tmp_path) == []
    return exited.value.code


def test_fire_is_left_as_it_was(monkeypatch):
    parse_value = fire.parser.DefaultParseValue
    command_line(monkeypatch, "12345", "1", "--models_dir", TOY)
    assert fire.parser.DefaultParseValue is parse_value
    with pytest.raises(SystemExit):
        command_line(monkeypatch, "x", "--temperature=1")
    assert fire.parser.DefaultParseValue is parse_value


def test_help_shows_the_options_and_nothing_of_how_they_are_parsed():
    done = run("gpt2.py", "--help")
    for words in ("gpt2.py PROMPT", "1558M", "how many tokens to add", '--prompt="-..."'):
        assert words in done.stderr
    assert "METADATA" not in done.stderr
    assert HINT not in done.stderr
    assert (done.stdout, done.returncode) == ("", 0)


def test_the_prompt_and_the_new_tokens_may_fill_the_context_and_not_exceed_it():
    gpt2.main("Twas" * 216, 40, models_dir=TOY)
    message = "the prompt has 217 tokens; 40 more would exceed the context of 256$"
    with pytest.raises(utils.UserError, match=message):
        gpt2.main("Twas" * 217, 40, models_dir=TOY)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("utils.UserError('two\\nlines')", "two lines\n"),
        ("FileExistsError(17, 'File exists', 'models')", "[Errno 17] File exists: 'models'\n"),
        ("ImportError('No module named fire')", "No module named fire\n"),
        ("BrokenPipeError", ""),
    ],
)
def test_an_error_the_user_can_fix_is_one_line(error, line):
    done = run("-c", f"import utils\nwith utils.one_line_errors(): raise {error}")
    assert (done.stdout, done.stderr, done.returncode) == ("", line, 1)


@pytest.mark.skipif(os.name == "nt", reason="needs bash")
def test_ctrl_c_shows_no_traceback_and_ends_a_loop_of_the_shell_around_the_program():
    # Ctrl+C sends SIGINT to all processes of the foreground: to the shell and the program
    ctrl_c = "import os, signal, time, utils\nwith utils.one_line_errors():\n    "
    ctrl_c += "os.killpg(0, signal.SIGINT); time.sleep(9)"
    loop = f"for i in 1 2 3; do {shlex.join([sys.executable, '-c', ctrl_c])}; echo next; done"
    options = {"cwd": ROOT, "capture_output": True, "text": True, "start_new_session": True}
    # a test that runs in the background may have been started with SIGINT ignored
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    done = subprocess.run(["bash", "-c", loop], check=False, **options)
    assert (done.stdout, done.stderr) == ("", "KeyboardInterrupt\n")
    assert done.returncode == -signal.SIGINT


@pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals")
def test_the_first_run_prints_its_text_even_if_the_terminal_of_stderr_is_gone(toy):
    terminal, stderr = os.openpty()
    os.close(terminal)
    options = {"capture_output": False, "stdout": subprocess.PIPE, "stderr": stderr}
    done = run("gpt2.py", PROMPT, "1", "124M", toy, **options)
    os.close(stderr)
    assert done.stdout == " toves\n"


@pytest.mark.parametrize("error", ["ValueError", "TypeError", "KeyError", "MemoryError"])
def test_any_other_error_keeps_its_traceback(error):
    done = run("-c", f"import utils\nwith utils.one_line_errors(): raise {error}")
    assert done.stderr.startswith("Traceback")
    assert done.returncode == 1


FULL_DISK = "[Errno 28] No space left on device\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(
    ("target", "stderr"), [("| head -c 5", ""), ("| true", ""), (">/dev/full", FULL_DISK)]
)
def test_a_closed_pipe_is_quiet_and_a_full_disk_is_one_line(target, stderr):
    command = shlex.join([sys.executable, "gpt2.py", PROMPT, "200", "124M", str(TOY)])
    # Python flushes stdout once more at exit, unless PYTHONUNBUFFERED is set
    script = ["bash", "-c", f"PYTHONUNBUFFERED= {command} {target}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(script, check=False, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, stderr)


# ---- In the tools of a learner ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "its_input", "its_output"),
    [
        (["-m", "cProfile"], "", "function calls"),
        (["-m", "pdb", "-c", "continue"], "quit\n", "The program finished"),
        (["-i"], "print(type(gpt2))\n", "<class 'function'>"),
    ],
)
def test_a_tool_has_its_say_after_the_text(tool, its_input, its_output):
    done = run(*tool, "gpt2.py", PROMPT, "40", "124M", TOY, input=its_input)
    assert done.stdout.startswith(VERSE)
    assert its_output in done.stdout.partition(VERSE)[2]
    assert "Traceback (most" not in done.stdout + done.stderr


def test_each_piece_is_flushed_also_in_a_thread_into_a_captured_stdout(monkeypatch):
    out, seen = io.StringIO(), []
    out.flush = lambda: seen.append(out.getvalue())
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["gpt2.py", PROMPT, "3", "--models_dir", str(TOY)])
    monkeypatch.chdir(ROOT)
    run_it = "import runpy; runpy.run_path('gpt2.py', run_name='__main__')"
    thread = threading.Thread(target=exec, args=(run_it, {}))
    thread.start()
    thread.join()
    assert out.getvalue() == " toves\nDid\n"
    assert seen[:3] == [" toves", " toves\n", " toves\nDid"]
