"""docs/models.md: every method on every family, from tiny pipelines that are trained a step of each phase.

PYTHONPATH=.:tests python tests/models_table.py
"""

from __future__ import annotations

from pathlib import Path

import tiny
from models import refused

from stepdistill.errors import atomic_write
from stepdistill.methods import METHODS

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
HEAD = """# Families and methods

Each cell was tried on a tiny pipeline of that kind, with random weights: a step of every phase of the method.
"yes" says that all that the method trains moved; a number says why a pair is refused.
`lcm` tells its student a guidance scale; with `method.tell_guidance: false` it trains where a network has no place for one.
`meanflow`, `imf`, `twinflow`, `boot` and, in its `flow_map`, `anyflow` embed the end of a jump.
With `end_by: depth`, as `dmf` has it, `meanflow`, `imf` and `anyflow` train on every row.
There `imf` needs `tell_guidance: false` as well where a network has no place for a scale.
`PYTHONPATH=.:tests python tests/models_table.py` makes this page again, in some five minutes of one core.

The tests in `tests/families/` hold for every row of the table.
Of the slow ones among them 1,119 passed and none failed; `benchmarks/slow_families.json` has the command and the commits.
The teacher drawn with here is the teacher in its stock pipeline, to 1e-5 in float32, with and without guidance.
Exported students draw the same images in their stock pipelines: by both rules, in one step and in four.

"""
TAIL = """
## Shapes that draw

`training/embedded/shapes.py` makes pipelines in the shape of SDXL, FLUX and SD 3 around the embedded VAE and text encoder.
That of SD 3 was trained longest and is shipped as `assets/transformer` ([its results](results.md#the-embedded-transformer)).
SDXL's begins as the embedded teacher and learns its second encoder, pooled text and sizes in 800 iterations.
FLUX's begins from random weights and has 3,000, so its shapes stay rough.
These two were then distilled by DMD2, in 250 and 300 iterations of 16; the recipes are `training/recipes/shapes_*.yaml`.

![A teacher in SDXL's shape and its student](../assets/pictures/shapes_sdxl.png)

![A teacher in FLUX's shape and its student](../assets/pictures/shapes_flux.png)

## Inpainting

`sd_inpaint` serves UNets of nine channels, which see a mask and the image without what it covers.
In training both are made of the data's images: boxes, strokes, and some masks that cover everything.
A mask depends on its sample and step alone, so that runs resume bit for bit; the VAE therefore encodes an image per sample.
Previews, evaluation and the app ask with prompts, for which the mask covers everything.
The exported student is a `StableDiffusionInpaintPipeline`, which takes an image and a mask.
SDXL's inpainting UNet is refused by its number of channels.

## What upstream makes impossible

- Most flow pipelines draw the noise between two steps from the global generator: a seed there needs `torch.manual_seed`.
  SANA's takes its own.
- No directory can turn the default guidance off for SD 3, PixArt, SANA, DiT, HunyuanDiT, Chroma, Z-Image, Lumina 2 and Wan.
  Their model cards pass the right `guidance_scale`; a call without it guides a student twice.
- A student of several steps makes the pipeline's default number of steps an error. Of one step, nothing does for flow pipelines.
- SD 3, SANA and Wan take only a number of steps, so their schedulers can hold the times of one step count.
  Cards give `sigmas` for the others; Wan's pipeline does not take them.
- Chroma's single blocks lose their mask under gradient checkpointing, and HunyuanDiT has none: both are refused.
- PixArt, DiT and HunyuanDiT have no `load_lora_weights`: their students of adapters leave merged.
- Stable Diffusion's pipelines cannot step a flow scheduler, so flow matching on a UNet is refused when it is loaded.
- Qwen-Image with `guidance_embeds` fails in its own embedding, and is refused.
"""


def main() -> None:
    reasons: list[str] = []
    lines = [
        f"| teacher | {' | '.join(f'`{name}`' for name in METHODS)} |",
        "|---" * (len(METHODS) + 1) + "|",
    ]
    for variant in tiny.VARIANTS:
        cells = []
        for name in METHODS:
            # Neither the field nor the way out, which depend on the recipe.
            why = refused(variant, name).partition(": ")[2].partition(";")[0]
            if why and why not in reasons:
                reasons.append(why)
            cells.append(f"{reasons.index(why) + 1}" if why else "yes")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    notes = [f"{number}. {why}." for number, why in enumerate(reasons, 1)]
    with atomic_write(PAGE) as temporary:
        temporary.write_text(HEAD + "\n".join([*lines, "", *notes, ""]) + TAIL)


if __name__ == "__main__":
    main()
