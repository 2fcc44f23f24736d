"""Normal ranges of methods with a fake score (`Method.health`): how a critic that lags, diverges or is outrun is told.

A critic's loss does not tell it. It falls where a fake score learns nothing of a student that stands still, and where one
comes back from far away. What tells it is how the two scores stand to each other, by the values of `compared`
(stepdistill/methods/score.py): a fake score that does not learn points as the teacher does, one that was outrun by the
student points elsewhere, and one that has diverged is further off than no score at all.

A run's first hundred iterations throw these values about, so "_recent" is judged, a mean over the last iterations
(training/health.py). Where the teacher is guided, guidance alone turns the two apart, and a fake score that does not learn
is not seen by this.
"""

from __future__ import annotations

# Measured by means over 200 iterations (benchmarks/health.json). Healthy: the runs of ten minutes on the embedded teacher, and
# toy recipes at their length. Broken: toy_dmd2 and scenes_diff_instruct with one learning rate far off, and runs that have
# collapsed by themselves.
SCORES: dict[str, tuple[float, float, str]] = {
    # Healthy at most 0.6, though single lines of DMD, VSD and Phased DMD pass 1.
    "student/gap_recent": (
        0.0,
        1.0,
        "the teacher and the fake score disagree by more than the data's own spread: the student has left"
        " the data, or the fake score lags; lower optim.student.lr or raise method.student_every",
    ),
    # Healthy 0.70 (DisBack and Phased DMD, as they begin) to 0.984 (Phased DMD on the toy, as it ends). The student's rate ten
    # times too high: 0.35, on the toy 0.63; the fake score's ten to fifty times: down to 0.11 to 0.45; collapse of f-distill 0.36.
    # The fake score's rate a hundred times too low 0.993, on the toy two thousand times 0.994; there, two hundred times, 0.985
    # at most, are not told.
    "student/scores_cosine_recent": (
        0.65,
        0.99,
        "below, the student has outrun its fake score: lower optim.student.lr or raise method.student_every; above, the"
        " fake score is still the teacher and does not follow the student: raise optim.fake_score.lr",
    ),
    # A fake score of zero has 1. Healthy at most 0.72; the fake score's rate ten times too high 34, fifty times 22; the
    # student's a hundred times too high 1.05.
    "student/scores_apart_recent": (
        0.0,
        1.0,
        "the fake score is further from the teacher's than none at all would be, it has diverged: lower"
        " optim.fake_score.lr, or optim.student.lr if that is the higher one",
    ),
    # Of methods with a GAN.
    "critic/accuracy": (
        0.2,
        0.98,
        "the discriminator has won: lower method.gan_critic_weight",
    ),
}
