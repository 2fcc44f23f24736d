"""diffusers' schedulers: the noise process one stands for, and the one a student leaves with."""

from __future__ import annotations

from typing import Any

from stepdistill.errors import UserError
from stepdistill.sampling import Sampling
from stepdistill.schedule import VP, Flow, Schedule


def schedule_of(scheduler: Any) -> tuple[Schedule, str]:
    """A diffusers scheduler's noise process and the kind its network predicts.

    Raises:
        UserError: a scheduler whose process is none of ours.
    """
    kinds = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
    if hasattr(scheduler, "alphas_cumprod"):
        kind = getattr(scheduler.config, "prediction_type", "epsilon")
        if kind not in kinds:
            raise UserError(
                f"prediction_type {kind!r} in the teacher's scheduler_config.json is none of {', '.join(kinds)};"
                " set it to what the network predicts."
            )
        return VP(scheduler.alphas_cumprod), kinds[kind]
    if type(scheduler).__name__.startswith("FlowMatch"):
        return Flow(float(scheduler.config.get("shift") or 1.0)), "flow"
    raise UserError(
        f"the teacher's scheduler {type(scheduler).__name__} has no noise process this library knows; put one with"
        " alphas_cumprod (such as DDIMScheduler) or a FlowMatch one into its directory."
    )


def few_step_scheduler(scheduler: Any, sampling: Sampling) -> Any:
    """The stock scheduler whose rule and timesteps are the student's.

    `LCMScheduler`, like `TCDScheduler`, keeps no `timesteps` in its config; a uniform grid of `finest` points lives in
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
    # A table that ends where the student starts.
    if sampling.first_rho:
        entries = schedule_of(scheduler)[0].entries(sampling.first_rho)
        kept |= {"num_train_timesteps": entries, "trained_betas": scheduler.betas[:entries].tolist()}
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
        rescale_betas_zero_snr=False,
    )
