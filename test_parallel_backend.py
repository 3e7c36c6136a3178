"""Tests of parallel_backend: one contract for all backends, then each engine's own quirks.

Interleavings are forced with files that tasks write and wait for; every wait ends.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import (
    CancelledError,
    Executor,
    Future,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

import parallel_backend as pb
from parallel_backend import CancellationPolicy as Policy

HERE = Path(__file__).parent
LONG = 30  # seconds: what never takes so long is stuck
ENGINES = ["joblib", "ray"]
ALL = ["sequential", *ENGINES]


# --- tools ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init(
        "local", num_cpus=4, logging_level="error", log_to_driver=False, include_dashboard=False
    )
    yield ray
    ray.shutdown()


def backend_named(name: str, request: pytest.FixtureRequest) -> pb.ParallelBackend:
    if name == "ray":
        request.getfixturevalue("ray_cluster")
    elif name == "joblib":
        pytest.importorskip("joblib")
    return pb.init_parallel_backend(name)


@pytest.fixture(params=ALL)
def backend(request: pytest.FixtureRequest) -> pb.ParallelBackend:
    return backend_named(request.param, request)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> pb.ParallelBackend:
    """A backend that runs tasks in other processes."""
    return backend_named(request.param, request)


def is_ray(backend: pb.ParallelBackend) -> bool:
    return isinstance(backend, pb.RayParallelBackend)


@pytest.fixture(scope="session", autouse=True)
def nothing_left() -> Iterator[None]:
    """No thread, file or process of ours outlives the tests."""
    psutil = pytest.importorskip("psutil")
    files = set(Path("/dev/shm").glob("parallel_backend_*"))
    yield
    gc.collect()
    pb._kill_parked()
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("parallel_backend")])
    gc.collect()
    until(lambda: set(Path("/dev/shm").glob("parallel_backend_*")) <= files)
    children = [c for c in psutil.Process().children() if "popen_loky" in " ".join(c.cmdline())]
    assert not children


def until(condition: Any, seconds: float = LONG) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gated(folder: Path, name: str, result: Any = None) -> Any:
    """A task that says it has started, with its process's id, and waits to be let go."""
    started = folder / f"{name}.started"
    (folder / f"{name}.new").write_text(str(os.getpid()))
    (folder / f"{name}.new").rename(started)
    deadline = time.monotonic() + LONG
    while not (folder / "gate").exists():
        if time.monotonic() > deadline:
            raise TimeoutError("nobody opened the gate")
        time.sleep(0.002)
    return result


def has_started(folder: Path, name: str) -> int:
    """Wait until that gated task runs; its process's id."""
    until((folder / f"{name}.started").exists)
    return int((folder / f"{name}.started").read_text())


def open_gate(folder: Path) -> None:
    (folder / "gate").touch()


def open_gate_when_shut(executor: Executor, folder: Path) -> threading.Thread:
    """Open the gate as soon as the executor takes no more tasks, that is, during its shutdown."""

    def run() -> None:
        until(lambda: executor._core.shut)  # type: ignore[attr-defined]
        open_gate(folder)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def sleep_for_long(folder: Path, name: str) -> None:
    (folder / f"{name}.new").write_text(str(os.getpid()))
    (folder / f"{name}.new").rename(folder / f"{name}.started")
    time.sleep(600)


def loop_in_c(folder: Path, name: str) -> None:
    """Busy in one C call, which no signal handler or other thread of Python's can interrupt."""
    (folder / f"{name}.new").write_text(str(os.getpid()))
    (folder / f"{name}.new").rename(folder / f"{name}.started")
    sum(itertools.repeat(1, 10**12))


def identity(x: Any) -> Any:
    return x


def capture(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def run_script(
    code: str, *arguments: str, timeout: float = 60, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(HERE), **kwargs.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        check=False,
        env=env,
        timeout=timeout,
        capture_output=True,
        text=True,
        **kwargs,
    )


class Big:
    """Something that can be weakly referenced."""

    def method(self) -> None:
        pass


# --- the contract of executors ----------------------------------------------------------------


def test_submit_takes_any_keyword(backend: pb.ParallelBackend) -> None:
    with backend.executor() as executor:
        assert executor.submit(capture, 1, self=2, fn=3, work=4, done=5).result(LONG) == (
            (1,),
            {"self": 2, "fn": 3, "work": 4, "done": 5},
        )


def test_submit_needs_a_callable(backend: pb.ParallelBackend) -> None:
    with backend.executor() as executor:
        with pytest.raises(TypeError):
            executor.submit()  # type: ignore[call-arg]
        with pytest.raises(TypeError):
            executor.submit(3).result(LONG)  # type: ignore[arg-type]


class Callables:
    def method(self, x: int) -> int:
        return x + 1

    @classmethod
    def of_class(cls, x: int) -> int:
        return x + 1

    @staticmethod
    def static(x: int) -> int:
        return x + 1

    def __call__(self, x: int) -> int:
        return x + 1


def callables() -> dict[str, Any]:
    one = 1

    def closure(x: int) -> int:
        return x + one

    class Local:
        def __new__(cls, x: int) -> int:  # type: ignore[misc]
            return x + one

    return {
        "lambda": lambda x: x + 1,
        "closure": closure,
        "partial": functools.partial(pow, exp=1, mod=None) and functools.partial(int.__add__, 1),
        "bound method": Callables().method,
        "class method": Callables.of_class,
        "static method": Callables.static,
        "instance": Callables(),
        "builtin": (41).__add__ and (1).__add__,
        "local class": Local,
    }


@pytest.mark.parametrize("kind", callables())
def test_any_callable_goes(backend: pb.ParallelBackend, kind: str) -> None:
    with backend.executor() as executor:
        assert executor.submit(callables()[kind], 41).result(LONG) == 42
        assert list(executor.map(callables()[kind], range(5))) == [1, 2, 3, 4, 5]
    assert backend.get(backend.wrap(callables()[kind])(41), timeout=LONG) == 42


def test_functions_of_main_go(engine: pb.ParallelBackend) -> None:
    code = """
        import sys, parallel_backend as pb
        class Point:
            def __init__(self, x): self.x = x
            def __eq__(self, other): return type(other) is Point and other.x == self.x
        def shift(point): return Point(point.x + OFFSET)
        OFFSET = 3
        if __name__ == "__main__":
            with pb.init_parallel_backend(sys.argv[1]).executor(2) as executor:
                assert executor.submit(shift, Point(1)).result(30) == Point(4)
                assert list(executor.map(shift, map(Point, range(9)))) == [*map(Point, range(3, 12))]
        print("ok")
    """
    name = "ray" if is_ray(engine) else "joblib"
    done = run_script(code, name, env=ray_address())
    assert done.stdout == "ok\n", done.stderr


def ray_address() -> dict[str, str]:
    """Environment for a child that shall join the tests' cluster, if one runs."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return {}
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_LOG_TO_DRIVER": "0"}


@pytest.mark.parametrize("workers", [2, 5])
@pytest.mark.parametrize("chunksize", [None, 1, 3, 100])
def test_map_is_map(backend: pb.ParallelBackend, workers: int, chunksize: int | None) -> None:
    with backend.executor(workers) as executor:
        got = executor.map(pow, range(40), itertools.repeat(2), chunksize=chunksize)
        assert list(got) == [n**2 for n in range(40)]
        assert list(executor.map(identity, "abc", chunksize=chunksize)) == ["a", "b", "c"]
        assert list(executor.map(identity, [], chunksize=chunksize)) == []
        assert list(executor.map(identity, [1, 2, 3], chunksize=chunksize, buffersize=2)) == [
            1,
            2,
            3,
        ]


def test_map_runs_without_being_iterated(backend: pb.ParallelBackend, tmp_path: Path) -> None:
    with backend.executor(2, cancel_futures=False) as executor:
        executor.map(lambda name: (tmp_path / name).touch(), "abcdef")
    assert sorted(path.name for path in tmp_path.iterdir()) == list("abcdef")


@pytest.mark.parametrize("chunksize", [None, 1, 7])
def test_map_yields_what_comes_before_a_failure(
    backend: pb.ParallelBackend, chunksize: int | None
) -> None:
    def reciprocal(x: int) -> float:
        return 1 / x

    numbers = [*range(1, 50), 0, *range(1, 50)]
    with backend.executor(2) as executor:
        results = executor.map(reciprocal, numbers, chunksize=chunksize)
        for number in numbers[:49]:
            assert next(results) == 1 / number
        with pytest.raises(ZeroDivisionError):
            next(results)
        with pytest.raises(StopIteration):
            next(results)


def test_map_runs_items_after_a_failure_too(engine: pb.ParallelBackend, tmp_path: Path) -> None:
    def touch(number: int) -> None:
        if number % 2:
            raise ValueError(number)
        (tmp_path / str(number)).touch()

    with engine.executor(2, cancel_futures=False) as executor:
        executor.map(touch, range(20))
    assert len(list(tmp_path.iterdir())) == 10


@pytest.mark.parametrize("bad", ["argument", "result"])
@pytest.mark.parametrize("chunksize", [None, 10])
def test_map_item_that_cannot_be_pickled_fails_alone(
    engine: pb.ParallelBackend, bad: str, chunksize: int | None
) -> None:
    lock = threading.Lock()

    def odd(item: Any) -> Any:
        return threading.Lock() if item == "bad" else item

    items = [*range(25), lock if bad == "argument" else "bad", *range(25)]
    with engine.executor(2) as executor:
        results = executor.map(odd, items, chunksize=chunksize)
        assert [next(results) for _ in range(25)] == items[:25]
        with pytest.raises((pickle.PicklingError, TypeError), match="pickle"):
            next(results)


def test_map_timeout(engine: pb.ParallelBackend, tmp_path: Path) -> None:
    with engine.executor(2) as executor:
        results = executor.map(gated, [tmp_path] * 9, "abcdefghi", timeout=0.2)
        try:
            with pytest.raises(FutureTimeoutError):
                list(results)
        finally:
            open_gate(tmp_path)
    assert not (tmp_path / "i.started").exists(), "what has not started is cancelled"


@pytest.mark.parametrize("arguments", [{"chunksize": 0}, {"chunksize": -1}, {"buffersize": 0}])
def test_map_refuses_bad_sizes_at_once(backend: pb.ParallelBackend, arguments: Any) -> None:
    with backend.executor() as executor, pytest.raises(ValueError, match=next(iter(arguments))):
        executor.map(identity, [1], **arguments)


@pytest.mark.parametrize("chunksize", [None, 4, 50])
def test_map_with_buffersize_reads_no_further(
    backend: pb.ParallelBackend, chunksize: int | None
) -> None:
    read = 0

    def endless() -> Iterator[int]:
        nonlocal read
        for number in itertools.count():
            read += 1
            yield number

    with backend.executor(2) as executor:
        results = executor.map(identity, endless(), buffersize=20, chunksize=chunksize)
        for yielded in range(300):
            assert read - yielded <= 20
            assert next(results) == yielded


def test_map_with_buffersize_raises_what_the_iterable_raises(backend: pb.ParallelBackend) -> None:
    def broken() -> Iterator[int]:
        yield from range(10)
        raise KeyError("source")

    with backend.executor(2) as executor:
        results = executor.map(identity, broken(), buffersize=4)
        got = []
        with pytest.raises(KeyError, match="source"):
            got.extend(results)
        assert got == list(range(len(got)))
        assert len(got) >= 6


def test_abandoned_map_cancels_what_waits(engine: pb.ParallelBackend, tmp_path: Path) -> None:
    with engine.executor(1, cancel_futures=False) as executor:
        results = executor.map(gated, [tmp_path] * 3, "abc", "abc", chunksize=1)
        has_started(tmp_path, "a")
        thread = threading.Timer(0.05, open_gate, [tmp_path])
        thread.start()
        assert next(results) == "a"
        results.close()  # type: ignore[attr-defined]
        thread.join()
    assert not (tmp_path / "c.started").exists()


def test_chunks_grow_with_short_items_and_stay_small_with_long_ones(
    engine: pb.ParallelBackend,
) -> None:
    def process_and_time(_: int) -> tuple[int, float]:
        return os.getpid(), time.monotonic()

    with engine.executor(2) as executor:
        sizes: list[int] = []
        cut = pb._Mapping.cut

        def spy(self: Any, workers: int) -> Any:
            chunk = cut(self, workers)
            if chunk is not None:
                sizes.append(len(chunk.call[1]))
            return chunk

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pb._Mapping, "cut", spy)
            list(executor.map(process_and_time, range(10_000)))
            assert sizes[0] == 1
            assert max(sizes) > 100
            sizes.clear()
            list(executor.map(time.sleep, [0.05] * 6))
            assert max(sizes) == 1


def test_long_items_in_one_chunk_are_spread(engine: pb.ParallelBackend) -> None:
    """A chunk measured on short items comes back early when it meets long ones."""
    seconds = [0.0001] * 400 + [0.2] * 8
    with engine.executor(2) as executor:
        list(executor.map(time.sleep, [0, 0]))  # warm
        started = time.monotonic()
        list(executor.map(time.sleep, seconds))
        assert time.monotonic() - started < 8 * 0.2 + 0.4, "one worker has run them all"


def test_nobody_holds_a_finished_task(backend: pb.ParallelBackend) -> None:
    with backend.executor(2) as executor:
        big, argument = Big(), Big()
        references = [weakref.ref(big), weakref.ref(argument)]
        future = executor.submit(big.method)
        future.result(LONG)
        kept = executor.submit(capture, argument)
        result = weakref.ref(kept.result(LONG)[0][0])
        del big, argument
        until(
            lambda: (
                gc.collect() is not None
                and [r() for r in references] in ([None, None], [None, result()])
            )
        )
        del kept, future
        until(lambda: gc.collect() is not None and result() is None)


def test_nobody_holds_what_map_has_yielded(backend: pb.ParallelBackend) -> None:
    with backend.executor(2) as executor:
        for big in executor.map(lambda _: Big(), range(10)):
            reference = weakref.ref(big)
            del big
            until(lambda: gc.collect() is not None and reference() is None)  # noqa: B023


def test_discarded_future_frees_its_task(engine: pb.ParallelBackend) -> None:
    gone = threading.Event()
    big = Big()
    reference = weakref.ref(big, lambda _: gone.set())
    with engine.executor(1) as executor:
        executor.submit(big.method)
        del big
        assert gone.wait(LONG)
    assert reference() is None


def test_wait_and_as_completed_and_callbacks(engine: pb.ParallelBackend, tmp_path: Path) -> None:
    called: list[Future[Any]] = []
    with engine.executor(2) as executor:
        slow = executor.submit(gated, tmp_path, "slow")
        quick = executor.submit(identity, 1)
        for future in (slow, quick):
            future.add_done_callback(called.append)
        done, pending = wait([slow, quick], LONG, return_when="FIRST_COMPLETED")
        assert (done, pending) == ({quick}, {slow})
        with pytest.raises(FutureTimeoutError):
            list(as_completed([slow, quick], timeout=0.05))
        open_gate(tmp_path)
        assert set(as_completed([slow, quick], timeout=LONG)) == {slow, quick}
    assert called == [quick, slow]


def test_failing_callback_hurts_nobody(backend: pb.ParallelBackend, caplog: Any) -> None:
    with backend.executor(1) as executor:
        future = executor.submit(identity, 1)
        future.add_done_callback(lambda _: 1 / 0)  # type: ignore[arg-type,return-value]
        assert future.result(LONG) == 1
        assert executor.submit(identity, 2).result(LONG) == 2


# --- failures ---------------------------------------------------------------------------------


class Picky(Exception):
    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason

    def __reduce__(self) -> Any:
        return functools.partial(Picky, reason=self.reason), (self.code,)


class Falsy(Exception):
    def __bool__(self) -> bool:
        return False


def raise_it(error: BaseException) -> None:
    raise error  # the line that a traceback must show


@pytest.mark.parametrize(
    "error",
    [
        ValueError(1, "two"),
        Picky(3, reason="x"),
        Falsy(),
        OSError(2, "no"),
        SystemExit(5),
        StopIteration(1),
    ],
    ids=lambda error: type(error).__name__,
)
def test_exception_arrives_as_it_was(backend: pb.ParallelBackend, error: BaseException) -> None:
    with backend.executor(1) as executor:
        got = executor.submit(raise_it, error).exception(LONG)
        assert type(got) is type(error)
        assert got is not None and got.args == error.args
        assert (
            vars(got).items() >= {k: v for k, v in vars(error).items() if k != "__notes__"}.items()
        )
        assert executor.submit(identity, 1).result(LONG) == 1


def test_exception_shows_the_workers_traceback(engine: pb.ParallelBackend) -> None:
    import traceback

    with engine.executor(1) as executor:
        error = executor.submit(raise_it, ValueError(1)).exception(LONG)
        item = next_error(executor.map(raise_it, [ValueError(1)]))
    wrapped = next_error(engine.get(h) for h in [engine.wrap(raise_it)(ValueError(1))])
    for got in (error, item, wrapped):
        assert type(got) is ValueError
        text = "".join(traceback.format_exception(got))
        assert "raise error  # the line that a traceback must show" in text


def next_error(results: Any) -> BaseException | None:
    try:
        next(iter(results))
    except BaseException as error:
        return error
    return None


def crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave(code: int = 3) -> Any:
    os._exit(code)


class At:
    """Does something when it is pickled, or when it is unpickled."""

    def __init__(self, when: str, action: Any, *args: Any) -> None:
        self.when, self.action, self.args = when, action, args

    def __reduce__(self) -> Any:
        if self.when == "pickle":
            self.action(*self.args)
        return (self.action if self.when == "unpickle" else At, self.args or ())


class UnpicklableException(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(a)


class LockedException(Exception):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def make_at(*args: Any) -> At:
    return At(*args)


FAULTS: dict[str, tuple[Any, tuple[Any, ...], Any]] = {
    "argument fails to be pickled": (
        identity,
        (At("pickle", raise_it, KeyError("x")),),
        pickle.PicklingError,
    ),
    "argument is a lock": (identity, (threading.Lock(),), pickle.PicklingError),
    "argument fails to be unpickled": (
        identity,
        (At("unpickle", raise_it, KeyError("x")),),
        BrokenProcessPool,
    ),
    "argument exits when unpickled": (identity, (At("unpickle", sys.exit, 1),), BrokenProcessPool),
    "argument crashes when unpickled": (identity, (At("unpickle", leave),), BrokenProcessPool),
    "task crashes": (crash, (), BrokenProcessPool),
    "task leaves": (leave, (), BrokenProcessPool),
    "task exits": (sys.exit, (1,), SystemExit),
    "result fails to be pickled": (make_at, ("pickle", raise_it, KeyError("x")), Exception),
    "result crashes when pickled": (make_at, ("pickle", leave), BrokenProcessPool),
    "result is a lock": (threading.Lock, (), (pickle.PicklingError, TypeError)),
    "result fails to be unpickled": (
        make_at,
        ("unpickle", raise_it, KeyError("x")),
        BrokenProcessPool,
    ),
    "result exits when unpickled": (make_at, ("unpickle", sys.exit, 1), BrokenProcessPool),
    "exception fails to be unpickled": (raise_it, (LockedException,), pickle.PicklingError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_costs_one_future(engine: pb.ParallelBackend, fault: str, tmp_path: Path) -> None:
    function, arguments, expected = FAULTS[fault]
    options = {"max_retries": 0} if is_ray(engine) else {}
    if fault == "exception fails to be unpickled":
        function, arguments = locked, ()
    with engine.executor(2, **options) as executor:
        neighbour = executor.submit(gated, tmp_path, "neighbour", "fine")
        has_started(tmp_path, "neighbour")
        failing = executor.submit(function, *arguments)
        waiting = [executor.submit(identity, n) for n in range(5)]
        error = failing.exception(LONG)
        assert isinstance(error, expected), repr(error)
        open_gate(tmp_path)
        assert neighbour.result(LONG) == "fine"
        assert [future.result(LONG) for future in waiting] == list(range(5))


def locked() -> None:
    raise LockedException


def test_exception_that_cannot_be_unpickled(engine: pb.ParallelBackend) -> None:
    def fail() -> None:
        raise UnpicklableException(1, 2)

    with engine.executor(1) as executor:
        error = executor.submit(fail).exception(LONG)
        assert isinstance(error, BrokenProcessPool)
        assert "fail" in str(error)
        assert "raise UnpicklableException(1, 2)" in str(error.__cause__)
        assert executor.submit(identity, 1).result(LONG) == 1


def test_callable_that_is_gone_when_it_runs(engine: pb.ParallelBackend) -> None:
    import types

    module = types.ModuleType("nowhere")
    exec("def vanished(): pass", module.__dict__)  # noqa: S102
    sys.modules["nowhere"] = module
    try:
        with engine.executor(1) as executor:
            error = executor.submit(module.vanished).exception(LONG)
            assert isinstance(error, BrokenProcessPool), repr(error)
            assert "vanished" in str(error)
            assert executor.submit(identity, 1).result(LONG) == 1
    finally:
        del sys.modules["nowhere"]


def test_error_of_a_dead_worker_says_what_happened(request: pytest.FixtureRequest) -> None:
    backend = backend_named("joblib", request)
    with backend.executor(1) as executor:
        assert "signal 9 (SIGKILL) while it ran crash" in str(
            executor.submit(crash).exception(LONG)
        )
        assert "exit code 3 while it ran leave" in str(executor.submit(leave).exception(LONG))


# --- concurrency and cancellation -------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_no_more_than_max_workers_at_once(
    engine: pb.ParallelBackend, workers: int, tmp_path: Path
) -> None:
    def overlap(name: str) -> int:
        path = tmp_path / name
        path.touch()
        time.sleep(0.01)
        count = len(list(tmp_path.iterdir()))
        path.unlink()
        return count

    with engine.executor(workers) as executor:
        futures = [executor.submit(overlap, str(n)) for n in range(20)]
        most_running = 0
        while not all(future.done() for future in futures):
            # The last first: who is found running after it, was running with it.
            running = sum(future.running() for future in reversed(futures))
            most_running = max(most_running, running)
        assert 1 <= most_running <= workers
        assert max(future.result() for future in futures) <= workers
        assert max(executor.map(overlap, map(str, range(20)))) <= workers


def test_max_workers_tasks_do_run_at_once(engine: pb.ParallelBackend, tmp_path: Path) -> None:
    with engine.executor(3) as executor:
        futures = [executor.submit(gated, tmp_path, name) for name in "abcd"]
        pids = {has_started(tmp_path, name) for name in "abc"}
        assert len(pids) == 3
        assert [future.running() for future in futures] == [True, True, True, False]
        open_gate(tmp_path)


def test_cancelled_future_is_cancelled_at_once(engine: pb.ParallelBackend, tmp_path: Path) -> None:
    called: list[Future[Any]] = []
    with engine.executor(1, cancel_futures=False) as executor:
        running = executor.submit(gated, tmp_path, "running")
        has_started(tmp_path, "running")
        big = Big()
        reference = weakref.ref(big)
        pending = executor.submit(gated, tmp_path, "pending", big)
        del big
        pending.add_done_callback(called.append)
        assert not running.cancel()
        assert pending.cancel() and pending.cancel()
        assert called == [pending]
        assert wait([pending], timeout=0).done == {pending}  # although no worker is free
        assert list(as_completed([pending], timeout=1)) == [pending]
        assert reference() is None
        with pytest.raises(CancelledError):
            pending.result(0)
        open_gate(tmp_path)
    assert not (tmp_path / "pending.started").exists()


@pytest.mark.parametrize("way", ["block", "exception", "shutdown"])
@pytest.mark.parametrize("policy", [Policy.NONE, Policy.PENDING])
def test_policies_that_let_tasks_run(
    engine: pb.ParallelBackend, policy: Policy, way: str, tmp_path: Path
) -> None:
    executor = engine.executor(1, cancel_futures=Policy.ALL if way == "shutdown" else policy)
    running = executor.submit(gated, tmp_path, "running", 1)
    has_started(tmp_path, "running")
    pending = [executor.submit(identity, 2), executor.submit(identity, 3)]
    items = executor.map(identity, [4, 5])
    opener = open_gate_when_shut(executor, tmp_path)
    end(executor, policy, way)
    opener.join()
    assert running.result(0) == 1
    if policy is Policy.NONE:
        assert [future.result(0) for future in pending] == [2, 3]
        assert list(items) == [4, 5]
    else:
        assert all(future.cancelled() for future in pending)
        with pytest.raises(CancelledError):
            next(items)


def end(executor: Executor, policy: Policy, way: str) -> None:
    if way == "block":
        with executor:
            pass
    elif way == "exception":
        with pytest.raises(KeyError), executor:
            raise KeyError
    else:
        executor.shutdown(cancel_futures=policy)
    with pytest.raises(RuntimeError):
        executor.submit(identity, 1)


@pytest.mark.parametrize("task", [sleep_for_long, loop_in_c])
@pytest.mark.parametrize("way", ["block", "exception", "shutdown"])
@pytest.mark.parametrize("policy", [Policy.RUNNING, Policy.ALL])
def test_policies_that_stop_tasks(
    engine: pb.ParallelBackend, policy: Policy, way: str, task: Any, tmp_path: Path
) -> None:
    called: list[Any] = []
    executor = engine.executor(2, cancel_futures=Policy.NONE if way == "shutdown" else policy)
    running = executor.submit(task, tmp_path, "running")
    items = executor.map(task, [tmp_path], ["item"])
    pids = [has_started(tmp_path, "running"), has_started(tmp_path, "item")]
    pending = [executor.submit(os.getpid) for _ in range(3)]
    for future in (running, *pending):
        future.add_done_callback(called.append)
    started = time.monotonic()
    end(executor, policy, way)
    seconds = time.monotonic() - started
    assert running.cancelled() and running in wait([running], 0).done
    with pytest.raises(CancelledError):
        running.result(0)
    with pytest.raises(CancelledError):
        next(items)
    until(lambda: not any(map(is_alive, pids)), 1)
    if policy is Policy.ALL:
        assert seconds < 0.5
        assert all(future.cancelled() for future in pending)
    else:
        assert not {future.result(0) for future in pending} & set(pids), "on fresh workers"
    assert sorted(called, key=id) == sorted([running, *pending], key=id)


def test_running_tasks_start_processes_that_go_with_them(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    def start_child() -> None:
        subprocess.run(
            ["sh", "-c", f"echo $$ > {tmp_path}/n; mv {tmp_path}/n {tmp_path}/c; sleep 60"],
            check=False,
        )

    with backend_named("joblib", request).executor(1, cancel_futures=Policy.ALL) as executor:
        executor.submit(start_child)
        until((tmp_path / "c").exists)
        child = int((tmp_path / "c").read_text())
    until(lambda: not is_alive(child), 1)


EXIT = """
    import sys, time, os
    from pathlib import Path
    import parallel_backend as pb

    folder = Path(sys.argv[3])

    def note(name, seconds):
        (folder / f"{name}.started").write_text(str(os.getpid()))
        time.sleep(seconds)
        (folder / f"{name}.done").touch()

    policy = pb.CancellationPolicy[sys.argv[2]]
    executor = pb.init_parallel_backend(sys.argv[1]).executor(1, cancel_futures=policy)
    executor.submit(note, "running", 60 if pb.CancellationPolicy.RUNNING in policy else 0.2)
    executor.submit(note, "pending", 0)
    executor.map(note, ["item"], [0])
    while not (folder / "running.started").exists():
        time.sleep(0.002)
"""


@pytest.mark.parametrize("policy", ["NONE", "PENDING", "RUNNING", "ALL"])
def test_policy_at_interpreter_exit(
    engine: pb.ParallelBackend, policy: str, tmp_path: Path
) -> None:
    name = "ray" if is_ray(engine) else "joblib"
    done = run_script(EXIT, name, policy, str(tmp_path), env=ray_address())
    assert done.returncode == 0
    assert not [line for line in done.stderr.splitlines() if "Traceback" in line], done.stderr
    if name == "joblib":
        assert done.stderr == ""
    ran = {path.stem for path in tmp_path.glob("*.done")}
    expected = {
        "NONE": {"running", "pending", "item"},
        "PENDING": {"running"},
        "RUNNING": {"pending", "item"},
        "ALL": set(),
    }
    assert ran == expected[policy]
    pids = [int(path.read_text()) for path in tmp_path.glob("*.started")]
    if name == "joblib" or policy in ("RUNNING", "ALL"):
        until(lambda: not is_alive(pids[0]), 5)


# --- the end ----------------------------------------------------------------------------------


def test_shutdown_twice_and_from_many_threads(backend: pb.ParallelBackend) -> None:
    executor = backend.executor(2)
    futures = [executor.submit(identity, n) for n in range(2)]
    threads = [threading.Thread(target=executor.shutdown) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    executor.shutdown()
    executor.shutdown(wait=False)
    assert [future.result(0) for future in futures] == [0, 1]
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(identity, 1)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.map(identity, [1])


def test_shutdown_without_waiting(engine: pb.ParallelBackend, tmp_path: Path) -> None:
    executor = engine.executor(1, cancel_futures=False)
    futures = [executor.submit(gated, tmp_path, name, name) for name in "ab"]
    executor.shutdown(wait=False)
    assert not futures[0].done()
    open_gate(tmp_path)
    assert [future.result(LONG) for future in futures] == ["a", "b"]


@pytest.mark.parametrize("wait_for_end", [True, False])
def test_shutdown_from_a_callback(backend: pb.ParallelBackend, wait_for_end: bool) -> None:
    executor = backend.executor(1, cancel_futures=False)
    ended = threading.Event()

    def shut(_: Future[Any]) -> None:
        executor.shutdown(wait=wait_for_end)
        ended.set()

    future = executor.submit(time.sleep, 0.05)
    future.add_done_callback(shut)
    assert ended.wait(LONG)
    executor.shutdown()


def test_shutdown_with_a_cancelled_task_still_queued(
    engine: pb.ParallelBackend, tmp_path: Path
) -> None:
    with engine.executor(1, cancel_futures=False) as executor:
        executor.submit(gated, tmp_path, "running")
        pending = [executor.submit(identity, n) for n in range(3)]
        for future in pending:
            assert future.cancel()
        open_gate(tmp_path)


def test_shutdown_while_a_worker_dies(engine: pb.ParallelBackend, tmp_path: Path) -> None:
    options = {"max_retries": 0} if is_ray(engine) else {}
    executor = engine.executor(2, cancel_futures=False, **options)
    futures = [
        executor.submit(crash if n % 3 == 0 else identity, *[n] * bool(n % 3)) for n in range(9)
    ]
    executor.shutdown()
    assert [type(future.exception(0)) for future in futures if not futures.index(future) % 3] == (
        [BrokenProcessPool] * 3
    )
    assert [futures[n].result(0) for n in (1, 2, 4, 5, 7, 8)] == [1, 2, 4, 5, 7, 8]


def test_dropped_executor_applies_its_policy(engine: pb.ParallelBackend, tmp_path: Path) -> None:
    executor = engine.executor(1, cancel_futures=Policy.NONE)
    futures = [executor.submit(gated, tmp_path, name, name) for name in "ab"]
    core = weakref.ref(executor._core)  # type: ignore[attr-defined]
    del executor
    open_gate(tmp_path)
    assert [future.result(LONG) for future in futures] == ["a", "b"]
    until(lambda: gc.collect() is not None and core() is None)

    executor = engine.executor(1, cancel_futures=Policy.ALL)
    running = executor.submit(sleep_for_long, tmp_path, "sleeper")
    pending = executor.submit(identity, 1)
    pid = has_started(tmp_path, "sleeper")
    del executor
    assert wait([running, pending], LONG).not_done == set()
    assert running.cancelled() and pending.cancelled()
    until(lambda: not is_alive(pid), 1)


def test_executor_is_not_dropped_while_its_map_is_read(engine: pb.ParallelBackend) -> None:
    results = engine.executor(2).map(identity, range(100))
    gc.collect()
    assert list(results) == list(range(100))


def test_many_executors_leave_nothing(engine: pb.ParallelBackend) -> None:
    psutil = pytest.importorskip("psutil")

    def count() -> tuple[int, int, int]:
        gc.collect()
        process = psutil.Process()
        ours = [t for t in threading.enumerate() if t.name.startswith("parallel_backend")]
        return len(process.children()), len(ours), process.num_fds()

    def use() -> None:
        with engine.executor(2) as executor:
            assert list(executor.map(identity, range(10))) == list(range(10))

    use()
    before = count()
    for _ in range(30):
        use()
    until(lambda: all(now <= then for now, then in zip(count()[:2], before[:2])))
    assert count()[2] <= before[2] + 4


# --- company ----------------------------------------------------------------------------------


def test_eight_threads_submit_at_once(backend: pb.ParallelBackend) -> None:
    barrier = threading.Barrier(8)

    def submit(thread: int) -> list[Future[int]]:
        barrier.wait(LONG)
        return [executor.submit(identity, thread * 100 + n) for n in range(50)]

    with backend.executor(2) as executor, ThreadPoolExecutor(8) as threads:
        for thread, futures in enumerate(threads.map(submit, range(8))):
            assert [future.result(LONG) for future in futures] == [
                thread * 100 + n for n in range(50)
            ]


def test_callback_submits_the_next(backend: pb.ParallelBackend) -> None:
    finished = threading.Event()
    results = []
    with backend.executor(2) as executor:

        def then(future: Future[int]) -> None:
            results.append(future.result())
            if len(results) == 300:
                finished.set()
            else:
                executor.submit(identity, len(results)).add_done_callback(then)

        executor.submit(identity, 0).add_done_callback(then)
        assert finished.wait(LONG)
    assert results == list(range(300))


def test_executor_inside_a_task(
    backend: pb.ParallelBackend, request: pytest.FixtureRequest
) -> None:
    name = next(n for n, c in pb.ParallelBackend.BACKENDS.items() if type(backend) is c)

    def outer(n: int) -> int:
        from parallel_backend import init_parallel_backend

        with init_parallel_backend(name).executor(2) as inner:
            return sum(inner.map(abs, range(-n, 0)))

    options: dict[str, Any] = {"num_cpus": 0.5} if name == "ray" else {}
    with backend.executor(2, **options) as executor:
        assert list(executor.map(outer, [3, 4], chunksize=1)) == [6, 10]


def test_four_executors_side_by_side(engine: pb.ParallelBackend, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_cpus": 0.5, "max_retries": 0} if is_ray(engine) else {}
    executors = [engine.executor(1, cancel_futures=Policy.ALL, **options) for _ in range(4)]
    futures = [e.submit(gated, tmp_path, str(n), n) for n, e in enumerate(executors)]
    pids = [has_started(tmp_path, str(n)) for n in range(4)]
    assert len(set(pids)) == 4
    executors[0].shutdown()
    os.kill(pids[1], signal.SIGKILL)
    assert isinstance(futures[1].exception(LONG), BrokenProcessPool)
    assert futures[0].cancelled()
    assert futures[2].running() and futures[3].running()
    open_gate(tmp_path)
    assert [future.result(LONG) for future in futures[2:]] == [2, 3]
    assert executors[1].submit(identity, "goes on").result(LONG) == "goes on"
    for executor in executors:
        executor.shutdown()


def test_joblib_parallel_in_the_same_process(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    joblib = pytest.importorskip("joblib")
    backend = backend_named("joblib", request)
    handle = backend.put(list(range(100_000)))
    with backend.executor(2, cancel_futures=Policy.ALL) as executor:
        running = executor.submit(sleep_for_long, tmp_path, "sleeper")
        has_started(tmp_path, "sleeper")
        before = joblib.Parallel(n_jobs=2)(joblib.delayed(os.getpid)() for _ in range(4))
        lengths = joblib.Parallel(n_jobs=2)(joblib.delayed(len)(handle) for _ in range(4))
    assert running.cancelled()
    assert lengths == [100_000] * 4
    after = joblib.Parallel(n_jobs=2)(joblib.delayed(os.getpid)() for _ in range(4))
    assert set(before) & set(after), "its workers have outlived ours"
    joblib.externals.loky.get_reusable_executor().shutdown(kill_workers=True)


# --- faults -----------------------------------------------------------------------------------


def test_five_killed_workers_in_300_tasks(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Only what a killed worker ran is lost, nothing is run twice, and the executor goes on."""

    def work(n: int) -> int:
        with open(tmp_path / "runs", "a") as file:
            file.write(f"{n}\n")
        (tmp_path / f"pid{os.getpid()}").touch()
        time.sleep(0.005)
        return n

    killed: set[int] = set()
    with backend_named("joblib", request).executor(2, cancel_futures=False) as executor:
        futures = [executor.submit(work, n) for n in range(300)]
        for kill in range(1, 6):
            wait(futures[: 50 * kill], LONG)  # spread over the run
            until(lambda: any(map(is_alive, pids_in(tmp_path) - killed)))
            victim = next(pid for pid in pids_in(tmp_path) - killed if is_alive(pid))
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
        errors = [future.exception(LONG) for future in futures]
        assert executor.submit(identity, "goes on").result(LONG) == "goes on"
    lost = [error for error in errors if error is not None]
    print(f"5 kills: {len(lost)} of 300 tasks lost", file=sys.stderr)
    assert len(lost) <= 5, "a kill costs one task at most, the one that the worker ran"
    assert all(isinstance(error, BrokenProcessPool) for error in lost)
    assert [f.result() for f, e in zip(futures, errors) if e is None] == [
        n for n, error in enumerate(errors) if error is None
    ]
    runs = (tmp_path / "runs").read_text().split()
    assert len(runs) == len(set(runs)), "a task ran twice"


def pids_in(folder: Path) -> set[int]:
    return {int(path.name[3:]) for path in folder.glob("pid*")}


def test_ray_retries_what_killed_workers_ran(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    def work(n: int) -> int:
        (tmp_path / f"pid{os.getpid()}").touch()
        time.sleep(0.02)
        return n

    killed: set[int] = set()
    with backend_named("ray", request).executor(2, cancel_futures=False) as executor:
        futures = [executor.submit(work, n) for n in range(100)]
        for kill in range(1, 4):
            wait(futures[: 20 * kill], LONG)
            until(lambda: any(map(is_alive, pids_in(tmp_path) - killed)))
            victim = next(pid for pid in pids_in(tmp_path) - killed if is_alive(pid))
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
        assert [future.result(LONG) for future in futures] == list(range(100))


def test_warm_worker_that_died_idle_costs_nothing(request: pytest.FixtureRequest) -> None:
    with backend_named("joblib", request).executor(1) as executor:
        pid = executor.submit(os.getpid).result(LONG)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, with all its threads
        assert executor.submit(os.getpid).result(LONG) != pid


NODE_REMOVED = """
    import sys, time
    from pathlib import Path
    from ray.cluster_utils import Cluster
    import parallel_backend as pb

    folder = Path(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    import ray
    ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
    backend = pb.init_parallel_backend("ray")
    assert backend.effective_n_jobs() == 3

    def work(n):
        (folder / f"{n}-{ray.get_runtime_context().get_node_id()}").touch()
        time.sleep(0.1)
        return n

    with backend.executor(cancel_futures=False) as executor:
        futures = [executor.submit(work, n) for n in range(40)]
        victim = nodes[0].node_id
        while not any(path.name.endswith(victim) for path in folder.iterdir()):
            time.sleep(0.005)
        cluster.remove_node(nodes[0], allow_graceful=False)
        assert [future.result(60) for future in futures] == list(range(40))
    print("ok")
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.timeout(120)
def test_ray_node_removed_while_40_tasks_run(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    done = run_script(NODE_REMOVED, str(tmp_path), timeout=110, env={"RAY_ADDRESS": ""})
    assert "ok\n" in done.stdout, done.stdout + done.stderr


TOO_LARGE = """
    import ray, os
    import parallel_backend as pb
    ray.init("local", num_cpus=1, object_store_memory=80_000_000, logging_level="ERROR",
             log_to_driver=False, include_dashboard=False)
    with pb.init_parallel_backend("ray").executor(1) as executor:
        try:
            print(executor.submit(len, bytes(200_000_000)).result(50))
        except Exception as error:
            print("error:", type(error).__name__, error)
        assert executor.submit(len, b"123").result(50) == 3
"""


@pytest.mark.timeout(90)
def test_argument_larger_than_rays_object_store() -> None:
    pytest.importorskip("ray")
    done = run_script(TOO_LARGE, timeout=80)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("200000000", "error:")), done.stdout


DRIVER = """
    import sys, time, os, signal
    from pathlib import Path
    import parallel_backend as pb

    def note(name):
        (folder / f"{name}.new").write_text(str(os.getpid()))
        (folder / f"{name}.new").rename(folder / f"{name}.started")

    def sleep(handle, name):
        note(name)
        time.sleep(600)

    def loop(handle, name):
        note(name)
        sum(iter(int, 1))

    folder = Path(sys.argv[3])
    backend = pb.init_parallel_backend(sys.argv[1])
    handle = backend.put(bytes(1_000_000))
    with backend.executor(2, cancel_futures=pb.CancellationPolicy[sys.argv[2]]) as executor:
        futures = [executor.submit(sleep, handle, "sleep"), executor.submit(loop, handle, "loop")]
        futures[0].result()
"""


def started_driver(engine: pb.ParallelBackend, policy: str, folder: Path) -> Any:
    code = textwrap.dedent(DRIVER)
    name = "ray" if is_ray(engine) else "joblib"
    return subprocess.Popen(
        [sys.executable, "-c", code, name, policy, str(folder)],
        env={**os.environ, "PYTHONPATH": str(HERE), **ray_address()},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, as a terminal gives
    )


def test_driver_killed(engine: pb.ParallelBackend, tmp_path: Path) -> None:
    files = set(Path("/dev/shm").glob("parallel_backend_*"))
    driver = started_driver(engine, "PENDING", tmp_path)
    pids = [has_started(tmp_path, name) for name in ("sleep", "loop")]
    ours = set(Path("/dev/shm").glob("parallel_backend_*")) - files
    driver.kill()
    driver.communicate(timeout=LONG)
    until(lambda: not any(map(is_alive, pids)), 10)
    until(lambda: not any(path.exists() for path in ours), 10)
    assert ours or is_ray(engine)


def test_ctrl_c_leaves_the_block_by_its_policy(engine: pb.ParallelBackend, tmp_path: Path) -> None:
    driver = started_driver(engine, "ALL", tmp_path)
    pids = [has_started(tmp_path, name) for name in ("sleep", "loop")]
    os.killpg(driver.pid, signal.SIGINT)
    _, stderr = driver.communicate(timeout=LONG)
    assert driver.returncode != 0
    until(lambda: not any(map(is_alive, pids)), 5)
    if not is_ray(engine):  # Ray's own processes may speak up
        assert stderr.count("Traceback") == 1, stderr
    assert stderr.rstrip().endswith("KeyboardInterrupt"), stderr


def test_second_ctrl_c_stops_what_runs(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    driver = started_driver(backend_named("joblib", request), "PENDING", tmp_path)
    pids = [has_started(tmp_path, name) for name in ("sleep", "loop")]
    os.killpg(driver.pid, signal.SIGINT)
    time.sleep(0.3)  # the first one is on its way to shutdown(), which waits for ever
    assert all(map(is_alive, pids)), "PENDING lets them run"
    os.killpg(driver.pid, signal.SIGINT)
    driver.communicate(timeout=LONG)
    until(lambda: not any(map(is_alive, pids)), 5)


def test_submit_racing_with_worker_start(request: pytest.FixtureRequest) -> None:
    """Stopped before its process exists: the task is cancelled, and no process is left."""
    backend = backend_named("joblib", request)
    pb._kill_parked()
    executor = backend.executor(2, cancel_futures=Policy.ALL)
    futures = [executor.submit(time.sleep, 60) for _ in range(2)]
    executor.shutdown()
    assert all(future.cancelled() for future in futures)


def test_worker_watches_its_lifeline_where_there_is_no_prctl(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """What macOS and Windows workers do; here by a platform that lies."""
    code = """
        import sys, os, time
        from multiprocessing import Pipe
        import parallel_backend as pb
        from joblib.externals.loky.backend import get_context

        def lying(serve):
            def main(*args):
                import sys
                sys.platform = "darwin"
                serve(*args)
            return main

        ours, theirs = Pipe()
        watched, lifeline = Pipe(duplex=False)
        process = get_context("loky").Process(target=lying(pb._serve), args=(theirs, os.getpid(), watched))
        process.start()
        theirs.close(); watched.close()
        ours.send_bytes(pb._dumps((os.getpid, [()], {}, 0.0)))
        assert pb._opened(ours.recv_bytes(), (), "task", 1)[0] == [process.pid]
        ours.send_bytes(pb._dumps((time.sleep, [(600,)], {}, 0.0)))
        print(process.pid, flush=True)
        os.kill(os.getpid(), 9)
    """
    pytest.importorskip("joblib")
    done = run_script(code)
    pid = int(done.stdout)
    until(lambda: not is_alive(pid), 5)


# --- put, get, wrap, wait ---------------------------------------------------------------------


def test_get_takes_what_there_is(backend: pb.ParallelBackend) -> None:
    start = backend.wrap(identity)
    handle = backend.put({"a": 1})
    with backend.executor(2) as executor:
        future = executor.submit(identity, 5)
        nested = [start(1), (backend.put(2), future), [handle]]
        assert backend.get(nested, timeout=LONG) == [1, (2, 5), [{"a": 1}]]
        assert backend.get("as it is") == "as it is"
        assert backend.get([]) == []


def test_handles_arrive_as_objects(backend: pb.ParallelBackend) -> None:
    handle = backend.put([1, 2, 3])
    with backend.executor(2) as executor:
        assert executor.submit(len, handle).result(LONG) == 3
        assert executor.submit(capture, x=handle).result(LONG) == ((), {"x": [1, 2, 3]})
        assert list(executor.map(len, [handle] * 20)) == [3] * 20
    assert backend.get(backend.wrap(len)(handle), timeout=LONG) == 3
    chained = backend.wrap(sum)(backend.wrap(identity)(handle))
    assert backend.get(chained, timeout=LONG) == 6


def test_get_timeout_is_the_builtin(engine: pb.ParallelBackend, tmp_path: Path) -> None:
    handle = engine.wrap(gated)(tmp_path, "a", 1)
    with pytest.raises(TimeoutError):
        engine.get([handle], timeout=0.05)
    assert engine.wait([handle], timeout=0.05) == ([], [handle])
    open_gate(tmp_path)
    assert engine.get(handle, timeout=LONG) == 1


def test_wait_returns_as_many_as_asked(engine: pb.ParallelBackend, tmp_path: Path) -> None:
    slow = engine.wrap(gated)(tmp_path, "slow")
    has_started(tmp_path, "slow")
    quick = engine.wrap(identity)(1)
    stored = engine.put(1)
    assert engine.wait([slow, quick], timeout=LONG) == ([quick], [slow])
    assert engine.wait([slow, quick, stored], num_returns=2, timeout=LONG) == (
        [quick, stored],
        [slow],
    )
    assert engine.wait([quick, stored], timeout=LONG) == ([quick], [stored])
    for wrong in (0, 3):
        with pytest.raises(ValueError, match="num_returns"):
            engine.wait([slow, quick], num_returns=wrong)
    open_gate(tmp_path)
    assert engine.wait([slow, quick], num_returns=2, timeout=LONG) == ([slow, quick], [])


def test_wrap_takes_options_of_the_engine(backend: pb.ParallelBackend) -> None:
    assert backend.get(backend.wrap(identity, num_cpus=0.5, max_calls=1)(1), timeout=LONG) == 1


def test_background_task_outlives_its_backend(request: pytest.FixtureRequest) -> None:
    backend = backend_named("joblib", request)
    handle = backend.wrap(lambda: time.sleep(0.2) or 7)()  # type: ignore[func-returns-value]
    del backend
    gc.collect()
    assert pb.init_parallel_backend("joblib").get(handle, timeout=LONG) == 7


def test_effective_n_jobs(backend: pb.ParallelBackend) -> None:
    cpus = 4 if is_ray(backend) else pb.available_cpus()
    assert backend.effective_n_jobs() == backend.effective_n_jobs(None) == cpus
    assert backend.effective_n_jobs(-2) == max(cpus - 1, 1)
    assert backend.effective_n_jobs(-99) == 1
    assert backend.effective_n_jobs(1) == 1
    assert backend.effective_n_jobs(64) == (cpus if is_ray(backend) else 64)
    with pytest.raises(ValueError, match="n_jobs"):
        backend.effective_n_jobs(0)
    with backend.executor() as executor:
        assert executor._max_workers == cpus  # type: ignore[attr-defined]


def test_joblib_config_bounds_the_jobs(request: pytest.FixtureRequest) -> None:
    joblib = pytest.importorskip("joblib")
    backend = backend_named("joblib", request)
    with joblib.parallel_config(n_jobs=1):
        assert backend.effective_n_jobs(-1) == backend.effective_n_jobs(5) == 1
    with joblib.parallel_config(n_jobs=3):
        assert backend.effective_n_jobs(5) == 3
    with joblib.parallel_config(n_jobs=-2):
        assert backend.effective_n_jobs(-1) == max(pb.available_cpus() - 1, 1)


@pytest.mark.parametrize("folder", ["/dev/shm", None])
def test_shared_object_is_mapped_and_its_file_goes(
    request: pytest.FixtureRequest, folder: str | None, tmp_path: Path, monkeypatch: Any
) -> None:
    numpy = pytest.importorskip("numpy")
    backend = backend_named("joblib", request)
    where = Path(folder or tmp_path)
    monkeypatch.setenv("JOBLIB_TEMP_FOLDER", str(where))
    before = set(where.glob("parallel_backend_*"))

    def inspect(array: Any) -> Any:
        base = array
        while getattr(base, "base", None) is not None:
            base = base.base
        kind = type(base.obj).__name__ if isinstance(base, memoryview) else type(base).__name__
        return float(array.sum()), array.flags.writeable, kind

    handle = backend.put(numpy.ones(1_000_000))
    (path,) = set(where.glob("parallel_backend_*")) - before
    assert path.stat().st_mode & 0o077 == 0, "for the user alone"
    with backend.executor(1) as executor:
        assert executor.submit(inspect, handle).result(LONG) == (1_000_000, False, "mmap")
        executor.submit(time.sleep, 0.1)
        waiting = executor.submit(inspect, handle)
        array = backend.get(handle)
        assert array.sum() == 1_000_000
        del handle
        assert waiting.result(LONG)[0] == 1_000_000, "a task that uses it keeps the file"
        del waiting
        until(lambda: gc.collect() is not None and not path.exists())
    assert array.sum() == 1_000_000


def test_small_shared_object_has_no_file(request: pytest.FixtureRequest) -> None:
    before = set(Path("/dev/shm").glob("parallel_backend_*"))
    handle = backend_named("joblib", request).put(b"small")
    assert set(Path("/dev/shm").glob("parallel_backend_*")) == before
    assert pickle.loads(pickle.dumps(handle)) == b"small"  # type: ignore[comparison-overlap]


def test_shared_object_that_only_cloudpickle_can_send(request: pytest.FixtureRequest) -> None:
    backend = backend_named("joblib", request)
    data = bytes(100_000)
    handle = backend.put(lambda: len(data))
    assert backend.get(backend.wrap(lambda f: f())(handle), timeout=LONG) == 100_000


def test_shared_object_where_there_is_no_room(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Any
) -> None:
    backend = backend_named("joblib", request)
    monkeypatch.setenv("JOBLIB_TEMP_FOLDER", str(tmp_path / "missing"))
    handle = backend.put(bytes(100_000))
    assert backend.get(handle) == bytes(100_000)
    monkeypatch.setattr(pb.tempfile, "mkstemp", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backend.put(bytes(100_000))


# --- warm workers -----------------------------------------------------------------------------


def pids_of(executor: Executor) -> set[int]:
    return set(executor.map(lambda _: (time.sleep(0.05), os.getpid())[1], range(4), chunksize=1))


def test_next_executor_finds_warm_workers(request: pytest.FixtureRequest) -> None:
    backend = backend_named("joblib", request)
    with backend.executor(2) as executor:
        first = pids_of(executor)
    with backend.executor(2) as executor, backend.executor(2) as other:
        second, third = pids_of(executor), pids_of(other)
    assert second == first
    assert not second & third, "never shared by two that live at once"


@pytest.mark.parametrize("why", ["crash", "stop", "other environment"])
def test_workers_are_not_kept_after(
    why: str, request: pytest.FixtureRequest, monkeypatch: Any
) -> None:
    backend = backend_named("joblib", request)
    with backend.executor(2, cancel_futures=Policy.ALL) as executor:
        first = pids_of(executor)
        if why == "crash":
            executor.submit(crash).exception(LONG)
        elif why == "stop":
            executor.submit(time.sleep, 60)
    if why == "other environment":
        monkeypatch.setenv("SOMETHING_THAT_WORKERS_SEE", "1")
    else:
        assert not any(map(is_alive, first))
    with backend.executor(2) as executor:
        assert not pids_of(executor) & first


def test_idle_workers_end(request: pytest.FixtureRequest, monkeypatch: Any) -> None:
    pb._kill_parked()
    monkeypatch.setattr(pb, "IDLE_SECONDS", 0.2)
    backend = backend_named("joblib", request)
    with backend.executor(2) as executor:
        pids = pids_of(executor)
        until(lambda: not any(map(is_alive, pids)))
        assert not pids_of(executor) & pids
    until(lambda: not any(pb._LokyEngine.parked.values()))


def test_forked_child_leaves_our_workers_alone(request: pytest.FixtureRequest) -> None:
    backend = backend_named("joblib", request)
    handle = backend.put(bytes(100_000))
    with backend.executor(1, cancel_futures=Policy.ALL) as executor:
        pid = executor.submit(os.getpid).result(LONG)
        child = os.fork()
        if child == 0:
            try:
                del handle
                gc.collect()
                pb._end_all()
                pb._kill_parked()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert executor.submit(os.getpid).result(LONG) == pid
        assert executor.submit(len, handle).result(LONG) == 100_000


# --- the core, under an engine under our control ----------------------------------------------


class ManualEngine(pb._Engine):
    """Starts nothing, and says that something is done when the test says so."""

    stoppable = True

    def __init__(self) -> None:
        self.started: dict[Any, Any] = {}
        self.closed = 0

    def start(self, work: Any, done: Any) -> None:
        assert work not in self.started
        self.started[work] = done

    def stop(self, work: Any) -> None:
        self.finish(work, KeyError("killed"), begun=len(work.call[1]))

    def finish(self, work: Any, failure: BaseException | None, begun: int) -> None:
        items = work.call[1]
        values = [args[0] for args in items[:begun]]
        if failure is not None:
            values = values[: max(begun - 1, 0)] if begun < len(items) else []
        self.started.pop(work)(work, (values, failure, begun, 0.001 * begun))

    def close(self, clean: bool) -> None:
        assert not self.started
        self.closed += 1


def core_machine() -> Any:
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

    class Core(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.engine = ManualEngine()
            self.executor = pb._Executor(self.engine, 2, Policy.PENDING)
            self.core = self.executor._core
            self.futures: list[Future[Any]] = []
            self.expected: dict[Future[Any], str] = {}  # the model: how each must end, once known
            self.calls: dict[Future[Any], int] = {}
            self.maps: list[tuple[Any, int]] = []
            self.shut = False

        def pick(self, data: Any, choices: Any) -> Any:
            return data.draw(st.sampled_from(list(choices)))

        def count(self, future: Future[Any]) -> None:
            self.calls[future] = self.calls.get(future, 0) + 1

        @rule()
        def submit(self) -> None:
            try:
                future = self.executor.submit(identity, len(self.futures))
            except RuntimeError:
                assert self.shut
                return
            assert not self.shut
            self.futures.append(future)
            future.add_done_callback(self.count)

        @precondition(lambda self: not self.shut)
        @rule(size=st.integers(1, 20), chunksize=st.sampled_from([None, 1, 3]))
        def map(self, size: int, chunksize: int | None) -> None:
            self.maps.append((self.executor.map(identity, range(size), chunksize=chunksize), size))

        @precondition(lambda self: self.futures)
        @rule(data=st.data())
        def cancel(self, data: Any) -> None:
            future = self.pick(data, self.futures)
            was = future.running(), future.done(), future.cancelled()
            assert future.cancel() == (was == (False, False, False) or was[2])
            if future.cancelled():
                self.expected.setdefault(future, "cancelled")

        @precondition(lambda self: self.engine.started)
        @rule(data=st.data(), how=st.sampled_from(["done", "part", "fails", "crash", "unsent"]))
        def finish(self, data: Any, how: str) -> None:
            work = self.pick(data, self.engine.started)
            size = len(work.call[1])
            failure: BaseException | None = {
                "fails": ValueError("task"),
                "crash": BrokenProcessPool("worker"),
                "unsent": pickle.PicklingError("call"),
            }.get(how)
            begun = {"part": 1, "unsent": 0}.get(how, size)
            if isinstance(work, Future):
                self.expected[work] = "done" if failure is None else "failed"
            self.engine.finish(work, failure, begun)

        @rule(
            policy=st.sampled_from(list(Policy) + [Policy.NONE, Policy.ALL]),
            first=st.booleans(),
        )
        def shutdown(self, policy: Policy, first: bool) -> None:
            pending = [f for f in self.futures if not f.running() and not f.done()]
            running = [f for f in self.futures if f.running()]
            if Policy.PENDING in policy:
                self.expected.update(dict.fromkeys(pending, "cancelled"))
            if Policy.RUNNING in policy:
                self.expected.update(dict.fromkeys(running, "cancelled"))
            self.shut = True
            self.executor.shutdown(wait=False, cancel_futures=policy)
            for future in running if Policy.RUNNING in policy else ():
                assert future.cancelled()

        @invariant()
        def promises_hold(self) -> None:
            assert len(self.engine.started) == len(self.core.running) <= 2
            running = [future for future in self.futures if future.running()]
            assert len(running) <= 2
            assert set(running) <= set(self.engine.started)
            if len(self.engine.started) < 2:
                assert not any(not f.done() and not f.running() for f in self.futures), (
                    "idle worker"
                )
            for future, how in self.expected.items():
                assert outcome(future) == how
            assert all(self.calls.get(f, 0) == f.done() for f in self.futures)

        def teardown(self) -> None:
            self.shut = True
            self.executor.shutdown(wait=False, cancel_futures=Policy.NONE)
            while self.engine.started:
                work = next(iter(self.engine.started))
                self.engine.finish(work, None, len(work.call[1]))
            self.executor.shutdown()
            assert self.engine.closed == 1
            assert not self.core.running and not self.core.pending
            assert all(future.done() and self.calls[future] == 1 for future in self.futures)
            for results, size in self.maps:
                got = []
                with contextlib.suppress(
                    CancelledError, ValueError, BrokenProcessPool, pickle.PicklingError
                ):
                    got.extend(results)
                    assert len(got) == size
                assert got == list(range(len(got)))

    Core.TestCase.settings = hypothesis.settings(
        max_examples=150, stateful_step_count=40, deadline=None, database=None
    )
    return Core


def outcome(future: Future[Any]) -> str:
    if future.cancelled():
        return "cancelled"
    if not future.done():
        return "running" if future.running() else "pending"
    return "failed" if future.exception() else "done"


def test_core_keeps_its_promises_in_any_order() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    machine = core_machine()
    run_state_machine_as_test(machine, settings=machine.TestCase.settings)


def test_core_forgets_an_engine_that_is_gone() -> None:
    class Lost(ManualEngine):
        def lost(self) -> BaseException | None:
            self.started.clear()
            return BrokenProcessPool("gone")

    executor = pb._Executor(Lost(), 1, Policy.NONE)
    futures = [executor.submit(identity, n) for n in range(2)]
    executor.shutdown(cancel_futures=Policy.PENDING)
    assert isinstance(futures[0].exception(0), BrokenProcessPool)
    assert futures[1].cancelled()


def test_core_survives_an_engine_that_cannot_start() -> None:
    class Broken(ManualEngine):
        def start(self, work: Any, done: Any) -> None:
            raise OSError("no more threads")

    with pb._Executor(Broken(), 2, Policy.NONE) as executor:
        assert isinstance(executor.submit(identity, 1).exception(0), OSError)
        with pytest.raises(OSError, match="no more threads"):
            list(executor.map(identity, range(3)))


def test_ctrl_c_in_a_sequential_task_goes_to_the_program() -> None:
    with pb.SequentialParallelBackend().executor() as executor:
        with pytest.raises(KeyboardInterrupt):
            executor.submit(raise_it, KeyboardInterrupt())
        assert executor.submit(identity, 1).result(0) == 1


def test_idle_executor_uses_no_cpu(engine: pb.ParallelBackend, tmp_path: Path) -> None:
    with engine.executor(2) as executor:
        executor.submit(sleep_briefly, 0.01).result(LONG)
        futures = [executor.submit(sleep_briefly, 1.0) for _ in range(2)]
        thread_times = cpu_of_our_threads()
        wait(futures, LONG)
        assert cpu_of_our_threads() - thread_times < 0.02  # 2 ms is the goal; this is a test


def sleep_briefly(seconds: float) -> None:
    time.sleep(seconds)


def cpu_of_our_threads() -> float:
    """Seconds of CPU that the threads of parallel_backend have used."""
    psutil = pytest.importorskip("psutil")
    ours = {t.native_id for t in threading.enumerate() if t.name.startswith("parallel_backend")}
    return sum(t.user_time + t.system_time for t in psutil.Process().threads() if t.id in ours)


# --- Ray's own --------------------------------------------------------------------------------


def test_ray_task_options(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    backend = backend_named("ray", request)
    with backend.executor(8, num_cpus=0.5) as executor:
        futures = [executor.submit(gated, tmp_path, str(n)) for n in range(8)]
        for n in range(8):
            has_started(tmp_path, str(n))
        open_gate(tmp_path)
        wait(futures, LONG)
    with pytest.raises((ValueError, TypeError)):
        backend.executor(nonsense=1)


def test_ray_retries_exceptions_if_asked(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    def fail_once() -> int:
        with contextlib.suppress(FileExistsError):
            (tmp_path / "failed").mkdir()
            raise ValueError("first time")
        return 1

    options = {"retry_exceptions": True, "max_retries": 1}
    with backend_named("ray", request).executor(1, **options) as executor:
        assert executor.submit(fail_once).result(LONG) == 1
        assert type(executor.submit(divmod, 1, 0).exception(LONG)) is ZeroDivisionError
        assert executor.submit(identity, 2).result(LONG) == 2


def test_ray_bound_below_its_cpus_holds_for_short_tasks(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    def overlap(n: int) -> int:
        path = tmp_path / str(n)
        path.touch()
        count = len(list(tmp_path.iterdir()))
        path.unlink()
        return count

    with backend_named("ray", request).executor(2) as executor:
        assert max(f.result(LONG) for f in [executor.submit(overlap, n) for n in range(300)]) <= 2


RAY_SHUT_DOWN = """
    import sys, time, ray
    import parallel_backend as pb
    executor = pb.init_parallel_backend("ray").executor(1, cancel_futures=pb.CancellationPolicy.NONE)
    future = executor.submit(time.sleep, 600)
    time.sleep(0.5)
    ray.shutdown()
    executor.shutdown()
    print(type(future.exception(0)).__name__)
"""


def test_ray_shut_down_while_tasks_run(request: pytest.FixtureRequest) -> None:
    backend_named("ray", request)
    done = run_script(RAY_SHUT_DOWN, env=ray_address())
    assert done.stdout == "BrokenProcessPool\n", done.stderr


def test_ray_is_started_for_who_has_not(monkeypatch: Any) -> None:
    code = """
        import sys, logging, parallel_backend as pb
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        assert "ray" not in sys.modules
        with pb.init_parallel_backend(pb.ParallelConfig(backend="ray", n_cpus_local=1)).executor() as e:
            print(e._max_workers, e.submit(pow, 2, 3).result(30))
    """
    pytest.importorskip("ray")
    done = run_script(code, env={"RAY_ADDRESS": "local"} if False else {})
    assert done.stdout == "1 8\n", done.stderr
    assert (
        "parallel_backend: Ray is not initialised yet: calling ray.init(num_cpus=1)" in done.stderr
    )
