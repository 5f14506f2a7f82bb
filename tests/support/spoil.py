"""Ways to break what is there, in the working directory: each returns a function that does it."""

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import os
import resource
import shlex
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

TINY = "loop.duration=4 loop.batch_size=8 loop.save_every=2 loop.eval_samples=16"
Spoiler = Callable[[], object]


def words(command: str) -> list[str]:
    """Arguments of `tokar` in a command of the table."""
    return shlex.split(command.replace("$TINY", TINY))[1:]


def put(path: str, content: bytes) -> None:
    """Write a file anew: the old one may be linked to from elsewhere."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def write(path: str, content: bytes | str = "") -> Spoiler:
    return lambda: put(path, content.encode() if isinstance(content, str) else content)


def append(path: str, text: str) -> Spoiler:
    return lambda: put(path, Path(path).read_bytes() + text.encode())


def cut(path: str, share: float = 0.5) -> Spoiler:
    """Keep the beginning of a file, as a full disk or a broken copy does."""

    def spoil() -> None:
        content = Path(path).read_bytes()
        put(path, content[: int(len(content) * share)])

    return spoil


def flip_bytes(path: str, at: float, count: int = 400) -> Spoiler:
    """Change bytes somewhere, as a bad disk does; size and time stay."""

    def spoil() -> None:
        content, times = bytearray(Path(path).read_bytes()), os.stat(path)
        start = int(len(content) * at)
        content[start : start + count] = bytes(255 - byte for byte in content[start : start + count])
        put(path, bytes(content))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    return spoil


def edit(path: str, **values: object) -> Spoiler:
    """Change keys of a JSON file."""
    return lambda: put(path, json.dumps({**json.loads(Path(path).read_text()), **values}).encode())


def remove(path: str) -> Spoiler:
    return lambda: shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def move(path: str, to: str) -> Spoiler:
    return lambda: Path(path).rename(to)


def folder(path: str) -> Spoiler:
    return lambda: Path(path).mkdir(parents=True)


def both(*spoilers: Spoiler) -> Spoiler:
    return lambda: [spoil() for spoil in spoilers]


def run(*commands: str) -> Spoiler:
    """Other commands that ended before."""

    def spoil() -> None:
        from tokar.cli import main

        for command in commands:
            main(words(command))

    return spoil


def lock(path: str) -> Spoiler:
    """What a process that trains there holds."""

    def spoil() -> object:
        file = open(path, "a")  # noqa: SIM115  (closed when the command has ended)
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    return spoil


def no_room(largest: int) -> Spoiler:
    """Files beyond a size cannot be written, as on a full disk."""

    def spoil() -> object:
        before, stack = resource.getrlimit(resource.RLIMIT_FSIZE), contextlib.ExitStack()
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
        stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, before)
        return stack

    return spoil


def later_format(checkpoint: str) -> Spoiler:
    """A checkpoint as a later version may write it."""

    def spoil() -> None:
        edit(f"{checkpoint}/state.json", format=99)()
        state = Path(checkpoint, "state.json").read_bytes()
        facts = {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}
        edit(f"{checkpoint}/COMPLETE", **{"state.json": facts})()

    return spoil


def replace_result(run_folder: str, change: Callable[[str], Spoiler]) -> Spoiler:
    """Spoil the evaluation of a run."""
    return lambda: change(str(next(Path(run_folder, "evaluation").glob("*.json"))))()


def tensors(path: str, **shapes: tuple[int, ...]) -> Spoiler:
    """A safetensors file of zeros; `__` in a name is a dot."""

    def spoil() -> None:
        import torch
        from safetensors.torch import save_file

        save_file({name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}, path)

    return spoil


def add_key(path: str, name: str) -> Spoiler:
    """One more tensor in a safetensors file."""

    def spoil() -> None:
        import torch
        from safetensors.torch import load_file, save_file

        save_file({**load_file(path), name: torch.zeros(2, 2)}, path)

    return spoil


def not_a_number(path: str) -> Spoiler:
    """Weights as a diverged training leaves them."""

    def spoil() -> None:
        import torch
        from safetensors.torch import load_file, save_file

        save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(path).items()}, path)

    return spoil


def pickled(path: str) -> Spoiler:
    """A torch file with more than tensors in it."""

    def spoil() -> None:
        import torch

        torch.save({"model": argparse.ArgumentParser}, path)

    return spoil


def picture(path: str, size: int = 32) -> Spoiler:
    return lambda: put(path, png(size))


def png(size: int = 32) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (size, size), (10, 200, 90)).save(content, "PNG")
    return content.getvalue()


def images(path: str, dtype: str = "uint8", size: int = 32) -> Spoiler:
    """Eight images as an npz."""

    def spoil() -> None:
        import numpy as np

        np.savez(path, np.zeros((8, size, size, 3), dtype))

    return spoil


def statistics(path: str, width: int) -> Spoiler:
    """Mean and covariance of features, in the usual evaluator's layout."""

    def spoil() -> None:
        import numpy as np

        np.savez(path, mu=np.zeros(width), sigma=np.eye(width))

    return spoil


def tar(path: str, **members: str) -> Spoiler:
    """A WebDataset tar of small images, with the given text as `.cls`; an empty one leaves it out."""

    def spoil() -> None:
        import webdataset

        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with webdataset.TarWriter(path) as writer:
            for key, label in members.items():
                writer.write({"__key__": key, "png": png(), **({"cls": label} if label else {})})

    return spoil


def archive(path: str, **members: bytes) -> Spoiler:
    """A zip."""

    def spoil() -> None:
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)

    return spoil
