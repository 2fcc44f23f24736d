"""Where training examples come from: one small contract, `Source`, and a file per kind of source.

A source is opened once, drops what cannot be used and says how much of it and why; from then on it has `size`
examples that never change. Which of them come after the first n samples of a run is a pure function of (seed, n), see
`order`; with buckets, of how many were drawn of each, see `next_bucket`.
A new source is one file and one line in `DATA`.
"""

from stepdistill.registry import Table
from training.data.base import Source, Unreadable, order

DATA = Table(
    "training.data.base:Source",
    {
        "scenes": "training.data.scenes:Scenes",
        "folder": "training.data.folder:Folder",
        "frames": "training.data.frames:Frames",
        "parquet": "training.data.parquet:Parquet",
        "prompts": "training.data.prompts:Prompts",
        "lines": "training.data.lines:Lines",
        "datasets": "training.data.streamed:Datasets",
        "webdataset": "training.data.webdataset:WebDataset",
        "toy": "training.data.toy:Toy",
    },
)

__all__ = ["DATA", "Source", "Unreadable", "order"]
