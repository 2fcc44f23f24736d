"""Videos as folders of frames."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stepdistill.errors import UserError
from training.data.base import at_least
from training.data.decoding import Cut, decoded
from training.data.folder import beside_of, read, walk
from training.data.reading import existing
from training.data.stored import Files, Listing, Stored

# Of the length that stands before each frame's bytes.
LENGTH = 8


class Frames(Stored):
    """Folders below a folder, each with the frames of a video as images in the order of their names.

    Captions come from a .txt or .caption file beside such a folder, of its name, or from metadata as in `Folder`, where
    file_name is the folder's.
    """

    noun = "videos"

    @dataclass(frozen=True, kw_only=True)
    class Config(Files):
        """Which frames.

        Attributes:
            frames: of each video, from its first on, as many as family.frames; shorter ones are dropped.
            every: 1 = all frames, 2 = every second, which is half the speed of the file.
        """

        frames: int = 81
        every: int = 1

        def __post_init__(self) -> None:
            super().__post_init__()
            at_least(1, frames=self.frames, every=self.every)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.frames = config.frames
        root = existing(config.path, directory=True)
        dropped: collections.Counter[str] = collections.Counter()
        images, beside, described = walk(root, dropped)
        videos: dict[Path, list[Path]] = collections.defaultdict(list)
        for image in sorted(images, key=lambda path: path.relative_to(root).parts):
            videos[image.parent].append(image)
        dropped["image outside a video"] += len(videos.pop(root, []))
        dropped["missing video"] += len(described.keys() - videos.keys())
        dropped["caption without a video"] += len(beside - videos.keys())
        chosen = {folder: frames[:: config.every][: config.frames] for folder, frames in videos.items()}
        self._videos = {folder: frames for folder, frames in chosen.items() if len(frames) == config.frames}
        dropped[f"video of fewer than {config.frames} frames"] += len(videos) - len(self._videos)
        self._paths = list(self._videos.values())
        if not self._paths:
            raise UserError(
                f"data.path={root} holds no folder of {config.frames} frames (.png, .jpg or .webp)."
            )
        captions = [described.get(folder) or beside_of(folder) for folder in self._videos]
        self._open(Listing(len(captions), captions if any(captions) else None, dropped=dropped))

    def _raw(self, listed: Sequence[int]) -> Iterator[bytes | str]:
        """The frames of each, one behind another."""
        for i in listed:
            frames = [read(path) for path in self._paths[i]]
            broken = next((frame for frame in frames if isinstance(frame, str)), "")
            yield broken or b"".join(len(frame).to_bytes(LENGTH, "little") + frame for frame in frames)

    def _decoded(self, raw: bytes | str) -> Cut | str:
        if isinstance(raw, str):
            return raw
        cuts, at, sizes = [], 0, self._wanted
        while at < len(raw):
            length = int.from_bytes(raw[at : at + LENGTH], "little")
            cut = decoded(raw[at + LENGTH : at + LENGTH + length], sizes, self.config.min_size)
            if isinstance(cut, str):
                return cut
            if cuts and cut.original != cuts[0].original:
                return "frames of several sizes"
            cuts.append(cut)
            at += LENGTH + length
        return replace(cuts[0], pixels=np.stack([cut.pixels for cut in cuts]))
