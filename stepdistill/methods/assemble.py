"""The networks of a run, put together here alone: for the trainer, its forecast, the benchmarks and the tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from stepdistill.denoiser import Denoiser, Overlay, unwrap
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.lora import NO_LORA, LoRA, LoraConfig, checkpointed
from stepdistill.methods.base import Method, Networks
from stepdistill.pruning import Pruned

# Iterations whose turns `trained_by` looks at.
LOOKED_AT, WINDOWS = 32_768, 32
# What settings are where nothing is guided, the first of them in messages; by the end of their names.
UNGUIDED = {
    "guidance_scale": (1,),
    "guidance_low": (1,),
    "guidance_high": (1,),
    "kappa": (0,),
    "augmentation": (0,),
    # 0 is the method's guidance_scale.
    "diversity_guidance": (0, 1),
}


def assemble(
    method: Method,
    family: Family,
    init: str = "teacher",
    *,
    lora: LoraConfig = NO_LORA,
    before: Denoiser | None = None,
    gradient_checkpointing: bool = False,
    dropout: float = 0.0,
) -> Networks:
    """The student, what the method makes beside it, and the family's teacher where the method needs one.

    Fresh weights come from torch's global generator: seed it first. Nothing is frozen, wrapped or moved.

    Args:
        init: what the student starts as: "teacher", "random", or a saved student's directory.
        lora: with a rank, the student is adapters over that network, which for "teacher" is the teacher itself.
        before: a student whose weights this one takes over, wherever both have them: the stage before's.
        gradient_checkpointing: recompute the student's activations, and those of copies of it, in backward.
        dropout: the share of activations that the student's dropout layers, and those of copies of it, drop from now on.

    Raises:
        UserError: the family has no such student or teacher, or cannot checkpoint its gradients, or has no dropout.
    """
    if method.needs_captions and family.conditions != "prompt":
        raise UserError(
            f"family.name={family.name}: the method's reward or eye reads captions, and this teacher is told"
            f" {'classes' if family.conditions == 'class' else 'nothing'}; use a family that is told captions, or a"
            " reward or eye of your own (my_module:MyClass, with --allow-code)."
        )
    refuse_codes(method, family)
    _refuse_untold(method, family)
    _refuse_guidance(method, family)
    student = new_student(method, family, init, lora)
    _refuse_undefined(method, family, student)
    if before is not None:
        _start_from(before, student)
    if gradient_checkpointing:
        _checkpoint_gradients(student)
    if dropout:
        _drop_out(student, dropout)
    teacher = family.teacher if method.needs_teacher else None
    modules: dict[str, nn.Module] = {"student": student, **method.networks(teacher, student)}
    if teacher is not None:
        modules["teacher"] = teacher
    return Networks(modules, family.schedule, family.decode)


def new_student(method: Method, family: Family, init: str, lora: LoraConfig) -> Denoiser:
    """The student a run starts from. Raises UserError where the family has none such."""
    if family.teacher is not None and init != "random":
        base = family.teacher if init == "teacher" else family.student(init, ()).requires_grad_(False)
        made = method.student_over(base)
        if made is not None and lora:
            raise UserError(
                f"student.lora: {type(method).__name__} trains whole blocks in the place of others; set its rank to 0."
            )
        if made is not None:
            return made
    if not lora:
        return family.student(init, method.sampling.inputs)
    if init == "random":
        raise UserError(
            "student.lora adapts weights that are there; with student.init=random set its rank to 0."
        )
    if method.for_codes:
        raise UserError(
            "student.lora: a student of codes hears noise, through layers its teacher lacks and no LoRA file holds; set"
            " student.lora.rank to 0."
        )
    if method.sampling.inputs:
        raise UserError(
            f"student.lora: {type(method).__name__} tells its student {', '.join(method.sampling.inputs)}, through"
            " a layer no LoRA file holds; set student.lora.rank to 0, or for lcm method.tell_guidance to false."
        )
    if init == "teacher" and family.teacher is not None:
        return lora.over(family.teacher.backbone())
    return lora.over(family.student(init, ()).requires_grad_(False))


def take_over(
    method: Method, modules: Mapping[str, nn.Module], before: Mapping[str, nn.Module], where: str
) -> None:
    """Load the weights of `Method.carried` from the networks of the stage before; every key must match.

    A composition's network is called part/name; where no name is the same, the part's is left out, if that means
    one network alone.

    Args:
        where: the stage in messages, "stages.1".

    Raises:
        UserError: there is no such network, or it is of another make.
    """
    for name in method.carried:
        alike = [key for key in before if key.split("/")[-1] == name.split("/")[-1]]
        source = name if name in before else alike[0] if len(alike) == 1 else None
        if source is None:
            raise UserError(
                f"{where}.method takes the network {name!r} over from the stage before, which has"
                f" {', '.join(sorted(before)) or 'none'}; write both as `stages:` with the same settings."
            )
        try:
            modules[name].load_state_dict(before[source].state_dict())
        except RuntimeError:
            # Other keys or shapes: a LoRA cannot go on as a whole network.
            raise UserError(
                f"{where}.method takes the network {name!r} over from the stage before, whose"
                f" {source!r} is of another make; carry between methods that build it alike."
            ) from None


def trained_by(method: Method, steps: int) -> list[str]:
    """Names of the networks that a run of so many steps trains, sorted.

    Of a long run, the first `LOOKED_AT` iterations are looked at, and `WINDOWS` windows over the rest up to its end: no method
    takes more than a window until all have had their turn.
    """
    window = LOOKED_AT // WINDOWS
    looked_at = [range(min(steps, LOOKED_AT))]
    if steps > LOOKED_AT:
        starts = (LOOKED_AT + (steps - LOOKED_AT) * i // WINDOWS for i in range(1, WINDOWS + 1))
        looked_at += [range(max(end - window, LOOKED_AT), end) for end in starts]
    named = (phase.trains for part in looked_at for step in part for phase in method.phases(step))
    return sorted({name for trains in named for name in trains})


def _start_from(before: Denoiser, student: Denoiser) -> None:
    """The weights of `before` in `student`, which may take other inputs (LCM's guidance).

    What only `student` has starts at zero by contract, and what only `before` had is left behind.
    """
    own = student.state_dict()
    if isinstance(before, Pruned) or isinstance(student, Pruned):
        raise UserError(
            "stages: a stage that removes blocks leaves another network, which no other stage goes on with; make it a run"
            " of its own, and its student the family.teacher of the next."
        )
    if isinstance(student, LoRA):
        theirs = before.state_dict() if isinstance(before, LoRA) else {}
        if {k: v.shape for k, v in theirs.items()} != {k: v.shape for k, v in own.items()}:
            raise UserError(
                "student.lora: the stage before left other weights than adapters of this rank and these targets;"
                " give all stages the same student.lora."
            )
    elif isinstance(before, LoRA):
        before = before.merged()
    known = {name: value for name, value in before.state_dict().items() if name in own}
    student.load_state_dict(own | known)


def refuse_codes(method: Method, family: Family) -> None:
    """UserError where one of the two is of codes and the other is not, or codes have a teacher that is a student."""
    if method.for_codes == family.of_codes:
        if family.of_codes and not hasattr(family.teacher, "logits_behind"):
            raise UserError(
                "family.teacher is a student itself, which says all codes at once; give the autoregressive model it was made"
                " from, and this one as student.init if it is to be trained on."
            )
        return
    if family.of_codes:
        raise UserError(
            f"method.name: the family {family.name!r} has codes and noise place by place, which have no noise level between;"
            " set method.name to dd1."
        )
    raise UserError(
        f"method.name: {type(method).__name__} distils an autoregressive model of codes, and family.name={family.name} is"
        " none; use family.name=ar or another method."
    )


def _refuse_untold(method: Method, family: Family) -> None:
    """Of a teacher that is a student itself: no method tells a teacher what it was trained to be told."""
    told = getattr(family.teacher.network, "told", ()) if method.needs_teacher and family.teacher else ()
    if told:
        raise UserError(
            f"family.teacher: its network was trained to be told {' and '.join(told)} (time_cond_proj_dim in"
            " unet/config.json), which a teacher is not; give the many-step model it was made from, and this one as"
            " student.init if it is to be trained on."
        )


def _refuse_guidance(method: Method, family: Family) -> None:
    """Guided calls would stop a run at its first step, and what asks for `uncond` first would do without and say nothing."""
    if family.guidable:
        return
    found, off = [], []
    for where, config in _configs(method):
        for name, value in vars(config).items():
            unguided = next((UNGUIDED[end] for end in UNGUIDED if name.endswith(end)), None)
            if unguided is not None and value not in unguided:
                found.append(f"{where}.{name}={value:g}")
                off.append(f"{where}.{name}={unguided[0]}")
    if found:
        raise UserError(
            f"{' and '.join(found)}: the teacher has no class that means none (family.null_class=false), so it"
            f" cannot be guided; set {' and '.join(off)}."
        )


def _configs(method: Method, where: str = "method") -> Iterator[tuple[str, Any]]:
    """The settings of a method and of all that it is made of, each with its place in the recipe."""
    yield where, method.config
    for section in vars(method.config):
        # A method inside goes by the name of its section; a composition's are each in a list.
        held = vars(method).get(section)
        if isinstance(held, Method):
            yield from _configs(held, f"{where}.{section}")
    for number, part in enumerate(getattr(method, "parts", ())):
        yield from _configs(part.method, f"{where}.parts.{number}")


def _refuse_undefined(method: Method, family: Family, student: Denoiser) -> None:
    """Noise says nothing of an image where there is no signal, so eps from there on is undefined."""
    kinds = {student.kind} | ({family.teacher.kind} if method.needs_teacher and family.teacher else set())
    movable = method.sampling.hears("first_rho")
    inside = movable and method.sampling.first_rho
    if family.schedule.ends_without_signal and "eps" in kinds and not inside:
        start = (
            "" if not movable else "student.first_rho, the noise level the student starts from, 14 say, or "
        )
        raise UserError(
            "family.teacher: its scheduler's last step has no signal left (rescale_betas_zero_snr), where epsilon"
            f" prediction is undefined; give {start}a teacher of v_prediction."
        )


def _checkpoint_gradients(student: Denoiser) -> None:
    network = unwrap(student).network
    why = getattr(network, "uncheckpointed", "")
    for module in network.children() if not why else ():
        # Every model of diffusers has the method, and some raise in it.
        if getattr(module, "_supports_gradient_checkpointing", False):
            module.enable_gradient_checkpointing(checkpointed)
            return
    why = why or "this family's network cannot do it"
    raise UserError(f"student.gradient_checkpointing=true: {why}; set it to false.")


def _drop_out(student: Denoiser, share: float) -> None:
    """These layers alone are set to train: what else a model draws while it does, such as labels left out, is no method's."""
    if isinstance(student, Overlay):
        raise UserError(
            "student.dropout: this student holds the teacher's own layers, which would drop activations too; set it to 0."
        )
    layers = [layer for layer in student.modules() if isinstance(layer, nn.Dropout)]
    if not layers:
        raise UserError("student.dropout: this family's network has no dropout layers; set it to 0.")
    for layer in layers:
        layer.p = share
        layer.train()
