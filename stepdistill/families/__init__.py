"""All model families by the name a recipe uses. Adding one is one file and one line here."""

from __future__ import annotations

from stepdistill.registry import Table

FAMILIES = Table(
    "stepdistill.families.base:Family",
    {
        "toy": "stepdistill.families.toy:Toy",
        "sd": "stepdistill.families.sd:SD",
        "sd_inpaint": "stepdistill.families.sd_inpaint:SDInpaint",
        "sdxl": "stepdistill.families.sdxl:SDXL",
        "pixart": "stepdistill.families.pixart:PixArt",
        "dit": "stepdistill.families.dit:DiT",
        "hunyuan_dit": "stepdistill.families.hunyuan_dit:HunyuanDiT",
        "sd3": "stepdistill.families.sd3:SD3",
        "sana": "stepdistill.families.sana:Sana",
        "sana_sprint": "stepdistill.families.sana:SanaSprint",
        "flux": "stepdistill.families.flux:Flux",
        "chroma": "stepdistill.families.flux:Chroma",
        "flux2": "stepdistill.families.flux2:Flux2",
        "qwen_image": "stepdistill.families.qwen_image:QwenImage",
        "z_image": "stepdistill.families.z_image:ZImage",
        "lumina2": "stepdistill.families.lumina2:Lumina2",
        "wan": "stepdistill.families.wan:Wan",
        "pixel": "stepdistill.families.pixel:Pixel",
        "ar": "stepdistill.families.autoregressive:Autoregressive",
    },
)
