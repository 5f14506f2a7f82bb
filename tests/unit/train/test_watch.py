import os
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from tokar.conf.spine import Strategy
from tokar.train import watch
from tokar.train.processes import Joined
from tokar.train.rendezvous import PARENT, Place
from tokar.train.signals import EXIT_HUNG, EXIT_LOST
from tokar.train.watch import Watch, write_stacks


class EndedError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def ends(monkeypatch):
    """`ends(watch)`: its exit code, once it ends the process; the times that it waits are short."""

    def end(code):
        raise EndedError(code)

    monkeypatch.setattr(watch.os, "_exit", end)
    for name, seconds in (("TICK", 0.02), ("GRACE", 0.1), ("ANSWER", 0.3), ("REPORT", 0.3)):
        monkeypatch.setattr(watch, name, seconds)

    def run(watching):
        with pytest.raises(EndedError) as ended:
            watching._look()
        return ended.value.args[0]

    return run


def fabric(*children, rank=0, world=1):
    strategy = SimpleNamespace(launcher=SimpleNamespace(procs=list(children)), num_processes=len(children) + 1)
    return SimpleNamespace(strategy=strategy, global_rank=rank, local_rank=rank, world_size=world)


def child(command):
    return subprocess.Popen(["sh", "-c", command])


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("kill -9 $$", EXIT_LOST, "tokar: rank 1 was killed by SIGKILL; the run ends with it\n"),
        ("exit 2", 2, "tokar: rank 1 ended with exit code 2; the run ends with it\n"),
    ],
)
def test_a_dead_rank_is_named_and_takes_the_others_along(ends, capfd, command, code, said):
    dead, sleeping = child(command), child("exec sleep 100")
    watching = Watch(fabric(dead, sleeping, world=3))
    assert ends(watching) == code
    assert capfd.readouterr().err == said
    assert sleeping.wait(10) == -9


def test_the_launchers_own_observer_is_left_nobody(ends):
    running = fabric(child("exit 3"), world=2)
    held = running.strategy.launcher.procs
    ends(Watch(running))
    assert held == []


@pytest.mark.parametrize("code", [0, 75, 130])
def test_what_all_ranks_end_with_is_no_death(ends, code):
    ended = child(f"exit {code}")
    ended.wait()
    watching = Watch(fabric(ended, world=2))
    threading.Timer(0.2, watching._ended.set).start()
    watching._look()
    assert list(watching._children) == [1]


def test_a_rank_whose_words_are_under_way_may_end_by_itself(ends, capfd, monkeypatch):
    monkeypatch.setattr(watch, "GRACE", 60.0)
    ended = child("exit 2")
    ended.wait()
    watching = Watch(fabric(ended, world=2))
    threading.Timer(0.1, watching._ended.set).start()
    watching._look()
    assert capfd.readouterr().err == ""


def joined(parent):
    return Joined(Strategy(), torch.device("cpu"), Place(1, 1, 2, "here", 1, parent))


def test_a_rank_ends_when_the_process_that_started_it_is_gone(ends, capfd, monkeypatch):
    watching = Watch(joined(1))  # not this process's parent
    monkeypatch.setattr(watching._thread, "start", lambda: None)
    watching.start()
    assert ends(watching) == EXIT_LOST
    assert capfd.readouterr().err == "tokar: rank 1 ends: the process that started it is gone\n"


@pytest.mark.parametrize("started", [lambda: fabric(world=2), lambda: joined(None)])
def test_who_may_outlive_its_parent_is_that_of_others(started, monkeypatch):
    monkeypatch.setenv(PARENT, "1")
    watching = Watch(started())
    monkeypatch.setattr(watching._thread, "start", lambda: None)
    watching.start()
    assert watching._parent is None
    assert os.environ[PARENT] == str(os.getpid())


def hanging(folder, **kwargs):
    watching = Watch(fabric(**kwargs))
    watching._thread.start = lambda: None
    watching.expect_steps(folder, 0.1)
    return watching


def test_a_hang_is_reported_with_where_each_rank_is(ends, capfd, tmp_path):
    folder = tmp_path / "hang"
    folder.mkdir()
    (folder / "rank-2.txt").write_text("is in an earlier hang\n")
    watching = hanging(tmp_path, world=3)
    write_stacks(folder / "rank-1.txt")
    watching.step(long=False)
    assert ends(watching) == EXIT_HUNG
    said = capfd.readouterr().err.splitlines()
    assert said[0] == f"tokar: no step for 0.1 s; all stacks are in {folder}, guard.hang_after=… allows more"
    assert [line.split(" (")[0] for line in said[1:3]] == [
        "tokar: rank 0 is in write_stacks",
        "tokar: rank 1 is in write_stacks",
    ]
    assert said[3] == "tokar: rank 2 does not answer"
    assert (folder / "report.txt").read_text() == "".join(line.removeprefix("tokar: ") + "\n" for line in said)
    assert "in test_a_hang_is_reported" in (folder / "rank-0.txt").read_text()


def test_another_rank_writes_its_stacks_and_ends_in_silence(ends, capfd, tmp_path):
    watching = hanging(tmp_path, rank=1, world=2)
    watching.step(long=False)
    assert ends(watching) == EXIT_HUNG
    assert (tmp_path / "hang" / "rank-1.txt").read_text().startswith("is in ")
    assert capfd.readouterr().err == ""


def test_a_step_may_be_long_and_none_is_awaited_after_the_end(ends, tmp_path):
    before = time.monotonic()
    watching = hanging(tmp_path)
    assert watching._deadline >= before + 0.1 * watch.LONG  # the first step
    watching.step(long=False)
    assert watching._deadline <= time.monotonic() + 0.1
    with watching:
        pass
    assert watching._deadline is None


def test_an_error_is_held_back_where_another_may_have_caused_it(monkeypatch):
    waits = []
    monkeypatch.setattr(watch.time, "sleep", waits.append)
    for world, kind in ((1, RuntimeError), (2, ValueError), (2, RuntimeError)):
        assert waits == []
        with pytest.raises(kind), Watch(fabric(world=world)):
            raise kind
    assert waits == [watch.GRACE + 2 * watch.TICK]
