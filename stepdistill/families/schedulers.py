"""diffusers' schedulers: the noise process one stands for, and the one a student leaves with."""

from __future__ import annotations

import math
from typing import Any

from stepdistill.errors import UserError
from stepdistill.sampling import Sampling
from stepdistill.schedule import VP, Flow, Schedule
from stepdistill.shift import bent, dynamic_mu, shifted

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
        return VP(scheduler.alphas_cumprod), _KINDS[kind]
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
        scheduler: the teacher's, of which a VP student keeps the table. schedule: the student's noise process;
            passes_sigmas: as `schedule_of`.
    """
    if isinstance(schedule, Flow):
        return flow_scheduler(schedule, sampling, passes_sigmas)
    return _table_scheduler(scheduler, sampling)


def _table_scheduler(scheduler: Any, sampling: Sampling) -> Any:
    """`LCMScheduler`, like `TCDScheduler`, keeps no `timesteps` in its config; a uniform grid of `finest` points lives in
    `original_inference_steps`, which also makes a call with the pipeline's default 50 steps a clear error.
    A student of the rule "ode" leaves with `DDIMScheduler`, whose last step is x0 as in our sampler, a one-step
    student of sigma noise with `EulerDiscreteScheduler`. Both take any number of steps: the card says which.
    """
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler

    names = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
    )
    kept = {name: scheduler.config[name] for name in names if name in scheduler.config}
    zero_snr = bool(scheduler.config.get("rescale_betas_zero_snr", False))
    # A table that ends where the student starts; its betas are those of the rescaled table already.
    if sampling.first_rho:
        entries = schedule_of(scheduler)[0].entries(sampling.first_rho)
        kept |= {"num_train_timesteps": entries, "trained_betas": scheduler.betas[:entries].tolist()}
        zero_snr = False
    kept["rescale_betas_zero_snr"] = zero_snr
    if sampling.init_noise == "sigma":
        # One Euler step is x0, and its first input, rho z / sqrt(1 + rho^2), is sigma z.
        return EulerDiscreteScheduler(**kept, timestep_spacing="trailing")
    if sampling.rule == "ode":
        return DDIMScheduler(**kept, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    stepping = TCDScheduler if sampling.rule == "tcd" else LCMScheduler
    return stepping(
        **kept,
        original_inference_steps=sampling.points,
        # Used by neither; the stock pipeline warns of any other.
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
    )


def flow_scheduler(schedule: Flow, sampling: Sampling, passes_sigmas: bool) -> Any:
    """`FlowMatchLCMScheduler` for students that renoise, `FlowMatchEulerDiscreteScheduler` for the ODE, with the
    student's times at the most of its step counts.

    Where the pipeline passes even times, the shift says all. Where it passes a number of steps alone, the scheduler
    lists N times from 1 to its smallest, and another shift and `shift_terminal` bend those to the student's; a
    further step count is then drawn by passing `sigmas`. Of several steps, `scale_factors` of 1 do nothing but
    make a call with another number of steps an error before the second one.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

    steps = max(sampling.steps, default=1)
    shift, terminal = schedule.shift_at(sampling.points), None
    if not passes_sigmas and steps > 1:
        shift, terminal = bent(shift, steps)
    kept = {"shift": shift, "shift_terminal": terminal, "use_dynamic_shifting": False}
    if sampling.rule == "ode":
        return FlowMatchEulerDiscreteScheduler(**kept)
    guard = (
        {"scale_factors": [1.0] * (steps - 1), "upscale_mode": "nearest"} if len(sampling.steps) == 1 else {}
    )
    return FlowMatchLCMScheduler(**kept, **guard)
