"""A CLIP model as methods see it: embeddings and hidden states of images in [0, 1], differentiable, and of texts.

The embedded micro-CLIP (`assets/clip`) stands where a full-size CLIP or DINO would; any directory with a
transformers CLIPModel, its tokenizer and preprocessor_config.json does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from stepdistill import assets
from stepdistill.errors import UserError, first_line
from stepdistill.untrusted import LOADING, check_configurations, check_directory, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Clip(nn.Module):
    """Frozen. directory: "" is the embedded model.

    Raises:
        UserError: the directory holds no CLIP model that can be loaded.
    """

    def __init__(self, directory: str = ""):
        super().__init__()
        path = Path(directory) if directory else assets.path("clip")
        self.directory = str(path)
        if path.is_dir():
            check_directory(path)
        mean, std = normalisation(path)
        self.model = pretrained("CLIPModel", path, use_safetensors=True)
        self.tokenizer = tokenizer(path)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.eval().requires_grad_(False)
        try:
            ids = self._tokens(["a"])
            known = (
                ids.shape[1] <= self._positions and int(ids.max()) < self.model.config.text_config.vocab_size
            )
        except (TypeError, ValueError, OverflowError, RuntimeError):
            known = False
        if not known:
            raise UserError(f"the tokenizer in {path} gives what its model has no places for; copy it again.")

    @property
    def width(self) -> int:
        """Of the hidden states of images."""
        return self.model.config.vision_config.hidden_size

    @property
    def layers(self) -> int:
        """Transformer layers over images."""
        return self.model.config.vision_config.num_hidden_layers

    @property
    def dim(self) -> int:
        """Of embeddings."""
        return self.model.config.projection_dim

    def pixels(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in about [0, 1] at the model's size, normalised. Not clamped, which would
        stop gradients.
        """
        # Decoders may give half precision, in which CPUs cannot resize.
        images, side = images.float(), self.model.config.vision_config.image_size
        if images.shape[-2:] != (side, side):
            images = nnf.interpolate(images, (side, side), mode="bicubic", antialias=True)
        return (images - self.mean) / self.std

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, dim)."""
        return self.model.get_image_features(pixel_values=self.pixels(images)).pooler_output

    def hidden_states(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Token states (B, tokens, width) after the given layers, counted from 1."""
        states = self.model.vision_model(
            pixel_values=self.pixels(images), output_hidden_states=True
        ).hidden_states
        return [states[i] for i in layers]

    @torch.no_grad()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """(B, dim).

        Raises:
            UserError: the prompts are no texts.
        """
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(
                "a CLIP model compares images with captions, and this run's prompts are classes; use a family that"
                " is told captions, or a reward or eye of your own (my_module:MyClass, with --allow-code)."
            )
        ids = self._tokens(prompts).to(self.mean.device)
        return self.model.get_text_features(input_ids=ids).pooler_output

    @property
    def _positions(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    def _tokens(self, prompts: Sequence[str]) -> Tensor:
        length = min(self.tokenizer.model_max_length, self._positions)
        told = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return told.input_ids


def normalisation(path: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3, 1, 1) out of a directory's preprocessor_config.json.

    Raises:
        UserError: the file is missing or has none.
    """
    try:
        settings = read_json(path / "preprocessor_config.json")
        mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    except (UserError, ValueError, KeyError, RuntimeError, TypeError, OverflowError) as error:
        raise UserError(
            f"{path / 'preprocessor_config.json'} cannot be read ({type(error).__name__}); copy the model again."
        ) from None
    return mean, std


def pretrained(kind: str, path: Path, **options: Any) -> nn.Module:
    """A frozen model of transformers from a directory, float32; `options` go to `from_pretrained`.

    Raises:
        UserError: it cannot be loaded, or the directory lacks some of its weights.
    """
    import transformers
    from transformers.utils import logging

    if path.is_dir():
        check_configurations(path)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # A repository without safetensors is opened by transformers with weights_only=True.
        network, info = getattr(transformers, kind).from_pretrained(
            path, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
        )
    except UserError:
        raise
    except LOADING as error:
        raise UserError(
            f"the model in {path} cannot be loaded ({first_line(error)}); copy it again."
        ) from None
    finally:
        if shown:
            logging.enable_progress_bar()
    # Transformers fills these with random numbers and goes on.
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:
        raise UserError(
            f"the model in {path} lacks {len(absent)} weights of a {kind}, like {absent[0]}; copy it again."
        )
    return network.eval().requires_grad_(False)


def tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory. Raises UserError when it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except UserError:
        raise
    except LOADING as error:
        raise UserError(
            f"the tokenizer in {path} cannot be loaded ({first_line(error)}); copy it again."
        ) from None
