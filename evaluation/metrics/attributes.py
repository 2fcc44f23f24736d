"""Share of images that show what their caption says, read from the pixels."""

from __future__ import annotations

import numpy as np

from evaluation.metrics.base import Inputs
from stepdistill import scenes
from stepdistill.errors import UserError


class Attributes:
    """`attributes/<name>`, in 0 .. 1, for each attribute of a scene and `all` together; higher is better."""

    needs = frozenset({"images", "captions"})

    def compute(self, inputs: Inputs) -> dict[str, float]:
        """The shares, and the binomial standard error of `all`."""
        images = np.concatenate([batch.permute(0, 2, 3, 1).numpy() for batch in inputs.images])
        try:
            shares = scenes.attribute_accuracy(images, inputs.captions)
        except ValueError as error:
            raise UserError(f"attributes cannot be checked: {error}") from None
        found = {f"attributes/{name}": float(share) for name, share in shares.items()}
        everything = found["attributes/all"]
        found["attributes/all/se"] = float(np.sqrt(everything * (1 - everything) / len(images)))
        return found
