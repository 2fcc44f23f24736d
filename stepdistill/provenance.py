"""Where a number or a file comes from: the commit of this code, and checksums of files."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def git_commit(short: bool = False) -> str | None:
    """The commit this code is at, with "+" when a tracked file was changed; None outside a repository."""
    name = ["rev-parse", *(["--short"] if short else []), "HEAD"]
    try:
        commit, changed = (
            subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (name, ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def sha256_of_files(files: Iterable[Path], root: Path | None = None) -> str:
    """Of the contents, one after another, in the order given; with `root` also of names relative to it and sizes."""
    digest = hashlib.sha256()
    for file in files:
        if root is not None:
            # As the file system has it: a name need not be UTF-8.
            digest.update(os.fsencode(file.relative_to(root).as_posix()) + b"\0")
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
        if root is not None:
            digest.update(file.stat().st_size.to_bytes(8, "little"))
    return digest.hexdigest()


def pipeline_sha256(path: Path) -> str:
    """Of weights, configurations and tokenizers of a pipeline directory; cards and pictures don't count."""
    kinds = {".safetensors", ".json", ".txt", ".model"}
    return sha256_of_files(sorted(f for f in path.rglob("*") if f.suffix in kinds and f.is_file()), path)


def sha256_of_weights(module: nn.Module) -> str:
    """Of every tensor of a module's state, with its name and dtype; a copy of one tensor at a time is made."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
