"""Who does the work: processes of this machine, Apache Beam, or Ray. The result is the same."""

import collections
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from l32jax.data.prepare.task import Task, run_task
from l32jax.errors import InputError

MAX_DEATHS = 5  # of workers, while a task was under way


# Does tasks, and yields the index of each that is done.
Runner = Callable[[Sequence[Task]], Iterator[int]]


def on_processes(tasks: Sequence[Task], *, workers: int) -> Iterator[int]:
    """Processes of this machine. The task of one that dies is done by another."""
    waiting = collections.deque(range(len(tasks)))
    deaths: collections.Counter[int] = collections.Counter()
    while waiting:
        running: dict[Future, int] = {}
        try:
            yield from _until_one_dies(tasks, waiting, running, workers)
        except BrokenProcessPool:
            waiting.extendleft(running.values())
            deaths.update(running.values())
            _raise_if_hopeless(tasks, deaths)


def _until_one_dies(
    tasks: Sequence[Task],
    waiting: collections.deque[int],
    running: dict[Future, int],
    workers: int,
) -> Iterator[int]:
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker
    )
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running[pool.submit(run_task, tasks[waiting[0]])] = waiting[0]
                waiting.popleft()
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                yield running.pop(future)
        pool.shutdown()
    finally:
        # After an error or Ctrl-C nobody waits for what is under way: it leaves nothing behind.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()


def _begin_worker() -> None:
    """Ctrl-C is for the parent to decide about; without a parent there is no more to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _raise_if_hopeless(tasks: Sequence[Task], deaths: collections.Counter[int]) -> None:
    index, count = next(iter(deaths.most_common(1)), (0, 0))
    if count >= MAX_DEATHS:
        name = tasks[index].result.name
        raise InputError(
            f"worker for {name}: killed {count} times, perhaps out of memory; "
            "give fewer workers, and the same command goes on"
        )


def on_beam(tasks: Sequence[Task], *, runner: str, options: Sequence[str]) -> Iterator[int]:
    """Apache Beam; `options` are its own, such as --project=NAME."""
    try:
        import apache_beam as beam  # type: ignore[import-not-found]
        from apache_beam.options.pipeline_options import PipelineOptions  # type: ignore[import-not-found]
    except ImportError:
        raise InputError(
            "Beam to prepare data: not installed; pip install 'l32jax[beam]' in an environment "
            "of its own"
        ) from None
    flags = PipelineOptions([f"--runner={runner}", *options])
    with beam.Pipeline(options=flags) as pipeline:
        _ = (
            pipeline
            | "Tasks" >> beam.Create(list(tasks))
            | "Spread" >> beam.Reshuffle()
            | "Run" >> beam.Map(run_task)
        )
    yield from range(len(tasks))


def on_ray(tasks: Sequence[Task], *, address: str) -> Iterator[int]:
    """Ray Data on a cluster, or on this machine if the address is "local"."""
    try:
        import ray  # type: ignore[import-not-found]
        import ray.data  # type: ignore[import-not-found]
    except ImportError:
        raise InputError(
            "Ray to prepare data: not installed; pip install 'l32jax[ray]' in an environment "
            "of its own"
        ) from None
    if not ray.is_initialized():
        ray.init(address=None if address == "local" else address)
    numbers = [{"task": number} for number in range(len(tasks))]
    # A block each: what is lost with a worker is one task, which Ray does again.
    rows = ray.data.from_items(numbers, override_num_blocks=len(tasks))
    for row in rows.map(functools.partial(_run_row, tasks)).iter_rows():
        yield row["task"]


def _run_row(tasks: Sequence[Task], row: dict[str, int]) -> dict[str, int]:
    run_task(tasks[row["task"]])
    return row
