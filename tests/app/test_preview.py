"""A tiny decoder while somebody types, and the model's own for all that is kept."""

from __future__ import annotations

import numpy as np
import pytest

from app import png
from app.__main__ import main
from app.batcher import Job
from app.engine import Engine
from app.request import Request
from stepdistill import assets
from stepdistill.errors import UserError
from stepdistill.families.decoders import decoded_by

PROMPT = "a large green star on a black background"


@pytest.fixture(scope="module")
def engine():
    engine = Engine(None, False, device="cpu", threads=1, decoder=assets.path("tiny_decoder"))
    engine.start().wait(120)
    yield engine
    engine.close()


def drawn(engine, **how):
    return engine.submit(Request(PROMPT, seed=3), "me", **how).future.result(60)


def test_what_is_typed_is_a_preview_and_what_is_asked_for_is_not(engine):
    live, final = drawn(engine, live=True), drawn(engine)
    assert live.preview and live.settings()["preview"] is True
    assert not final.preview and "preview" not in final.settings()
    difference = live.image.astype(float) - final.image
    assert 0 < np.sqrt((difference**2).mean()) < 40
    # No file passes for one that its settings would give again.
    assert png.read_png(live.png())[1] is None and png.read_png(final.png())[1] is not None


def test_the_own_decoder_is_untouched_by_the_tiny_one(engine):
    model = engine.models.loaded["student"]
    assert type(model.sampler.family_.vae).__name__ == "AutoencoderKL"
    assert type(model.preview.family_.vae).__name__ == "AutoencoderTiny"
    assert model.preview.denoiser is model.sampler.denoiser
    plain = model.sampler([PROMPT], [3], steps=1, chunk=1)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(plain, drawn(engine).image)


def test_a_preview_shares_no_batch_with_a_final_image():
    live, final = (Job(Request(PROMPT), preview=preview) for preview in (True, False))
    assert live.key != final.key


def test_without_a_tiny_decoder_nothing_is_a_preview():
    from app_fakes import engine_of

    engine = engine_of(teacher=False)
    try:
        result = drawn(engine, live=True)
        assert not result.preview and png.read_png(result.png())[1] is not None
    finally:
        engine.close()


def test_a_decoder_that_is_none_is_one_sentence(tmp_path, tiny_sd):
    from stepdistill import load

    with pytest.raises(
        UserError, match=r"--decoder .* is not a directory; give the directory of a tiny decoder"
    ):
        main(["--decoder", str(tmp_path / "x"), "--check"])
    with pytest.raises(UserError, match="holds no AutoencoderTiny"):
        decoded_by(load(tiny_sd), tmp_path)
    with pytest.raises(UserError, match="latents of 4 channels for 4"):
        decoded_by(load(tiny_sd), assets.path("tiny_decoder"))
