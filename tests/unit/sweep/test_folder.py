import os
import signal
import subprocess
import sys
import time

import pytest
from tokar.errors import UserError
from tokar.sweep.folder import FAILED, FINISHED, INTERRUPTED, PRUNED, RUNNING, WAITING, SweepFolder, counts


def test_what_was_asked_for_is_read_again(make):
    sweep = make(2, retries=3, name="x")
    assert SweepFolder(sweep.path).plan == sweep.plan


def test_a_folder_that_is_no_sweep_or_is_damaged_is_one_line(make, tmp_path):
    with pytest.raises(UserError, match="no sweep here"):
        SweepFolder(tmp_path / "nowhere")
    sweep = make()
    (sweep.path / "points/0001.json").write_text('{"number": 1}')
    with pytest.raises(UserError, match=r"0001\.json: damaged; restore it"):
        sweep.points()
    (sweep.path / "sweep.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99, not 1"):
        SweepFolder(sweep.path)


def test_a_point_is_claimed_once(make):
    sweep, other = make(), SweepFolder(make().path)
    claim = sweep.claim(0)
    assert claim is not None
    assert other.claim(0) is None
    assert other.claim(1) is not None
    claim.release()
    assert other.claim(0) is not None


@pytest.mark.parametrize(
    ("changes", "may"),
    [
        ({"state": WAITING}, True),
        ({"state": INTERRUPTED}, True),
        ({"state": RUNNING}, True),  # nobody holds it
        ({"state": FINISHED}, False),
        ({"state": PRUNED}, False),
        ({"state": FAILED, "tries": 1}, True),
        ({"state": FAILED, "tries": 2}, False),
    ],
)
def test_which_points_may_be_taken(make, changes, may):
    sweep = make(retries=1)
    sweep.write(sweep.point(0), **changes)
    assert (sweep.claim(0) is not None) == may


def test_running_without_a_holder_is_interrupted(make):
    sweep = make()
    claim = sweep.claim(1)
    claim.point = sweep.write(claim.point, state=RUNNING)
    sweep.write(sweep.point(2), state=RUNNING)
    assert [point.state for point in sweep.points()] == [WAITING, RUNNING, INTERRUPTED]
    assert counts(sweep.points()) == "1 running, 1 interrupted, 1 waiting"
    claim.release()
    assert [point.state for point in sweep.points()] == [WAITING, INTERRUPTED, INTERRUPTED]


def test_a_lock_dies_with_the_last_process_that_has_it(make):
    sweep = make()
    claim = sweep.claim(0)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[claim.lock.fileno()])
    claim.release()
    assert sweep.claim(0) is None  # the child that runs the point outlives who started it
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert sweep.claim(0) is not None


def test_whoever_looks_at_the_state_does_not_keep_others_from_claiming(make):
    sweep = make(1)
    sweep.write(sweep.point(0), state=RUNNING)
    looker = subprocess.Popen([
        sys.executable, "-c",
        f"from pathlib import Path; from tokar.sweep.folder import SweepFolder; s = SweepFolder(Path({str(sweep.path)!r}))\n"
        "print('ready', flush=True)\nwhile True: s.points()",
    ], stdout=subprocess.PIPE)  # fmt: skip
    looker.stdout.readline()
    end, claims = time.monotonic() + 1, 0
    while time.monotonic() < end:
        claim = sweep.claim(0)
        assert claim is not None
        claim.release()
        claims += 1
    looker.kill()
    looker.wait()
    assert claims > 10
