"""The other commands: pictures, protocols, help."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from fakes import refused, save_scenes
from PIL import Image

from evaluation.__main__ import COMMANDS, main
from evaluation.protocol import PROTOCOLS
from stepdistill import scenes


def test_picture_has_a_row_per_prompt_and_a_column_per_sampler(tmp_path, painters, capsys) -> None:
    prompt = "a large red star on a black background"
    command = ["picture", "--teacher", tmp_path / "teacher", "--student", tmp_path / "student", "--before"]
    sizes = []
    for prompts in ([prompt], [prompt, "a small cyan circle on a white background"]):
        asked = [part for text in prompts for part in ("--prompt", text)]
        main([*map(str, command), "--out", str(tmp_path / "p.png"), "--student-steps", "1,2", *asked])
        with Image.open(tmp_path / "p.png") as image:
            sizes.append(image.size)
    # teacher, student at 2, student at 1, teacher at 1: each 192 wide
    assert sizes[0][0] == sizes[1][0] > 4 * 192 and sizes[1][1] - sizes[0][1] >= 192
    assert "is a directory" in refused(capsys, *command, "--out", tmp_path)
    assert "--student-steps 4 is not" in refused(
        capsys, *command, "--out", tmp_path / "q.png", "--student-steps", 4
    )


def test_every_io_batch_gives_the_same_distance(tmp_path, net) -> None:
    one, other = save_scenes(tmp_path / "one", 70), save_scenes(tmp_path / "other", 40)
    found = []
    for size in (1, 7, 64):
        command = [
            "images",
            one,
            "--ref",
            other,
            "--extractor",
            net,
            "--io-batch",
            size,
            "-o",
            tmp_path / "r.json",
        ]
        main([*map(str, command)])
        found.append(json.loads((tmp_path / "r.json").read_text()))
    for result in found:
        assert (result["fd:tiny"], result["fd:tiny/se"]) == (found[0]["fd:tiny"], found[0]["fd:tiny/se"])


def test_doubts_about_two_sets(tmp_path, net, capsys) -> None:
    def doubted(*more: object) -> str:
        main(
            [*map(str, ("images", tmp_path / "one", "--ref", tmp_path / "other", "--extractor", net, *more))]
        )
        return capsys.readouterr().out

    save_scenes(tmp_path / "one", 30)
    (tmp_path / "other").mkdir()
    for index in range(30):
        pixels = Image.fromarray(scenes.image_at(100 + index, 3)[1])
        pixels.resize((80, 80)).save(tmp_path / "other" / f"{index}.jpg")
    shown = doubted()
    assert "differ in size, 64x64 and 80x80" in shown and "30 of the 30 of the reference are JPEG" in shown
    assert "30 images are few" in shown and "same pixels" not in shown and "without colour" not in shown
    shutil.copy(tmp_path / "one" / "3.png", tmp_path / "one" / "copy.png")
    Image.new("L", (64, 64), 7).save(tmp_path / "one" / "grey.png")
    shutil.rmtree(tmp_path / "other")
    save_scenes(tmp_path / "other", 9)
    shown = doubted()
    for part in ("1 of 32 images have the same pixels", "1 of 32 images are stored without colour",
                 "9 different images are in both sets", "no more images than the 16 features"):  # fmt: skip
        assert part in shown


def test_protocols_are_listed_and_shown(capsys) -> None:
    main(["protocols"])
    assert "scenes-2k" in capsys.readouterr().out
    main(["protocols", "show", "scenes-2k"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["hash"] == PROTOCOLS["scenes-2k"].hash and shown["reference"]["first"] == 10_000
    assert "Did you mean 'scenes-2k'" in refused(capsys, "protocols", "show", "scene-2k")


def test_every_command_has_help_with_examples(capsys) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0 and "example" in capsys.readouterr().out


def test_exit_code_in_a_process_of_its_own(tmp_path) -> None:
    command = [sys.executable, "-m", "evaluation", "compare", str(tmp_path / "nowhere"), str(tmp_path)]
    wrong = subprocess.run(command, capture_output=True, text=True)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    assert wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1 and "nowhere" in wrong.stderr
