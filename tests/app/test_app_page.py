"""The page's handlers, called as Gradio calls them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from app_fakes import FakeSampler, engine_of

from app import handlers
from app.handlers import HISTORY, Handlers
from app.layout import lay_out
from app.page import Page
from app.request import Request
from app.ui import build

TAB = SimpleNamespace(session_hash="tab")
A = "a red circle"


@pytest.fixture(scope="module")
def page(engine):
    with Page():
        return Handlers(engine, lay_out(engine))


def made(page, prompt=A, steps=1, seed=5, fresh=False, alone=False, negative="", guidance=3.0, past=()):
    """Everything that `make` shows, in order."""

    async def gather():
        run = page.make(prompt, steps, seed, fresh, alone, negative, guidance, list(past), TAB)
        return [shown async for shown in run]

    return asyncio.run(gather())


def test_the_student_comes_first_and_the_teacher_starts_from_its_seed(page, engine):
    shown = made(page)
    first, last = shown[0], shown[-1]
    p = page.parts
    want = engine.generate(Request(A, seed=5)).shots["student"].image
    assert np.array_equal(np.asarray(first[p.student]), want)
    assert first[p.seed] == 5 and "waiting" in first[p.teacher_head] and first[p.teacher] == gr.skip()
    teacher = engine.generate(Request(A, seed=5, model="teacher", guidance_scale=3.0)).shots["teacher"].image
    assert np.array_equal(np.asarray(last[p.teacher]), teacher)
    assert [entry["settings"]["model"] for entry in last[p.past]] == ["student", "teacher"]
    assert [caption for _, caption in last[p.gallery]] == ["T50", "S1"]
    assert "student 1 step" in last[p.verdict] and "teacher 50 steps" in last[p.verdict]


def test_alone_the_student_is_all_there_is(page):
    (only,) = made(page, alone=True, steps=2)
    assert only[page.parts.teacher] is None and "2 steps" in only[page.parts.student_head]


def test_a_new_seed_is_shown_and_the_gallery_is_bounded(page):
    (only,) = made(page, alone=True, fresh=True, past=HISTORY * made(page, alone=True)[0][page.parts.past])
    assert only[page.parts.seed] != 5 and len(only[page.parts.past]) == HISTORY


def test_what_is_wrong_is_said_and_no_traceback_printed(page):
    for wrong in ({"prompt": ""}, {"steps": 3}, {"seed": None}, {"negative": "blur"}):
        with pytest.raises(gr.Error) as caught:
            made(page, **wrong)
        assert not caught.value.print_exception and next(iter(wrong)) in str(caught.value)


def test_stop_ends_the_teacher(engine, page):
    teacher = engine.models.samplers["teacher"]
    teacher.gate.clear()
    teacher.began.clear()

    async def stopped():
        shown = []
        async for part in page.make(A, 1, 5, False, False, "", 3.0, [], TAB):
            shown.append(part)
            if len(shown) == 2:
                assert teacher.began.wait(5)
                page.stop(TAB)
                teacher.gate.set()
        return shown

    shown = asyncio.run(stopped())
    # What an earlier request drew is dimmed while the teacher runs, and gone when it will not come.
    assert all("stale" in part[page.parts.teacher_head] for part in shown[:-1])
    assert "stopped" in shown[-1][page.parts.teacher_head] and shown[-1][page.parts.teacher] is None


@pytest.mark.parametrize("after", ["the student is drawn", "the student is shown", "the teacher is drawn"])
def test_stop_counts_also_while_nothing_is_with_the_engine(engine, page, monkeypatch, after):
    submit, calls = engine.submit, []

    def submitted(asked, session=None):
        job = submit(asked, session)
        calls.append(asked.model)
        if after == f"the {asked.model} is drawn":
            job.future.add_done_callback(lambda _: page.stop(TAB))
        return job

    monkeypatch.setattr(engine, "submit", submitted)

    async def gather():
        shown = []
        async for part in page.make(A, 1, 5, False, False, "", 3.0, [], TAB):
            shown.append(part)
            if after == "the student is shown" and len(shown) == 1:
                page.stop(TAB)
        return shown

    shown = asyncio.run(gather())
    assert calls == (["student", "teacher"] if after == "the teacher is drawn" else ["student"])
    assert not any(page.parts.past in part for part in shown[1:])
    if after == "the student is drawn":
        # The page stays as it was; without this Gradio would empty all of it.
        assert shown == [{page.parts.student: gr.skip()}]
    else:
        assert "stopped" in shown[-1][page.parts.teacher_head]
    assert not page._runs


def test_a_newer_request_or_a_key_ends_the_older(engine, page):
    teacher = engine.models.samplers["teacher"]

    async def both(newer):
        teacher.gate.clear()
        teacher.began.clear()
        shown = []
        async for part in page.make(A, 1, 5, False, False, "", 3.0, [], TAB):
            shown.append(part)
            if len(shown) == 2:
                assert teacher.began.wait(5)
                other = asyncio.ensure_future(newer())
                await asyncio.sleep(0)
                teacher.gate.set()
                other = await other
        return shown, other

    async def generate():
        return [part async for part in page.make("a blue star", 1, 6, False, True, "", 3.0, [], TAB)][-1]

    for newer in (generate, lambda: page.typed("a blue star", 1, 6, True, TAB)):
        older, other = asyncio.run(both(newer))
        # Nothing of the older comes after the newer: its teacher belongs to another prompt.
        assert not any(page.parts.past in part for part in older[1:])
        assert other[page.parts.teacher] is None and page.parts.student in other
    assert not page._runs


def test_typing_draws_only_when_live_and_passes_over_half_a_word(page, engine):
    p = page.parts
    live = asyncio.run(page.typed(A, 1, 5, True, TAB))
    assert np.array_equal(
        np.asarray(live[p.student]), engine.generate(Request(A, seed=5)).shots["student"].image
    )
    assert live[p.teacher] is None
    for prompt, on in ((A, False), ("", True)):
        assert list(asyncio.run(page.typed(prompt, 1, 5, on, TAB))) == [p.student]


def test_a_dropped_image_fills_the_form(page, engine):
    result = engine.generate(Request(A, seed=9, steps=2, model="both"))
    prompt, steps, seed, fresh, said = page.read(result.png("student"))
    assert (prompt, steps, seed, fresh) == (A, 2, 9, False) and "2 steps, seed 9" in said.value
    # The teacher's steps are none of the student's.
    assert page.read(result.png("teacher"))[1] == gr.skip()
    with pytest.raises(gr.Error, match="not a PNG"):
        page.read(b"GIF89a")


def test_a_clicked_image_fills_the_form_where_it_is_still_there(page):
    past = made(page)[-1][page.parts.past]
    newest, oldest = (handlers._recall(past, SimpleNamespace(index=i)) for i in (0, 1))
    assert newest == (A, gr.skip(), 5, False) and oldest == (A, 1, 5, False)
    assert handlers._recall(past, SimpleNamespace(index=2)) == (gr.skip(),) * 4
    assert handlers._recall([], SimpleNamespace(index=0)) == (gr.skip(),) * 4


def test_the_form_follows_the_models(page):
    p, shown = page.parts, page.refresh()
    assert [value for _, value in shown[p.steps].choices] == [1, 2, 4] and not shown[p.clock].active
    assert shown[p.guidance].visible and shown[p.guidance].value == 3.0
    # A student without guidance takes no negative prompt, so the page offers none.
    assert shown[p.advanced].visible and not shown[p.negative].visible
    guided = engine_of(FakeSampler(guidance_free=False), False)
    with Page():
        other = Handlers(guided, lay_out(guided))
    assert other.refresh()[other.parts.negative].visible and other.refresh()[other.parts.advanced].visible
    guided.close()
    classes = engine_of(FakeSampler(conditions="class", class_names=("horse", "ship")), False)
    with Page():
        other = Handlers(classes, lay_out(classes))
    shown = other.refresh()
    assert not shown[other.parts.advanced].visible
    assert shown[other.parts.prompt].value == "horse" and not shown[other.parts.teacher_card].visible
    classes.close()
    assert "stopped" in other.refresh()[other.parts.status]


def test_every_event_of_the_page_has_a_handler(engine):
    events = {event for function in build(engine).fns.values() for _, event in function.targets}
    assert events == {"click", "submit", "input", "then", "upload", "select", "unload", "load", "tick"}
