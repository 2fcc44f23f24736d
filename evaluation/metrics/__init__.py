"""All metrics by the name a command uses. Adding one is one file and one line here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from stepdistill.errors import UserError
from stepdistill.registry import Table, resolve

if TYPE_CHECKING:
    from evaluation.metrics.base import Metric

METRICS = Table(
    "evaluation.metrics.base:Metric",
    {
        "fd": "evaluation.metrics.fd:FrechetDistance",
        "fid": "evaluation.metrics.fd:FID",
        "kid": "evaluation.metrics.kid:KernelDistance",
        "prdc": "evaluation.metrics.prdc:PRDC",
        "is": "evaluation.metrics.inception_score:InceptionScore",
        "cmmd": "evaluation.metrics.cmmd:ClipMMD",
        "patch-fd": "evaluation.metrics.patch_fd:PatchDistance",
        "diversity": "evaluation.metrics.diversity:Diversity",
        "paired": "evaluation.metrics.paired:Paired",
        "clip": "evaluation.metrics.clip_score:ClipScore",
        "pickscore": "evaluation.metrics.preference:PickScore",
        "hpsv2": "evaluation.metrics.preference:HPSv2",
        "attributes": "evaluation.metrics.attributes:Attributes",
        "latency": "evaluation.metrics.latency:Latency",
    },
)

_IMAGE_REWARD = (
    "ImageReward is a BLIP network with a head of its own, which transformers has no class for; score the images with "
    "its package (pip install image-reward), or ask for pickscore or hpsv2."
)


def get_metrics(names: Iterable[str]) -> dict[str, Metric]:
    """The metrics of these names, ready to compute. One's own is written my_package.my_file:MyMetric, derives
    from `Metric`, and is only imported where `allowing_code`.

    The name of a single value, "attributes/all", stands for the metric that has it. Raises UserError if there is no
    such metric, or it is one's own without permission.
    """
    kinds = dict.fromkeys(name.partition("/")[0] for name in names)
    if any(re.fullmatch("image[-_]?reward", kind, re.IGNORECASE) for kind in kinds):
        raise UserError(_IMAGE_REWARD)
    return {kind: resolve(kind, METRICS, "metric")() for kind in kinds}
