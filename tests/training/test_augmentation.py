"""What is drawn anew in every use of an example: whether its image is mirrored, and which activations a student drops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import worlds
from PIL import Image
from runs import assert_same_run, interrupt_in, labelled_images, pixel, sd
from torch import nn

from stepdistill.errors import Interrupted, UserError
from stepdistill.families.pixel import Pixel
from stepdistill.lora import LoraConfig
from stepdistill.methods.assemble import assemble
from training.batches import mirrored
from training.precompute import prepare
from training.run import accelerator_of, build, run
from training.state import TrainState

pytestmark = pytest.mark.usefixtures("accelerator_state")
# Needs images, and no teacher's step.
ECT = ("method={name: ect}", "student.steps=[1]")


def test_mirrored_is_from_right_to_left():
    x0 = torch.arange(12.0).view(2, 1, 2, 3)
    made = mirrored(x0, torch.tensor([False, True]))
    assert torch.equal(made[0], x0[0]) and made[1].tolist() == [[[8, 7, 6], [11, 10, 9]]]


def drawn(out, teacher, images, *overrides, steps: int = 12):
    """x0 and the numbers of the examples, of several batches."""
    recipe = pixel(out, teacher, images, *ECT, *overrides)
    family, sources = build(recipe)
    batches = prepare(recipe, recipe.new_method(), family, sources[0], accelerator_of(recipe))
    state, found = TrainState(0), []
    for state.step in range(steps):
        found += [(batch.x0, batch.examples) for batch in batches.draw("student", state)]
    examples = [example for _, examples in found for example in examples]
    return sources[0], torch.cat([x0 for x0, _ in found]), examples


def test_flip_mirrors_half_of_the_uses_and_nothing_else(tmp_path, tiny_pixel):
    images = labelled_images(tmp_path / "images")
    source, plain, examples = drawn(tmp_path / "a", tiny_pixel, images)
    _, again, _ = drawn(tmp_path / "a", tiny_pixel, images)
    flipping, shown, same = drawn(tmp_path / "b", tiny_pixel, images, "data.flip=true")
    assert torch.equal(plain, again) and examples == same
    pixels = torch.from_numpy(source.images(examples)).movedim(-1, 1) / 127.5 - 1
    torch.testing.assert_close(plain, pixels)
    turned = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(shown, plain, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(shown, plain, strict=True)])
    assert bool((turned ^ kept).all()) and 0.25 < float(turned.float().mean()) < 0.75
    # In some use an example is mirrored, in another it is not.
    assert {number for number, flag in zip(examples, turned, strict=True) if flag} & {
        number for number, flag in zip(examples, kept, strict=True) if flag
    }
    # What is computed once of such data stays valid.
    assert flipping.fingerprint() == source.fingerprint()


def test_a_run_that_mirrors_and_drops_goes_on_bit_for_bit(tmp_path, tiny_pixel, short_runs, monkeypatch):
    images = labelled_images(tmp_path / "images")
    # With previews, which are drawn without dropping anything.
    how = (
        *ECT,
        "data.flip=true",
        "student.dropout=0.3",
        "run.steps=3",
        "run.save_every=2",
        "run.preview_every=2",
    )
    run(pixel(tmp_path / "whole", tiny_pixel, images, *how))
    with monkeypatch.context() as patch:
        interrupt_in(patch, 2)
        with pytest.raises(Interrupted):
            run(pixel(tmp_path / "parts", tiny_pixel, images, *how))
    run(pixel(tmp_path / "parts", tiny_pixel, images, *how))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_latents_are_not_mirrored(tmp_path, tiny_sd):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "a.png")
    (folder / "a.txt").write_text("a red circle")
    data = {"name": "folder", "path": str(folder), "resolution": 16, "flip": True}
    with pytest.raises(UserError, match=r"data\.flip=true: the latents of the family 'sd' are computed once"):
        build(sd(tmp_path / "run", tiny_sd, data=data))
    # Prompts alone are what they are.
    build(sd(tmp_path / "run", tiny_sd, data=data, method={"name": "dmd2"}))


@pytest.fixture
def dropping(tiny_pixel):
    return assemble(worlds.method("cd"), Pixel.from_directory(tiny_pixel), dropout=0.5)


def test_dropout_is_the_students_and_its_copies_and_not_the_teachers(dropping):
    for name, module in dropping.modules.items():
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Dropout)]
        assert layers and {layer.p for layer in layers} == ({0.0} if name == "teacher" else {0.5})
        # Nothing else of a network is set to train.
        training = [each for each in module.modules() if each.training]
        assert training == ([] if name == "teacher" else layers)
    x_t, t, cond = torch.randn(2, 3, 8, 8), torch.ones(2).double(), torch.tensor([0, 1])
    for name, alike in (("teacher", True), ("student", False), ("target", False)):
        answers = [dropping.modules[name](x_t, t, cond).x0 for _ in range(2)]
        assert torch.equal(*answers) == alike


def test_dropout_is_refused_where_there_is_none_or_it_would_be_the_teachers(tiny_pixel):
    made = worlds.method("cd")
    with pytest.raises(UserError, match=r"student\.dropout: this family's network has no dropout layers"):
        assemble(made, worlds.world("cd").family, dropout=0.5)
    with pytest.raises(UserError, match=r"student\.dropout: this student holds the teacher's own layers"):
        assemble(
            made, Pixel.from_directory(tiny_pixel), lora=LoraConfig(2, targets=("to_q", "conv1")), dropout=0.5
        )
