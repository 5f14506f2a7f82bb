"""`tokar`, with things going wrong in a training: FAULTS="nan@11,12 spike@20 hang@4" python faulty.py train tokenizer …

Batches are counted along the data, so that a fault does not come again when a step does. What befalls one rank befalls rank 1.
Each rank writes a hash of what it holds of the weights before every step to `weights-RANK.txt` in the working directory.
"""

import hashlib
import os
import sys
import time

FAULTS = dict(text.split("@") for text in os.environ.get("FAULTS", "").split())
AT = {fault: {int(batch) for batch in batches.split(",")} for fault, batches in FAULTS.items()}


def main() -> int:
    from tokar.cli import main as tokar
    from tokar.train import tokenizer
    from tokar.train.network import Network

    def to_image(pixels, real=tokenizer.to_image):
        return real(pixels) * factor[0]

    def step(self, batch, clock, networks, real=tokenizer.TokenizerStage.step):
        if not isinstance(networks["tokenizer"], Network):  # what a step costs is counted on paper
            return real(self, batch, clock, networks)
        number, rank = clock.samples // clock.batch_size, int(os.environ.get("LOCAL_RANK", 0))
        held = [getattr(master, "_local_tensor", master) for master in networks["tokenizer"].engine.masters]
        weights = b"".join(value.detach().numpy().tobytes() for value in held)
        with open(f"weights-{rank}.txt", "a") as file:
            file.write(f"{clock.step} {hashlib.sha256(weights).hexdigest()}\n")
        factor[0] = float("nan") if rank == 1 and number in AT.get("nan", ()) else 1.0
        factor[0] *= 50.0 if number in AT.get("spike", ()) else 1.0
        while rank == 1 and number in AT.get("hang", ()):
            time.sleep(1)
        return real(self, batch, clock, networks)

    factor = [1.0]
    tokenizer.to_image, tokenizer.TokenizerStage.step = to_image, step
    return tokar()


if __name__ == "__main__":
    sys.exit(main())
