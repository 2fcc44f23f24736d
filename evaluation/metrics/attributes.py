"""Share of images that show what their caption says, read from the pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.metrics.base import Inputs, Metric
from evaluation.values import Value, measured
from stepdistill import scenes
from stepdistill.errors import UserError


class Attributes(Metric):
    """`attributes/<name>`, in 0 .. 1, for each attribute of a scene and `all` together; higher is better."""

    needs = frozenset({"images", "captions"})
    values = (
        *(Value(f"attributes/{name}", better="higher") for name in scenes.ATTRIBUTES),
        Value("attributes/all", better="higher", main=True),
    )

    def check(self, inputs: Inputs, n: int) -> None:
        """Raises UserError for captions that describe no scene."""
        _relations(inputs.captions)

    def compute(self, inputs: Inputs) -> list[Value]:
        """The shares, and the binomial standard error of `all`; batch by batch, so that no set is held in memory.
        Raises UserError if images and captions differ in number, or a caption describes no scene.
        """
        captions = list(inputs.captions)
        count = len(inputs.images)
        if count != len(captions) or not count:
            raise UserError(
                f"attributes cannot be checked: {count} images and {len(captions)} captions were given."
            )
        right: dict[str, float] = {}
        asked: dict[str, int] = {}
        at = 0
        for batch in inputs.images:
            own = captions[at : at + len(batch)]
            at += len(batch)
            related = _relations(own)
            shares = scenes.attribute_accuracy(batch.permute(0, 2, 3, 1).numpy(), own)
            for name, share in shares.items():
                # The share of relations is among captions that have one.
                number = related if name == "relation" else len(own)
                right[name] = right.get(name, 0) + round(share * number)
                asked[name] = asked.get(name, 0) + number
        shares_of = {
            f"attributes/{name}": right[name] / asked[name] if asked[name] else 1.0 for name in right
        }
        everything = shares_of["attributes/all"]
        error = float(np.sqrt(everything * (1 - everything) / count))
        return measured(self.values, shares_of | {"attributes/all": (everything, error)})


def _relations(captions: Sequence[str]) -> int:
    """How many captions have a relation. Raises UserError for one that describes no scene."""
    try:
        return sum(scenes.parse_caption(caption).relation is not None for caption in captions)
    except ValueError as error:
        raise UserError(f"attributes cannot be checked: {error}") from None
