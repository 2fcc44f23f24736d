"""Procedural captioned scenes and the checker that reads them back.

A scene is one or two plain shapes on a plain background, and its caption says everything about it: "a
small red circle above a large blue square on a yellow background". A scene is drawn from its index and a
seed alone, so a data set of any length needs no files; `check` reads count, colours, shapes, sizes,
relation and background back from the pixels, so whether a generated image obeys its prompt is a
measurement and not an opinion.

Geometry is in pixels of a 64 x 64 image (other sizes scale it), x to the right, y down. All shapes of one
size have the same area, `pi r^2` with r the *equivalent radius*, and their centroid at the origin, so neither
area nor position gives the shape away. Only numpy is needed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 65, 215),
    "yellow": (240, 215, 50),
    "purple": (150, 45, 175),
    "cyan": (60, 205, 220),
    "white": (243, 243, 243),
    "black": (18, 18, 18),
}
SIZES = ("small", "large")
RELATIONS = ("above", "below", "left of", "right of")
# The data set evaluation draws its prompts and references from; training must never see it.
HELD_OUT_SEED = 1_000_003
ATTRIBUTES = ("count", "colours", "shapes", "sizes", "relation", "background")

# Share of scenes with one object.
SINGLE = 0.25
# Equivalent radius, in pixels of a 64 x 64 image.
RADII = {"small": (7.0, 8.0), "large": (11.0, 13.0)}
# Least distance of two objects' bounding boxes along the relation's axis.
GAP = 3.0
# Least distance of a bounding box from the frame.
MARGIN = 1.0
# Most that two objects' centres differ across the relation's axis.
DRIFT = 6.0
# Colour jitter, grey levels, uniform per object and channel.
JITTER = 8.0
# The background's brightness changes by up to this many grey levels from its middle to the frame.
RAMP = 6.0

_NAMES = tuple(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], dtype=np.float32)
_CAPTION = re.compile(
    "a ({sizes}) ({colours}) ({shapes})"
    "(?: ({relations}) a ({sizes}) ({colours}) ({shapes}))? on a ({colours}) background".format(
        sizes="|".join(SIZES),
        colours="|".join(COLOURS),
        shapes="|".join(SHAPES),
        relations="|".join(RELATIONS),
    )
)


@dataclass(frozen=True)
class Object:
    """One shape of a scene: names out of SHAPES, COLOURS and SIZES."""

    shape: str
    colour: str
    size: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background; `relation` is where the first lies as seen from the second."""

    objects: tuple[Object, ...]
    relation: str | None
    background: str

    @property
    def caption(self) -> str:
        """The one sentence that `parse_caption` turns back into this scene."""
        return f" {self.relation} ".join(map(str, self.objects)) + f" on a {self.background} background"


VOCABULARY: tuple[str, ...] = (
    "a", "on", "background", *SIZES, *COLOURS, *SHAPES, *dict.fromkeys(" ".join(RELATIONS).split())
)  # fmt: skip


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene with all attributes uniform and independent, but for the colours, which all differ."""
    count = 1 if rng.random() < SINGLE else 2
    colours = rng.permutation(len(_NAMES))
    objects = tuple(
        Object(SHAPES[rng.integers(len(SHAPES))], _NAMES[colours[k]], SIZES[rng.integers(len(SIZES))])
        for k in range(count)
    )
    relation = RELATIONS[rng.integers(len(RELATIONS))] if count == 2 else None
    return Scene(objects, relation, _NAMES[colours[-1]])


def parse_caption(text: str) -> Scene:
    """The scene a caption describes.

    Raises:
        ValueError: the text is not a caption of a scene.
    """
    found = _CAPTION.fullmatch(" ".join(text.lower().split()))
    if found is None:
        raise ValueError(
            f"the caption {text!r} describes no scene; write it like "
            "'a small red circle above a large blue square on a yellow background'."
        )
    size, colour, shape, relation, other_size, other_colour, other_shape, background = found.groups()
    objects = (Object(shape, colour, size),)
    if relation is not None:
        objects += (Object(other_shape, other_colour, other_size),)
    return Scene(objects, relation, background)


def scene_at(index: int, seed: int = 0) -> Scene:
    """Scene number `index` of the endless data set `seed`."""
    return sample_scene(np.random.default_rng((seed, index)))


def image_at(index: int, seed: int = 0) -> tuple[Scene, np.ndarray]:
    """Scene number `index` of the data set `seed` and its image, uint8 (64, 64, 3)."""
    rng = np.random.default_rng((seed, index))
    scene = sample_scene(rng)
    return scene, render(scene, rng)


# ---------------------------------------------------------------------------------------------------- drawing

# Lengths of a shape of equivalent radius 1, each from "area = pi".
# Half a side.
_SQUARE = np.sqrt(np.pi) / 2
# Base = height.
_TRIANGLE = np.sqrt(2 * np.pi)
# Half a diagonal.
_DIAMOND = np.sqrt(np.pi / 2)
# Width of an arm; the cross is three of them long.
_CROSS = np.sqrt(np.pi / 5)
# A star's inner radius, relative to its outer one.
_INNER = 0.55
# Outer radius.
_STAR = np.sqrt(np.pi / (5 * _INNER * np.sin(np.pi / 5)))

# Reach of a shape of equivalent radius 1 from its centroid: left = right, up, down.
_REACH = {
    "circle": (1.0, 1.0, 1.0),
    "square": (_SQUARE, _SQUARE, _SQUARE),
    "triangle": (_TRIANGLE / 2, _TRIANGLE * 2 / 3, _TRIANGLE / 3),
    "diamond": (_DIAMOND, _DIAMOND, _DIAMOND),
    "cross": (1.5 * _CROSS, 1.5 * _CROSS, 1.5 * _CROSS),
    "star": (_STAR * np.sin(0.4 * np.pi), _STAR, _STAR * np.cos(0.2 * np.pi)),
}


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance to a shape's edge, negative inside; exact up to the rounding of its corners.

    x: (..., W) and y: (..., H, 1) are relative to the centroid; r is the equivalent radius.
    """
    across, along = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.sqrt(x * x + y * y) - r
    if shape == "square":
        return np.maximum(across, along) - _SQUARE * r
    if shape == "diamond":
        return (across + along - _DIAMOND * r) / np.float32(np.sqrt(2))
    # The slanted side falls two for one across.
    if shape == "triangle":
        side = (2 * across - y - _TRIANGLE * r * 2 / 3) / np.float32(np.sqrt(5))
        return np.maximum(side, y - _TRIANGLE * r / 3)
    if shape == "cross":
        arm, reach = _CROSS * r / 2, 1.5 * _CROSS * r
        return np.minimum(np.maximum(across - reach, along - arm), np.maximum(across - arm, along - reach))
    # A star is one edge, mirrored: fold the plane onto the tenth between a tip (upwards) and the next inner
    # corner.
    across, up = _fold(across, -y)
    outer = _STAR * r
    inner = np.array([_INNER * outer * np.sin(0.2 * np.pi), _INNER * outer * np.cos(0.2 * np.pi)])
    edge = inner - (0.0, outer)
    normal = np.array([-edge[1], edge[0]]) / np.hypot(*edge)
    return across * np.float32(normal[0]) + (up - outer) * np.float32(normal[1])


def _fold(across: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mirror a half plane (across >= 0) onto the sector of 36 degrees beside the upward axis."""
    across, up = np.broadcast_arrays(across, up)
    # Mirrors at 108, 72 and 36 degrees from the axis take the fifth tenth to the first, one fold at a time.
    for degrees in (108, 72, 36):
        angle = np.deg2rad(degrees)
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        beyond = 2 * np.maximum(across * c - up * s, 0)
        across, up = across - beyond * c, up + beyond * s
        across = np.abs(across)
    return across, up


def _place(scene: Scene, rng: np.random.Generator, size: int) -> Iterator[tuple[float, float, float]]:
    """Centre (x, y) and equivalent radius of every object: inside the frame, in the relation, apart."""
    radii = np.array([rng.uniform(*RADII[thing.size]) for thing in scene.objects])
    least = np.array([RADII[thing.size][0] for thing in scene.objects])
    # reach[k] = left, right, up, down of object k at equivalent radius 1
    reach = np.array([(side, side, up, down) for side, up, down in (_REACH[o.shape] for o in scene.objects)])
    room, spare = 64 - 2 * MARGIN, rng.random(4)
    if len(scene.objects) == 1:
        left, right, up, down = reach[0] * radii[0]
        x = MARGIN + left + spare[0] * (room - left - right)
        y = MARGIN + up + spare[1] * (room - up - down)
        centres = [(x, y)]
    else:
        axis = 0 if scene.relation in ("left of", "right of") else 1
        # Which object lies nearer to the origin.
        first = 0 if scene.relation in ("left of", "above") else 1
        near, far = first, 1 - first
        lengths = reach[:, 2 * axis] + reach[:, 2 * axis + 1]
        # Two large objects may be too long for the frame: take both towards their least radius until they
        # fit.
        excess = lengths @ radii - (room - GAP)
        if excess > 0:
            radii = radii - (radii - least) * min(1.0, excess / (lengths @ (radii - least)))
        bounds = reach * radii[:, None]
        free = room - GAP - lengths @ radii
        # `free` is shared between before, between and after; at most 10 px go between, so that objects stay
        # related.
        between = min(10.0, free) * spare[0]
        before = (free - between) * spare[1]
        along = np.empty(2)
        along[near] = MARGIN + before + bounds[near, 2 * axis]
        along[far] = along[near] + bounds[near, 2 * axis + 1] + GAP + between + bounds[far, 2 * axis]
        other = 1 - axis
        low = MARGIN + bounds[:, 2 * other]
        high = 64 - MARGIN - bounds[:, 2 * other + 1]
        across = np.empty(2)
        across[0] = low[0] + spare[2] * (high[0] - low[0])
        start, stop = max(low[1], across[0] - DRIFT), min(high[1], across[0] + DRIFT)
        # Where the second object cannot come within DRIFT of the first, the first moves instead.
        if start > stop:
            across[1] = low[1] if across[0] < low[1] else high[1]
            across[0] = across[1] + np.clip(across[0] - across[1], -DRIFT, DRIFT)
        else:
            across[1] = start + spare[3] * (stop - start)
        centres = [(along[k], across[k]) if axis == 0 else (across[k], along[k]) for k in range(2)]
    scale = size / 64
    for (x, y), r in zip(centres, radii, strict=True):
        yield x * scale, y * scale, r * scale


@functools.lru_cache(maxsize=8)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres: x (1, size) and y (size, 1)."""
    line = np.arange(size, dtype=np.float32) + 0.5
    return line[None, :], line[:, None]


def render(scene: Scene, rng: np.random.Generator, size: int = 64) -> np.ndarray:
    """Draw a scene, antialiased; placing, radii and colour jitter come from `rng`.

    Returns uint8 (size, size, 3).
    """
    x, y = _grid(size)
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(-RAMP, RAMP)
    ramp = (x / size - 0.5) * (2 * strength * np.cos(angle)) + (y / size - 0.5) * (
        2 * strength * np.sin(angle)
    )
    jitter = rng.uniform(-JITTER, JITTER, (3, 3)).astype(np.float32)
    image = (
        np.asarray(COLOURS[scene.background], np.float32) + jitter[2] + ramp[:, :, None].astype(np.float32)
    )
    for k, (thing, (cx, cy, r)) in enumerate(zip(scene.objects, _place(scene, rng, size), strict=True)):
        side, up, down = (reach * r + 1 for reach in _REACH[thing.shape])
        # Only the object's bounding box is touched; a pixel's coverage is the distance of its centre from the
        # edge.
        rows = slice(max(int(cy - up), 0), int(cy + down) + 1)
        columns = slice(max(int(cx - side), 0), int(cx + side) + 1)
        distance = _distance(thing.shape, x[:, columns] - np.float32(cx), y[rows] - np.float32(cy), r)
        coverage = np.clip(0.5 - distance, 0, 1)[:, :, None].astype(np.float32)
        colour = np.asarray(COLOURS[thing.colour], np.float32) + jitter[k]
        window = image[rows, columns]
        window += coverage * (colour - window)
    return (np.clip(image, 0, 255) + 0.5).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------- reading

# A pixel counts for a blob when this many of its 3 x 3 neighbourhood have its colour.
PURE = 6
# Pure pixels (of 64 x 64) from which on a blob of another colour counts as an object.
NOTABLE = 30
# A blob less like every shape than this has no shape.
LEAST_IOU = 0.65
# Equivalent radius between small and large.
_BORDERLINE = float(np.sqrt(RADII["small"][1] * RADII["large"][0]))


@dataclass(frozen=True)
class Blob:
    """One object read from an image. `shape` is None for a blob that looks like none; x, y is its
    centroid in pixels.
    """

    colour: str
    shape: str | None
    size: str
    x: float
    y: float
    area: int


@dataclass(frozen=True)
class Reading:
    """What the checker sees in an image."""

    background: str
    blobs: tuple[Blob, ...]


def read(image: np.ndarray) -> Reading:
    """Read background and objects from an image, uint8 (H, W, 3), knowing nothing of its caption.

    Raises:
        ValueError: the image has another shape or type.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"the image must be uint8 (H, W, 3), got {image.dtype} {image.shape}.")
    height, width = image.shape[:2]
    # Areas in pixels of a 64 x 64 image.
    scale = height * width / 4096
    # |p - c|^2 up to |p|^2, which is the same for every palette colour c
    far = (_PALETTE**2).sum(1) - 2 * (image.reshape(-1, 3).astype(np.float32) @ _PALETTE.T)
    far = far.T.reshape(len(_NAMES), height, width)
    labels = far.argmin(0)
    pure = _pure(labels)
    background = int(np.bincount(labels[pure], minlength=len(_NAMES)).argmax())
    blobs = []
    for colour in range(len(_NAMES)):
        if colour == background:
            continue
        own = pure & (labels == colour)
        if np.count_nonzero(own) < NOTABLE * scale:
            continue
        # Where an edge is soft its pixels have neither colour and may be nearest to a third one. So the blob
        # itself is what lies nearer to its colour than to the background, without what surely belongs to
        # another object.
        near = (far[colour] < far[background]) & ~(pure & (labels != colour) & (labels != background))
        for core in _components(_bits(own), width):
            if core.bit_count() >= NOTABLE * scale:
                mask = _mask(_flood(core, _bits(near), width), height, width)
                blobs.append(_describe(mask, _NAMES[colour], scale))
    return Reading(_NAMES[background], tuple(blobs))


def check(image: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Which attributes of a scene an image shows: count, colours, shapes, sizes, relation, background
    and all.

    An object is looked up by its colour, which no other object of the scene has: `shapes` holds when every
    object is found and has its shape, and so on. The relation of a single object holds by definition.

    image: uint8 (H, W, 3). Raises ValueError for another shape or type.
    """
    seen = read(image)
    found = [
        max(
            (blob for blob in seen.blobs if blob.colour == thing.colour),
            key=lambda blob: blob.area,
            default=None,
        )
        for thing in scene.objects
    ]
    pairs = list(zip(scene.objects, found, strict=True))
    result = {
        "count": len(seen.blobs) == len(scene.objects),
        "colours": {blob.colour for blob in seen.blobs} == {thing.colour for thing in scene.objects},
        "shapes": all(blob is not None and blob.shape == thing.shape for thing, blob in pairs),
        "sizes": all(blob is not None and blob.size == thing.size for thing, blob in pairs),
        "relation": scene.relation is None or (None not in found and _related(*found) == scene.relation),
        "background": seen.background == scene.background,
    }
    return result | {"all": all(result.values())}


def attribute_accuracy(images: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
    """Share of images that show each attribute of their caption, in 0 .. 1, and "all" of them together.

    `relation` is the share among captions that have one (1.0 where none has).

    images: uint8 (N, H, W, 3). Raises ValueError for other shapes, for a caption that is none, or no image
    at all.
    """
    if len(images) != len(captions) or len(captions) == 0:
        raise ValueError(
            f"as many captions as images are needed, at least one: {len(images)} and {len(captions)} given."
        )
    scenes = [parse_caption(caption) for caption in captions]
    results = [check(image, scene) for image, scene in zip(images, scenes, strict=True)]
    accuracy = {name: float(np.mean([result[name] for result in results])) for name in (*ATTRIBUTES, "all")}
    related = [result["relation"] for result, scene in zip(results, scenes, strict=True) if scene.relation]
    return accuracy | {"relation": float(np.mean(related)) if related else 1.0}


def _related(one: Blob, other: Blob) -> str:
    """Where `one` lies as seen from `other`, along the axis on which they differ most."""
    dx, dy = one.x - other.x, one.y - other.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _pure(labels: np.ndarray) -> np.ndarray:
    """Where at least PURE of the nine pixels around one (the frame repeats its edge) have its label."""
    height, width = labels.shape
    padded = np.pad(labels.astype(np.uint8), 1, mode="edge")
    votes = np.zeros((height, width), np.uint8)
    centre = padded[1:-1, 1:-1]
    for row in range(3):
        for column in range(3):
            votes += padded[row : row + height, column : column + width] == centre
    return votes >= PURE


# Connected components on a mask written as one long integer, a row and a spare zero bit after the other:
# growing a region by one pixel is four shifts, some hundred times faster than the same on arrays.


def _bits(mask: np.ndarray) -> int:
    """A mask (H, W) as an integer, pixel (row, column) at bit row * (W + 1) + column."""
    padded = np.pad(mask, ((0, 0), (0, 1)))
    return int.from_bytes(np.packbits(padded.ravel(), bitorder="little").tobytes(), "little")


def _mask(bits: int, height: int, width: int) -> np.ndarray:
    """The mask (H, W) that `_bits` wrote."""
    count = height * (width + 1)
    raw = np.frombuffer(bits.to_bytes((count + 7) // 8, "little"), np.uint8)
    return (
        np.unpackbits(raw, bitorder="little", count=count).reshape(height, width + 1)[:, :width].astype(bool)
    )


def _flood(seed: int, mask: int, width: int) -> int:
    """All of `mask` that is connected to `seed` by edges."""
    grown, stride = seed & mask, width + 1
    while True:
        next_ = (grown | grown << 1 | grown >> 1 | grown << stride | grown >> stride) & mask
        if next_ == grown:
            return grown
        grown = next_


def _components(mask: int, width: int) -> Iterator[int]:
    """The connected parts of a mask."""
    while mask:
        part = _flood(mask & -mask, mask, width)
        yield part
        mask &= ~part


def _describe(mask: np.ndarray, colour: str, scale: float) -> Blob:
    """Size, centroid and best shape of a blob's mask (H, W)."""
    rows, columns = np.nonzero(mask)
    area = len(rows)
    x, y, r = columns.mean() + 0.5, rows.mean() + 0.5, float(np.sqrt(area / np.pi))
    grid_x, grid_y = np.arange(mask.shape[1]) + 0.5 - x, (np.arange(mask.shape[0]) + 0.5 - y)[:, None]
    best, shape = LEAST_IOU, None
    for name in SHAPES:
        template = _distance(name, grid_x, grid_y, r) < 0
        shared = np.count_nonzero(template & mask)
        iou = shared / (np.count_nonzero(template) + area - shared)
        if iou > best:
            best, shape = iou, name
    size = "small" if r < _BORDERLINE * np.sqrt(scale) else "large"
    return Blob(colour, shape, size, float(x), float(y), area)
