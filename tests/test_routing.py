"""Several students: partitions of prompts and classes, merging, and who draws what."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from stepdistill.errors import UserError


def test_prompts_are_cut_into_clusters_that_are_disjoint_complete_and_a_function_of_the_prompt():
    from stepdistill import scenes
    from stepdistill.routing import cluster, nearest, router

    captions = [scenes.scene_at(i).caption for i in range(300)]
    centroids = cluster(captions, 4)
    assert centroids.tolist() == cluster(captions, 4).tolist()
    parts = nearest(captions, centroids)
    assert set(parts.tolist()) == {0, 1, 2, 3} and parts[0] == 0
    # Written into a card and read back, for prompts nobody clustered, one at a time or together.
    rule = json.loads(json.dumps({"by": "prompt", "centroids": centroids.tolist()}))
    unseen = [scenes.scene_at(i, seed=5).caption for i in range(50)]
    together = router(rule)(unseen)
    assert together == [router(rule)([prompt])[0] for prompt in unseen] and len(set(together)) > 1
    # Clusters mean something: prompts share more words with their own centroid's than with the others'.
    assert router(rule)(captions) == parts.tolist()
    with pytest.raises(UserError, match="only 1 different prompts"):
        cluster(["a star", "a STAR"], 2)


def test_classes_are_routed_by_their_blocks():
    from stepdistill.routing import router

    route = router({"by": "class", "blocks": [[0, 2], [2, 5]]})
    assert route([0, 1, 2, 4]) == [0, 0, 1, 1]
    with pytest.raises(UserError, match="class 5 belongs to none"):
        route([5])


@pytest.fixture(scope="module")
def halves(tiny_sd, tmp_path_factory):
    """Two students of the tiny pipeline, each trained for a step on its half of the prompts."""
    from accelerate.state import AcceleratorState, GradientState

    from training.recipe import recipe_from
    from training.run import run

    root = tmp_path_factory.mktemp("halves")
    for k in (1, 2):
        run(
            recipe_from(
                {
                    "family": {"name": "sd", "teacher": str(tiny_sd)},
                    "student": {"steps": [1, 2]},
                    "method": {"name": "dmd2", "guidance_scale": 1.5, "student_every": 1},
                    "data": {"name": "scenes", "size": 24, "partition": f"{k}/2"},
                    "optim": {"batch_size": 2, "lr": 0.05 * k},
                    "run": {"steps": 2, "out": str(root / f"run{k}"), "log_every": 1, "trackers": []},
                }
            )
        )
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    return [root / f"run{k}" / "student" for k in (1, 2)]


def test_merged_students_draw_each_prompt_as_its_own_student_would(halves, tmp_path):
    from diffusers import DiffusionPipeline

    import stepdistill
    from stepdistill import scenes
    from training.merge import main

    # In any order.
    main([str(tmp_path / "merged"), str(halves[1]), str(halves[0])])
    students = stepdistill.load(tmp_path / "merged")
    alone = [stepdistill.load(path) for path in halves]
    prompts = [scenes.scene_at(i).caption for i in range(12)]
    chosen = students.route(prompts)
    assert set(chosen) == {0, 1}
    timings = {}
    images = students(prompts, list(range(12)), steps=2, chunk=4, timings=timings)
    assert images.dtype == torch.uint8 and set(timings) == {"text", "denoise", "decode"}
    for i, (prompt, k) in enumerate(zip(prompts, chosen, strict=True)):
        drawn = [each([prompt], [i], steps=2, chunk=4)[0] for each in alone]
        assert torch.equal(images[i], drawn[k]) and not torch.equal(drawn[0], drawn[1])
    assert students.steps == (1, 2) and students.kind == "student" and students.conditions == "prompt"
    assert students.parameters["denoiser"] == 2 * alone[0].parameters["denoiser"]
    # Each is a stock pipeline, and each saw only its own prompts.
    DiffusionPipeline.from_pretrained(tmp_path / "merged" / "1")
    # Again over the old one.
    main([str(tmp_path / "merged"), *map(str, halves)])
    with pytest.raises(UserError, match="steps=3 is not what"):
        students(prompts, list(range(12)), steps=3)
    with pytest.raises(UserError, match="of one length"):
        students(prompts, [0])


def test_one_merged_student_draws_what_it_draws_alone(halves, tmp_path):
    import stepdistill
    from stepdistill import scenes
    from stepdistill.routing import cluster, merge

    prompts, alone = [scenes.scene_at(i).caption for i in range(5)], tmp_path / "alone"
    shutil.copytree(halves[0], alone)
    routing = {"by": "prompt", "of": 1, "part": 1, "centroids": cluster(prompts, 1).tolist()}
    card = json.loads((alone / "stepdistill.json").read_text())
    (alone / "stepdistill.json").write_text(json.dumps(card | {"routing": routing}))
    students = stepdistill.load(merge([alone], tmp_path / "merged"))
    assert set(students.route(prompts)) == {0}
    drawn = [each(prompts, [*range(5)], steps=2, chunk=2) for each in (students, stepdistill.load(alone))]
    assert torch.equal(*drawn)


def test_what_cannot_be_merged_is_refused_with_one_sentence(halves, tmp_path, capsys):
    from training.merge import main

    def said(*students) -> str:
        with pytest.raises(SystemExit) as exit_:
            main([str(tmp_path / "out"), *map(str, students)])
        assert exit_.value.code == 2
        return capsys.readouterr().err

    assert "must be the parts 1 to K of one partition, got 1/2, 1/2" in said(halves[0], halves[0])
    assert "got 1/2" in said(halves[0])
    assert "is no student directory" in said(tmp_path, halves[1])
    other = tmp_path / "other"
    shutil.copytree(halves[1], other)
    card = json.loads((other / "stepdistill.json").read_text())
    for change, says in (
        ({"sampling": card["sampling"] | {"rule": "ode"}}, "differ in rule: renoise and ode"),
        ({"routing": None}, "was not trained on a part"),
        ({"routing": card["routing"] | {"centroids": [[0.0] * 64] * 2}}, "parts of different data"),
    ):
        (other / "stepdistill.json").write_text(json.dumps(card | change))
        assert says in said(halves[0], other)
    (tmp_path / "out").mkdir()
    assert "exists and holds no merged students" in said(*halves)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_partition_of_one_is_the_whole():
    from training.data.scenes import Scenes
    from training.data.toy import Toy

    for source, config in ((Scenes, {"size": 9}), (Toy, {"size": 9})):
        whole, one = (source(source.Config(partition=text, **config)) for text in ("", "1/1"))
        assert whole.size == one.size == 9 and one.routing is None
    assert list(whole.captions or ()) == list(one.captions or ())


def test_the_students_of_a_class_partition_each_see_their_own_classes():
    from stepdistill.families.toy import Toy as Family
    from training.data.toy import Toy

    family = Family(Family.Config(modes=8, classes=4, fit_steps=0))
    seen = [set(family.prompts(Toy(Toy.Config(partition=f"{k}/2")), range(100))) for k in (1, 2)]
    assert seen == [{0, 1}, {2, 3}]
