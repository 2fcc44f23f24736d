"""What does not fit together is refused before anything is computed, in one sentence that says what it met."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from worlds import SETTINGS, STEPS

from stepdistill import load
from stepdistill.errors import UserError
from stepdistill.families.pixel import Pixel
from stepdistill.families.schedulers import schedule_of
from stepdistill.families.sd import SD
from stepdistill.families.toy import SCHEDULES
from stepdistill.methods import METHODS
from training.data.prompts import Prompts
from training.fitting import check
from training.recipe import recipe_from
from training.run import build

DATA_FREE = (
    "dmd2", "sim", "sid", "diff_instruct", "vsd", "dmd", "kd", "boot", "reward", "disback", "compose",
    "decoupled_dmd", "cdm", "phased_dmd",
)  # fmt: skip
GAN = {"name": "dmd2", "gan_weight": 0.1}
# And whether real images are needed.
CASES = [
    *((name, SETTINGS.get(name, {}), name not in DATA_FREE) for name in METHODS),
    ("dmd2", {"gan_weight": 0.1}, True),
    ("disback", {"base": GAN}, True),
    ("disback", {"base": GAN, "stage": "degrade"}, False),
    ("compose", {"parts": [{"name": "dmd2"}, GAN]}, True),
]


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    said = str(caught.value)
    # One sentence.
    assert re.fullmatch(r"[^\n]+\.", said) and ". " not in said, said
    return said


def edited(pipeline: Path, to: Path, file: str, **changes) -> Path:
    """A copy of a pipeline directory with some entries of one of its files changed."""
    shutil.copytree(pipeline, to)
    path = to / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return to


@pytest.fixture(scope="module")
def sd(tiny_sd) -> SD:
    return SD(SD.Config(teacher=str(tiny_sd)))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Prompts:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle\na blue square\n")
    return Prompts(Prompts.Config(path=path))


@pytest.mark.usefixtures("own_code")
@pytest.mark.parametrize(("name", "settings", "needs_images"), CASES)
def test_prompts_alone_are_refused_by_the_methods_that_need_images_and_by_no_other(
    name, settings, needs_images, sd, prompts
):
    recipe = recipe_from(
        {
            "family": {"name": "sd", "teacher": str(sd.path)},
            "student": {"steps": list(STEPS.get(name, (1, 2)))},
            "method": {"name": name, **settings},
            "data": {"name": "prompts", "path": "prompts.txt"},
            "optim": {"batch_size": 2},
            "run": {"steps": 1, "out": "runs/x"},
        }
    )
    if needs_images:
        said = refusal(check, recipe, sd, prompts)
        assert f"method '{name}' needs real images" in said and "data.name=prompts has none" in said
    else:
        check(recipe, sd, prompts)


def test_a_method_whose_student_is_told_more_than_its_family_can_tell_is_refused(tiny_ddpm):
    family = Pixel(Pixel.Config(teacher=str(tiny_ddpm)))
    said = refusal(family.student, "teacher", ("end", "guidance"))
    assert "family.name=pixel" in said and "'guidance'" in said


@pytest.mark.parametrize("name", ["sim", "sid", "diff_instruct"])
def test_a_first_state_the_students_pipeline_cannot_start_from_is_refused(name, tiny_ddpm, prompts):
    def recipe(**student):
        return recipe_from(
            {
                "family": {"name": "pixel", "teacher": str(tiny_ddpm)},
                "student": student,
                "method": {"name": name},
                "data": {"name": "toy"},
                "optim": {"batch_size": 2},
                "run": {"steps": 1, "out": "runs/x"},
            }
        )

    family = Pixel(Pixel.Config(teacher=str(tiny_ddpm)))
    said = refusal(check, recipe(), family, prompts)
    assert said.startswith("student.init_noise=sigma: ") and "starts from unit noise; set it to that" in said
    check(recipe(init_noise="unit"), family, prompts)


def test_a_time_of_ones_own_is_refused_where_a_student_is_called_at_listed_times():
    """`scm`'s own is not: nobody asked for it."""

    def made(schedule: str, **student: object):
        sections = {"family": {"name": "toy", "schedule": schedule}, "data": {"name": "toy"}}
        method, run = {"name": "scm"}, {"steps": 1, "out": "runs/x"}
        return recipe_from(sections | {"student": {"steps": [1, 2], **student}, "method": method, "run": run})

    assert refusal(build, made("edm", middle_time=1.3)).startswith(
        "student.middle_time=1.3 changes nothing under"
    )
    for schedule in SCHEDULES:
        build(made(schedule))
        if schedule != "edm":
            build(made(schedule, middle_time=1.3))


def test_what_a_later_stages_method_refuses_is_said_with_the_number_of_that_stage():
    settings = {"name": "dmd2", "t_low": 0.0}
    stages = [{"method": settings | {"t_high": high}, "run": {"steps": 1}} for high in (1.0, 2.0)]
    rest = {"family": {"name": "toy"}, "data": {"name": "toy"}, "run": {"out": "runs/x"}}
    said = refusal(build, recipe_from({**rest, "stages": stages}))
    assert said.startswith("stages.1: method.t_low and method.t_high") and said.endswith("got 0 and 2.")
    said = refusal(build, recipe_from({**rest, **stages[1], "run": {"steps": 1, "out": "runs/x"}}))
    assert said.startswith("method.t_low and method.t_high")


@pytest.mark.parametrize(
    ("method", "student", "says"),
    [
        ({"name": "add", "eye": "dino", "arguments": {"directory": "nowhere"}}, [1], "no directory nowhere of a DINOv2"),
        ({"name": "rdm", "encoders": [{"name": "fourier"}], "prompt_weight": 1.0}, [1], "method.prompt_weight=1: none of"),
        ({"name": "cd", "distance": "lpips", "lpips_weights": "no.safetensors"}, [1], "there is no file no.safetensors"),
        ({"name": "kd", "pair_count": 0}, [1], "method.pair_count must be at least 1, got 0"),
        (
            {"name": "compose", "parts": [{"name": "dmd2"}, {"name": "add", "eye": "dino", "arguments": {"directory": "no"}}]},
            [1],
            "method.parts.1.arguments.directory: there is no directory no of a DINOv2",
        ),
        ({"name": "compose", "parts": [{"name": "dmd2"}, {"name": "kd", "pair_steps": 0}]}, [1], "method.parts.1.pair_steps must"),
        ({"name": "disback", "base": {"name": "dmd", "pair_count": 0}}, [1], "method.base.pair_count must be at least 1"),
        ({"name": "dmd2"}, [1, 2000], "student.steps=[1, 2000]: 2000 steps are more than the 1000 timesteps"),
    ],
)  # fmt: skip
def test_what_a_later_stage_would_end_with_is_refused_before_the_first(method, student, says):
    stages = [
        {"method": {"name": "dmd2"}, "run": {"steps": 1}},
        {"method": method, "student": {"steps": student}, "run": {"steps": 1}},
    ]
    family = {"name": "toy", "schedule": "vp"}
    said = refusal(
        build,
        recipe_from({"family": family, "data": {"name": "toy"}, "stages": stages, "run": {"out": "runs/x"}}),
    )
    assert said.startswith("stages.1: ") and says in said


def test_a_pipeline_no_family_serves_is_refused_with_those_that_are(tiny_ddpm, tmp_path):
    path = edited(tiny_ddpm, tmp_path / "other", "model_index.json", _class_name="AudioLDMPipeline")
    said = refusal(load, path)
    assert f"{path} is a AudioLDMPipeline" in said and "DDPMPipeline" in said


def test_a_scheduler_of_another_process_is_refused(tiny_ddpm, tmp_path):
    from diffusers import CMStochasticIterativeScheduler, IPNDMScheduler

    file = "scheduler/scheduler_config.json"
    path = edited(tiny_ddpm, tmp_path / "kind", file, prediction_type="velocity")
    said = refusal(load, path)
    assert (
        "prediction_type 'velocity' in the teacher's scheduler_config.json" in said
        and "epsilon, v_prediction, sample" in said
    )
    for scheduler in (IPNDMScheduler(), CMStochasticIterativeScheduler()):
        said = refusal(schedule_of, scheduler)
        assert f"{type(scheduler).__name__} has no noise process" in said and "such as DDIMScheduler" in said


def test_a_clip_that_is_asked_about_classes_says_what_it_needs():
    from stepdistill.clip import Clip

    assert Clip().embed_texts(["a red circle"]).shape[0] == 1
    said = refusal(Clip().embed_texts, [3, 1])
    assert "compares images with captions" in said and "prompts are classes" in said
