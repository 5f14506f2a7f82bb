import contextlib
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tokar.conf.spine import Guard as GuardConfig
from tokar.conf.spine import Loop as LoopConfig
from tokar.train.checkpoint import Checkpoints
from tokar.train.clock import Clock
from tokar.train.guard import Diverged, Guard
from tokar.train.logging import Meters
from tokar.train.loop import Fit
from tokar.train.network import Update


def loop(said, step=140, reach=1.0):
    return SimpleNamespace(
        meters=SimpleNamespace(reach={"train/codes/usage": reach}),
        clock=Clock(step, 320, 200, 8, 100),
        folder="runs/x",
        told=set(),
        progress=SimpleNamespace(say=said.append),
    )


def test_a_collapsed_codebook_is_told_once():
    said = []
    fit = loop(said)
    for _ in range(3):
        Fit._warn_of_collapse(fit, {"train/loss": 1.0, "train/codes/usage": 0.004, "train/codes/perplexity": 1.0})
    assert len(said) == 1
    assert "train/codes/usage is 0.0040 at step 140: the codebook has collapsed" in said[0]


def test_a_codebook_in_use_is_not_told():
    said = []
    Fit._warn_of_collapse(loop(said), {"train/loss": 1.0, "train/codes/usage": 0.5})
    assert said == []


def test_a_scale_of_few_tokens_is_measured_by_what_it_could_use():
    said = []
    Fit._warn_of_collapse(loop(said, reach=0.1), {"train/loss": 1.0, "train/codes/usage": 0.004})
    assert said == []
    Fit._warn_of_collapse(loop(said, reach=0.1), {"train/loss": 1.0, "train/codes/usage": 0.001})
    assert len(said) == 1


def test_a_codebook_may_settle_first():
    said = []
    Fit._warn_of_collapse(loop(said, step=40), {"train/loss": 1.0, "train/codes/usage": 0.004})
    assert said == []


@pytest.fixture
def guarded(make_network, workers, tmp_path):
    """`guarded(steps, bad)`: a run whose batches of these numbers have no finite loss, saved at every other step."""

    def make(steps, bad):
        networks = {"net": make_network()}
        guard = Guard(GuardConfig(patience=2, rollbacks=1), networks, workers)
        clock, records, said = Clock(0, 0, steps, 8, 100), [], []
        fit = SimpleNamespace(
            guard=guard, workers=workers, networks=networks, clock=clock, folder=tmp_path, unsaved=False, meters=Meters(),
            loop=LoopConfig(duration=clock.total, batch_size=8, log_every=1000, save_every=2),
            records=records, said=said, saved=[], checkpoints=Checkpoints(tmp_path / "checkpoints", workers),
            metrics=SimpleNamespace(write=lambda clock, values: records.append((clock.step, values)), sync=lambda: None),
            telemetry=SimpleNamespace(outside=contextlib.nullcontext),
            progress=SimpleNamespace(say=said.append, update=lambda clock, note: None),
        )  # fmt: skip
        fit._log = fit._evaluate = fit._draw = lambda: ""
        fit._tell, fit._go_back = partial(Fit._tell, fit), partial(Fit._go_back, fit)

        def save():
            fit.saved.append(fit.clock.step)
            fit.unsaved = False
            state = {"step": fit.clock.step, "samples": fit.clock.samples, "world": 1, "guard": guard.facts()}
            fit.checkpoints.save(networks, {}, state)

        fit._save = save
        while not fit.clock.finished:
            loss = torch.tensor(float("nan") if fit.clock.samples // 8 in bad else 1.0)
            guard.begin()
            veto = guard.judge(loss, stop=False)
            guard.conclude(fit.clock.advanced(), {"net": Update(loss, veto)})
            fit.clock = fit.clock.advanced()
            Fit._boundary(fit)
        return fit

    return make


def test_a_checkpoint_waits_for_the_end_of_a_row_of_bad_steps(guarded):
    assert guarded(7, bad={3}).saved == [2, 5, 6, 7]


def test_a_row_of_bad_steps_goes_back_and_on_with_the_data_behind_it(guarded):
    fit = guarded(8, bad={3, 4})
    assert (fit.clock.step, fit.clock.samples) == (8, 11 * 8)
    assert [(step, values["event"]) for step, values in fit.records] == [(4, "skip"), (5, "skip"), (5, "rollback")]
    assert fit.records[-1][1]["to"] == 2
    assert fit.said[-1].endswith("step 5: 2 steps in a row went wrong; back to step 2, with the data that follow")
    assert fit.guard.rollbacks == 0  # the place is behind it


def test_a_run_that_cannot_go_back_ends_in_one_line(guarded, tmp_path):
    said = "2 steps in a row went wrong up to step 2 (the loss is nan), and there is no checkpoint from before them; lower"
    with pytest.raises(Diverged, match=re.escape(f"{tmp_path}: {said}")):
        guarded(8, bad=range(20))


def test_a_run_that_went_back_for_nothing_ends_in_one_line(guarded):
    with pytest.raises(Diverged, match=r"up to step 5 \(the loss is nan\), and going back to step 2 was in vain; lower"):
        guarded(8, bad={3, 4, 6, 7})
