"""The contract of a family: a diffusers pipeline in, denoisers and an exported pipeline out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from stepdistill.card import Card
from stepdistill.denoiser import Cond, Denoiser, parameter_count
from stepdistill.errors import UserError
from stepdistill.families.faces import cast
from stepdistill.noise import SampleNoise
from stepdistill.sampling import MANY_STEPS, Sampling

if TYPE_CHECKING:
    from stepdistill.lora import LoRA


class Family:
    """Turns a diffusers pipeline into a `Denoiser` and a trained student back into a pipeline directory.

    Attributes every family sets:
        teacher: the pipeline's denoiser, or None when a fresh network is to be trained.
        shape: of one x0, without the batch: (channels, height, width) of latents or pixels, such as (4, 64, 64), or
            (2,) of points. Of any length; nothing but the family reads a meaning into it.
        resolution: (H, W) of images in pixels.
        conditions: "prompt", "class" or "none"; class_names when known.
        guidable: there is a condition that stands for none (`uncond`), without which there is no guidance.
        pipeline: the diffusers pipeline behind it, None for the toy.
        init_noises: the first states its pipeline can start from, of `sampling.InitNoise`.
        exportable: whether a student can become a pipeline directory (`export`).
        own_data: it draws x0 and classes itself (`examples`, `prompts`); a data source gives indices only.
        preview_count: x0 that make one picture of a preview, drawn at once; None = one picture for each.
        many_steps: how its pipelines are sampled that come without a card.
        output: what its pipeline calls the images it returns.
        needs_images: its conditions are of images, so that prompts alone train nothing.
        pair_batch: trajectories that are worth computing at once, where a training batch is too small.
        image_to_image: the pipeline of diffusers that draws from an image what its own draws from noise; "" = none.
        of_codes: x0 is vectors of codes, and only methods `for_codes` train on it.
    """

    name: ClassVar[str] = ""
    # The pipeline classes it serves, each the `_class_name` of a model_index.json.
    pipelines: ClassVar[tuple[str, ...]] = ()
    # What a model_index.json may name: component -> patterns of "library.Class".
    components: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # Which of them a pipeline may lack.
    optional: ClassVar[tuple[str, ...]] = ()
    # What it may say beside them, values that name no class.
    plain: ClassVar[tuple[str, ...]] = ()
    default_guidance: float = 1.0
    teacher: Denoiser | None
    shape: tuple[int, ...]
    resolution: tuple[int, int]
    conditions: str
    class_names: tuple[str, ...] | None = None
    guidable: bool = True
    pipeline: Any = None
    init_noises: tuple[str, ...] = ("unit",)
    # x0 is the output of an encoder, worth computing once per data set.
    latent: bool = False
    # The family's own, {} for most: of n points, and which way is better, "lower" or "higher".
    metrics: dict[str, tuple[Callable[[Callable[[int], Tensor]], float], str]]
    exportable: bool = True
    # Conditions come from encoders that may leave memory (`drop_text`), worth encoding once per data set.
    has_text: bool = False
    own_data: bool = False
    preview_count: int | None = None
    # The commit at which the teacher was fetched from a hub.
    revision: str = ""
    # LoRAs that were merged into the teacher, for cards: file, scale, sha256.
    loras: tuple[dict[str, Any], ...] = ()
    many_steps: ClassVar[Sampling] = MANY_STEPS
    output: ClassVar[str] = "images"
    needs_images: ClassVar[bool] = False
    pair_batch: ClassVar[int] = 1
    image_to_image: ClassVar[str] = ""
    of_codes: ClassVar[bool] = False

    @classmethod
    def from_directory(
        cls, path: Path, settings: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32
    ) -> Family:
        """The family around a saved pipeline, teacher or student.

        settings: those of the family it was exported from (`settings`). dtype: to hold the weights in from the first.

        Raises:
            UserError: as `read_pipeline` does, or settings that are none.
        """
        raise UserError(
            f"the family {cls.name!r} has no pipeline directories, so {path} cannot be loaded as one."
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What a student's directory must say of its family beyond the pipeline, such as a resolution: plain values."""
        return {}

    def fresh(self) -> Denoiser:
        """A network with random weights, for `student.init=random`."""
        raise UserError(
            f"student.init=random: the family {self.name!r} has no network to start from; use student.init=teacher."
        )

    def student(self, init: str, extras: Sequence[str]) -> Denoiser:
        """The network a run trains.

        init: "teacher" (a copy), "random", or a saved student directory. extras: what it is told besides x_t,
            t, cond.
        """
        if init == "random":
            student = self.fresh()
        elif init == "teacher":
            if self.teacher is None:
                raise UserError(
                    "student.init=teacher needs family.teacher; give its directory or use student.init=random."
                )
            student = self.teacher.clone()
        else:
            student = self._saved(init)
        for extra in extras:
            known = getattr(student.network, "extras", {})
            if extra not in known:
                depth = "set end_by=depth if the method has it, or " if f"{extra}_by_depth" in known else ""
                raise UserError(
                    f"family.name={self.name}: its networks cannot be told the {extra!r} this method.name needs;"
                    f" {depth}choose another method or family."
                )
            student.network.extras[extra]()
        return student

    def _saved(self, init: str) -> Denoiser:
        """A saved student, along this family's noise process: that of its directory may be its first part."""
        try:
            student = type(self).from_directory(Path(init), self.settings).teacher.clone()
        except UserError as error:
            raise UserError(f"student.init={init}: {error}") from None
        if not student.schedule.agrees(self.schedule):
            raise UserError(
                f"student.init={init}: its scheduler's noise process is another than family.teacher's; start from a"
                " student of this teacher."
            )
        if student.native is student.schedule:
            student.native = self.schedule
        student.schedule = self.schedule
        return student

    def prompts(self, source: Any, indices: Sequence[int], uses: Sequence[int] | None = None) -> list:
        """What `encode` is given for the examples `indices` of a data source: captions, class indices, or anything.

        uses: how often each has been used before, None = never; where there are several captions it says which.
        """
        if self.conditions == "prompt":
            return [
                source.caption(i, use) for i, use in zip(indices, uses or [0] * len(indices), strict=True)
            ]
        labels = source.labels if self.conditions == "class" else None
        return [labels[i] for i in indices] if labels is not None else list(indices)

    def sized(self, cond: Cond, sizes: Tensor) -> Cond:
        """A condition told the sizes of its images, for networks that hear of them; for others as it is.

        sizes: (B, 6), in pixels: height and width of the whole image, what is cut off at its top and its left once it has
            the scale of what is left, height and width of what is left.
        """
        return cond

    def shape_at(self, size: tuple[int, int]) -> tuple[int, ...]:
        """`shape` for images of another (height, width). Raises UserError for one that its networks cannot take."""
        if tuple(size) != tuple(self.resolution):
            raise UserError(
                f"the family {self.name!r} takes images of {self.resolution[0]}x{self.resolution[1]} alone;"
                " set data.enable_bucket=false."
            )
        return self.shape

    def cut(self, prompts: Sequence) -> int:
        """How many of the prompts are longer than what `encode` reads of them."""
        return 0

    def encode(self, prompts: Sequence[str] | Sequence[int]) -> Cond:
        """Captions or class indices -> condition, batch first."""
        raise NotImplementedError

    def encode_negative(self, prompts: Sequence[str]) -> Cond:
        """Negative prompts -> condition; pipelines that add words of their own to a prompt leave them out here."""
        return self.encode(prompts)

    def uncond(self, count: int) -> Cond:
        """The condition that stands for none; None where there is none such."""
        raise NotImplementedError

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> x0 (N, *shape)."""
        raise NotImplementedError

    def stills(self, images: Tensor) -> Tensor:
        """Single images uint8 (N, 3, H, W) as what `encode_images` takes."""
        return images

    def examples(self, source: Any, indices: Sequence[int]) -> Tensor:
        """x0 of the images `indices` of a data source."""
        return self.encode_images(torch.from_numpy(source.images(indices)).movedim(-1, -3))

    def completed(self, cond: Cond, uncond: Cond, images: Tensor, noise: SampleNoise) -> tuple[Cond, Cond]:
        """Of a family that `needs_images`: the conditions of a training batch with what they have of its images.

        images: uint8 (N, 3, H, W). noise: of the batch, for what is drawn at random.
        """
        return cond, uncond

    def latent_key(self) -> str:
        """Names everything that `encode_images` depends on besides the images, for caches of x0."""
        raise NotImplementedError

    def text_key(self) -> str:
        """Names everything that `encode` depends on besides the prompts, for caches of conditions."""
        raise NotImplementedError

    def drop_text(self) -> None:
        """Let what turns prompts into conditions leave memory until `load_text`; nothing where there is none."""

    def load_text(self) -> None:
        """Bring back what `drop_text` took, onto the CPU."""

    def park_decoder(self) -> None:
        """Move what `decode` needs to the CPU, where it goes on working; nothing where there is nothing."""

    def decode(self, x0: Tensor) -> Tensor:
        """x0 (N, *shape) -> images in about [0, 1] (N, 3, H, W); differentiable."""
        raise NotImplementedError

    def picture(self, x0: Tensor) -> np.ndarray:
        """x0 (N, *shape) as one row of images, uint8 (H, W, 3), for previews."""
        with torch.no_grad():
            images = self.decode(x0).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
        return torch.cat(list(images), 2).permute(1, 2, 0).numpy()

    def from_stock_noise(self, noise: Tensor) -> Tensor:
        """What a stock pipeline draws between two steps, in its own layout -> (B, *shape)."""
        return noise

    def modules(self) -> dict[str, nn.Module]:
        """Frozen helpers besides the denoiser (VAE, text encoder), by component name."""
        return {}

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Family:
        """Move teacher and helpers; dtype: None = each as it is held."""
        for module in (self.teacher, *self.modules().values()):
            if module is not None:
                cast(module, device, dtype)
        return self

    def parameters(self) -> dict[str, int]:
        """Parameter counts of the helpers a generated image costs, by stage."""
        return {name: parameter_count(module) for name, module in self.modules().items()}

    def lora_file(self, student: LoRA, directory: Path) -> Path | None:
        """Write adapters as the stock pipeline's `load_lora_weights` reads them; None where `no_lora_file` says why not."""
        return None

    @property
    def no_lora_file(self) -> str:
        """Why adapters cannot leave as a file of their own, one sentence; "" = they can."""
        return f"The family {self.name!r} has no pipeline that reads a LoRA."

    def student_scheduler(self, card: Card, kind: str) -> Any:
        """The stock scheduler that a student of this card leaves with. kind: what its network predicts."""
        raise UserError(f"the family {self.name!r} has no pipeline to export to.")

    def export(self, student: Denoiser, directory: Path, card: Card) -> None:
        """Write a stock diffusers pipeline directory with the scheduler that samples as `card.sampling` says.

        Raises:
            UserError: there is no pipeline to export to.
        """
        raise UserError(f"the family {self.name!r} has no pipeline to export to.")

    # ------------------------------------------------------------------------- how a stock pipeline draws, for the card

    def stock_load(self) -> dict[str, Any]:
        """What `from_pretrained` must be told beside the directory."""
        return {}

    def stock_call(self, guidance_scale: float) -> dict[str, Any]:
        """Arguments by which the stock pipeline draws at this family's resolution and guidance, 1 = off, besides prompts,
        steps and generators.
        """
        return {}

    def stock_inputs(self) -> dict[str, str]:
        """Arguments of a stock call that are no plain values, as Python code, in which `Image` is Pillow's."""
        return {}

    def stock_sampling(self, sampling: Sampling, guidance_scale: float) -> dict[str, Any]:
        """The same for what is sampled as `sampling` says, which may have its guidance told or distilled."""
        told = self.stock_call(guidance_scale if sampling.guidance == "cfg" else 1.0)
        # All pipelines call the scale so that a network is told.
        return told | ({"guidance_scale": guidance_scale} if sampling.guidance == "input" else {})

    def stock_steps(self, sampling: Sampling, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """(settings, arguments): what the scheduler must be made with otherwise than it left for a student of so many
        steps, and the call's arguments beside `num_inference_steps`.
        """
        return {}, {}

    def beyond_stock(self, sampling: Sampling) -> str:
        """One sentence on why the stock pipeline of this family draws no student sampled so, "" where it does."""
        return ""
