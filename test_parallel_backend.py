"""Tests of parallel_backend: one contract for all backends, then each engine's own quirks.

Interleavings are forced with files that tasks write and wait for; every wait ends.
"""

from __future__ import annotations

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
