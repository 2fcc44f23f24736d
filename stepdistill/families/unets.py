"""What a UNet's configuration asks for, looked at before anything is trained with it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from stepdistill.errors import UserError


def check_unet(
    unet: nn.Module, path: Path, channels: Iterable[int], allowed: dict[str, Any], outputs: int = 0
) -> None:
    """Whether a UNet can be called with what its family tells it.

    channels: of its input, such as the VAE's latents. allowed: further conditions -> the one value besides null that the
    family serves. outputs: channels of an image, where the input has more.

    Raises:
        UserError: it takes another input, gives neither one nor two values for each of it, or must be told more.
    """
    config, channels = unet.config, tuple(channels)
    if config.in_channels not in channels:
        known = " or ".join(map(str, channels))
        way = "choose one that draws from noise alone"
        if config.in_channels == inpainting_channels(channels[0]):
            way = (
                "as one does that fills in masks; of Stable Diffusion 1.x and 2.x such are served as a"
                " StableDiffusionInpaintPipeline with family.name=sd_inpaint"
            )
        raise UserError(
            f"{path}: in_channels={config.in_channels} in unet/config.json, where images have {known}: this UNet takes"
            f" another input than an image, {way}."
        )
    outputs = outputs or config.in_channels
    if config.out_channels not in (outputs, 2 * outputs):
        raise UserError(
            f"{path}: out_channels={config.out_channels} in unet/config.json is neither that of images"
            f" ({outputs}) nor, with a learned variance, twice that; choose another UNet."
        )
    for name in ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type"):
        value = config.get(name)
        if value is not None and value != allowed.get(name) and allowed.get(name) is not Ellipsis:
            raise UserError(
                f"{path}: {name}={value!r} in unet/config.json: this UNet must be told more than its family tells one;"
                " choose another teacher or family."
            )


def inpainting_channels(latent: int) -> int:
    """Of a UNet that fills in masks: the image, the mask, and the image without what the mask covers."""
    return 2 * latent + 1


def drop_variance(pipeline: Any) -> None:
    """Cut a learned variance, the second half of a UNet's outputs, off a pipeline: few-step samplers have no use for it,
    and most schedulers none either (Nichol & Dhariwal 2021, arXiv 2102.09672).
    """
    unet, scheduler = pipeline.unet, pipeline.scheduler
    kept, whole = unet.config.in_channels, unet.conv_out
    if unet.config.out_channels == kept:
        return
    half = nn.Conv2d(whole.in_channels, kept, whole.kernel_size, padding=whole.padding).to(whole.weight)
    half.load_state_dict({name: value[:kept] for name, value in whole.state_dict().items()})
    unet.conv_out = half
    unet.register_to_config(out_channels=kept)
    if str(scheduler.config.get("variance_type")).startswith("learned"):
        fixed = "fixed_small" if type(scheduler).__name__ == "DDPMScheduler" else None
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, variance_type=fixed)
