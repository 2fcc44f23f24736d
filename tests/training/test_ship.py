"""What is put into assets/: half precision, and each file of weights once."""

import json

import torch
from safetensors.torch import load_file, save_file

from training.embedded.ship import ship


def _part(folder, weights):
    folder.mkdir(parents=True)
    save_file({"weight": weights}, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_lies_elsewhere_already_becomes_a_link_that_holds(tmp_path):
    generator = torch.Generator().manual_seed(0)
    text, vae, own = torch.randn(3, 5, 4, generator=generator)
    parts = {"text_encoder": text, "text_encoder_2": text, "vae": vae, "transformer": own}
    run, first, second = tmp_path / "run", tmp_path / "assets" / "first", tmp_path / "assets" / "second"
    for name, weights in parts.items():
        _part(run / name, weights)
    (run / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    _part(first / "vae", vae.half())

    ship(run, second, share=[first])

    linked = {path.parent.name for path in second.rglob("*.safetensors") if path.is_symlink()}
    assert linked == {"text_encoder_2", "vae"}
    assert (second / "vae" / "model.safetensors").resolve() == first / "vae" / "model.safetensors"
    for name, weights in parts.items():
        assert torch.equal(load_file(second / name / "model.safetensors")["weight"], weights.half())
    # The run's own directory is as it was.
    assert not any(path.is_symlink() for path in run.rglob("*"))
