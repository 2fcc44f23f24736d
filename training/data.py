"""Where training examples come from, by name; an entry is "module:Class", imported when it is used."""

from __future__ import annotations

DATA: dict[str, str] = {
    "scenes": "training.data:Scenes",
    "folder": "training.data:Folder",
    "parquet": "training.data:Parquet",
    "prompts": "training.data:Prompts",
    "toy": "training.data:Toy",
}
