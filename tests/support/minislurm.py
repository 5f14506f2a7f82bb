"""A real Slurm on this machine, for tests: several virtual nodes, no root, no munge, no systemd.

Debian's packages are downloaded and unpacked into a folder of the test; nothing is installed. Node names are loopback
addresses, so nothing needs to resolve. Times are tuned: a job starts within a second, a requeued one waits six.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "libmunge2", "libhwloc15", "liblua5.1-0")
ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"})
CONFIG = """\
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
PluginDir={plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=2
MinJobAge=86400
JobSubmitPlugins=lua
StateSaveLocation={state}/ctld
SlurmdSpoolDir={state}/spool/%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd.%n.pid
SlurmctldLogFile={state}/log/slurmctld.log
SlurmdLogFile={state}/log/slurmd.%n.log
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} CPUs=4 RealMemory=1000000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=10 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=paid Nodes=ALL State=UP
"""
PAID = """\
function slurm_job_submit(job, partitions, user)
    if job.partition == "paid" and job.account == nil then
        slurm.log_user("the partition paid needs an account")
        return slurm.ESLURM_INVALID_ACCOUNT
    end
    return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, user) return slurm.SUCCESS end
return slurm.SUCCESS
"""
"""What sites with accounts do: jobs without one are refused in one partition."""


class Unavailable(Exception):
    """Slurm cannot be had on this machine; the text says why."""


class Cluster:
    """A running Slurm: `main` (jobs there are preempted), `high` (preempts them) and `paid` (wants an account).

    Args:
        folder: an empty one for packages and state.
        count: nodes, each with 4 CPUs and 2 GPUs that are none.
    """

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.folder, self.state = folder, folder / "state"
        self.nodes = [f"127.0.0.1{number}" for number in range(1, count + 1)]
        self.prefix = folder / "root"
        libraries = next(iter(self.prefix.glob("usr/lib/*-linux-gnu")), self.prefix / "usr/lib")
        self._libraries = libraries
        self.environment = os.environ | {
            "SLURM_CONF": str(self.state / "slurm.conf"),
            "PATH": f"{self.prefix}/usr/bin:{self.prefix}/usr/sbin:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": f"{libraries}/slurm-wlm:{libraries}",
        }

    def start(self) -> None:
        """Write the configuration and start the daemons."""
        for name in ("ctld", "log", *(f"spool/{node}" for node in self.nodes)):
            (self.state / name).mkdir(parents=True)
        port, *ports = free_ports(1 + len(self.nodes))
        host, user = socket.gethostname().partition(".")[0], subprocess.check_output(["id", "-un"], text=True).strip()
        config = CONFIG.format(
            host=host, user=user, plugins=self._libraries / "slurm-wlm", state=self.state, port=port,
            nodes=",".join(self.nodes), ports=",".join(map(str, ports)),
        )  # fmt: skip
        (self.state / "slurm.conf").write_text(config)
        (self.state / "gres.conf").write_text(f"NodeName={','.join(self.nodes)} Name=gpu File=/dev/tty[0-1]\n")
        (self.state / "job_submit.lua").write_text(PAID)
        self.run("slurmctld", "-c")
        for node in self.nodes:
            self.start_node(node)
        self.until(lambda: self._idle() == len(self.nodes), 30, "nodes to be idle")

    def _idle(self) -> int:
        return len(self.run("sinfo", "-hN", "-p", "main", "-t", "idle", "-o", "%N", check=False).split())

    def start_node(self, node: str) -> None:
        """Start the daemon of one node."""
        self.run("slurmd", "-N", node, "-d", str(self.prefix / "usr/sbin/slurmstepd"))

    def resume(self, node: str) -> None:
        """Take a node back into service, if it has not come back by itself as soon as its daemon registered."""
        self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)

    def stop(self) -> None:
        """End every process of this cluster: daemons, jobs, and whatever they started."""
        for _ in range(3):
            for process in self._processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)

    def _processes(self) -> Iterator[int]:
        """Processes that were told of this cluster's configuration when they started."""
        mark = f"SLURM_CONF={self.state / 'slurm.conf'}".encode()
        for place in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in place.read_bytes().split(b"\0") and int(place.parts[2]) != os.getpid():
                    yield int(place.parts[2])

    def _running(self) -> Iterator[str]:
        """A line for each process of this cluster: what it is, its state, and where in the kernel it waits."""
        for number in self._processes():
            place = Path("/proc", str(number))
            with contextlib.suppress(OSError):
                state = (place / "stat").read_text().rpartition(") ")[2][0]
                words = (place / "cmdline").read_text().replace("\0", " ")[:300]
                yield f"{number} {state} {(place / 'wchan').read_text()}: {words}"

    def run(self, *command: str, check: bool = True, folder: Path | None = None) -> str:
        """Standard output of a command that knows this cluster."""
        done = subprocess.run(
            command, env=self.environment, cwd=folder, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: int | str) -> dict[str, str]:
        """What `scontrol show job` says of a job, e.g. `JobState`, `Restarts`, `ExitCode`, `Reason`."""
        said = self.run("scontrol", "-o", "show", "job", str(number))
        return dict(re.findall(r"(\S+?)=(.*?)(?= \S+?=|\n|$)", said.splitlines()[0]))

    def wait(self, number: int | str, *states: str, timeout: float = 120) -> dict[str, str]:
        """Wait until a job has one of `states` (default: it has ended); returns what is known of it."""
        wanted = states or ENDED
        self.until(lambda: self.job(number)["JobState"] in wanted, timeout, f"job {number} to be {' or '.join(wanted)}")
        return self.job(number)

    def until(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        """Wait for a condition; fails with the queue, the controller's last words and what runs when it takes too long."""
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                log = (self.state / "log/slurmctld.log").read_text().splitlines()[-15:]
                queue = self.run("squeue", "-t", "all", check=False)
                raise AssertionError("\n".join([f"waited {timeout} s for {what}", queue, *log, *self._running()]))
            time.sleep(0.05)


def fetch(folder: Path) -> None:
    """Download the packages with apt and unpack them below `folder`; no root is needed.

    Raises:
        Unavailable: there is no apt, or it cannot get them.
    """
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise Unavailable("no apt-get and dpkg here to fetch Slurm's packages with")
    debs, prefix = folder / "debs", folder / "root"
    debs.mkdir(parents=True)
    own = [f"-oDir::{key}={debs}/{name}" for key, name in (("State::lists", "lists"), ("Cache", "cache"))]
    for options in ([], own):  # the machine's package lists; where they are missing or too old, lists of our own
        if options:
            _apt(debs, *options, "-qq", "update")
        done = _apt(debs, *options, "-q", "download", *PACKAGES)
        if done.returncode == 0:
            break
    else:
        raise Unavailable(f"Slurm's packages cannot be had: {' '.join(done.stderr.split()) or 'apt-get download failed'}")
    for file in debs.glob("*.deb"):
        subprocess.run(["dpkg", "-x", file, prefix], check=True)
    for name in ("slurmctld", "slurmd", "slurmstepd"):  # under their -wlm names they find neither GPUs nor their own kin
        (prefix / "usr/sbin" / name).symlink_to(f"{name}-wlm")


def _apt(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    try:
        return subprocess.run(["apt-get", *arguments], cwd=folder, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(arguments, 1, "", "no answer from the package archive within 120 s")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
