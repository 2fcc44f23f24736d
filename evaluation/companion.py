"""Metrics of several images of a prompt beside those of a protocol that has one image of each.

Such a protocol names its companion: another one, which draws several. A run then measures both, so that the
seeds' diversity stands beside every distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.metrics import get_metrics
from evaluation.protocol import Protocol, get_protocol
from stepdistill.errors import UserError

# What samples of two protocols are drawn by alike, as the same pipelines draw both.
_ALIKE = ("conditions", "classes", "resolution", "quantise")


@dataclass(frozen=True)
class Part:
    """What is measured of the first `n` samples of a protocol."""

    protocol: Protocol
    metrics: list[str]
    n: int


def parts(protocol: Protocol, metrics: Sequence[str], n: int) -> list[Part]:
    """The metrics of the first `n` samples of a protocol, and those that its companion measures beside it, if there are
    such: of whole prompts, as large a share of the companion's as `n` is of the protocol's, and at least two.

    Where all metrics are the companion's, its part is the only one. Raises UserError for unknown metrics, and for a companion
    that is unknown, draws one image of a prompt or is drawn otherwise than the protocol.
    """
    several = {kind for kind, metric in get_metrics(metrics).items() if metric.several}
    apart = [name for name in metrics if name.partition("/")[0] in several]
    if not apart or not protocol.companion or protocol.images_per_prompt > 1:
        return [Part(protocol, list(metrics), n)]
    companion = get_protocol(protocol.companion).with_captions()
    per = companion.images_per_prompt
    differ = [name for name in _ALIKE if getattr(companion, name) != getattr(protocol, name)]
    if per == 1 or differ:
        what = f"other {' and '.join(differ)}" if differ else "one image of a prompt"
        raise UserError(
            f"the protocol {protocol.name} has the companion {companion.name}, which has {what}; name one that "
            "draws alike, with images_per_prompt of 2 or more."
        )
    prompts = max(2, round(companion.n // per * min(1.0, n / protocol.n)))
    own = [name for name in metrics if name not in apart]
    both = [Part(protocol, own, n), Part(companion, apart, prompts * per)]
    return both if own else both[1:]
