"""SIM (arXiv 2410.16794): the gradient of its divergence."""

from __future__ import annotations

from quadrature import EVERY_SCHEDULE, TWO_STUDENTS, Line, close


@EVERY_SCHEDULE
@TWO_STUDENTS
def test_sim_has_the_gradient_of_its_divergence(schedule, theta):
    """Through the inputs of teacher and fake score: without either the gradient is another one."""
    line = Line("sim", schedule, theta, distance="l2")
    # Of a score to an x0.
    ratio = line.alpha / line.sigma**2
    close(line.gradient(), line.direct(lambda y: y**2, sampling=False) / (2 * ratio**2))
    c = 0.2
    line = Line("sim", schedule, theta, huber_c=c)
    c_score = c * ratio
    huber = line.direct(lambda y: (y**2 + c_score**2).sqrt() - c_score, sampling=False) / ratio
    # The kink of width c is what limits the quadrature.
    close(line.gradient(), huber, 1e-6)
