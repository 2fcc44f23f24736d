"""Do once what is the same in every epoch: `python -m training.precompute RECIPE.yaml [section.key=value ...]`.

Conditions of prompts, latents of images and a teacher's trajectories become checksummed safetensors shards in ./cache,
computed a shard at a time: stop it at any point, and the same command goes on. Under `accelerate launch` the processes
share the work. Training with the same recipe then reads them, and its text encoders leave memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

    from stepdistill.families.base import Family
    from stepdistill.methods.base import Method
    from training.batches import Batches
    from training.data import Source
    from training.recipe import Recipe

CACHE = Path("cache")


def prepare(
    recipe: Recipe,
    method: Method,
    family: Family,
    source: Source,
    accelerator: Accelerator,
    *,
    all_of_it: bool = False,
) -> Batches:
    """The batches of one stage, after what is computed once per data set and teacher.

    What lies in ./cache is read from there; all processes call it and compute a share of what is missing. Helpers that
    nothing in the stage needs any more have left memory, or moved to the CPU.

    Args:
        all_of_it: make everything a run could read, and again what is damaged.

    Raises:
        UserError: something computed is not finite, a shard is missing or damaged, or the batch cannot be split over
            the processes.
    """
    from accelerate.utils import gather_object

    from training.batches import Batches
    from training.encoded import Conditions, Latents, forget
    from training.measure import metric_prompts
    from training.shards import Share
    from training.trajectories import Trajectories

    split, device = recipe.optim.split(accelerator.num_processes), accelerator.device
    share = Share(accelerator.process_index, accelerator.num_processes, lambda value: gather_object([value]))
    how = {"mend": all_of_it, "share": share, "progress": accelerator.is_main_process}
    # A stage before may have sent some of it away.
    forget(family)
    family.to(device)
    if _may_answer(recipe, family, all_of_it):
        conditions = Conditions(family, [source.all_captions(), metric_prompts(recipe.run, family)], CACHE)
        if all_of_it or conditions.complete or _pays(recipe, method, source):
            conditions.fill(split[0], **how).answer()
    latents = pairs = None
    if method.needs_images and family.latent:
        latents = Latents(
            source, lambda images: family.encode_images(images.to(device)), CACHE, family.latent_key()
        )
        latents.fill(**how)
    if (settings := method.pairs(family.schedule)) is not None:
        pairs = Trajectories(family, source, settings, CACHE, device).fill(
            max(split[0], family.pair_batch), **how
        )
    if family.latent and not method.needs_decoder:
        family.park_decoder()
    return Batches(
        family, source, accelerator, split, needs_images=method.needs_images, latents=latents, pairs=pairs
    )


def answers(recipe: Recipe, method: Method, family: Family, source: Source) -> bool:
    """Whether a stage takes its conditions from shards even where none are there yet."""
    return _may_answer(recipe, family, False) and _pays(recipe, method, source)


def _may_answer(recipe: Recipe, family: Family, all_of_it: bool) -> bool:
    """Whether conditions may come from shards: the family has encoders, and some shards are there or to be made."""
    if family.conditions != "prompt" or not family.has_text:
        return False
    return all_of_it or recipe.run.precompute != "never"


def _pays(recipe: Recipe, method: Method, source: Source) -> bool:
    """Whether the run draws more prompts than there are."""
    if recipe.run.precompute == "always":
        return True
    draws = 0
    for step in range(recipe.run.steps):
        draws += recipe.optim.batch_size * sum(1 for _ in method.phases(step))
        if draws > source.size:
            return True
    return False


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; what is wrong with it is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="training.precompute",
        description="Compute conditions, latents and trajectories of a recipe's stages once, into ./cache; resumable.",
    )
    parser.add_argument("recipe", help="a YAML file, such as those in training/recipes/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe"
    )
    from stepdistill.errors import cli_errors, quieten_libraries
    from stepdistill.registry import add_allow_code, allowing_code

    add_allow_code(parser)
    with cli_errors():
        given = parser.parse_intermixed_args(arguments)
        from training.recipe import load_recipe
        from training.run import accelerator_of, build, say

        with allowing_code(given.allow_code):
            recipe = load_recipe(given.recipe, given.overrides)
            quieten_libraries()
            accelerator = accelerator_of(recipe)
            family, sources = build(recipe)
            for stage, source in zip(recipe.stages(), sources, strict=True):
                prepare(stage, stage.new_method(), family, source, accelerator, all_of_it=True)
            say(
                accelerator.is_main_process,
                f"all that {given.recipe} computes once lies in {CACHE.resolve()}",
            )
            accelerator.end_training()


if __name__ == "__main__":
    main()
