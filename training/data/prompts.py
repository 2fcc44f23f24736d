"""Prompts without images, for methods that need no data."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from pathlib import Path

from stepdistill.errors import UserError
from training.data.base import Partition, Source, because, counts, digest, facts
from training.data.reading import captions_of, existing, json_object, lines


class Prompts(Source):
    """Prompts alone, without images: a .txt file, one per line, or .jsonl with "text", "caption" or "prompt"."""

    has_images = False

    @dataclass(frozen=True, kw_only=True)
    class Config(Partition):
        """path: the .txt or .jsonl file."""

        path: Path

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        path = existing(config.path, directory=False)
        if path.suffix not in (".txt", ".jsonl"):
            raise UserError(f"data.path={path} must be a .txt file, one prompt per line, or a .jsonl file.")
        dropped: collections.Counter[str] = collections.Counter()
        prompts = []
        for line in lines(path):
            text = line.strip()
            if not text:
                dropped["blank line"] += 1
            elif path.suffix == ".txt":
                prompts.append(text)
            else:
                found = captions_of(json_object(text))
                prompts += found
                dropped["line without a prompt"] += not found
        if not prompts:
            raise UserError(f"data.path={path} holds no prompts{because(dropped)}.")
        ours, self.routing = config.of_captions(prompts)
        dropped["in other partitions"] = len(prompts) - len(ours)
        self.captions = [prompts[i] for i in ours]
        self.size = len(ours)
        self.counts = counts(self.size, dropped)

    def fingerprint(self) -> str:
        return digest([facts(self.config), "\n".join(self.captions)])
