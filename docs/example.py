"""A trained generator in Python, cell by cell (an editor that knows `# %%` runs them one by one).

bash scripts/demo.sh                                   # or any generator of yours
TOKAR_RUN=runs/digits_llamagen python docs/example.py  # writes example.png
"""

# %% Load a run, a checkpoint, an exported model or a published file
import os

import numpy as np
import tokar
from PIL import Image
from tokar.loaded import LoadedGenerator

model = tokar.load(os.environ.get("TOKAR_RUN", "runs/digits_llamagen"))  # device="cuda" on a GPU
assert isinstance(model, LoadedGenerator)
layout = model.layout
print(f"{model.generator.num_classes} classes, {layout.total_tokens} {layout.kind} tokens of {layout.vocab_size} codes")

# %% Sample: image i depends on (seed, i) and its class alone, whatever is drawn beside it
classes = np.arange(8) % model.generator.num_classes
images = model.sample(classes, seed=0, guidance=2.0)  # uint8 [8, H, W, 3]
assert (model.sample(classes[:3], seed=0, guidance=2.0) == images[:3]).all()

# %% Images to codes and back; pictures of PIL and torch tensors do too
codes = model.encode(images)  # int64 [8, N]
again = model.decode(codes)  # uint8 [8, H, W, 3]
assert (model.encode([Image.fromarray(image) for image in images]) == codes).all()

# %% Edit tokens: the first half of each image's tokens comes from its neighbour
half = layout.total_tokens // 2
edited = codes.copy()
edited[:, :half] = np.roll(codes, 1, axis=0)[:, :half]
swapped = model.decode(edited)

# %% Complete: keep the first half of the tokens, draw the others anew (-1), for the class asked
given = np.where(np.arange(layout.total_tokens) < half, codes, -1)
completed = model.sample(classes, seed=1, guidance=2.0, given=given)
assert (model.sample_codes(classes, seed=1, guidance=2.0, given=given)[:, :half] == codes[:, :half]).all()

# %% Decode the first tokens alone, where they say the coarse of the image
rows = [images, again, swapped, completed]
if layout.prefix_decodable:
    ends = np.cumsum([stream.n_tokens for stream in layout.streams]) if layout.kind == "multiscale" else [1, half]
    rows += [model.decode(codes, tokens=int(end)) for end in ends]

# %% A picture: samples, through the tokenizer, edited, completed, and from few tokens to many
sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
Image.fromarray(sheet).save("example.png")
print(f"example.png: {len(rows)} rows of {len(images)}")
