"""Train the micro-CLIP on captioned scenes: a stock CLIPModel with a tokenizer of whole words.

    python -m training.embedded.clip --clip assets/clip --teacher assets/teacher

Its text tower is the embedded teacher's text encoder, its score the embedded CLIP score. Both need to know
which colour belongs to which shape, and scenes drawn at random are told apart without: so half of every batch
differs from the other half in a single attribute, every image also faces such a caption that belongs to no
image, and one linear head, shared by both towers and thrown away afterwards, reads every attribute from the
common embedding. A second head reads off each patch of an image what lies there.

The contrastive loss is that of CLIP (Radford et al., "Learning Transferable Visual Models From Natural
Language Supervision", arXiv 2103.00020). The length is given in steps, so a seed gives the same weights on
the same machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill import scenes
from stepdistill.errors import UserError, atomic_write, cli_errors
from training.embedded import common

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerFast

TOKENS = 24  # longest prompt, with start and end
SPECIAL = (
    "<pad>",
    "<start>",
    "<unk>",
    "<end>",
)  # ids 0 to 3; CLIP's pooling treats an end token of id 2 differently
AUXILIARY = 1.0  # weight of the attribute loss
STRANGE = 0.05  # share of captions with a word that is not in the vocabulary
EXTRA = 1  # captions per image that belong to no image of the batch
SIZES = tuple(map(len, common.QUESTIONS.values()))  # logits per question
PATCH_SIZES = (3, len(scenes.SHAPES) + 1, len(scenes.COLOURS) + 1, 3)  # which object, its shape, colour, size

# ------------------------------------------------------------------------------------------------ the models


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the vocabulary; case and punctuation do not matter; other words become <unk>."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate((*SPECIAL, *scenes.VOCABULARY))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(name, ids[name]) for name in ("<start>", "<end>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TOKENS,
        pad_token="<pad>",
        bos_token="<start>",
        unk_token="<unk>",
        eos_token="<end>",
        padding_side="right",
        truncation_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_model() -> CLIPModel:
    """A fresh CLIPModel with 1 M parameters."""
    from transformers import CLIPConfig, CLIPModel

    token = {
        name: SPECIAL.index(f"<{word}>") for name, word in (("pad", "pad"), ("bos", "start"), ("eos", "end"))
    }
    text = {
        "vocab_size": len(SPECIAL) + len(scenes.VOCABULARY),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": TOKENS,
        "hidden_act": "gelu",
        "projection_dim": 64,
        **{f"{name}_token_id": value for name, value in token.items()},
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "hidden_act": "gelu",
        "projection_dim": 64,
    }
    # The initialiser is scaled for widths near 1,000; at 128 it leaves the first layers nearly blind.
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=64, initializer_factor=3.0)
    )


def embed_images(model: CLIPModel, images: Tensor) -> Tensor:
    """Embeddings (N, 64), not normalised, of uint8 images (N, 3, 64, 64)."""
    return look(model, images)[0]


def look(model: CLIPModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings as `embed_images`, and the last states (N, 64, 128) of the image's patches, row by row."""
    seen = model.vision_model(pixel_values=common.to_unit(images))
    return model.visual_projection(seen.pooler_output), seen.last_hidden_state[:, 1:]


def embed_captions(model: CLIPModel, ids: Tensor) -> Tensor:
    """Embeddings (N, 64), not normalised, of token ids (N, L)."""
    return model.text_projection(model.text_model(input_ids=ids).pooler_output)


# ------------------------------------------------------------------------------------------------ the lessons


def vary(scene: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
    """A scene that differs in one thing: a colour, shape or size, the background, or what two objects
    exchange.
    """
    while True:
        changed = _vary_once(scene, rng)
        if common.canonical(changed) != common.canonical(
            scene
        ):  # two circles may have exchanged their shapes
            return changed


def _vary_once(scene: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
    kinds = ["colour", "shape", "size", "background"]
    if scene.relation is not None:
        kinds += ["relation", "turn", "swap colour", "swap shape", "swap size"]
    kind = kinds[rng.integers(len(kinds))]
    used = {scene.background, *(thing.colour for thing in scene.objects)}
    unused = [name for name in scenes.COLOURS if name not in used]
    things = list(scene.objects)
    k = int(rng.integers(len(things)))
    if kind == "background":
        return replace(scene, background=unused[rng.integers(len(unused))])
    if kind == "relation":
        return replace(scene, objects=scene.objects[::-1])
    if kind == "turn":
        return replace(scene, relation=scenes.RELATIONS[rng.integers(len(scenes.RELATIONS))])
    if kind.startswith("swap"):
        name = kind.split()[1]
        mine, yours = (getattr(thing, name) for thing in things)
        things = [replace(things[0], **{name: yours}), replace(things[1], **{name: mine})]
    else:
        choices = {"colour": unused, "shape": scenes.SHAPES, "size": scenes.SIZES}[kind]
        things[k] = replace(things[k], **{kind: choices[rng.integers(len(choices))]})
    return replace(scene, objects=tuple(things))


class Reader(nn.Module):
    """Answers to `common.QUESTIONS` from an embedding (N, 64): one linear layer for both towers, so that
    they agree.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.linear = nn.Linear(64, sum(SIZES))

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        return self.linear(self.norm(embedding)).split(SIZES, dim=1)

    def loss(self, embedding: Tensor, truth: Tensor) -> Tensor:
        """Mean cross-entropy over the questions; truth: (N, 8) integers."""
        parts = [F.cross_entropy(logits, truth[:, k]) for k, logits in enumerate(self(embedding))]
        return torch.stack(parts).mean()


class Pointer(nn.Module):
    """What lies in each patch, from its last state (N, 64, 128).

    A vision transformer learns slowly from one answer per image, and fast from 64.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.linear = nn.Linear(128, sum(PATCH_SIZES))

    def loss(self, patches: Tensor, truth: Tensor) -> Tensor:
        """Mean cross-entropy, half of it on patches with an object; truth: (N, 64, 4) out of
        `patch_truth`.
        """
        logits = self.linear(self.norm(patches)).flatten(0, 1).split(PATCH_SIZES, dim=1)
        truth = truth.flatten(0, 1)
        each = sum(F.cross_entropy(part, truth[:, k], reduction="none") for k, part in enumerate(logits))
        empty = truth[:, 0] == 2
        return (each[empty].mean() + each[~empty].mean()) / (2 * len(PATCH_SIZES))


def patch_truth(images: Tensor, answers: Tensor) -> Tensor:
    """Which object covers at least a fifth of each 8 x 8 patch (2: none), and its shape, colour and size.

    images: uint8 (N, 3, 64, 64); answers: (N, 8), `common.answers` of each. Returns integers (N, 64, 4).
    """
    palette = torch.tensor([*scenes.COLOURS.values(), (1e6, 1e6, 1e6)])  # the last is the colour of no object
    colours = palette[answers[:, [1, 4, 7]]]  # (N, 3 things, 3)
    distance = (images[:, None].float() - colours[..., None, None]).square().sum(2)
    owner = F.one_hot(distance.argmin(1), 3)[..., :2].permute(0, 3, 1, 2).float()
    share = F.avg_pool2d(owner, 8).flatten(2)  # (N, 2 objects, 64)
    most, which = share.max(1)
    which = torch.where(most >= 0.2, which, 2)
    nothing = torch.tensor([len(scenes.SHAPES), len(scenes.COLOURS), len(scenes.SIZES)]).expand(
        len(images), 3
    )
    things = torch.stack([answers[:, 0:3], answers[:, 3:6], nothing], 1)  # (N, 3, 3)
    described = things.gather(1, which[..., None].expand(-1, -1, 3))
    return torch.cat([which[..., None], described], 2)


def contrast(images: Tensor, captions: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's loss of N images and M >= N captions; caption i belongs to image i, captions from N on to no
    image.

    images: (N, D), captions: (M, D), not normalised; same: (N, M) bool, further captions that are true of an
    image as well and hence no negatives.
    """
    logits = scale * F.normalize(images, dim=1) @ F.normalize(captions, dim=1).T
    logits = logits.masked_fill(same, -torch.inf)
    truth = torch.arange(len(images))
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits[:, : len(images)].T, truth)) / 2


def draw_batch(rng: np.random.Generator, half: int) -> tuple[list[scenes.Scene], Tensor, Tensor]:
    """Scenes of 2 half images and of their extra captions, the images (uint8), and `same` for `contrast`."""
    base = [scenes.sample_scene(rng) for _ in range(half)]
    shown = base + [vary(scene, rng) for scene in base]
    drawn = shown + [vary(scene, rng) for _ in range(EXTRA) for scene in shown]
    images = torch.from_numpy(np.stack([scenes.render(scene, rng) for scene in shown])).permute(0, 3, 1, 2)
    numbers: dict[scenes.Scene, int] = {}
    keys = torch.tensor([numbers.setdefault(common.canonical(scene), len(numbers)) for scene in drawn])
    same = keys[: len(shown), None] == keys[None, :]
    same[:, : len(shown)].fill_diagonal_(False)
    return drawn, images, same


def caption_with_noise(scene: scenes.Scene, rng: np.random.Generator) -> str:
    """The caption, sometimes with a word nobody knows, which therefore learns to mean nothing."""
    words = scene.caption.split()
    if rng.random() < STRANGE:
        words.insert(int(rng.integers(len(words) + 1)), SPECIAL[2].strip("<>"))
    return " ".join(words)


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> Tensor:
    """Ids (N, L), L the longest: attention is causal, so padding behind the end token changes no
    embedding.
    """
    return tokenizer(list(captions), padding="longest", truncation=True, return_tensors="pt").input_ids


# ------------------------------------------------------------------------------------------------ measuring


@torch.no_grad()
def retrieval(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, count: int) -> dict[str, float]:
    """Share of held-out images whose own caption wins: among 32 random ones, and among 8 that differ in
    one thing.
    """
    drawn, images = common.scene_pool(count, seed=scenes.HELD_OUT_SEED)
    rng = np.random.default_rng(scenes.HELD_OUT_SEED)
    groups = []
    for scene in drawn:
        group = {common.canonical(scene): scene}
        while len(group) < 8:
            other = vary(scene, rng)
            group.setdefault(common.canonical(other), other)
        groups.append(list(group.values()))
    pictures = torch.cat([F.normalize(embed_images(model, part), dim=1) for part in images.split(64)])
    captions = [scene.caption for group in groups for scene in group]
    texts = torch.cat(
        [
            F.normalize(embed_captions(model, tokenize(tokenizer, captions[k : k + 512])), dim=1)
            for k in range(0, len(captions), 512)
        ]
    ).view(count, 8, -1)
    hard = torch.einsum("nd,nkd->nk", pictures, texts).argmax(1) == 0
    hits = []
    for start in range(0, count - count % 32, 32):
        part = slice(start, start + 32)
        hits.append((pictures[part] @ texts[part, 0].T).argmax(1) == torch.arange(32))
    cosine = (pictures * texts[:, 0]).sum(1)
    return {
        "right caption of 32 random": round(torch.cat(hits).float().mean().item(), 4),
        "right caption of 8 hard": round(hard.float().mean().item(), 4),
        "cosine of pairs": round(cosine.mean().item(), 4),
    }


# ------------------------------------------------------------------------------------------------ the run


def save(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, clip: Path, teacher: Path) -> None:
    """Write CLIP (with tokenizer and image processor) and the teacher's text_encoder and tokenizer, half
    precision.
    """
    from transformers import CLIPImageProcessor

    half = copy.deepcopy(model).half()
    processor = CLIPImageProcessor(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    with atomic_write(clip) as temporary:
        half.save_pretrained(temporary)
        save_tokenizer(tokenizer, temporary)
        processor.save_pretrained(temporary)
    with atomic_write(teacher / "text_encoder") as temporary:
        half.text_model.save_pretrained(temporary)
    with atomic_write(teacher / "tokenizer") as temporary:
        save_tokenizer(tokenizer, temporary)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the tokenizer under the class name that every release of transformers knows."""
    tokenizer.save_pretrained(out)
    config = json.loads((Path(out) / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (Path(out) / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def train(args: argparse.Namespace) -> None:
    """Train, save, measure; see the module's docstring."""
    started = time.monotonic()
    common.prepare(args.threads, args.seed)
    tokenizer, model, reader, pointer = build_tokenizer(), build_model(), Reader(), Pointer()
    if args.init:  # the auxiliary heads are not kept, and learn anew in the first hundred steps
        model = type(model).from_pretrained(args.init, dtype=torch.float32)
    average = common.Average(model, 0.998)
    parameters = [*model.parameters(), *reader.parameters(), *pointer.parameters()]
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    rng = np.random.default_rng(args.seed)
    logged = time.monotonic()
    for step in range(args.stop or args.steps):
        drawn, images, same = draw_batch(rng, args.batch // 2)
        ids = tokenize(tokenizer, [caption_with_noise(scene, rng) for scene in drawn])
        truth = torch.tensor([common.answers(scene) for scene in drawn])
        for group in optimiser.param_groups:
            group["lr"] = args.lr * common.cosine(step, args.steps, args.warmup)
        (pictures, patches), texts = look(model, images), embed_captions(model, ids)
        contrastive = contrast(pictures, texts, model.logit_scale.exp(), same)
        seen, said = reader.loss(pictures, truth[: len(images)]), reader.loss(texts, truth)
        pointed = pointer.loss(patches, patch_truth(images, truth[: len(images)]))
        optimiser.zero_grad(set_to_none=True)
        (contrastive + AUXILIARY * (seen + said + pointed)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))
        average.update(model)
        if time.monotonic() - logged > 60:
            logged = time.monotonic()
            scores = retrieval(average.module, tokenizer, 128)
            print(
                f"{logged - started:6.0f} s  step {step + 1}/{args.steps}  "
                f"contrastive {contrastive.item():.3f}  seen {seen.item():.3f}  said {said.item():.3f}  "
                f"pointed {pointed.item():.3f}  "
                f"scale {model.logit_scale.exp().item():.1f}  {scores}",
                flush=True,
            )
            if args.partial:
                save(average.module, tokenizer, Path(args.partial) / "clip", Path(args.partial) / "teacher")
    clip, teacher = Path(args.clip), Path(args.teacher)
    save(average.module, tokenizer, clip, teacher)
    reread = type(model).from_pretrained(clip, dtype=torch.float32)  # measured is what was written
    common.write_report(
        clip / "training.json",
        started,
        command=common.command(__spec__.name, args, ("init", "steps", "stop", "lr", "seed")),
        steps=args.steps,
        retrieval=retrieval(reread, tokenizer, 512),
        parameters={
            "text": sum(p.numel() for p in model.text_model.parameters()),
            "vision": sum(p.numel() for p in model.vision_model.parameters()),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clip", required=True, help="directory for the CLIP model")
    parser.add_argument(
        "--teacher", required=True, help="pipeline directory that receives text_encoder and tokenizer"
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--stop", type=int, default=0, help="leave the schedule of --steps at this step; 0 = at its end"
    )
    parser.add_argument("--init", default="", help="directory of a CLIP model to start from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--partial", default="", help="directory that receives a copy every minute")
    args = parser.parse_args()
    with cli_errors():
        for name in ("steps", "threads", "batch", "warmup"):
            common.positive(name, getattr(args, name))
        if args.batch < 4 or args.batch % 2:
            raise UserError(f"--batch is {args.batch}; give an even number, 4 or more.")
        train(args)


if __name__ == "__main__":
    main()
