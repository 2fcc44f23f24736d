"""Statistics that other tools wrote: what they may be taken for, and what their files leave unsaid."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evaluation.moments import Source
from stepdistill.errors import UserError

if TYPE_CHECKING:
    from evaluation.stats import FeatureStats

# Extractors that other tools have, too. EDM2's pickles hold DINOv2's statistics beside Inception's.
_KNOWN = ("inception-2015", "dinov2-vitl14")


def foreign(
    kind: type[FeatureStats], path: Path, arrays: dict[str, np.ndarray], expect: Source | None
) -> FeatureStats:
    """Statistics of the arrays in a file with `mu` and `sigma`, taken for those of the extractor `expect`.

    ADM's files also hold `mu_s` and `sigma_s`, of spatial features, and are of images resized as TensorFlow 1 does;
    clean-fid's have its mode in their names. Where that contradicts `expect` they are refused. What is not told, the
    resize, the number of images, comes into `doubts`.

    Raises:
        UserError: no extractor that others have is expected, or another one than made the file; values are damaged.
        KeyError: there is no `mu` or no `sigma`.
    """
    mu, sigma = arrays["mu"], arrays["sigma"]
    name = expect.extractor if expect else ""
    if not name.startswith(_KNOWN):
        raise UserError(
            f"{path} is not a statistics file of ours: it has mu and sigma but does not say what made them; "
            f"such files hold Inception features, so use --extractor inception-2015, or make one for "
            f"{name or 'the extractor'!r} with `python -m evaluation stats DIR -o ref.npz`."
        )
    if name.endswith("-spatial"):
        if "mu_s" not in arrays:
            raise UserError(f"{path} has no mu_s and sigma_s, the spatial statistics that ADM's files hold.")
        mu, sigma = arrays["mu_s"], arrays["sigma_s"]
    by = _made_by(path, arrays)
    if by not in ("", name.removesuffix("-spatial")):
        raise UserError(
            f"{path} was made by {by}, as its arrays or its name say, but {name} is in use; use that one."
        )
    count = next(
        (int(arrays[key]) for key in ("n", "num_images") if key in arrays and int(arrays[key])), None
    )
    try:
        stats = kind.of_moments(mu, sigma, count, expect)
    except UserError as error:
        raise UserError(f"{path} holds damaged statistics: {error}") from None
    stats.doubts = [f"{path} {doubt}" for doubt in _doubts(stats, sigma, count, by, name)]
    return stats


def _made_by(path: Path, arrays: dict[str, np.ndarray]) -> str:
    """The extractor a file was made with, as far as it can be told; "" where not."""
    if "mu_s" in arrays:
        return "inception-2015"
    # clean-fid's cache: <data set>_<mode>_<split>_<side>.npz
    modes = {
        "clean": "inception-2015-clean",
        "legacy_pytorch": "inception-2015-pytorch",
        "legacy_tensorflow": "inception-2015",
    }
    return next((made for mode, made in modes.items() if f"_{mode}_" in path.name), "")


def _doubts(stats: FeatureStats, sigma: np.ndarray, count: int | None, by: str, name: str) -> list[str]:
    doubts = []
    if not by:
        doubts.append(
            f"does not say what made it: it is taken for {name}, and another network or resize makes a distance of its own."
        )
    if count is None:
        doubts.append("does not say of how many images it is.")
    if sigma.dtype == np.float32:
        doubts.append("holds float32 values, with which distances are right to some 1e-3 only.")
    rank = _rank(stats.cov, 1e-7 if sigma.dtype == np.float32 else 1e-10)
    if rank < stats.dim:
        doubts.append(
            f"has a covariance of rank {rank} of {stats.dim}: it is of about {rank + 1} images, far too few."
        )
    return doubts


def _rank(cov: np.ndarray, share: float) -> int:
    try:
        pivots = np.diagonal(np.linalg.cholesky(cov))
        if pivots.min() ** 2 > 10 * share * pivots.max() ** 2:
            return len(cov)
    except np.linalg.LinAlgError:
        pass
    values = np.linalg.eigvalsh(cov)
    return int((values > share * values[-1]).sum())
