"""A sampler with the interface of stepdistill.Sampler and no weights, for the tests of the app."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from stepdistill.errors import UserError

CANARY = "canary-4711"  # what no answer may hold


class Network(nn.Module):
    """Stands for a denoiser: one attention layer of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.attention_processor import Attention

        torch.manual_seed(0)
        self.attention = Attention(8, heads=2, dim_head=4)

    def forward(self, x):
        return self.attention(x)


class FakeSampler:
    """Draws noise that depends on (prompt, seed, steps, guidance, negative prompt).

    A prompt with "poison" raises, one with "overflow" is refused as the library refuses what is not finite, and
    several with "memory" at once run out of it. Of a picture it depends on the pixels and the strength.
    `gate` holds every step until it is set, so a test decides when a run goes on; `began` is set when a step starts.
    """

    def __init__(
        self, kind="student", delay=0.0, guidance_free=None, conditions="prompt", class_names=None
    ) -> None:
        self.name, self.path, self.family, self.kind = f"fake-{kind}", Path("/nowhere") / kind, "sd", kind
        student = kind == "student"
        self.steps = (1, 2, 4) if student else None
        self.default_steps = 1 if student else 50
        self.image_to_image, self.levels = True, (4.0, 3.0, 2.0, 1.0)
        self.guidance_free = student if guidance_free is None else guidance_free
        self.default_guidance = 1.0 if self.guidance_free else 3.0
        self.resolution, self.conditions, self.class_names = (64, 64), conditions, class_names
        self.parameters = {"denoiser": 1000, "text": 10, "decoder": 10}
        self.pipeline = SimpleNamespace(unet=Network().eval())
        self.denoiser = SimpleNamespace(network=self.pipeline.unet)
        # No CPU, so that nothing is recorded or tried while nobody draws.
        self.device, self.dtype = "fake", torch.float32
        self.delay, self.gate, self.began = delay, threading.Event(), threading.Event()
        self.gate.set()
        self.calls, self.chunks, self.threads = [], [], set()

    def trace(self):
        return self

    def __call__(
        self,
        prompts,
        seeds,
        *,
        steps=None,
        guidance_scale=None,
        negative_prompts=None,
        images=None,
        strength=1.0,
        chunk=16,
        timings=None,
        on_step=None,
    ):
        steps = steps or self.default_steps
        if self.steps and steps not in self.steps:
            raise UserError(f"steps={steps}")
        if self.guidance_free and (negative_prompts or guidance_scale not in (None, 1.0)):
            raise UserError("guidance on a guidance-free student")
        assert len(prompts) <= chunk, "more than one call of the networks"
        self.threads.add(threading.get_ident())
        self.calls += [(prompt, seed, steps) for prompt, seed in zip(prompts, seeds, strict=True)]
        self.chunks.append(chunk)
        began = time.perf_counter()
        if "overflow" in str(prompts):
            raise UserError(f"the image of seed {seeds[0]} is not finite")
        for i in range(steps):
            self.began.set()
            assert self.gate.wait(10), "a test forgot to open the gate"
            time.sleep(self.delay)
            with torch.no_grad():
                self.pipeline.unet(torch.ones(1, 4, 8))
            if "memory" in str(prompts) and len(prompts) > 1:
                raise MemoryError
            if "poison" in str(prompts):
                raise RuntimeError("secret /path/of/ours")
            if on_step:
                on_step(i + 1, steps)
        if timings is not None:
            timings["text"] = timings.get("text", 0.0) + 0.001
            self.spent = time.perf_counter() - began
            timings["denoise"] = timings.get("denoise", 0.0) + self.spent
            timings["decode"] = timings.get("decode", 0.0) + 0.002
        drawn = []
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            negative = negative_prompts[i] if negative_prompts else ""
            key = f"{self.kind}|{prompt}|{seed}|{steps}|{guidance_scale}|{negative}".encode()
            if images is not None and strength < 1:
                key += f"{strength}".encode() + images[i].numpy().tobytes()
            generator = torch.Generator().manual_seed(zlib.crc32(key))
            drawn.append(torch.randint(0, 256, (3, *self.resolution), generator=generator).to(torch.uint8))
        return torch.stack(drawn)


def engine_of(student=None, teacher=None, **options):
    """A ready engine around fake samplers; `teacher=False` serves the student alone."""
    from app.engine import Engine

    student = student or FakeSampler("student")
    made = {"S": student}
    if teacher is not False:
        made["T"] = teacher or FakeSampler("teacher")
    engine = Engine(
        "S",
        "T" if teacher is not False else False,
        loader=lambda path, **_: made[str(path)],
        device="cpu",
        **options,
    )
    engine.start().wait(30)
    while any(entry.state == "loading" for entry in engine.entries.values()):
        time.sleep(0.002)
    for sampler in made.values():
        sampler.calls.clear()
        sampler.chunks.clear()
    return engine


def tiny_pair(root):
    """Stock Stable Diffusion directories of random weights (64x64): root/teacher and root/student."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from training.embedded.clip import build_tokenizer
    from training.embedded.vae import build

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    words = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        **words,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    pipeline = StableDiffusionPipeline(
        vae=build(),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(root / "teacher")
    pipeline.save_pretrained(root / "student")
    card = {"kind": "student", "family": "sd", "name": "tiny", "steps": [1, 2, 4], "guidance_free": True}
    (root / "student" / "stepdistill.json").write_text(
        json.dumps(card | {"rule": "renoise", "init_noise": "unit"})
    )


@contextlib.contextmanager
def served(folder, *, receipt=None, step=0.0):
    """A server of fake models in a process of its own, as `python -m app` runs it: its URL, and its log file.

    Its temporary files, and so the cache of uploads, lie in `folder`. `receipt` is the seconds that a request
    may take to arrive, where not the server's own; `step` those of a step of the teacher.
    """
    command = [sys.executable, __file__, json.dumps({"receipt": receipt, "step": step})]
    env = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).parent.parent)}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command, env={**env, "SECRET": CANARY}, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        first = process.stdout.readline()
        assert first.startswith("page: "), (folder / "log").read_text()
        yield first.split()[1], folder / "log"
        assert process.poll() is None, (folder / "log").read_text()
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def until(condition, seconds=5.0):
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "waited too long"
        time.sleep(0.002)


if __name__ == "__main__":
    from app import __main__, connections

    given = json.loads(sys.argv[1])
    connections.RECEIPT_SECONDS = given["receipt"] or connections.RECEIPT_SECONDS
    made = engine_of(teacher=FakeSampler("teacher", delay=given["step"]))
    __main__.serve(made, __main__._listen("127.0.0.1", 0), "127.0.0.1", [])
