"""Ranks in processes of their own, forked from one that has imported everything once."""

import os
import sys
import time


def rank(variables, words, log, folder):
    """Target of a process: one rank of `tokar.slurm.rank`, with its output in a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ.update(variables)
    from tokar.slurm.rank import main

    code = main(words)
    sys.stdout.flush()
    os._exit(code)


def run_ranks(server, world, port, words, folder):
    """Run all ranks of one node, as torchrun would start them, to their end."""
    common = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
              "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"}  # fmt: skip
    log = folder / "ranks.log"
    ranks = [
        server.Process(target=rank, args=({**common, "RANK": str(i), "LOCAL_RANK": str(i)}, list(words), str(log), str(folder)))
        for i in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(600)
    assert [process.exitcode for process in ranks] == [0] * world, log.read_text()


def storm(words):
    """One rank that srun started: it runs a stage again and again, each time in a fork, as often as it is stopped."""
    import signal

    import tokar.train.run  # noqa: F401 - once for all forks
    import torch._dynamo  # noqa: F401 - which every optimizer imports

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    port = int(os.environ["MASTER_PORT"])
    for start in range(1000):
        place = f"{os.environ['TOKAR_ENDED']}-{start}"
        child = os.fork()
        if child == 0:
            os.environ |= {"MASTER_PORT": str(port + start), "TOKAR_ENDED": place}
            from tokar.slurm.rank import main

            code = main(words)
            sys.stdout.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.01)
        with open(place) as file:
            if code or file.read() != "75\n":
                sys.exit(f"start {start} ended with {code}")


if __name__ == "__main__":
    storm(sys.argv[1:])
