"""diffusers' schedulers: the noise process one stands for, and the one a student leaves with."""

from __future__ import annotations

import math
from typing import Any

import torch

from stepdistill.errors import UserError
from stepdistill.sampling import Sampling
from stepdistill.schedule import VP, Flow, Schedule
from stepdistill.shift import bent, dynamic_mu, even, shifted

_KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def schedule_of(scheduler: Any, image_tokens: int = 0, passes_sigmas: bool = True) -> tuple[Schedule, str]:
    """A diffusers scheduler's noise process and the kind its network predicts. How it solves the process does not
    matter: DPM++, UniPC or Euler with Karras times stand for the table or the flow they were configured with.

    Args:
        image_tokens: of one image, by which some flow schedulers shift their times.
        passes_sigmas: the pipeline gives a flow scheduler even times; else the scheduler's own end at its smallest.

    Raises:
        UserError: a scheduler whose process is none of ours.
    """
    config, name = scheduler.config, type(scheduler).__name__
    kind = config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch") or kind == "flow_prediction":
        shift = _shift(scheduler, image_tokens)
        # The smallest of the thousand times, shifted as FlowMatchEulerDiscreteScheduler shifts all it lists.
        static = shift if not config.get("use_dynamic_shifting") else 1.0
        last = 0.0 if passes_sigmas else shifted(1 / config.num_train_timesteps, static)
        return Flow(shift, last, float(config.get("shift_terminal") or 0.0)), "flow"
    if name == "SCMScheduler":
        # Its network is an ordinary one of flow matching in s; the pipeline turns it into TrigFlow's F.
        return Flow(), "flow"
    if hasattr(scheduler, "alphas_cumprod"):
        if kind not in _KINDS:
            raise UserError(
                f"prediction_type {kind!r} in the teacher's scheduler_config.json is none of {', '.join(_KINDS)};"
                " set it to what the network predicts."
            )
        try:
            return VP(scheduler.alphas_cumprod), _KINDS[kind]
        except ValueError as error:
            raise UserError(
                f"the teacher's scheduler_config.json gives betas of no noise process ({error}); fetch it again."
            ) from None
    raise UserError(
        f"the teacher's scheduler {name} has no noise process this library knows; put one with"
        " alphas_cumprod (such as DDIMScheduler) or a FlowMatch one into its directory."
    )


def _shift(scheduler: Any, image_tokens: int) -> float:
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        mu = dynamic_mu(image_tokens, config.get("base_shift", 0.5), config.get("max_shift", 1.15), *tokens)
        return mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)
    return float(config.get("shift") or config.get("flow_shift") or 1.0)


def few_step_scheduler(
    scheduler: Any, sampling: Sampling, schedule: Schedule | None = None, passes_sigmas: bool = True
) -> Any:
    """The stock scheduler whose rule and timesteps are the student's.

    Args:
        scheduler: the teacher's. schedule: the student's noise process. passes_sigmas: as `schedule_of`.
    """
    if isinstance(schedule, Flow):
        return flow_scheduler(schedule, sampling, passes_sigmas)
    return _table_scheduler(scheduler, sampling, schedule or schedule_of(scheduler)[0])


def _table_scheduler(scheduler: Any, sampling: Sampling, schedule: VP) -> Any:
    """`LCMScheduler`, like `TCDScheduler`, keeps no `timesteps` in its config; a uniform grid of `finest` points lives in
    `original_inference_steps`, which also makes a call with the pipeline's default 50 steps a clear error.
    A student of the rule "ode" leaves with `DDIMScheduler`, whose last step is x0 as in our sampler, a one-step
    student of sigma noise with `EulerDiscreteScheduler`. Both take any number of steps: the card says which.

    The table is the student's: said as the teacher's configuration says it where that makes this very table, which it
    does not of a shorter one or by betas that the student's scheduler does not know, and else listed.
    """
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler

    table = schedule.alphas_cumprod[: schedule.entries(sampling.first_rho)]
    if sampling.init_noise == "sigma":
        # One Euler step is x0, and its first input, rho z / sqrt(1 + rho^2), is sigma z.
        stepping, how = EulerDiscreteScheduler, {"timestep_spacing": "trailing"}
        # As its own tables end; it divides by the last entry.
        table = table.clamp(min=2**-24)
    elif sampling.rule == "ode":
        how = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
        stepping = DDIMScheduler
    else:
        stepping = TCDScheduler if sampling.rule == "tcd" else LCMScheduler
        # The offset is used by neither; the stock pipeline warns of any other.
        how = {"clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1}
        how["original_inference_steps"] = sampling.points
    how |= {
        "prediction_type": scheduler.config.get("prediction_type", "epsilon"),
        "num_train_timesteps": len(table),
    }
    names = ("beta_start", "beta_end", "beta_schedule", "trained_betas")
    said = {name: scheduler.config[name] for name in names if name in scheduler.config}
    try:
        made = stepping(**how, **said, rescale_betas_zero_snr=bool(table[-1] < 1e-6))
    except NotImplementedError:
        # A beta schedule that it does not know.
        pass
    else:
        if len(made.alphas_cumprod) == len(table) and torch.allclose(
            made.alphas_cumprod.double(), table, 1e-4, 1e-7
        ):
            return made
    before = torch.cat((table.new_ones(1), table[:-1]))
    return stepping(**how, trained_betas=(1 - table / before).tolist())


def of_kind(scheduler: Any, kind: str) -> Any:
    """`scheduler` for a network that predicts `kind`, "eps", "v" or "x0", where it steps along a table."""
    if hasattr(scheduler, "alphas_cumprod"):
        told = {ours: theirs for theirs, ours in _KINDS.items()}[kind]
        if scheduler.config.get("prediction_type", "epsilon") != told:
            scheduler = type(scheduler).from_config(scheduler.config, prediction_type=told)
    return scheduler


def flow_scheduler(schedule: Flow, sampling: Sampling, passes_sigmas: bool) -> Any:
    """`FlowMatchLCMScheduler` for students that renoise, `FlowMatchEulerDiscreteScheduler` for the ODE, with the
    student's times at the most of its step counts (`flow_settings`).
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

    settings, _ = flow_settings(schedule, sampling, max(sampling.steps, default=1), passes_sigmas)
    stepping = FlowMatchEulerDiscreteScheduler if sampling.rule == "ode" else FlowMatchLCMScheduler
    return stepping(**settings)


def flow_settings(
    schedule: Flow, sampling: Sampling, steps: int, passes_sigmas: bool
) -> tuple[dict[str, Any], list[float] | None]:
    """(settings, sigmas) with which a flow scheduler lists a student's times at `steps` steps: what it is made with, and
    what the pipeline's call must pass as `sigmas`, None where the number of steps is enough.

    Where the pipeline passes even times, the shift says all. Where it passes a number of steps alone, the scheduler
    lists N times from 1 to its smallest, and another shift and `shift_terminal` bend those to the student's. They bend
    whatever `sigmas` are passed as well, so each further step count has settings of its own. `scale_factors` of 1 do
    nothing but make a call with another number of steps an error before the second one; only a renoising scheduler
    has them, and none where one scheduler is to serve several step counts.
    """
    shift, terminal = schedule.shift_at(sampling.points), None
    # Bending there and back leaves round-off, which a card would print.
    unshifted = [round(shifted(t, 1 / shift), 12) for t in sampling.grid(schedule, steps)]
    enough = even(unshifted)
    if enough and not passes_sigmas and steps > 1:
        shift, terminal = bent(shift, steps)
    settings = {"shift": shift, "shift_terminal": terminal, "use_dynamic_shifting": False}
    if sampling.rule != "ode" and (len(sampling.steps) == 1 or not passes_sigmas):
        settings |= {"scale_factors": [1.0] * (steps - 1), "upscale_mode": "nearest"}
    return settings, None if enough else unshifted
