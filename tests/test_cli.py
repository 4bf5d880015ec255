"""The program as a user meets it: `python gpt2.py ...` on the toy, in a process of its own."""

import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, TOY

VERSE = (
    " toves\nDid gyre and gimble in the wabe:\n"
    "All mimsy were the borogoves,\nAnd the mome raths outgrabe.\n"
)
PROMPT = "Twas brillig, and the slithy"
USAGE = 'usage: python gpt2.py "PROMPT"'


def run_code(code, **options):
    """Run Python code in a process of its own, in the project's folder."""
    options = {"cwd": ROOT, "capture_output": True, "text": True, **options}
    return subprocess.run([sys.executable, "-c", code], check=False, **options)


def run_shell(command):
    """Run a shell command in the project's folder; "python" is the Python of the tests."""
    command = command.replace("python", f'"{sys.executable}"', 1)
    options = {"cwd": ROOT, "capture_output": True, "text": True}
    return subprocess.run(["bash", "-c", command], check=False, **options)


def one_line(text):
    return text.endswith("\n") and text.count("\n") == 1 and "Traceback" not in text


def bars(stderr):
    """The names of the progress bars on stderr, which must hold nothing else."""
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line]
    return {re.fullmatch(r"(\w+).*\|.*\|.*", line)[1] for line in lines}


def test_it_recites_the_poem_and_stdout_holds_nothing_else(run):
    done = run(PROMPT, "--models_dir", TOY)
    assert done.returncode == 0
    assert done.stdout.startswith(VERSE[:60])
    assert "40/40" in done.stderr


def test_a_first_start_shows_two_bars_and_a_second_start_one(run, toy):
    first, second = (run(PROMPT, "--models_dir", toy) for _ in range(2))
    assert first.stdout == second.stdout
    assert bars(first.stderr) == {"reading", "generating"}
    assert bars(second.stderr) == {"generating"}


def run_where_onednn_is_on_by_default(models_dir, setting=None):
    """Run gpt2.py as on a CPU where TensorFlow turns oneDNN on if it is unset.

    At the end, print what it is set to.
    """
    code = (
        "import os, runpy, sys\n"
        "def on_import(event, arguments):\n"
        "    if event == 'import' and arguments[0] == 'tensorflow':\n"
        "        os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')\n"
        "sys.addaudithook(on_import)\n"
        f"sys.argv = ['gpt2.py', 'x', '1', '--models_dir', {str(models_dir)!r}]\n"
        "runpy.run_path('gpt2.py', run_name='__main__')\n"
        "print('set to', os.environ['TF_ENABLE_ONEDNN_OPTS'])"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    return run_code(code, env={**env, "TF_ENABLE_ONEDNN_OPTS": setting} if setting else env)


def test_tensorflow_says_nothing_about_onednn(toy):
    done = run_where_onednn_is_on_by_default(toy)
    assert done.returncode == 0
    assert bars(done.stderr) == {"reading", "generating"}


def test_a_user_who_turns_onednn_on_keeps_it(toy):
    done = run_where_onednn_is_on_by_default(toy, "1")
    assert done.stdout.endswith("set to 1\n"), done.stderr


def test_a_library_leaves_tensorflows_settings_alone(toy):
    code = (
        "import os; names = ('TF_CPP_MIN_LOG_LEVEL', 'TF_ENABLE_ONEDNN_OPTS')\n"
        "before = [os.environ.get(name) for name in names]\n"
        f"import gpt2; gpt2.main('x', 1, models_dir={str(toy)!r})\n"
        "print([os.environ.get(name) for name in names] == before)"
    )
    assert run_code(code).stdout == "True\n"


def test_the_second_start_imports_neither_tensorflow_nor_requests(run, toy):
    run(PROMPT, "1", "--models_dir", toy)
    code = (
        f"import sys, gpt2; gpt2.main({PROMPT!r}, 1, models_dir={str(toy)!r})\n"
        "print({'tensorflow', 'requests', 'fire'} & sys.modules.keys())"
    )
    assert run_code(code).stdout == "set()\n"


@pytest.mark.parametrize("count", [0, 1, 7])
def test_it_generates_as_many_tokens_as_it_is_told(run, count):
    done = run(PROMPT, "--n_tokens_to_generate", str(count), "--models_dir", TOY)
    assert done.returncode == 0
    assert VERSE.startswith(done.stdout.removesuffix("\n"))
    assert f"{count}/{count}" in done.stderr or count == 0
    assert (done.stdout == "\n") == (count == 0)


def test_arguments_may_come_by_position(run):
    by_name = run(PROMPT, "--models_dir", TOY, "--n_tokens_to_generate=1")
    assert run(PROMPT, "1", "124M", TOY).stdout == by_name.stdout


def test_an_empty_prompt_starts_from_endoftext(run):
    verse = "'Twas brillig, and the slithy toves\nDid gyre"
    assert run("", "--models_dir", TOY).stdout.startswith(verse)


TEXTS = ["12345", "[1, 2]", "None", "1e5", "a,b", "{'a': 1}", "True", "'quoted'", "(", "-", "-5"]


@pytest.mark.parametrize("prompt", [*TEXTS, "FIRE_METADATA"])
def test_every_prompt_is_text(run, prompt):
    done = run(prompt, "3", "--models_dir", TOY)
    expected = run_code(f"import gpt2; print(gpt2.main({prompt!r}, 3, models_dir={str(TOY)!r}))")
    assert (done.returncode, done.stdout) == (0, expected.stdout)


@pytest.mark.parametrize("prompt", ["-Alan", "-- SELECT all users", "--", "--help"])
def test_a_prompt_that_begins_with_a_dash_can_be_given_by_name(run, prompt):
    done = run(f"--prompt={prompt}", "3", "--models_dir", TOY)
    expected = run_code(f"import gpt2; print(gpt2.main({prompt!r}, 3, models_dir={str(TOY)!r}))")
    assert (done.returncode, done.stdout) == (0, expected.stdout)


def test_a_size_or_folder_that_looks_like_a_number_is_text(run, tmp_path):
    assert "not '124'" in run("x", "--model_size", "124").stderr
    (tmp_path / "007").symlink_to(TOY)
    assert run(PROMPT, "1", "--models_dir", "007", cwd=tmp_path).returncode == 0


def test_a_tilde_that_the_shell_has_not_expanded_is_the_home_folder(run, toy):
    done = run(PROMPT, "1", "--models_dir=~", env={"HOME": str(toy)})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "prompt"),
        (["Alan", "Turing", "theorized"], "'Turing'"),
        (["Alan", "Turing", "theorized", "that", "computers"], "computers"),
        ([PROMPT, "1", "124M", str(TOY), "upper"], "upper"),
        ([PROMPT, "1", "124M", str(TOY), "__doc__"], "__doc__"),
        ([PROMPT, "1", "124M", str(TOY), "0"], "0"),
        ([PROMPT, "1", "124M", str(TOY), "two\nlines"], "lines"),
        ([PROMPT, "--size", "124M"], "--size"),
        ([PROMPT, "--models_dir", str(TOY), "--temperature=1"], "--temperature"),
        ([PROMPT, "--n_tokens_to_generate", "-1"], "'-1'"),
        ([PROMPT, "--n_tokens_to_generate", "ten"], "'ten'"),
        ([PROMPT, "--n_tokens_to_generate", "2.5"], "'2.5'"),
        ([PROMPT, "--n_tokens_to_generate", "9" * 5000], "'999"),
        ([PROMPT, "--n_tokens_to_generate", "{[]}"], "'{[]}'"),
        ([PROMPT, "--n_tokens_to_generate"], "'True'"),
        (["-Alan", "--models_dir", str(TOY)], '--prompt="..." takes any text'),
        (["-- SELECT all users", "--models_dir", str(TOY)], '--prompt="..." takes any text'),
    ],
)
def test_a_mistake_in_the_call_is_one_line_with_the_usage(run, tmp_path, arguments, said):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert one_line(done.stderr), done.stderr
    assert said in done.stderr
    assert USAGE in done.stderr
    assert os.listdir(tmp_path) == []  # above all, no model was downloaded


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([PROMPT, "--model_size", "125M"], "124M, 355M, 774M, 1558M, not '125M'"),
        ([PROMPT, "--model_size", "../124M"], "'../124M'"),
        ([PROMPT, "--n_tokens_to_generate", "256", "--models_dir", str(TOY)], "256 new ones"),
        (["and " * 300, "--models_dir", str(TOY)], "the context of 256"),
        ([PROMPT, "--models_dir", "/dev/null"], "/dev/null"),
    ],
)
def test_what_a_user_can_fix_is_one_line_on_stderr(run, tmp_path, arguments, said):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert one_line(done.stderr), done.stderr
    assert said in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_line_break_in_a_file_name_makes_no_second_line(run, toy):
    (toy / "two\nlines").mkdir()
    shutil.move(toy / "124M", toy / "two\nlines")
    (toy / "two\nlines" / "124M" / "hparams.json").write_text("{}")
    done = run(PROMPT, "--models_dir", toy / "two\nlines")
    assert one_line(done.stderr), done.stderr
    assert "two lines/124M/hparams.json is damaged" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], [PROMPT, "--help"]])
def test_help_is_on_stdout_and_tells_what_the_options_mean(run, arguments):
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    options = ("PROMPT", "--n_tokens_to_generate", "--model_size", "--models_dir")
    assert all(word in done.stdout for word in (*options, "1558M", "tokens to add"))


def test_help_on_a_terminal_needs_no_key(run):
    try:
        terminal, its_end = pty.openpty()
    except OSError as error:  # as in some containers
        pytest.skip(str(error))
    options = {"stdin": its_end, "stdout": its_end, "stderr": its_end, "capture_output": False}
    assert run("--help", **options).returncode == 0
    os.close(its_end)
    os.close(terminal)


def test_a_90_kb_prompt_and_a_word_of_100_000_letters_fail_with_their_token_count(run):
    for prompt in ("the cat " * 11_500, "".join(random.Random(0).choices("abcdefgh", k=100_000))):
        done = run(prompt, "--models_dir", TOY)
        assert done.returncode == 1
        assert one_line(done.stderr)
        assert re.search(
            r"\d{5} prompt tokens and 40 new ones exceed the context of 256", done.stderr
        )


def test_bytes_that_are_no_utf8_are_no_traceback(run):
    assert run(b"Twas \xff\xfe brillig", "1", "--models_dir", TOY).returncode == 0


def test_the_locale_does_not_matter(run):
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = run(PROMPT, "3", "--models_dir", TOY, env=plain)
    assert (done.returncode, done.stdout) == (0, " toves\nDid\n")


def test_a_lone_surrogate_in_the_prompt_is_accepted(run):
    prompt = "Twas\ud800".encode("utf-8", "surrogatepass")
    assert run(prompt, "5", "--models_dir", TOY).returncode == 0


def test_a_terminal_without_the_characters_shows_question_marks():
    code = (
        "import encoder, runpy, sys\n"
        f"sys.argv = ['gpt2.py', 'x', '1', '--models_dir', {str(TOY)!r}]\n"
        "encoder.Encoder.decode = lambda self, ids: 'caf\u00e9'\n"
        "runpy.run_path('gpt2.py', run_name='__main__')"
    )
    done = run_code(code, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "caf?\n"), done.stderr


def test_a_closed_pipe_is_quiet():
    """Python flushes stdout once more when it exits, unless PYTHONUNBUFFERED is set."""
    command = f'PYTHONUNBUFFERED= python gpt2.py "{PROMPT}" --models_dir tests/models | true'
    done = run_shell(command)
    assert done.stdout == ""
    assert bars(done.stderr) == {"generating"}


@pytest.mark.parametrize(("closed", "shown"), [(">&-", ""), ("2>&-", " toves\nDid\n")])
def test_a_stream_that_the_caller_has_closed_does_no_harm(closed, shown):
    done = run_shell(f'python gpt2.py "{PROMPT}" 3 --models_dir tests/models {closed}')
    assert (done.returncode, done.stdout) == (0, shown)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("moment", ["fire.core", "tensorflow.python.eager", "generating"])
def test_ctrl_c_kills_the_program_by_its_signal_and_without_a_traceback(toy, moment):
    """-X importtime tells on stderr what is being imported, TensorFlow at the toy's first start."""
    program = [sys.executable, "-X", "importtime", ROOT / "gpt2.py"]
    command = [*program, PROMPT, "200", "--models_dir", toy]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        seen = b""
        while moment.encode() not in seen and (piece := process.stderr.read1()):
            seen += piece
        process.send_signal(signal.SIGINT)
        stdout, rest = process.communicate(timeout=60)
    assert moment.encode() in seen
    assert (process.returncode, stdout) == (-signal.SIGINT, b"")
    assert b"Traceback" not in seen + rest


def test_an_importing_program_keeps_its_own_ctrl_c():
    code = (
        "import signal; before = signal.getsignal(signal.SIGINT)\n"
        "import gpt2; print(signal.getsignal(signal.SIGINT) is before)"
    )
    assert run_code(code).stdout == "True\n"


def test_a_bug_of_ours_keeps_its_traceback(toy):
    code = (
        "import runpy, sys, utils\n"
        f"sys.argv = ['gpt2.py', 'x', '1', '--models_dir', {str(toy)!r}]\n"
        "def buggy(*arguments): raise ValueError('our own')\n"
        "utils.load_encoder_hparams_and_params = buggy\n"
        "runpy.run_path('gpt2.py', run_name='__main__')"
    )
    done = run_code(code)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "our own" in done.stderr
