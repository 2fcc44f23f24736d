"""Tiny decoders: an AutoencoderTiny in the place of a pipeline's VAE, whose decoder is most of what a one-step image costs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.errors import UserError, first_line
from stepdistill.families.base import Family
from stepdistill.untrusted import read_json

if TYPE_CHECKING:
    from stepdistill.drawing import Sampler


def put_decoder(family: Family, directory: Path) -> None:
    """Let `family` decode by the AutoencoderTiny in `directory`.

    Raises:
        UserError: there is none, or it is of other latents or another scale; the family's pipeline takes none.
    """
    from diffusers import AutoencoderTiny

    if "diffusers.AutoencoderTiny" not in getattr(family, "components", {}).get("vae", ()):
        raise UserError(
            f"decoder={directory}: pipelines of the family {family.name!r} take no AutoencoderTiny."
        )
    config = directory / "config.json"
    said = read_json(config) if config.is_file() else None
    if not isinstance(said, dict) or said.get("_class_name") != "AutoencoderTiny":
        raise UserError(
            f"decoder={directory} holds no AutoencoderTiny; give a directory as its save_pretrained leaves it."
        )
    try:
        tiny = AutoencoderTiny.from_pretrained(directory, use_safetensors=True)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"decoder={directory} cannot be read: {first_line(error)}.") from None
    scale = tiny.config.upsampling_scaling_factor ** (len(tiny.config.decoder_block_out_channels) - 1)
    ours = (family.vae.config.latent_channels, family.stride)
    if (tiny.config.latent_channels, scale) != ours:
        raise UserError(
            f"decoder={directory} makes {scale} pixels a side of {tiny.config.latent_channels} channels, and this pipeline has"
            f" latents of {ours[0]} channels for {ours[1]} pixels; give a decoder of the same VAE."
        )
    family.pipeline.register_modules(vae=tiny.eval().requires_grad_(False))


def decoded_by(sampler: Sampler, directory: Path) -> Sampler:
    """A sampler of the same networks that decodes by the AutoencoderTiny in `directory`; the given one stays as it is.

    Raises:
        UserError: as `put_decoder`, or it is of merged students, into which nothing is plugged.
    """
    if getattr(sampler, "parts", ()):
        raise UserError(
            f"decoder={directory}: {sampler.path} holds merged students, into which nothing is plugged."
        )
    other = copy.copy(sampler)
    other.family_ = copy.copy(sampler.family_)
    # That of ONNX files, where it has such.
    vars(other.family_).pop("decode", None)
    other.family_.pipeline = other.pipeline = copy.copy(sampler.pipeline)
    put_decoder(other.family_, directory)
    other.family_.vae.to(sampler.device, sampler.dtype)
    return other
