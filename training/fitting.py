"""Whether a method, a family, a data source and a metric fit each other, asked before anything is computed."""

from __future__ import annotations

from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.methods.assemble import refuse_codes, trained_by
from stepdistill.methods.base import Method
from training.data import Source
from training.measure import check_metric
from training.recipe import Recipe
from training.trackers import check_trackers


def check(recipe: Recipe, family: Family, source: Source) -> None:
    """One sentence for a method, family, data source and metric that do not fit each other."""
    method = recipe.new_method()
    refuse_codes(method, family)
    needs, data = f"the method {recipe.method.name!r} needs", f"data.name={recipe.data.name}"
    if method.needs_images and not (source.has_images or family.own_data):
        raise UserError(
            f"{needs} real images as configured, and {data} has none; set data.name to a source with images."
        )
    if family.needs_images and not source.has_images:
        raise UserError(
            f"the family {family.name!r} is told parts of images, and {data} has none; set data.name to a source with"
            " images."
        )
    if method.needs_teacher and family.teacher is None:
        raise UserError(f"{needs} a teacher; set family.teacher and leave family.unet out.")
    if family.conditions == "prompt" and source.captions is None:
        raise UserError(f"the family {family.name!r} needs captions, and {data} has none.")
    if family.conditions == "class":
        _check_classes(family, source, data)
    _check_sizes(method, family, source)
    _check_sampling(recipe, method, family)
    # Trajectories that cannot be, and frozen networks that are not there: not after hours, when their stage begins.
    _ = method.pairs(family.schedule), method.trained_on
    recipe.optim.check_networks(trained_by(method, recipe.run.steps))
    check_metric(recipe.run, family, method)
    check_trackers(recipe.run.trackers)


def _check_sampling(recipe: Recipe, method: Method, family: Family) -> None:
    """UserError where the family's pipeline or schedule cannot sample a student so."""
    sampling = method.sampling
    if sampling.init_noise not in family.init_noises:
        raise UserError(
            f"student.init_noise={sampling.init_noise}: the pipeline of this {family.name!r} teacher starts from"
            f" {family.init_noises[0]} noise; set it to that."
        )
    middle = recipe.student.middle_time
    if middle and family.schedule.at_angle(middle) is None:
        raise UserError(
            f"student.middle_time={middle:g} changes nothing under this teacher's schedule, whose students are called at the"
            " times its scheduler lists; leave it out."
        )
    try:
        for steps in sampling.steps:
            sampling.grid(family.schedule, steps)
    except UserError as error:
        raise UserError(f"student.steps={list(sampling.steps)}: {error}") from None


def _check_sizes(method: Method, family: Family, source: Source) -> None:
    """UserError where images have sizes or are mirrored, or videos have a length, as the family does not take them."""
    frames = getattr(getattr(family, "config", None), "frames", 1)
    seen = (method.needs_images or family.needs_images) and source.has_images
    if seen and source.frames != frames:
        raise UserError(
            f"data: {source.noun} of {source.frames} frame{'s' * (source.frames > 1)} are not what the family"
            f" {family.name!r} takes, which is {frames}; set data.frames of the source `frames`, or family.frames."
        )
    if seen and getattr(source.config, "flip", False) and family.latent:
        raise UserError(
            f"data.flip=true: the latents of the family {family.name!r} are computed once, of images as they are; leave it out,"
            " or mirror half of the images yourself."
        )
    if source.bucketed:
        for bucket in source.buckets:
            family.shape_at(bucket.size)
        if method.pairs(family.schedule) is not None:
            raise UserError(
                "data.enable_bucket: this method learns from the teacher's trajectories, which are of one size; leave it"
                " out, or choose another method."
            )
        return
    height, width = family.resolution
    if seen and source.image_size != (height, width):
        wanted = height if height == width else [height, width]
        raise UserError(
            f"data.resolution={source.config.resolution} differs from the family's {height}x{width};"
            f" set it to {wanted}, or family.resolution to that of the data where the family takes it."
        )


def _check_classes(family: Family, source: Source, data: str) -> None:
    if source.labels is None and not family.own_data:
        raise UserError(f"the family {family.name!r} needs classes here, and {data} has no labels.")
    if source.class_names:
        if len(source.class_names) != len(family.class_names):
            raise UserError(
                f"the network has {len(family.class_names)} classes and the data {len(source.class_names)};"
                " make them equal."
            )
        family.class_names = tuple(source.class_names)
