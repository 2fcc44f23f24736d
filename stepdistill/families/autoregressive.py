"""Autoregressive image models: a VQ autoencoder, and a transformer that says its codes one after another.

x0 is the vectors of an image's codes, (places, dimensions), row by row. A state holds codes in its first places and noise
in the rest; time is the share that is noise (`schedule.Prefix`). The exact flow (`stepdistill.code_flow`) makes the teacher's
64 draws a function of that noise, so teacher and student are denoisers like any others: same noise, same image.

No pipeline of diffusers is of this kind. The directory is laid out as one, and stepdistill reads it:

    model_index.json    _class_name AutoregressivePipeline
    vqvae/              a stock VQModel          text_encoder/, tokenizer/   stock parts of transformers
    transformer/        config.json (`CodeShape`) and model.safetensors
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill.card import Card
from stepdistill.config import build
from stepdistill.denoiser import Cond, Denoiser, parameter_count
from stepdistill.errors import UserError, atomic_write, first_line
from stepdistill.families.base import Family
from stepdistill.families.code_denoisers import CodeStudent, CodeTeacher
from stepdistill.families.code_transformer import CodeShape, CodeTransformer
from stepdistill.families.reading import CLIP_TOKENIZERS, read_index
from stepdistill.provenance import sha256_of_weights
from stepdistill.sampling import Sampling
from stepdistill.schedule import Prefix
from stepdistill.untrusted import LOADING, check_components, check_directory, read_json

NETWORK, AUTOENCODER, TEXT_PARTS = "transformer", "vqvae", ("text_encoder", "tokenizer")
WEIGHTS = "model.safetensors"
INDEX = {
    "_class_name": "AutoregressivePipeline",
    AUTOENCODER: ["diffusers", "VQModel"],
    NETWORK: ["stepdistill", "CodeTransformer"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
}


class Captions(nn.Module):
    """Captions -> the last states of a text encoder, (N, length, width)."""

    def __init__(self, encoder: nn.Module, tokenizer: Any, length: int = CodeShape.text_length):
        super().__init__()
        self.encoder, self.tokenizer, self.length = encoder, tokenizer, length

    @classmethod
    def read(cls, path: Path, length: int = CodeShape.text_length) -> Captions:
        """Of the parts `TEXT_PARTS` of a pipeline directory."""
        from transformers import CLIPTextModel, PreTrainedTokenizerFast

        encoder = CLIPTextModel.from_pretrained(
            path / "text_encoder", dtype=torch.float32, use_safetensors=True
        )
        words = PreTrainedTokenizerFast.from_pretrained(path / "tokenizer")
        return cls(encoder.eval().requires_grad_(False), words, length)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Tensor:
        told = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return self.encoder(input_ids=told.input_ids.to(self.encoder.device)).last_hidden_state

    def cut(self, prompts: Sequence[str]) -> int:
        """How many have more words than are read."""
        return sum(len(ids) > self.length for ids in self.tokenizer(list(prompts)).input_ids)


class Autoregressive(Family):
    """See the module's docstring."""

    name = "ar"
    pipelines = ("AutoregressivePipeline",)
    components: ClassVar = {
        AUTOENCODER: ("diffusers.VQModel",),
        NETWORK: ("stepdistill.CodeTransformer",),
        "text_encoder": ("transformers.CLIPTextModel",),
        "tokenizer": CLIP_TOKENIZERS,
    }
    conditions, latent, of_codes = "prompt", True, True
    # A pass over one place keeps no core busy.
    pair_batch = 256
    default_guidance = 2.0

    @dataclass
    class Config:
        # Pipeline directory.
        teacher: str = ""

    def __init__(self, config: Autoregressive.Config):
        if not config.teacher:
            raise UserError("family.teacher is missing; give a directory of an autoregressive pipeline.")
        self.config, self.metrics, path = config, {}, Path(config.teacher)
        network = read_network(path)
        self.vqvae, self.words = read_parts(path, network)
        shape = network.shape
        self.schedule, self.shape = Prefix(shape.length), (shape.length, shape.dims)
        self.side = round(shape.length**0.5)
        factor = 2 ** (len(self.vqvae.config.block_out_channels) - 1)
        self.resolution = (self.side * factor,) * 2
        denoiser = CodeStudent if shape.student else CodeTeacher
        self.teacher = denoiser(network, "x0", self.schedule).eval().requires_grad_(False)
        # A pass for each code, and by default the map along which the noise of a place says its code.
        self.many_steps = Sampling(steps=(shape.length,), rule="ode", guidance="cfg")

    @classmethod
    def from_directory(
        cls, path: Path, settings: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32
    ) -> Autoregressive:
        return cls(build(cls.Config, dict(settings or {}) | {"teacher": str(path)}, "family"))

    def fresh(self) -> Denoiser:
        twin = self.teacher.clone() if isinstance(self.teacher, CodeTeacher) else self.teacher
        network = CodeTransformer(twin.network.shape)
        network.book = twin.network.book.clone()
        return CodeStudent(network, "x0", self.schedule)

    def encode(self, prompts: Sequence[str]) -> Cond:
        return self.words(prompts)

    def uncond(self, count: int) -> Cond:
        return self.words([""]).expand(count, -1, -1)

    def cut(self, prompts: Sequence) -> int:
        return self.words.cut(prompts)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        pixels = images.to(self.vqvae.device, self.vqvae.dtype) / 127.5 - 1
        said = self.vqvae.encode(pixels).latents.flatten(2).mT.float()
        network = self.teacher.network
        return network.book[network.nearest(said)]

    def decode(self, x0: Tensor) -> Tensor:
        vectors = x0.mT.unflatten(2, (self.side, self.side)).to(self.vqvae.device, self.vqvae.dtype)
        painted = self.vqvae.decode(vectors, force_not_quantize=True).sample
        return (painted / 2 + 0.5).to(x0.device)

    def latent_key(self) -> str:
        return f"{self.name} {sha256_of_weights(self.vqvae)}"

    def text_key(self) -> str:
        return f"{self.name} {sha256_of_weights(self.words)}"

    def park_decoder(self) -> None:
        self.vqvae.to("cpu")

    def modules(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.words, "decoder": self.vqvae}

    def parameters(self) -> dict[str, int]:
        used = (self.vqvae.post_quant_conv, self.vqvae.decoder)
        return {"text": parameter_count(self.words), "decoder": sum(map(parameter_count, used))}

    def export(self, student: Denoiser, directory: Path, card: Card) -> None:
        source = Path(self.config.teacher)
        for part in (AUTOENCODER, *TEXT_PARTS):
            shutil.copytree(source / part, directory / part)
        write_network(student.network, directory / NETWORK)
        write_index(directory)

    def beyond_stock(self, sampling: Sampling) -> str:
        return "No pipeline of diffusers draws with an autoregressive model of codes or with its student."


def write_index(directory: Path) -> None:
    """model_index.json of a pipeline directory of this family."""
    with atomic_write(directory / "model_index.json") as temporary:
        temporary.write_text(json.dumps(INDEX, indent=2) + "\n", encoding="utf-8")


def write_network(network: CodeTransformer, folder: Path) -> None:
    """Its configuration and weights; what else lies in the folder is no more."""
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        (temporary / "config.json").write_text(json.dumps(asdict(network.shape), indent=2) + "\n")
        state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})


def read_network(path: Path) -> CodeTransformer:
    """The network of a pipeline directory, in float32. Raises UserError for what is none."""
    index, folder = read_index(path), path / NETWORK
    if index["_class_name"] not in Autoregressive.pipelines:
        raise UserError(f"{path} is a {index['_class_name']}, which the family 'ar' does not serve.")
    check_components(path / "model_index.json", index, Autoregressive.components)
    check_directory(path)
    said = read_json(folder / "config.json")
    sizes = {each.name for each in fields(CodeShape)}
    good = isinstance(said, dict) and set(said) == sizes
    if not good or not all(type(value) in (int, bool) and 0 <= value <= 65536 for value in said.values()):
        raise UserError(
            f"{folder / 'config.json'} must give whole numbers for {', '.join(sorted(sizes))}, and nothing else."
        )
    try:
        network = CodeTransformer(CodeShape(**said))
        network.load_state_dict({k: v.float() for k, v in load_file(folder / WEIGHTS).items()})
    except LOADING as error:
        raise UserError(f"{folder / WEIGHTS} cannot be loaded: {first_line(error)}") from None
    return network


def read_parts(path: Path, network: CodeTransformer) -> tuple[nn.Module, Captions]:
    """Autoencoder and text encoder of a pipeline directory. Raises UserError where they do not fit the network."""
    from diffusers import VQModel

    try:
        vqvae = VQModel.from_pretrained(path / AUTOENCODER, torch_dtype=torch.float32, use_safetensors=True)
        words = Captions.read(path, network.shape.text_length)
    except LOADING as error:
        raise UserError(f"the pipeline at {path} cannot be loaded: {first_line(error)}") from None
    found = tuple(vqvae.quantize.embedding.weight.shape), words.encoder.config.hidden_size
    wanted = tuple(network.book.shape), network.shape.text_width
    if found != wanted:
        raise UserError(
            f"{path}: the transformer is made for codes {wanted[0]} and texts of width {wanted[1]}, and the other parts"
            f" have {found[0]} and {found[1]}; export it again."
        )
    return vqvae.eval().requires_grad_(False), words
