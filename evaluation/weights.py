"""Weights of public networks: found where they usually lie, checked, and never downloaded behind one's back.

Places are searched in this order: the path that was given, $STEPDISTILL_WEIGHTS, `weights/` beside this
repository's statistics cache, torch's hub cache, the Hugging Face cache. A miss says what is needed, every
place that was looked at, and the command that gets it; nothing is drawn before.

    python -m evaluation.weights                            what is here and what is not
    python -m evaluation.weights convert IN.pth OUT.safetensors
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from evaluation.settings import Place
from stepdistill import assets
from stepdistill.errors import UserError, atomic_write, cli_errors, nearest
from stepdistill.provenance import sha256_of_files

ENVIRONMENT = "STEPDISTILL_WEIGHTS"
# In the metadata of a converted file: of the file it was converted from.
_SOURCE = "source_sha256"


@dataclass(frozen=True)
class Weights:
    """A public set of weights: one file, or the directory of a Hugging Face repository.

    files: names a file may have, the published one first. sha256: how that of the published file begins; ""
    where none is published. repository: on the Hugging Face hub. size: of the download, in MB. programs: names of
    files in which others keep the same network as TorchScript or a pickle.
    """

    name: str
    size: int
    licence: str
    files: tuple[str, ...] = ()
    url: str = ""
    sha256: str = ""
    repository: str = ""
    programs: tuple[str, ...] = ()

    @property
    def how(self) -> str:
        """The command that gets them."""
        if self.repository:
            return f"hf download {self.repository}"
        return f"curl -L --create-dirs -o {torch_hub() / self.files[0]} {self.url}"


_INCEPTION = Weights(
    "inception-2015",
    96,
    "Apache-2.0",
    (
        "weights-inception-2015-12-05-6726825d.pth",
        "pt_inception-2015-12-05-6726825d.pth",
        "inception-2015.safetensors",
    ),
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d",
    programs=("inception-2015-12-05.pt", "inception-2015-12-05.pkl"),
)
# Directories of transformers: name, repository, MB, licence.
_REPOSITORIES = (
    ("clip-vit-b32", "openai/clip-vit-base-patch32", 605, "MIT"),
    ("clip-vit-b16", "openai/clip-vit-base-patch16", 599, "MIT"),
    ("clip-vit-l14", "openai/clip-vit-large-patch14", 1710, "MIT"),
    ("clip-vit-l14-336", "openai/clip-vit-large-patch14-336", 1710, "MIT"),
    ("clip-vit-g14-laion2b", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K", 5470, "MIT"),
    ("dinov2-vitl14", "facebook/dinov2-large", 1220, "Apache-2.0"),
    ("pickscore-v1", "yuvalkirstain/PickScore_v1", 3940, "MIT"),
    ("hpsv2-hf", "adams-story/HPSv2-hf", 3940, "Apache-2.0"),
    ("mask2former-swin-s", "facebook/mask2former-swin-small-coco-instance", 276, "MIT"),
)
WEIGHTS = {_INCEPTION.name: _INCEPTION} | {
    name: Weights(name, size, licence, repository=repository)
    for name, repository, size, licence in _REPOSITORIES
}


class MissingWeights(UserError):
    """Weights that are nowhere; the message is what to do."""


def find(name: str, path: Place | None = None) -> Path:
    """The file or directory of the weights `name`.

    Args:
        path: where to look and nowhere else: the file or directory itself, or a folder that holds it.

    Raises:
        MissingWeights: they are in none of the places.
        UserError: there are no weights of this name, or the file that was found is another one or damaged.
    """
    if name not in WEIGHTS:
        raise UserError(
            f"there are no weights {name!r}; known are {', '.join(WEIGHTS)}.{nearest(name, WEIGHTS)}"
        )
    wanted = WEIGHTS[name]
    tried: list[Path] = []
    folders = [Path(path)] if path is not None else places()
    for place in folders:
        for candidate in _candidates(wanted, place):
            tried.append(candidate)
            if _complete(wanted, candidate):
                _check(wanted, candidate)
                return candidate
    # Every place is asked for the same names, so the two lists say it all.
    names = ", ".join(dict.fromkeys(one.name for one in tried if one not in folders))
    programs = [file for p in folders for file in (p, *map(p.joinpath, wanted.programs)) if file.is_file()]
    program = next((file for file in programs if file.name in wanted.programs), None)
    refused = f"{program} holds this network as a program (clean-fid's and NVIDIA's form), which is not run; "
    pin = f", sha256 {wanted.sha256}..." if wanted.sha256 else ""
    raise MissingWeights(
        f"{refused if program else ''}the weights {name} ({wanted.size} MB, {wanted.licence}{pin}) are not here: there is "
        f"none of {names} in {', '.join(map(str, folders))}; get them on any machine with `{wanted.how}`, and put them "
        f"into one of these folders or name theirs in ${ENVIRONMENT}."
    )


def places() -> list[Path]:
    """Folders that are searched, in order."""
    given = os.environ.get(ENVIRONMENT)
    cache = os.environ.get("STEPDISTILL_CACHE") or assets.ROOT.parent / "cache"
    return [*([Path(given)] if given else []), Path(cache) / "weights", torch_hub(), hugging_face()]


def torch_hub() -> Path:
    """Where torch.hub keeps checkpoints."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def hugging_face() -> Path:
    """Where huggingface_hub keeps repositories; its variables are read now, not when it was imported."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HOME") or usual) / "hub"


def load_file(path: Path) -> dict[str, Tensor]:
    """The tensors in a file: safetensors, or a torch checkpoint of tensors alone.

    A checkpoint is a pickle. It is opened by `torch.load(weights_only=True)`, which makes tensors and containers and
    refuses everything else. Raises UserError if the file is damaged, or holds more than tensors.
    """
    import safetensors.torch
    import torch

    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle can fail in any way; all mean the same to a reader.
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as weights ({type(error).__name__}); copy it again, or convert it where you "
            "trust it: python -m evaluation.weights convert IN.pth OUT.safetensors"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds more than tensors by name; give the state dict alone.")
    return state


def content_sha256(state: dict[str, Tensor]) -> str:
    """Of names, types, shapes and values: the same for a checkpoint and its conversion."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().numpy().tobytes())
    return digest.hexdigest()


@functools.lru_cache(maxsize=32)
def file_sha256(path: Path) -> str:
    """Of a file, read once per process."""
    return sha256_of_files([path])


def convert(source: Place, target: Place) -> Path:
    """Write the tensors of a checkpoint as safetensors, with the checkpoint's sha256. Raises UserError."""
    from safetensors.torch import save_file

    source, target = Path(source), Path(target)
    if not source.is_file():
        raise UserError(f"there is no file {source} to convert.")
    if target.suffix != ".safetensors":
        raise UserError(f"{target} must end with .safetensors.")
    state = {name: tensor.contiguous() for name, tensor in load_file(source).items()}
    with atomic_write(target) as temporary:
        save_file(state, temporary, metadata={"format": "pt", _SOURCE: file_sha256(source)})
    return target


def find_pipeline(name: Place) -> Place:
    """`name` itself, or where the Hugging Face cache has the repository owner/name. Raises UserError if it looks like
    a repository, and is neither a directory nor in the cache.
    """
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        return name
    snapshot = cached_repository(str(name), hugging_face())
    if snapshot is None or not (snapshot / "model_index.json").is_file():
        raise UserError(
            f"there is no directory {name}, and no pipeline of that name in the Hugging Face cache {hugging_face()}; "
            f"get it with `hf download {name}`, or give the directory of a diffusers pipeline."
        )
    return snapshot


def cached_repository(repository: str, cache: Path) -> Path | None:
    """Where a Hugging Face cache has the repository owner/name, None where it has not. Nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, cache_dir=cache, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def pipeline_name(path: Path) -> str:
    """What people call a pipeline: its directory's name, or the repository a cached one is of."""
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.name


def _candidates(wanted: Weights, place: Path) -> list[Path]:
    """Paths under `place` that may be the weights."""
    if wanted.repository:
        snapshot = cached_repository(wanted.repository, place)
        cached = snapshot or place / f"models--{wanted.repository.replace('/', '--')}"
        return [place, place / wanted.name, place / wanted.repository.rpartition("/")[2], cached]
    if place.is_file():
        return [] if place.name in wanted.programs else [place]
    return [place / file for file in wanted.files]


def _complete(wanted: Weights, path: Path) -> bool:
    if not wanted.repository:
        return path.is_file()
    return (path / "config.json").is_file() and bool(model_files(path))


def model_files(path: Path) -> list[Path]:
    """The files a directory's weights are in: safetensors where there are any."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(path.glob(pattern)):
            return files
    return []


def _check(wanted: Weights, path: Path) -> None:
    """The file is the published one, and what the cache holds is what was downloaded."""
    if wanted.repository:
        for file in model_files(path):
            blob = file.resolve()
            # The hub's cache calls a large file by its sha256.
            if blob.parent.name == "blobs" and len(blob.name) == 64 and file_sha256(blob) != blob.name:
                raise UserError(
                    f"{file} is damaged: its sha256 is not {blob.name[:16]}...; run {wanted.how} again."
                )
        return
    if not wanted.sha256:
        return
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                digest = (file.metadata() or {}).get(_SOURCE, "")
        except (OSError, SafetensorError):
            digest = ""
        origin = "was not converted from the published file"
    else:
        digest, origin = file_sha256(path), "is not the published file, or is damaged"
    if not digest.startswith(wanted.sha256):
        raise UserError(
            f"{path} {origin}: its sha256 begins with {digest[:8] or 'nothing'}, that of {wanted.name} with "
            f"{wanted.sha256}; get it with: {wanted.how}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """List the weights, or convert a file."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.weights", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command")
    converting = commands.add_parser("convert", help="a torch checkpoint of tensors into safetensors")
    converting.add_argument("source")
    converting.add_argument("target")
    args = parser.parse_args(argv)
    with cli_errors():
        if args.command == "convert":
            print(f"written: {convert(args.source, args.target)}")
            return
        for name in WEIGHTS:
            try:
                print(f"{name:22} {find(name)}")
            except MissingWeights:
                print(f"{name:22} missing; {WEIGHTS[name].how}")
            except UserError as error:
                print(f"{name:22} {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
