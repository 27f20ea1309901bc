"""Scoring in this process, step by step: nothing starts and loads torch where Ray is not what a test is about."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pyarrow as pa
import pytest
import torch

from workflows import score_images, score_slides
from workflows.cluster import Node
from workflows.scoring import pipeline, slide_pipeline, slide_tasks, tasks
from workflows.scoring.slide_plan import SlideItem, SlideTask
from workflows.scoring.slide_tasks import FinishedSlide

Row = dict[str, Any]


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Give torch back the threads that it had, which an actor sets for its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def score_images_here(patch: pytest.MonkeyPatch) -> None:
    """Have score_images take the steps of each image here."""
    from workflows.scoring.actor import ScoreActor

    def score(work: Any, items: Sequence[Mapping[str, Any]], *_: Any, **__: Any) -> Iterator[Row]:
        with _threads_kept():
            actor, schema = ScoreActor(work.ensemble, work.task.save), tasks.ITEM
            for item in items:
                decoded = tasks.decode(work.task, pa.Table.from_pylist([item], schema=schema))
                yield from tasks.finish(work.task, actor(decoded)).to_pylist()

    def finish_from_maps(work: Any, items: Sequence[Mapping[str, Any]], *_: Any) -> Iterator[Row]:
        for item in items:
            yield from tasks.refinish(work.task, pa.Table.from_pylist([item])).to_pylist()

    patch.setattr(pipeline, "score", score)
    patch.setattr(pipeline, "finish_from_maps", finish_from_maps)
    patch.setattr(score_images, "ray_session", lambda: nullcontext([Node(2)]))


class _Finishing:
    """Stands for the tasks that finish slides."""

    def __init__(self, task: SlideTask, *_: Any) -> None:
        self._task = task
        self._ended: list[FinishedSlide] = []

    def begin(self, item: SlideItem, seconds: dict[str, float]) -> None:
        self._ended.append(slide_tasks.finish(self._task, item, seconds | {"begun_unix_s": time.time()}))

    def ended(self, *, wait: bool = False) -> Iterator[FinishedSlide]:
        while self._ended:
            yield self._ended.pop()

    def cancel(self) -> None:
        assert not self._ended


def score_slides_here(patch: pytest.MonkeyPatch) -> None:
    """Have score_slides take the steps of each slide and block here; seams are not measured."""
    from workflows.scoring.slide_actor import SlideActor

    def survey(task: SlideTask, items: Sequence[SlideItem], *_: Any) -> Iterator[Row]:
        for item in items:
            yield from slide_tasks.survey(task, pa.Table.from_pylist([item])).to_pylist()

    def predict(job: Any, items: Sequence[Mapping[str, Any]], *_: Any) -> Iterator[Row]:
        with _threads_kept():
            actor = SlideActor(job.ensemble, job.task)
            for item in items:
                read = slide_tasks.read(job.task, pa.Table.from_pylist([item]))
                yield from slide_tasks.keep(job.task, actor(read)).to_pylist()

    patch.setattr(slide_pipeline, "survey", survey)
    patch.setattr(slide_pipeline, "predict", predict)
    patch.setattr(slide_pipeline, "measure_seams", lambda *_: None)
    patch.setattr(slide_pipeline, "Finishing", _Finishing)
    patch.setattr(score_slides, "ray_session", lambda: nullcontext([Node(2)]))
