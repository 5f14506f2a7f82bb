import errno
import json
import os
import subprocess
import sys

import pytest
from tokar import cli
from tokar.cli import find_command, main, parse
from tokar.commands import COMMANDS
from tokar.commands.command import table
from tokar.errors import UserError

RECIPE = "experiment=digits_classifier"


def call(capsys, *words):
    code = main(words)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def python(code, **more):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **more)


QUICK = [
    ["--help"], ["train", "--help"], ["train", "tokenizer", "--help"], ["--version"], ["trian"],
    ["config", "check", "tokenizer", "optim.lrr=1", "foo"], ["config", "check", "classifier", RECIPE],
    ["sweep", "classifier", RECIPE, "optim.lr=-1,-2"], ["sweep", "status", "nowhere"],
    ["train", "tokenizer", "optim.lrr=1"], ["train", "tokenizer", "-m", "optim.lr=-1,-2"], ["sample", "nowhere", "sed=1"],
    ["evaluate", "nowhere", "sed=1"], ["data", "prepare", "sed=1"], ["encode"],
    ["config", "show", "generator", "--explain"], ["__complete", "tokar train tokenizer optim."],
]  # fmt: skip
FORKED = f"""
import os, sys
import tokar.conf.compose  # once for all
from tokar.cli import main
for words in {QUICK}:
    sys.stdout.flush()
    if os.fork():
        os.wait()
        continue
    out, sys.stdout, sys.stderr = sys.stdout, open(os.devnull, "w"), open(os.devnull, "w")
    try:
        main(words)
    except SystemExit:
        pass
    finally:
        print(*words, ":", *sys.modules, file=out, flush=True)
        os._exit(0)
"""


@pytest.fixture(scope="module")
def loaded():
    """The modules that each command of `QUICK` has loaded when it ends, in a process of its own that has the config's."""
    lines = (line.partition(" : ") for line in python(FORKED, check=True).stdout.splitlines())
    return {words: set(modules.split()) for words, _, modules in lines}


@pytest.mark.parametrize("words", QUICK)
def test_help_and_config_errors_do_without_the_slow_imports(loaded, words):
    assert "tokar.cli" in loaded[" ".join(words)]
    assert {"torch", "lightning", "numpy", "matplotlib", "sklearn", "webdataset"} & loaded[" ".join(words)] == set()


def test_overview_names_every_command(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert all(f"  {command.name} " in out and command.about in out for command in COMMANDS)
    assert call(capsys)[1] == out


def test_help_on_a_group_shows_its_commands_alone(capsys):
    _, out, _ = call(capsys, "data", "--help")
    assert "data verify" in out
    assert "train tokenizer" not in out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_each_commands_help_and_example(capsys, command):
    with pytest.raises(SystemExit) as left:
        main([*command.name.split(), "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert command.example in out
    if command.example.startswith("tokar "):
        found, rest = find_command(command.example.split()[1:])
        assert found is command
        parse(found, rest)


def test_version(capsys):
    assert call(capsys, "--version") == (0, "tokar 0.1.0\n", "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "tokar: no command 'trian'; did you mean 'train'?\n"),
        (["train", "tokeniser"], "tokar: no command train 'tokeniser'; did you mean 'tokenizer'?\n"),
        (["train", "tokenizer", "--multrun"],
         "tokar: tokar train tokenizer: no option '--multrun'; did you mean '--multirun'?\n"),
        (["sample"], "tokar: tokar sample: the following arguments are required: RUN; see `tokar sample --help`\n"),
        (["config", "check", "tokeniser"], "tokar: tokeniser: no such stage; did you mean 'tokenizer'?\n"),
        (["completion", "tcsh"], "tokar: tokar completion: argument shell: invalid choice: 'tcsh'"),
        (["export", "nowhere", "."], "tokar: .: is not empty; give a new folder\n"),
        (["convert", "nowhere.pt"], "tokar: nowhere.pt: no such file; give the path of a checkpoint file\n"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(capsys, words, line):
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_all_problems_of_a_config_are_told_at_once(capsys):
    code, _, err = call(capsys, "config", "check", "classifier", RECIPE, "sed=1", "+optim.lrr=1")
    assert code == 2
    assert sorted(err.splitlines()) == [
        "tokar: optim.lrr: no such key; did you mean 'lr'?",
        "tokar: sed: no such key; did you mean 'seed'?",
    ]


def test_config_check_says_ok_and_where_it_would_run(capsys):
    code, out, _ = call(capsys, "config", "check", "classifier", RECIPE, "optim.lr=1e-3")
    assert code == 0
    assert out.startswith("ok: runs/digits_classifier-optim.lr=0.001 ·")


def test_config_show_is_yaml_without_colours_when_piped(capsys):
    import yaml

    code, out, _ = call(capsys, "config", "show", "classifier", RECIPE, "seed=7")
    assert code == 0
    assert yaml.safe_load(out)["seed"] == 7


def test_options_may_stand_between_overrides():
    found, rest = find_command(["train", "tokenizer", "a=1", "-m", "b=2", "--objective", "val/psnr", "c=-3", "~d"])
    arguments = parse(found, rest)
    assert (arguments.overrides, arguments.multirun) == (["a=1", "b=2", "c=-3", "~d"], True)
    assert (arguments.stage, arguments.objective) == ("tokenizer", "val/psnr")
    found, rest = find_command(["config", "show", "--explain", "sample", "x=1"])
    assert (parse(found, rest).stage, parse(found, rest).overrides) == ("sample", ["x=1"])


@pytest.mark.parametrize("path", ["runs/a-optim.lr=1e-3", "it's (here), [now]", "back\\slash", "a b", "it\\'s\\"])
def test_positions_become_overrides_whatever_the_path(path):
    from tokar.conf.compose import compose
    from tokar.conf.overrides import quoted

    assert compose("sample", [quoted("model", path)]).typed.model == path


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("TOKAR_DEBUG", "1")
    with pytest.raises(UserError):
        main(["trian"])


def raising(monkeypatch, error):
    def dispatch(words):
        raise error

    monkeypatch.setattr(cli, "_dispatch", dispatch)


def test_faults_of_the_machine_are_one_line(monkeypatch, capsys):
    raising(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "/data/x"))
    assert call(capsys)[0::2] == (
        2, "tokar: /data/x: the disk is full; free space and run again; what is finished is kept\n"
    )  # fmt: skip


def test_a_file_where_a_folder_is_needed_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "notes").touch()
    raising(monkeypatch, NotADirectoryError(errno.ENOTDIR, "Not a directory", str(tmp_path / "notes" / "runs" / "x")))
    _, _, err = call(capsys)
    assert err == f"tokar: {tmp_path / 'notes'}: is a file, a folder is needed here; choose a path that can be used\n"


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "gone", "x"), ValueError("a bug")])
def test_faults_of_the_code_keep_their_traceback(monkeypatch, error):
    raising(monkeypatch, error)
    with pytest.raises(type(error)):
        main([])


def test_ctrl_c(monkeypatch, capsys):
    raising(monkeypatch, KeyboardInterrupt())
    assert call(capsys) == (130, "", "")


def test_a_closed_pipe_is_no_error():
    code = "import sys; from tokar.cli import main; sys.exit(main(['config', 'show', 'tokenizer', '--explain']))"
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_prepare_inspect_verify(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "data", "prepare", "workers=1", "shard_size=1000")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["split", "train", "val"]
    code, out, _ = call(capsys, "data", "inspect", "datasets/digits", "--picture", "digits.png")
    assert (code, json.loads(out)["train"]["classes"]) == (0, 10)
    assert (tmp_path / "digits.png").stat().st_size > 1000
    assert call(capsys, "data", "verify", "datasets/digits") == (0, "datasets/digits: ok\n", "")
    (tmp_path / "datasets/digits/val/manifest.json").unlink()
    assert call(capsys, "data", "verify", "datasets/digits")[0] == 1


def test_export_and_parity(tmp_path, capsys, shared_parity):
    file = shared_parity / "llamagen_vq.safetensors"
    code, out, _ = call(capsys, "parity", str(file))
    assert code == 0
    assert out.splitlines()[0].split() == ["file", "family", "output", "largest", "difference"]
    assert all(line.endswith(" ok") for line in out.splitlines()[1:])


def test_export_takes_the_average_unless_raw(tmp_path, capsys):
    import torch
    from safetensors.torch import load_file, save_file
    from tokar.models.build import save_model
    from tokar.models.classifier import Classifier

    node = {"_target_": "tokar.models.classifier.Classifier", "image_size": 16, "num_classes": 4, "width": 8}
    trained = Classifier(16, 4, width=8).state_dict()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    save_model(checkpoint / "classifier", node, trained, {"classes": ["a", "b", "c", "d"]})
    save_file({name: torch.zeros_like(value) for name, value in trained.items()}, checkpoint / "classifier" / "ema.safetensors")
    (checkpoint / "state.json").write_text('{"main": "classifier"}')
    (checkpoint / "COMPLETE").write_text("{}")
    for options, total in ((["--raw"], sum(value.double().abs().sum() for value in trained.values())), ([], 0)):
        out = tmp_path / f"model{len(options)}"
        assert call(capsys, "export", str(tmp_path / "run"), str(out), *options)[0] == 0
        written = load_file(out / "model.safetensors")
        assert sum(value.double().abs().sum() for value in written.values()) == pytest.approx(float(total))
        assert json.loads((out / "config.json").read_text())["classes"] == ["a", "b", "c", "d"]
    assert call(capsys, "export", str(tmp_path / "run"), str(tmp_path / "model0"))[0] == 2


def test_bench_parts_what_from_overrides(monkeypatch):
    import types

    seen = []
    monkeypatch.setitem(sys.modules, "tokar.train.bench", types.SimpleNamespace(bench=lambda *given: seen.append(given) or 0))
    assert main(["bench", "loader", "batch_size=4", "sampler", "~x"]) == 0
    assert seen == [(["loader", "sampler"], ["batch_size=4", "~x"])]


def test_table_is_aligned(capsys):
    assert table([("a", "bb"), ("ccc", 1)]) == 0
    assert capsys.readouterr().out == "a    bb\nccc  1\n"
