"""The scenes say what they show, and the checker sees what they show."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from stepdistill import scenes

COUNT = 150


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, list[str]]:
    """COUNT images, uint8 (COUNT, 64, 64, 3), of the evaluation's seed, and their captions."""
    pairs = [scenes.image_at(index, seed=1_000_003) for index in range(COUNT)]
    return np.stack([image for _, image in pairs]), [scene.caption for scene, _ in pairs]


def blurred(images: np.ndarray) -> np.ndarray:
    """A Gaussian blur of one pixel, as float32."""
    weights = np.exp(-0.5 * np.arange(-3, 4) ** 2).astype(np.float32)
    weights /= weights.sum()
    x = images.astype(np.float32)
    for axis in (1, 2):
        padded = np.pad(x, [(3, 3) if a == axis else (0, 0) for a in range(4)], mode="edge")
        length = x.shape[axis]
        x = sum(w * np.take(padded, np.arange(k, k + length), axis) for k, w in enumerate(weights))
    return x


def test_a_caption_parses_back_to_its_scene() -> None:
    seen = [scenes.scene_at(index) for index in range(2000)]
    assert all(scenes.parse_caption(scene.caption) == scene for scene in seen)
    assert {word for scene in seen for word in scene.caption.split()} == set(scenes.VOCABULARY)
    assert len(set(scenes.VOCABULARY)) == len(scenes.VOCABULARY)


def test_the_example_of_the_documentation() -> None:
    one, other = scenes.Object("circle", "red", "small"), scenes.Object("square", "blue", "large")
    scene = scenes.Scene((one, other), "above", "yellow")
    assert scene.caption == "a small red circle above a large blue square on a yellow background"
    alone = scenes.Scene((scenes.Object("star", "red", "large"),), None, "black")
    assert alone.caption == "a large red star on a black background"
    assert scenes.parse_caption("  A large RED star on a\nblack background ") == alone


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a small red circle above a large blue square",
        "a small pink circle on a red background",
    ],
)
def test_what_is_no_caption_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="describes no scene") as refused:
        scenes.parse_caption(text)
    assert repr(text) in str(refused.value)


def test_a_scene_depends_on_index_and_seed_alone() -> None:
    scene, image = scenes.image_at(7, seed=3)
    again, same = scenes.image_at(7, seed=3)
    assert scene == again == scenes.scene_at(7, seed=3)
    assert np.array_equal(image, same)
    assert not np.array_equal(image, scenes.image_at(8, seed=3)[1])
    assert not np.array_equal(image, scenes.image_at(7, seed=4)[1])
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8


def test_scenes_are_drawn_as_promised() -> None:
    seen = [scenes.scene_at(index) for index in range(4000)]
    singles = [scene for scene in seen if len(scene.objects) == 1]
    assert abs(len(singles) / len(seen) - scenes.SINGLE) < 0.03
    assert all((scene.relation is None) == (len(scene.objects) == 1) for scene in seen)
    for scene in seen:
        colours = [scene.background, *(thing.colour for thing in scene.objects)]
        assert len(set(colours)) == len(colours)
    shapes = [thing.shape for scene in seen for thing in scene.objects]
    assert all(abs(shapes.count(shape) / len(shapes) - 1 / 6) < 0.03 for shape in scenes.SHAPES)
    pairs = [scene.caption for scene in seen if scene.relation]
    # Of 193,536.
    assert len(set(pairs)) > 0.95 * len(pairs)


def test_shapes_of_one_size_have_one_area_and_their_centroid_at_the_origin() -> None:
    line = np.arange(-250, 250) / 10 + 0.05
    for shape in scenes.SHAPES:
        inside = scenes._distance(shape, line[None, :], line[:, None], 10.0) < 0
        assert inside.sum() / 100 == pytest.approx(np.pi * 100, rel=0.01), shape
        rows, columns = np.nonzero(inside)
        assert abs(line[rows].mean()) < 0.06, shape
        assert abs(line[columns].mean()) < 0.06, shape
        left, right, up, down = -line[columns].min(), line[columns].max(), -line[rows].min(), line[rows].max()
        assert np.allclose(
            (left, right, up, down),
            [10 * r for r in (scenes._REACH[shape][0], *scenes._REACH[shape])],
            atol=0.2,
        )


def test_objects_lie_inside_the_frame_and_apart() -> None:
    """Also in the tightest scenes there are: two large objects in a row."""
    rng = np.random.default_rng(0)
    for shape in scenes.SHAPES:
        for other in scenes.SHAPES:
            for relation in scenes.RELATIONS:
                objects = scenes.Object(shape, "red", "large"), scenes.Object(other, "blue", "large")
                boxes = []
                for thing, (x, y, r) in zip(
                    objects, scenes._place(scenes.Scene(objects, relation, "white"), rng, 64), strict=True
                ):
                    side, up, down = (reach * r for reach in scenes._REACH[thing.shape])
                    assert scenes.RADII["large"][0] - 1e-6 <= r <= scenes.RADII["large"][1]
                    boxes.append((x - side, x + side, y - up, y + down))
                    assert min(boxes[-1]) >= scenes.MARGIN - 1e-6
                    assert max(boxes[-1]) <= 64 - scenes.MARGIN + 1e-6
                axis = 0 if relation in ("left of", "right of") else 2
                near, far = boxes if relation in ("left of", "above") else boxes[::-1]
                assert far[axis] - near[axis + 1] >= scenes.GAP - 1e-6, (shape, other, relation)


def test_clean_images_are_read_without_error(drawn: tuple[np.ndarray, list[str]]) -> None:
    assert set(scenes.attribute_accuracy(*drawn).values()) == {1.0}


def test_other_sizes_show_the_same_scenes() -> None:
    seen = [scenes.scene_at(index) for index in range(30)]
    images = np.stack(
        [scenes.render(scene, np.random.default_rng(k), size=128) for k, scene in enumerate(seen)]
    )
    assert scenes.attribute_accuracy(images, [scene.caption for scene in seen])["all"] == 1.0


def test_blur_and_noise_hardly_matter(drawn: tuple[np.ndarray, list[str]]) -> None:
    images, captions = drawn
    soft = blurred(images)
    noise = np.random.default_rng(0).normal(0, 12, images.shape)
    for damaged in (soft, images + noise, soft + noise):
        accuracy = scenes.attribute_accuracy(np.clip(damaged + 0.5, 0, 255).astype(np.uint8), captions)
        assert accuracy["all"] >= 0.99, accuracy


def test_wrong_captions_are_at_chance(drawn: tuple[np.ndarray, list[str]]) -> None:
    images, captions = drawn
    accuracy = scenes.attribute_accuracy(images, captions[1:] + captions[:1])
    assert accuracy["all"] == 0.0
    # Chance is 1/8.
    assert accuracy["background"] < 0.25
    assert accuracy["colours"] < 0.1
    assert accuracy["shapes"] < 0.1
    # Two captions agree on the number of objects with probability 0.75^2 + 0.25^2 = 0.625.
    assert abs(accuracy["count"] - 0.625) < 0.15


def test_each_change_of_a_scene_fails_its_own_attribute() -> None:
    """The image shows the first scene; the checker is asked about one that differs in one thing."""
    one, other = scenes.Object("circle", "red", "small"), scenes.Object("square", "blue", "large")
    scene = scenes.Scene((one, other), "above", "yellow")
    image = scenes.render(scene, np.random.default_rng(0))
    star = scenes.Object("star", "red", "small")
    large = scenes.Object("circle", "red", "large")
    asked = {
        # The same, said the other way round.
        frozenset(): scenes.Scene((other, one), "below", "yellow"),
        frozenset({"shapes"}): scenes.Scene((star, other), "above", "yellow"),
        frozenset({"sizes"}): scenes.Scene((large, other), "above", "yellow"),
        frozenset({"relation"}): scenes.Scene((one, other), "left of", "yellow"),
        frozenset({"background"}): scenes.Scene((one, other), "above", "white"),
        frozenset({"count", "colours"}): scenes.Scene((one,), None, "yellow"),
    }
    for failing, question in asked.items():
        result = scenes.check(image, question)
        assert {name for name in scenes.ATTRIBUTES if not result[name]} == failing
        assert result["all"] is (not failing)


def test_an_extra_object_is_counted() -> None:
    scene = scenes.Scene((scenes.Object("circle", "red", "small"),), None, "white")
    image = np.full((64, 64, 3), 243, np.uint8)
    rows, columns = np.mgrid[:64, :64]
    image[(rows - 20) ** 2 + (columns - 20) ** 2 < 7.5**2] = scenes.COLOURS["red"]
    assert scenes.check(image, scene)["all"]
    # A second one of the same colour, and one of another.
    for colour in ("red", "green"):
        more = image.copy()
        more[45:55, 45:55] = scenes.COLOURS[colour]
        assert not scenes.check(more, scene)["count"], colour
    # A speck is no object.
    image[60:62, 60:62] = scenes.COLOURS["green"]
    assert scenes.check(image, scene)["all"]


def test_an_empty_image_shows_nothing() -> None:
    result = scenes.check(
        np.full((64, 64, 3), 243, np.uint8), scenes.parse_caption("a large red star on a white background")
    )
    assert result["background"]
    assert not any(result[name] for name in ("count", "colours", "shapes", "sizes", "all"))


def test_wrong_images_and_lists_are_refused() -> None:
    scene = scenes.scene_at(0)
    with pytest.raises(ValueError, match="uint8"):
        scenes.check(np.zeros((64, 64, 3), np.float32), scene)
    with pytest.raises(ValueError, match="uint8"):
        scenes.check(np.zeros((3, 64, 64), np.uint8), scene)
    with pytest.raises(ValueError, match="as many captions"):
        scenes.attribute_accuracy(np.zeros((2, 64, 64, 3), np.uint8), [scene.caption])


def test_only_numpy_is_imported() -> None:
    """Loaded as a file, so that what the package itself imports does not count."""
    code = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('scenes', sys.argv[1]); "
        "module = importlib.util.module_from_spec(spec); sys.modules['scenes'] = module; "
        "spec.loader.exec_module(module); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'scipy', 'PIL')))"
    )
    assert subprocess.run([sys.executable, "-c", code, scenes.__file__], check=False).returncode == 0
