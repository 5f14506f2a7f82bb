"""Text encoders: features at the right end of their slots, whatever else is in the batch."""

import json

import pytest
import torch
from text_encoders import write_clip, write_t5
from tokar.errors import UserError
from tokar.models.generators.conditions import PADDING, SEEN
from tokar.models.text import TextEncoder
from transformers import CLIPTextModel, T5EncoderModel

WRITERS = {"t5": (write_t5, T5EncoderModel), "clip": (write_clip, CLIPTextModel)}


@pytest.mark.parametrize("kind", WRITERS)
def test_features_are_the_encoders(kind, tmp_path):
    write, network = WRITERS[kind]
    encoder = TextEncoder(str(write(tmp_path)), tokens=6)
    assert encoder.facts == {"path": str(tmp_path), "tokens": 6, "features": 12}
    text = encoder(["a red boat", "dog"])
    assert text.shape == (2, 6, 13)
    assert text[:, :, -1].tolist() == [[PADDING] * 2 + [SEEN] * 4, [PADDING] * 4 + [SEEN] * 2]
    assert text[0, :2].abs().sum() == 0
    expected = network.from_pretrained(tmp_path).eval()(input_ids=torch.tensor([[3, 4, 6, 1]])).last_hidden_state
    torch.testing.assert_close(text[0, 2:, :-1], expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_text_alone_is_as_in_company(kind, tmp_path):
    encoder = TextEncoder(str(WRITERS[kind][0](tmp_path)), tokens=6)
    torch.testing.assert_close(encoder(["dog"])[0], encoder(["a red boat", "dog"])[1], atol=1e-5, rtol=1e-5)


def test_a_long_text_is_cut_and_an_empty_one_is_its_end(tmp_path):
    encoder = TextEncoder(str(write_t5(tmp_path)), tokens=3)
    assert encoder(["a red green boat dog", ""])[..., -1].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_what_is_no_text_encoder_is_refused(tmp_path):
    write_clip(tmp_path / "clip")
    with pytest.raises(UserError, match=r"reads 9 tokens, not 77; set text.tokens=9"):
        TextEncoder(str(tmp_path / "clip"), tokens=77)
    with pytest.raises(UserError, match="no such folder"):
        TextEncoder(str(tmp_path / "nothing"))
    for file in (tmp_path / "clip").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="no readable tokenizer"):
        TextEncoder(str(tmp_path / "clip"), tokens=6)
    config = tmp_path / "clip" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "bert"}))
    with pytest.raises(UserError, match="'bert', not T5 or CLIP"):
        TextEncoder(str(tmp_path / "clip"), tokens=6)
