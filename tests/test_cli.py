"""The command line: its help, its arguments, its files and its exit statuses."""

import configparser
import contextlib
import inspect
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import minidpo
from minidpo import checkpoint, cli, generation, ops, plots, tokenizer, training
from minidpo.cli import look, options, parser
from minidpo.losses import LOSSES
from minidpo.ops import OPS
from minidpo.theory import assumptions, dynamics, equalities, frontier


def test_check_prints_one_row_per_op_and_loss(capsys):
    """Check prints one row per op and per loss, each within the tolerance."""
    assert cli.main(["check", "--cases", "5"]) == 0
    printed = capsys.readouterr()
    rows = re.findall(r"^(\w+) +(\d\.\de[-+]\d\d) +(\d\.\de[-+]\d\d) +5$", printed.out, re.MULTILINE)
    assert [name for name, _, _ in rows] == [*OPS, *LOSSES]
    assert all(float(central) <= 1e-6 and float(complex_) <= 1e-12 for _, central, complex_ in rows)
    assert f"{len(OPS)} ops and {len(LOSSES)} losses" in printed.out and printed.err == ""


def test_check_fails_where_a_vjp_is_wrong(capsys, monkeypatch):
    """Check exits with 1 and names the argument where a derivative is wrong."""

    def tanh(x):
        y, vjp = ops.tanh.raw(x)
        return y, lambda g: (-vjp(g)[0],)

    monkeypatch.setitem(OPS, "tanh", tanh)
    monkeypatch.setitem(OPS, "exp", lambda x: (ops.exp.raw(x)[0], lambda g: g @ np.ones(99)))
    assert cli.main(["check", "--cases", "3"]) == 1
    printed = capsys.readouterr()
    assert re.search(r"^tanh +FAILED +FAILED +3$", printed.out, re.MULTILINE)
    assert re.search(r"^exp +FAILED +FAILED +3$", printed.out, re.MULTILINE)
    assert "vjp raised" in printed.err and printed.out.count("FAILED") == 4 and "all within" not in printed.out
    monkeypatch.undo()
    ipo = LOSSES["ipo"].gradient
    monkeypatch.setattr(LOSSES["ipo"], "gradient", lambda **x: [-g for g in ipo(**x)])
    assert cli.main(["check", "--cases", "1"]) == 1
    assert "ipo_loss: vjp raised GradientError: the sweep gives" in capsys.readouterr().err
    assert "tanh: argument 0 at index" in printed.err and "vjp gives" in printed.err


def test_check_repeats_with_its_seed(capsys):
    """The same seed checks the same cases."""
    printed = []
    for seed in ("1", "1", "2"):
        cli.main(["check", "--cases", "2", "--seed", seed])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_oracles_prints_both_columns(capsys):
    """Oracles prints both numbers of every score."""
    assert cli.main(["oracles"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13 and lines[1].split()[:2] == ["correct", "1.0000000000"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that a few steps of the real command made."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "names.txt").write_text("\n".join(["emma", "mia", "ava", "amelia", "emily", "ella", "", "mia"] * 3))
    sizes = ["--n-embd", "8", "--n-layer", "1", "--n-head", "2", "--batch-size", "4", "--steps", "3"]
    arguments = ["pretrain", "--data", str(folder / "names.txt"), "--out", str(folder / "model"), *sizes]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(arguments) == 0
    return folder, arguments, printed.getvalue()


def test_pretrain_says_what_it_does(trained):
    """Pretrain says what it reads and how far it is."""
    folder, _, printed = trained
    assert re.search(r"^\d+ texts to train on, 6 held out, 9 ids, \d+ parameters$", printed, re.MULTILINE)
    assert re.search(r"^model +3/3 +held-out loss \d\.\d{4} +[\d,]+ tokens/s +0:00 left$", printed, re.MULTILINE)
    assert checkpoint.load(folder / "model").verified


def test_sample_continues_the_prompt(trained, capsys):
    """Sample continues the prompt, and its options do what they say."""
    command = ["sample", "--checkpoint", str(trained[0] / "model"), "--prompt", "em"]
    assert cli.main(command) == 0
    texts = capsys.readouterr().out.splitlines()
    assert len(texts) == 5 and all(text.startswith("em") for text in texts)
    assert cli.main(command) == 0 and capsys.readouterr().out.splitlines() == texts
    assert cli.main([*command, "--samples", "2", "--temperature", "0"]) == 0
    greedy = capsys.readouterr().out.splitlines()
    assert len(greedy) == 2 and greedy[0] == greedy[1]
    for more, same in (
        (["--top-k", "1", "--samples", "2"], True),
        (["--top-p", "1e-9", "--samples", "2"], True),
        (["--seed", "9", "--samples", "2"], False),
    ):
        assert cli.main([*command, *more]) == 0
        assert (capsys.readouterr().out.splitlines() == greedy) is same
    assert cli.main([*command, "--max-new-tokens", "1"]) == 0
    assert all(len(text) <= 4 for text in capsys.readouterr().out.splitlines())


def test_unverified_weights_are_named(trained, capsys, tmp_path):
    """Weights without a checksum are named."""
    copied = shutil.copytree(trained[0] / "model" / "model", tmp_path / "copy")
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'sha256"', b'sha999"'))
    assert cli.main(["sample", "--checkpoint", str(copied)]) == 0
    assert "no checksum" in capsys.readouterr().err


def test_sample_begins_a_text_as_training_did(trained, capsys, monkeypatch):
    """Sample begins a text with end-of-text, as training does."""
    calls = []
    monkeypatch.setattr(look, "generate", lambda *args: calls.append(args) or generation.Generation([], []))
    assert cli.main(["sample", "--checkpoint", str(trained[0] / "model"), "--prompt", "a", "--samples", "2"]) == 0
    assert calls[0][2] == [[0, 2], [0, 2]]
    command = ["sample", "--checkpoint", str(trained[0] / "model"), "--prompt", "a", "--samples", "1", "--newline"]
    assert cli.main(command) == 0 and calls[1][2] == [[0, 2, 1]]


def test_a_sample_does_not_depend_on_how_many_there_are(trained, capsys):
    """The first texts are the same whatever the number of texts, and they are printed as they come."""
    command = ["sample", "--checkpoint", str(trained[0] / "model"), "--seed", "5", "--samples"]
    assert cli.main([*command, "40"]) == 0
    texts = capsys.readouterr().out.splitlines()
    for count in (1, 33):
        assert cli.main([*command, str(count)]) == 0
        assert capsys.readouterr().out.splitlines() == texts[:count]


@pytest.mark.parametrize(
    ("lines", "more", "sentence"),
    [
        ('{"prompt": "a"}\n{"prompt": "a\u00e9"}\n', [], r"character '\xe9' at position 1 of FILE, line 2, to MODEL"),
        ('{"prompt": "a"}\n{"text": "a"}\n', [], "FILE, line 2: has no text as its prompt"),
        ('{"prompt": "a"}\nem\n', [], "FILE, line 2: "),
        ('{"prompt": "' + 99 * "a" + '"}\n', [], "FILE, line 1, to MODEL: 100 tokens, but the model's n_positions = "),
        ("\n", [], "FILE: has no prompt"),
        ('{"prompt": "a"}\n', ["--prompt=a"], "in place of --prompt, --prompt-file and --escapes"),
        ('{"prompt": "a"}\n', ["--prompt-file=FILE"], "in place of --prompt, --prompt-file and --escapes"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_refused(trained, capsys, tmp_path, lines, more, sentence):
    """The message names file and line, and the model that cannot read a prompt; nothing is answered before."""
    (tmp_path / "prompts.jsonl").write_text(lines)
    folder, file = str(trained[0] / "model"), str(tmp_path / "prompts.jsonl")
    more = [word.replace("FILE", file) for word in more]
    assert cli.main(["sample", "--checkpoint", folder, folder, "--prompts", file, *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and sentence.replace("FILE", file).replace("MODEL", folder) in err and err.count("\n") == 1


def test_two_models_of_one_name_are_told_apart(trained, capsys, tmp_path):
    """Answers stand beside the folder's name, or its whole path where two have the same; one prompt needs no file."""
    other = shutil.copytree(trained[0] / "model", tmp_path / "model")
    command = ["sample", "--checkpoint", str(trained[0] / "model"), str(other), "--prompt", "em", "--newline"]
    if "\n" not in checkpoint.load(other).tokenizer.characters:
        command.pop()
    assert cli.main(command) == 0
    prompt, *answers = capsys.readouterr().out.splitlines()
    assert prompt == "em" and len(answers) == 2
    (first, text), (second, again) = (answer.strip().split("  ", 1) for answer in answers)
    assert (first, second) == (str(trained[0] / "model"), str(other)) and text.strip() == again.strip() != ""


def test_a_reader_that_has_enough_ends_the_samples_in_silence(trained):
    """`minidpo sample | head` prints nothing but the texts, though two thousand million were asked for."""
    words = [sys.executable, "-m", "minidpo", "sample", "--checkpoint", str(trained[0] / "model")]
    with subprocess.Popen([*words, "--samples=2000000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_a_prompt_comes_from_a_file_or_the_standard_input_or_with_escapes(trained, capsys, tmp_path, monkeypatch):
    """A prompt with a newline can be given in three ways; a backslash that was meant as one is answered with them."""
    command = ["sample", "--checkpoint", str(trained[0] / "model"), "--samples=2", "--temperature=0"]
    (tmp_path / "prompt").write_text("em\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("em\n"))
    outputs = set()
    for more in (["--prompt=em\\n", "--escapes"], ["--prompt-file", str(tmp_path / "prompt")], ["--prompt-file=-"]):
        assert cli.main([*command, *more]) == 0
        outputs.add(capsys.readouterr().out)
    assert len(outputs) == 1 and outputs.pop().startswith("em\\n")
    for words in (command, ["explain", *command[1:3], "--chosen=a", "--rejected=e"]):
        assert cli.main([*words, "--prompt=em\\n"]) == 2
        error = capsys.readouterr().err
        assert "the prompt has a backslash" in error and "--escapes" in error and "--replacement" not in error
    assert cli.main([*command, "--prompt=e", f"--prompt-file={tmp_path / 'prompt'}"]) == 2
    assert "--prompt-file is read as it is" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["-m", "minidpo"], ["-c", "import sys; sys.argv[0] = 'minidpo'; import minidpo"]])
def test_ctrl_c_while_modules_are_imported_is_no_traceback(words, tmp_path):
    """Ctrl-C before the command line has started ends the program with status 130 and without a word."""
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), str(Path(cli.__file__).parents[2])])
    run = subprocess.run([sys.executable, *words], capture_output=True, env={**os.environ, "PYTHONPATH": path})
    assert (run.returncode, run.stdout, run.stderr) == (130, b"", b"")


def test_a_text_of_pretrain_that_cannot_be_read_is_named_by_its_line(trained, capsys, tmp_path):
    """An unknown character and a text that is too long are reported with file and line, in either file."""
    model, sizes = str(trained[0] / "model"), ["--steps=0", f"--out={tmp_path / 'run'}"]
    data, held_out = tmp_path / "new.txt", tmp_path / "held.txt"
    for text, fault in (("mXa", "character 'X' at position 1 of the text of {}, line 4, is not in"),
                        ("m" * 500, "{}, line 4: the text has 500 characters, but 6 fit the context")):  # fmt: skip
        for path in (data, held_out):
            data.write_text("mia\n\nemma\nava\n")
            held_out.write_text("ella\n\nemily\namelia\n")
            path.write_text(path.read_text().rsplit("\n", 2)[0] + f"\n{text}\n")
            assert cli.main(["pretrain", f"--data={data}", f"--held-out-data={held_out}", "--init", model, *sizes]) == 2
            assert fault.format(path) in capsys.readouterr().err


def test_an_output_in_a_folder_that_takes_no_file_is_refused_before_anything_is_computed(trained, capsys):
    """A folder in which no file can be made is noticed by making one, whatever its permissions say."""
    words = ["explain", "--checkpoint", str(trained[0] / "model"), "--prompt=e", "--chosen=a", "--rejected=e"]
    assert cli.main([*words, "--html=/proc/page.html"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and "/proc/page.html: cannot be written" in error


def test_a_file_in_place_of_a_folder_is_named(trained, capsys, tmp_path):
    """A run below a file is refused; the sentence names the file."""
    (tmp_path / "file").touch()
    assert cli.main([*trained[1][:4], str(tmp_path / "file" / "run"), "--steps=0"]) == 2
    assert f"{tmp_path / 'file'}: is not a folder" in capsys.readouterr().err


def test_a_pair_that_is_too_long_is_told_what_explain_can_do(trained, capsys):
    """Explain does not advise an option that it does not have."""
    words = [
        "explain",
        "--checkpoint",
        str(trained[0] / "model"),
        f"--prompt={'e' * 70}",
        "--chosen=a",
        "--rejected=em",
    ]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert "the prompt with the rejected response has 74 tokens, but only 8 fit the context: shorten" in error


def test_too_little_memory_is_one_sentence(trained, capsys, monkeypatch, tmp_path):
    """Too little memory is one sentence."""

    def no_memory(*args, **options):
        raise MemoryError("Unable to allocate 191. GiB")

    monkeypatch.setattr(training, "sft_training_step", no_memory)
    assert cli.main([*trained[1][:4], str(tmp_path / "m")]) == 2
    assert "not enough memory (Unable to allocate 191. GiB)" in capsys.readouterr().err


def test_a_wrong_input_is_one_sentence(trained, capsys, tmp_path):
    """A wrong file or option is one sentence, and nothing is begun."""
    folder, arguments, _ = trained
    (tmp_path / "one.txt").write_text("same\nsame\n")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\n")
    for command, sentence in (
        (arguments, "model exists already"),
        (["sample", "--checkpoint", str(tmp_path / "none")], "config.json: cannot be read"),
        (["sample", "--checkpoint", str(folder / "model"), "--prompt", "a\u00e9"], "character '\\xe9' at position 1"),
        (["sample", "--checkpoint", str(folder / "model"), "--top-p", "2"], "top_p = 2.0 is out of range"),
        (["pretrain", "--data", str(tmp_path / "none.txt"), "--out", str(tmp_path / "new")], "No such file"),
        (
            ["pretrain", "--data", str(tmp_path / "one.txt"), "--out", str(tmp_path / "new")],
            "two different prompts or texts",
        ),
        (["pretrain", "--data", str(tmp_path / "latin.txt"), "--out", str(tmp_path / "new")], "byte 0 is not UTF-8"),
        (
            ["pretrain", "--data", str(folder / "names.txt"), "--out", str(tmp_path / "new"), "--n-head", "3"],
            "multiple",
        ),
    ):
        assert cli.main(command) == 2
        printed = capsys.readouterr()
        assert sentence in printed.err and printed.err.count("\n") == 1, printed.err
        assert printed.err.startswith(f"minidpo {command[0]}: ") and not (tmp_path / "new").exists()


@pytest.mark.parametrize("arguments", [["check", "--cases", "0"], ["check", "--seed", "-1"], ["chekc"], []])
def test_wrong_arguments_get_a_sentence(arguments, capsys):
    """Wrong arguments get usage and a sentence."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and "minidpo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "usage", "sentence"),
    [
        (["dpo", "--bta=3"], "usage: minidpo dpo [-h] --data", "unknown option --bta; did you mean --beta?"),
        (["dpo", "--learning_rate", "1"], "usage: minidpo dpo", "--learning_rate; did you mean --learning-rate?"),
        (["dpo", "--bet=3"], "usage: minidpo dpo", "unknown option --bet; did you mean --beta?"),
        (["check", "--qqqqqqq"], "usage: minidpo check", "unknown option --qqqqqqq\n"),
        (["check", "\x1b"], "usage: minidpo check", "unrecognized arguments"),
        (["smaple"], "usage: minidpo COMMAND", "unknown command smaple; did you mean sample?"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_intended_one(arguments, usage, sentence, capsys):
    """An unknown option shows the usage of its command and the nearest option; options are not abbreviated."""
    with pytest.raises(SystemExit):
        cli.main(arguments)
    error = capsys.readouterr().err
    assert error.startswith(usage) and sentence in error


def printed_by(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_shows_the_commands_in_groups(capsys):
    """minidpo --help lists every command under what it is for, with the first line of its docstring."""
    text = printed_by(capsys, "--help")
    groups = {}
    for group, commands in re.findall(r"^(\w+): .*\n((?:  .*\n)+)", text, re.MULTILINE):
        groups[group] = re.findall(r"^  (\w+) ", commands, re.MULTILINE)
    assert groups == {
        "learn": ["demo", "data", "judge"],
        "train": ["pretrain", "sft", "dpo", "import", "resume"],
        "look": ["card", "score", "sample", "explain", "displacement", "evaluate"],
        "prove": ["check", "oracles", "exact", "frontier", "invariances", "losses"],
        "verify": ["doctor", "verify"],
    }
    assert "  exact         show the theory of DPO as equalities on a small world\n" in text
    assert {"main", *itertools.chain(*groups.values())} == {name.rstrip("_") for name in cli.__all__}


@pytest.mark.parametrize("name", parser.COMMANDS)
def test_help_explains_every_option_with_its_default(name, capsys):
    """Each option has a help that makes sense alone, and its default where it has one."""
    text = " ".join(printed_by(capsys, name, "--help").split())
    assert "None" not in text and "False" not in text
    for each, p in parser.COMMANDS[name].options.items():
        own = parser.option(p)
        assert " ".join(own.help.split()) in text.replace("- ", "-") or own.help[:20] in text, each
        assert len(own.help.split()) > 1 and not own.help.endswith(".")
        if p.default not in (None, "", p.empty) and p.default is not False:
            assert f"(default: {p.default})" in text, each


def test_version_is_that_of_the_package(capsys):
    """minidpo --version prints the version."""
    assert printed_by(capsys, "--version") == f"minidpo {minidpo.__version__}\n"


def test_the_script_and_python_m_are_main(tmp_path):
    """`minidpo` is declared as a script, and `python -m minidpo` does the same."""
    finished = subprocess.run([sys.executable, "-m", "minidpo", "check", "--help"], capture_output=True, text=True)
    assert finished.returncode == 0 and "exit status is 1" in " ".join(finished.stdout.split())
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parents[1] / "setup.cfg")
    assert settings["options.entry_points"]["console_scripts"].split("=") == ["\nminidpo ", " minidpo.__main__:main"]


def test_python_calls_are_command_lines(trained, capsys):
    """A command is a function: text becomes a path, NumPy's integers are integers, and the result is returned."""
    folder, _, _ = trained
    texts = cli.sample(checkpoint=str(folder / "model"), prompt="em", samples=np.int64(2), seed=np.uint8(3))
    printed = capsys.readouterr().out.splitlines()
    assert printed == list(map(tokenizer.printable, texts)) and len(texts) == 2
    assert cli.main(["sample", f"--checkpoint={folder / 'model'}", "--prompt=em", "--samples=2", "--seed=3"]) == 0
    assert capsys.readouterr().out.splitlines() == printed
    assert "samples" in inspect.signature(cli.sample).parameters
    assert inspect.signature(cli.dpo).parameters["steps"].default == parser.COMMANDS["dpo"].options["steps"].default
    assert "Annotated[float, 'peak learning rate" in str(inspect.signature(cli.dpo))
    with pytest.raises(TypeError, match="unexpected keyword argument 'bta'"):
        cli.dpo(data="d", init="i", out="o", bta=1)
    with pytest.raises(TypeError, match="missing a required argument: 'init'"):
        cli.dpo(data="d", out="o")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: cli.check(cases=0), r"check: cases: 0 is not an integer of at least 1"),
        (lambda: cli.check(cases=True), r"check: cases: True is not an integer"),
        (lambda: cli.check(cases=2.0), r"check: cases: 2\.0 is not an integer"),
        (lambda: cli.check(seed=2**63 + 1), "is not an integer of at least 0 and at most 9223372036854775808"),
        (lambda: cli.check(seed=None), "check: seed: None is not an integer"),
        (lambda: cli.sample(checkpoint="x", temperature="hot"), "sample: temperature: 'hot' is not a number"),
        (lambda: cli.sample(checkpoint="x", newline="no"), "sample: newline: 'no' is not True or False"),
        (lambda: cli.sample(checkpoint=3), "sample: checkpoint: 3 is not a path"),
        (lambda: cli.sample(checkpoint="x", prompt=3), "sample: prompt: 3 is not a text"),
        (lambda: cli.sample(checkpoint="x", device="gpu"), "device: 'gpu' is not one of cpu, cuda"),
        (lambda: cli.judge(checkpoint=[1], reference="x"), "judge: checkpoint: 1 is not a path"),
        (lambda: cli.judge(checkpoint="none", reference="none"), "none/config.json: cannot be read"),
    ],
)
def test_python_arguments_are_checked(call, sentence):
    """A wrong argument from Python is a ValueError with the sentence that the command line prints."""
    with pytest.raises(ValueError, match=sentence):
        call()


def test_an_interrupt_is_one_sentence(trained, capsys, monkeypatch, tmp_path):
    """Ctrl-C ends with status 130, names the last checkpoint and says how to resume, which ends in the same model."""
    step = training.sft_training_step

    def interrupted(*args, **options):
        metrics = step(*args, **options)
        if args[2].steps == 3:
            raise KeyboardInterrupt
        return metrics

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training, "sft_training_step", interrupted)
        assert cli.main([*trained[1][:4], str(run), *trained[1][5:], "--evaluate-every=2"]) == 130
    error, last = capsys.readouterr().err, run / "step-000002"
    resume = f"the last checkpoint is {last}; resume with: minidpo resume {run}\n"
    assert (
        error.endswith(f"\nminidpo pretrain: interrupted; {resume}") and error.count("\n") == 2
    )  # one is of the warm-up
    assert cli.main(["resume", str(run)]) == 0
    first, again = (folder / "model" / "model.safetensors" for folder in (trained[0] / "model", run))
    assert first.read_bytes() == again.read_bytes()


def test_a_closed_pipe_is_not_a_traceback(capsys, monkeypatch):
    """A reader that goes away ends the command with status 141."""

    def closed(**values):
        """Close."""
        raise BrokenPipeError

    monkeypatch.setitem(parser.COMMANDS, "oracles", parser.COMMANDS["oracles"]._replace(function=closed))
    copies = []
    monkeypatch.setattr(parser.os, "dup2", lambda *descriptors: copies.append(descriptors))
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1)
    assert cli.main(["oracles"]) == 141 and len(copies) == 1
    assert capsys.readouterr().err == ""


@pytest.fixture
def quick(monkeypatch):
    """The theory in no time."""
    monkeypatch.setattr(equalities, "EQUALITIES", [])

    def nothing(world, seed):
        """Claim nothing."""
        return []

    monkeypatch.setattr(assumptions, "finite_margins", nothing)
    monkeypatch.setattr(dynamics, "beta_early_and_late", nothing)
    monkeypatch.setattr(assumptions, "cases", lambda world, seed: [])
    monkeypatch.setattr(frontier, "run", lambda seeds: [frontier.Point("a kind", 0.1, seeds[0], 1.0, 2.0, 0.5)])
    monkeypatch.setattr(plots, "png", lambda panels: b"a picture")
    monkeypatch.setattr(plots, "installed", lambda: True)
    monkeypatch.setattr(dynamics, "gap_panels", lambda: [])
    monkeypatch.setattr(frontier, "panels", lambda points: [])


def test_files_are_announced_before_anything_is_computed(quick, tmp_path, capsys, monkeypatch):
    """exact --plot and frontier name what they will write, and write it."""
    assert cli.main(["exact", f"--plot={tmp_path / 'beta.png'}"]) == 0
    assert capsys.readouterr().err == f"{tmp_path / 'beta.png'} will be written at the end\n"
    assert (tmp_path / "beta.png").read_bytes() == b"a picture"
    points = cli.frontier(out=tmp_path / "f", worlds=1)
    error = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in error] == [str(tmp_path / "f" / name) for name in FRONTIER]
    assert (tmp_path / "f" / "frontier.png").exists() and points[0].kind == "a kind"


FRONTIER = ("frontier.json", "frontier.png")


def test_an_output_that_cannot_be_written_is_refused_first(quick, tmp_path, capsys, monkeypatch):
    """A file that exists, a folder that is missing or read-only, matplotlib that is missing: nothing is computed."""
    (tmp_path / "mine.png").write_text("mine")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "frontier.png").write_text("mine")
    monkeypatch.setattr(equalities, "small_world", lambda seed: pytest.fail("computed"))
    monkeypatch.setattr(frontier, "run", lambda seeds: pytest.fail("computed"))
    for command, sentence in (
        (["exact", f"--plot={tmp_path / 'mine.png'}"], "exists already"),
        (["exact", f"--plot={tmp_path / 'link.png'}"], "exists already"),
        (["exact", f"--plot={tmp_path / 'none' / 'new.png'}"], "missing or read-only"),
        (["frontier", f"--out={tmp_path / 'f'}"], "frontier.png: exists already"),
    ):
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    (tmp_path / "file").touch()
    assert cli.main(["exact", f"--plot={tmp_path / 'file' / 'new.png'}"]) == 2
    assert "missing or read-only" in capsys.readouterr().err
    monkeypatch.setattr(options.tempfile, "TemporaryFile", lambda dir: open("/"))
    assert cli.main(["exact", f"--plot={tmp_path / 'new.png'}"]) == 2
    assert "missing or read-only" in capsys.readouterr().err
    monkeypatch.setattr(plots, "installed", lambda: False)
    assert cli.main(["exact", f"--plot={tmp_path / 'new.png'}"]) == 2
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert (tmp_path / "mine.png").read_text() == (tmp_path / "f" / "frontier.png").read_text() == "mine"


def test_frontier_without_matplotlib_writes_its_table(quick, tmp_path, capsys, monkeypatch):
    """Where matplotlib is missing, frontier says first that there will be no picture, and writes its points."""
    monkeypatch.setattr(plots, "installed", lambda: False)
    assert cli.main(["frontier", f"--out={tmp_path / 'f'}", "--worlds=1"]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert "frontier.json will be written" in first and "frontier.png will not be written: matplotlib" in second
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["frontier.json"]
