"""`method.tell_place`: the fake score of a student of several steps is told at what time each answer was given."""

from __future__ import annotations

import pytest
import worlds
from torch import Tensor
from worlds import world

from stepdistill.errors import UserError
from stepdistill.methods import judged

SEVERAL = (
    "diff_instruct",
    "dmd",
    "dmd2",
    "f_distill",
    "sim",
    "sid",
    "sida",
    "decoupled_dmd",
    "anyflow",
)
SETTINGS = {"sida": {"gan_weight": 0.0}, "decoupled_dmd": {"critic_pull": 0.0, "augmentation": 0.0}}


def heard(made: worlds.World) -> tuple[list[Tensor], list[Tensor | None]]:
    """The times the student is asked at, and what the fake score is told besides, from here on."""
    asked: list[Tensor] = []
    told: list[Tensor | None] = []
    made.nets.student.register_forward_pre_hook(lambda _, args: asked.append(args[1]))
    made.nets.fake_score.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs.get("end")), with_kwargs=True
    )
    return asked, told


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", SEVERAL)
def test_the_fake_score_is_told_the_time_of_the_answer_it_is_asked_about(name, shared):
    made = world(name, tell_place=True, shared_samples=shared, **SETTINGS.get(name, {}))
    asked, told = heard(made)
    places = set()
    for step in range(8):
        asked.clear(), told.clear()
        made.method.student_loss(made.nets, made.batch(step))
        answered = asked[-1]
        made.method.critic_loss(made.nets, made.batch(step, "critic"))
        assert told and told[0].unique().equal(answered.unique())
        assert told[-1].unique().equal((answered if shared else asked[-1]).unique())
        places.add(float(answered[0]))
    assert len(places) == 2


def test_untold_it_knows_the_mixture_of_all_places():
    made = world("dmd2")
    _, told = heard(made)
    made.method.student_loss(made.nets, made.batch())
    assert told == [None]


@pytest.mark.parametrize("paired", [False, True])
def test_the_discriminator_is_told_the_same_of_real_and_generated_samples(paired, monkeypatch):
    """Or what is told alone would say which is which."""
    made, real, original = (
        world("dmd2", tell_place=True, gan_weight=1.0, gan_paired=paired),
        [],
        judged.block_features,
    )

    def features(*args, **told):
        real.append(told["end"])
        return original(*args, **told)

    monkeypatch.setattr(judged, "block_features", features)
    _, told = heard(made)
    for step in range(4):
        real.clear(), told.clear()
        made.method.critic_loss(made.nets, made.batch(step, "critic"))
        assert real[0].equal(told[0])


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("dmd2", {"steps": (1,)}, r"student\.steps of 2 or more"),
        ("dmd2", {"fake_score_lora": {"rank": 2}}, r"fake_score_lora\.rank"),
        ("cdm", {}, r"set method\.critic_pull to 0"),
        ("phased_dmd", {}, r"leave it out"),
        ("vsd", {}, r"an adapter over it; set it to false"),
    ],
)
def test_where_there_is_nothing_to_tell_it_is_refused(name, settings, says):
    with pytest.raises(UserError, match=rf"method\.tell_place.*{says}"):
        worlds.method(name, tell_place=True, **settings)
