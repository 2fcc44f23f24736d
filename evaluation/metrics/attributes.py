"""Share of images that show what their caption says, read from the pixels."""

from __future__ import annotations

import numpy as np

from evaluation.metrics.base import Inputs, Metric
from stepdistill import scenes
from stepdistill.errors import UserError


class Attributes(Metric):
    """`attributes/<name>`, in 0 .. 1, for each attribute of a scene and `all` together; higher is better."""

    needs = frozenset({"images", "captions"})

    def compute(self, inputs: Inputs) -> dict[str, float]:
        """The shares, and the binomial standard error of `all`; batch by batch, so that no set is held in memory.

        Raises:
            UserError: images and captions differ in number, or a caption describes no scene.
        """
        captions = list(inputs.captions)
        count = len(inputs.images)
        if count != len(captions) or not count:
            raise UserError(
                f"attributes cannot be checked: {count} images and {len(captions)} captions were given."
            )
        right: dict[str, float] = {}
        told: dict[str, int] = {}
        at = 0
        for batch in inputs.images:
            own = captions[at : at + len(batch)]
            at += len(batch)
            try:
                shares = scenes.attribute_accuracy(batch.permute(0, 2, 3, 1).numpy(), own)
                related = sum(scenes.parse_caption(caption).relation is not None for caption in own)
            except ValueError as error:
                raise UserError(f"attributes cannot be checked: {error}") from None
            for name, share in shares.items():  # the share of relations is among captions that have one
                number = related if name == "relation" else len(own)
                right[name] = right.get(name, 0) + round(share * number)
                told[name] = told.get(name, 0) + number
        found = {f"attributes/{name}": right[name] / told[name] if told[name] else 1.0 for name in right}
        everything = found["attributes/all"]
        found["attributes/all/se"] = float(np.sqrt(everything * (1 - everything) / count))
        return found
