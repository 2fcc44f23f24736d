"""A tiny decoder in the place of a pipeline's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stepdistill import assets, load
from stepdistill.errors import UserError
from training.embedded.common import psnr

PROMPTS = ["a small red circle on a black background", "a large blue star on a white background"]


def test_the_shipped_one_decodes_what_the_own_decoder_does():
    own, tiny = (load(assets.path("student"), decoder=where) for where in ("", assets.path("tiny_decoder")))
    ours, theirs = (torch.as_tensor(each.at(1)(PROMPTS, [0, 1])) for each in (own, tiny))
    assert psnr(theirs, ours) > 20 and not torch.equal(ours, theirs)
    # Its label.
    assert "never trained" in json.loads((assets.path("tiny_decoder") / "training.json").read_text())["note"]
    assert sum(file.stat().st_size for file in assets.path("tiny_decoder").iterdir()) < 1 << 20


def test_one_of_other_latents_is_refused(tiny_sd, tmp_path: Path):
    with pytest.raises(
        UserError,
        match="makes 8 pixels a side of 4 channels, and this pipeline has latents of 4 channels for 4",
    ):
        load(tiny_sd, decoder=assets.path("tiny_decoder"))
    with pytest.raises(UserError, match="holds no AutoencoderTiny"):
        load(tiny_sd, decoder=tiny_sd / "vae")
