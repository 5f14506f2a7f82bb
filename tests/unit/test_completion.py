import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokar.commands import COMMANDS
from tokar.completion import SCRIPTS, propose


def complete(line):
    return propose(line, COMMANDS)


@pytest.mark.parametrize(
    ("line", "proposed"),
    [
        ("tokar tr", ["train"]),
        ("tokar train ", ["classifier", "dd2", "diffusion", "distill", "generator", "tokenizer"]),
        ("tokar --v", ["--version"]),
        ("tokar train tokenizer --m", ["--multirun"]),
        ("tokar train tokenizer exp", ["experiment="]),
        ("tokar train classifier experiment=", ["experiment=cifar10_classifier", "experiment=digits_classifier"]),
        ("tokar train classifier optim.l", ["optim.lr="]),
        ("tokar train classifier +optim.l", ["+optim.lr="]),
        ("tokar train classifier op", ["optim.", "optim="]),
        ("tokar train classifier -m optim=", ["optim=adam", "optim=adamw"]),
        ("tokar train classifier schedule.kind=c", ["schedule.kind=constant", "schedule.kind=cosine"]),
        ("tokar train classifier ema.warmup=", ["ema.warmup=false", "ema.warmup=true"]),
        ("tokar train tokenizer tokenizer/q", ["tokenizer/quantizer="]),
        ("tokar train tokenizer tokenizer.quantizer.cod", ["tokenizer.quantizer.codebook_size="]),
        ("tokar train tokenizer foo=1 optim.l", ["optim.lr="]),
        ("tokar config show tok", ["tokenizer"]),
        ("tokar config check tokenizer discriminator_opt", ["discriminator_optim."]),
        (
            "tokar sweep ",
            ["best", "classifier", "dd2", "diffusion", "distill", "generator", "report", "status", "tokenizer", "work"],
        ),
        ("tokar sweep st", ["status"]),
        ("tokar sweep classifier sweep.cou", ["sweep.count="]),
        ("tokar sweep classifier sweep=", ["sweep=grid", "sweep=random", "sweep=tpe"]),
        ("tokar sweep classifier sweep=tpe optim.l", ["optim.lr="]),
        ("tokar completion ", ["bash", "fish", "zsh"]),
        ("tokar sample some/run temp", []),
        ("tokar sample some/run sampling.temp", ["sampling.temperature="]),
        ("tokar nonsense ", []),
        ("tokar train classifier 'optim.l", ["optim.lr="]),
    ],
)
def test_proposals(line, proposed):
    assert complete(line) == proposed


def test_run_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits_vqgan", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    assert complete("tokar sample ") == ["runs/digits_vqgan", "runs/other"]
    assert complete("tokar report runs/other runs/d") == ["runs/digits_vqgan"]
    assert complete("tokar train generator codes.tokenizer=runs/d") == ["codes.tokenizer=runs/digits_vqgan"]
    assert complete("tokar train tokenizer init_from=") == ["init_from=runs/digits_vqgan", "init_from=runs/other"]


def in_bash(line):
    """What a real bash would offer for a line, as the script's function leaves it."""
    words = line.replace("=", " = ").split() + ([""] if line[-1] in " =" else [])
    script = f"""{SCRIPTS["bash"]}
COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=({" ".join(repr(word) for word in words)})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _tokar; printf '%s\\n' "${{COMPREPLY[@]}}"; complete -p tokar >/dev/null"""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    ended = subprocess.run(["bash", "--norc", "-c", script], env={"PATH": path}, capture_output=True, text=True, check=True)
    return ended.stdout.splitlines()


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_a_real_bash_gets_what_follows_its_word_breaks():
    assert in_bash("tokar tr") == ["train"]
    assert in_bash("tokar train classifier optim=") == ["adam", "adamw"]
    assert in_bash("tokar train classifier optim.l") == ["optim.lr="]
    assert in_bash("tokar train classifier seed=3 experiment=digits_c") == ["digits_classifier"]


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_scripts_are_printed_and_the_shell_can_read_them(shell, capsys):
    from tokar.cli import main

    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "tokar __complete" in script
    if shutil.which(shell):
        check = ["-n", "-c", script] if shell != "fish" else ["--no-execute", "-c", script]
        subprocess.run([shell, *check], check=True)
