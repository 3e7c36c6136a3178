"""Run Python on all cores of this machine, on a Ray cluster, or in this process: one file, one API.

Copy this file into your project; it needs nothing but the standard library until a backend is
used. Code is written against :class:`concurrent.futures.Executor` and a handful of methods, and
one string says where it runs::

    from parallel_backend import init_parallel_backend

    backend = init_parallel_backend()  # "joblib", unless PARALLEL_BACKEND says otherwise
    data = backend.put(load())  # sent to the workers once, not with every task
    with backend.executor() as executor:
        futures = [executor.submit(fit, data, seed) for seed in range(1000)]
        scores = backend.get(futures)

``"joblib"`` runs tasks in loky's worker processes, ``"ray"`` on a Ray cluster, ``"sequential"`` in
the calling process, for debugging. ``python -m parallel_backend`` tests what is installed.

What the executors promise, on every backend:

- They are :class:`concurrent.futures.Executor` to the letter, but for this: by default, what has not
  begun is cancelled when the ``with`` block is left. Collect results inside it.
- No more than ``max_workers`` tasks run at once. ``running()`` is true only of what a worker has begun;
  Ray does not say what it has begun, so there it is true of the oldest.
- Their :class:`CancellationPolicy` is applied when the ``with`` block is left, at ``shutdown()``, when
  an executor is dropped, and when the program ends. Under ``RUNNING``, what runs is stopped with its
  process, also by ``future.cancel()``. Cancelled means cancelled: nothing of it runs.
- A task's exception arrives as its own, with the worker's traceback. A worker that dies costs the
  task that it had begun, and no other; the executor goes on.
- Lambdas, closures and functions of ``__main__`` can be sent; a future or a handle among a task's
  arguments arrives as its value. What can't be pickled fails its own future.
- ``map`` sizes its chunks by itself, and reads an endless input with ``buffersize``.
- An idle executor uses no CPU, and one that has ended leaves no thread, process or file; but joblib's
  workers stay warm for the next one, for a minute.

Version 0.9.0 is the first. It still takes the ``ParallelConfig`` of the project that it comes from;
that, and the ``config`` arguments, go in 0.10.0.

SPDX-License-Identifier: MIT
Copyright (c) 2026 the parallel_backend developers

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction, including
without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to the
following conditions: The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO
EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN
AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE
OR OTHER DEALINGS IN THE SOFTWARE.
"""

# pyright: standard

from __future__ import annotations

import _thread
import abc
import atexit
import collections
import contextlib
import enum
import functools
import importlib
import inspect
import io
import itertools
import linecache
import logging
import os
import pickle
import queue
import re
import signal
import sys
import threading
import time
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, as_completed
from concurrent.futures import TimeoutError as FutureTimeoutError  # not the builtin before 3.11
from dataclasses import dataclass
from itertools import islice, repeat, takewhile
from types import ModuleType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    TypedDict,
    TypeVar,
    cast,
    overload,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack
elif sys.version_info >= (3, 11):
    from typing import Unpack
else:
    Unpack = collections.defaultdict(lambda: Any)  # what typing.get_type_hints() makes of it

T = TypeVar("T")

__version__ = "0.9.0"
__all__ = [
    "CancellationPolicy",
    "Handle",
    "JoblibParallelBackend",
    "ParallelBackend",
    "ParallelConfig",
    "ParallelExecutor",
    "RayParallelBackend",
    "SequentialParallelBackend",
    "TaskOptions",
    "available_cpus",
    "deprecated",
    "init_parallel_backend",
]

_log = logging.getLogger(__name__)


class CancellationPolicy(enum.Flag):
    """What becomes of an executor's tasks when it ends: at the end of its ``with`` block, at
    ``shutdown()``, when it is dropped, and when the interpreter exits.

    - ``NONE``: all tasks run to their end.
    - ``PENDING``: tasks not started are cancelled; those running run to their end.
    - ``RUNNING``: running tasks are stopped, and their workers with them; those not started still run.
    - ``ALL``: nothing goes on. The executor ends at once, whatever its tasks do.

    ::

        with backend.executor(cancel_futures=CancellationPolicy.ALL) as executor:
            first = next(as_completed([executor.submit(search, part) for part in parts]))
    """

    NONE = 0
    PENDING = 1
    RUNNING = 2
    ALL = PENDING | RUNNING


def _as_policy(value: CancellationPolicy | bool) -> CancellationPolicy:
    if isinstance(value, bool):
        return CancellationPolicy.PENDING if value else CancellationPolicy.NONE
    if not isinstance(value, CancellationPolicy):
        raise TypeError(f"cancel_futures must be a CancellationPolicy or a bool, not {value!r}")
    return value


def _check_number(name: str, value: object, kinds: Any = int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name} must be {'an int' if kinds is int else 'a number'}, not {value!r}")
    if not cast("float", value) > 0:
        raise ValueError(f"{name} must be greater than 0")


class TaskOptions(TypedDict, total=False):
    """Ray's options for a task; the other backends ignore them.

    For :meth:`ParallelBackend.executor` and :meth:`ParallelBackend.wrap`::

        with backend.executor(num_gpus=1, max_retries=0) as executor:
            executor.submit(train, data)
    """

    accelerator_type: str
    enable_task_events: bool
    fallback_strategy: list[dict[str, Any]]
    label_selector: dict[str, str]
    max_calls: int
    max_retries: int
    memory: float
    name: str
    num_cpus: float
    num_gpus: float
    object_store_memory: int
    placement_group: Any
    placement_group_bundle_index: int
    placement_group_capture_child_tasks: bool
    resources: dict[str, float]
    retry_exceptions: bool | list[type[BaseException]]
    runtime_env: dict[str, Any]
    scheduling_strategy: Any


_OWN_OPTIONS = ("initializer", "initargs", "max_tasks_per_child", "task_timeout")
_NAMES_ELSEWHERE = {  # what other libraries call our options
    "n_jobs": "max_workers",
    "n_workers": "max_workers",
    "processes": "max_workers",
    "timeout": "task_timeout",
}
_NOT_OURS = {
    "num_returns": "a task has one result",
    "mp_context": "the processes are joblib's or Ray's",
}


def _unknown_option(name: str) -> TypeError:
    """The error for an option that no backend knows."""
    import difflib

    if name in _NOT_OURS:
        return TypeError(f"There is no option {name!r}: {_NOT_OURS[name]}")
    known = (*_OWN_OPTIONS, *TaskOptions.__annotations__, "max_workers", "cancel_futures")
    if name in known:
        return TypeError(f"{name!r} is an option of executor(), and not of wrap()")
    nearest = _NAMES_ELSEWHERE.get(name) or difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    return TypeError(f"There is no option {name!r}; the nearest is {nearest}")


# --- deprecation ------------------------------------------------------------------------------


def _warn_caller(message: str, category: type[Warning]) -> None:
    """Attribute the warning to the nearest caller outside this file, whose line can be changed."""
    level, frame = 1, sys._getframe()
    # Not to asyncio, which before Python 3.12 may be what runs a coroutine's first step.
    while frame.f_back is not None and (
        frame.f_globals is globals() or str(frame.f_globals.get("__name__")).startswith("asyncio.")
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _differs(value: object, parameter: inspect.Parameter | None) -> bool:
    """Whether ``value`` is another than the parameter's default."""
    default = inspect.Parameter.empty if parameter is None else parameter.default
    try:
        return value is not default and not (type(value) is type(default) and value == default)
    except Exception:
        return True  # the == of arrays is no single truth


def deprecated(
    target: Callable[..., Any] | Literal[True] | None = None,
    *,
    args_mapping: Mapping[str, str | None] | None = None,
    deprecated_in: str,
    remove_in: str,
    category: type[Warning] = FutureWarning,
    instead: str = "",
    applies: Callable[[Any], bool] = lambda value: True,
) -> Callable[[T], T]:
    """Deprecate a callable, or some of its arguments::

        @deprecated(True, args_mapping={"jobs": "n_jobs"}, deprecated_in="1.2", remove_in="2.0")
        def fit(data, jobs=None, n_jobs=1): ...

    The warning is attributed to the caller's line, so that Python's filters show it once a place.
    Functions, methods, class and static methods, ``__init__`` and coroutine functions can be
    decorated; name, docstring, signature and pickling stay as they are.

    Args:
        target: ``True`` deprecates the arguments in ``args_mapping``, ``None`` the callable
            itself; a function likewise, and every call is forwarded to that function.
        args_mapping: what becomes of an argument: ``{"old": "new"}`` passes its value on as
            ``new``, ``{"old": None}`` drops it, ``{"old": "old"}`` only warns. With
            ``target=True`` only a value other than the argument's default warns.
        deprecated_in: the version since when.
        remove_in: the version in which it goes.
        category: of the warning. Python shows a ``FutureWarning`` to users by default.
        instead: what to use, where ``target`` and ``args_mapping`` do not tell.
        applies: says of an argument's value whether it is deprecated; by default every one is.

    Raises:
        TypeError: at decoration, of a class (decorate its ``__init__``), or if ``args_mapping`` is
            missing, names no parameter, or takes away one that has no default; at a call that
            gives both an argument and its replacement.
    """
    mapping = dict(args_mapping or {})
    if isinstance(target, (classmethod, staticmethod)):  # as it is called in its class's body
        target = target.__func__

    def decorate(function: Any) -> Any:
        if isinstance(function, (classmethod, staticmethod)):
            return type(function)(decorate(function.__func__))
        name = getattr(function, "__qualname__", repr(function)).removesuffix(".__init__")
        if isinstance(function, type):
            raise TypeError(f"deprecated() takes no class: decorate {name}.__init__()")
        if target is True and not mapping:
            raise TypeError(f"deprecated(True) needs args_mapping: which arguments of {name}()?")
        receiver = target if callable(target) else function
        given, taken = (
            inspect.signature(each).parameters if mapping else {}  # not every builtin has one
            for each in (function, receiver)
        )
        for known, arguments in ((given, {*mapping}), (taken, {*mapping.values()} - {None})):
            unknown = arguments - known.keys()
            if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                raise TypeError(f"args_mapping names {unknown}, no parameter of {name}()")
        for old, new in mapping.items():
            needed = old in given and given[old].default is inspect.Parameter.empty
            if target is True and new != old and needed:
                raise TypeError(f"args_mapping takes {old!r} from {name}(): give it a default")
        given_places, taken_places = (
            [n for n, p in known.items() if p.kind <= p.POSITIONAL_OR_KEYWORD]
            for known in (given, taken)
        )

        def notice(what: str, use: str) -> str:
            what += f" is deprecated since {deprecated_in} and will be removed in {remove_in}"
            return "; ".join(filter(None, (what, instead or use))) + "."

        use = f"use `{getattr(target, '__qualname__', target)}` instead"
        whole = notice(f"`{name}`", use if callable(target) else "")

        def translate(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            """Warn of what is deprecated and return the arguments that the receiver takes."""
            if target is not True:
                _warn_caller(whole, category)
            placed = dict(zip(given_places, args))
            moved = []
            for old, new in mapping.items():
                source = placed if old in placed else named
                if old not in source:
                    continue
                value = source[old]
                meant = _differs(value, given.get(old))
                if target is True and meant and applies(value):
                    use = f"use `{new}` instead" if new else "it has no effect"
                    argument = f"The argument `{old}` of `{name}`"
                    _warn_caller(notice(argument, use if new != old else ""), category)
                if new == old:
                    continue
                if target is True and source is placed:
                    placed[old] = given[old].default  # those after it keep their places
                else:
                    del source[old]
                if new and (meant or target is not True):
                    moved.append((old, new, value))
            renamed: dict[str, Any] = {}
            for old, new, value in moved:
                for source in (placed, named, renamed):
                    if new in source and _differs(source.pop(new), taken.get(new)):
                        raise TypeError(f"{name}() got both {new!r} and {old!r}, its old name")
                renamed[new] = value
            placed.update(renamed)
            leading = list(takewhile(placed.__contains__, taken_places))
            args = (*map(placed.pop, leading), *args[len(given_places) :])
            return args, {**named, **placed}

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = translate(args, kwargs)
            return receiver(*args, **kwargs)

        if inspect.iscoroutinefunction(receiver):
            if sys.version_info >= (3, 12):
                inspect.markcoroutinefunction(wrapper)
            else:
                # Before 3.12, only what is made by ``async def`` passes for a coroutine function. So
                # the warning comes when it is first awaited, and not when it is called.
                plain = wrapper

                async def stepped(*args: Any, **kwargs: Any) -> Any:
                    return await plain(*args, **kwargs)

                wrapper = functools.wraps(function)(stepped)
        if target is not True:
            cast("Any", wrapper).__deprecated__ = whole  # as PEP 702 has it
        return wrapper

    return decorate


def _evaluated(cls: type[T]) -> type[T]:
    """dataclass() looks up annotations that are strings in sys.modules[__name__], which is missing if
    this file was loaded by its path. So they are evaluated here."""
    cls.__annotations__ = {k: eval(v) for k, v in cls.__annotations__.items()}
    return cls


@dataclass(frozen=True)
@_evaluated
class ParallelConfig:
    """The configuration of old, still honoured; deprecated since 0.9.0, gone in 0.10.0::

        backend = init_parallel_backend(ParallelConfig(backend="ray", n_cpus_local=4))

    Args:
        backend: name of the backend.
        address: of the Ray cluster to connect to.
        n_cpus_local: most workers of an executor; on Ray also the CPUs of a cluster started here.
        logging_level: of Ray, as :mod:`logging` has them.
        wait_timeout: seconds; without effect, since nothing polls any more.

    Raises:
        ValueError: if both ``address`` and ``n_cpus_local`` are given, or the latter is below 1.
    """

    backend: str = "joblib"
    address: str | tuple[str, int] | None = None
    n_cpus_local: int | None = None
    logging_level: int | None = None
    wait_timeout: float = 1.0

    def __post_init__(self) -> None:
        if self.address is not None and self.n_cpus_local is not None:
            raise ValueError(
                "ParallelConfig takes address or n_cpus_local, not both: the CPUs of a cluster "
                "that runs already are not ours to set"
            )
        if self.n_cpus_local is not None and self.n_cpus_local < 1:
            raise ValueError(f"n_cpus_local must be at least 1, not {self.n_cpus_local!r}")


# --- CPUs -------------------------------------------------------------------------------------


def available_cpus() -> int:
    """How many CPUs this process may keep busy, at least 1::

        pool = ThreadPoolExecutor(available_cpus())

    ``-X cpu_count=…`` or the environment variable ``PYTHON_CPU_COUNT`` decide, upward too, as for
    Python 3.13's :func:`os.process_cpu_count`. Otherwise it is the smallest of
    :func:`os.cpu_count`, the affinity mask, ``LOKY_MAX_CPU_COUNT``, and the CPU quota of every
    cgroup from this process's own up to the root, fractions rounded up (the kernel's
    ``cgroup-v2.rst``, ``cpu.max``, and ``sched-bwc.rst``, ``cpu.cfs_quota_us``). Asked anew at
    every call; takes some 0.1 ms.
    """
    return min(_cpu_limits())[0]


def _cpu_limits(root: str = "") -> list[tuple[int, str]]:
    """All that bounds the CPUs, as (count, what it is); ``root`` goes before paths, for tests."""
    override = sys._xoptions.get("cpu_count")
    source = "-X cpu_count"
    if override is None and not sys.flags.ignore_environment:
        override, source = os.environ.get("PYTHON_CPU_COUNT"), "PYTHON_CPU_COUNT"
    if (count := _positive(override)) is not None:
        return [(count, source)]
    limits = [(os.cpu_count() or 1, "CPUs of the machine")]
    if hasattr(os, "sched_getaffinity"):  # Linux, Android, FreeBSD
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            limits.append((len(os.sched_getaffinity(0)) or 1, "affinity mask"))
    if (count := _positive(os.environ.get("LOKY_MAX_CPU_COUNT"))) is not None:
        limits.append((count, "LOKY_MAX_CPU_COUNT"))
    for quota, period in _cgroup_quotas(root):
        limits.append((max(-(-quota // period), 1), f"cgroup quota {quota / period:g} CPUs"))
    return limits


def _positive(text: object) -> int | None:
    """``text`` as a whole number above 0, of no more than 64 bits, if it is one."""
    try:
        count = int(text) if isinstance(text, str) else 0  # -X cpu_count without a value is True
    except ValueError:
        return None
    return count if 0 < count < 1 << 64 else None


def _read(path: str) -> str:
    """A file of the kernel's; empty where there is none, or it is not for us to read."""
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read())
    except (OSError, ValueError):  # ValueError: the path has a NUL or cannot be encoded
        return ""


def _cgroup_quotas(root: str) -> Iterator[tuple[int, int]]:
    """(quota, period) in microseconds of each cgroup that holds this process, where it has one.

    Formats: ``proc(5)`` for mountinfo, ``cgroups(7)`` for /proc/self/cgroup.
    """
    own = {}  # "" for v2, "cpu" for v1 -> this process's path in that hierarchy
    # Not splitlines() and split(): names may contain what only Python takes for a line's end.
    for line in _read(f"{root}/proc/self/cgroup").split("\n"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path.startswith("/"):
            for key in {"", "cpu"}.intersection(controllers.split(",")):
                own[key] = [*filter(None, path.split("/"))]
    for line in _read(f"{root}/proc/self/mountinfo").split("\n") if own else ():
        if " - cgroup" not in line:
            continue  # early, since there may be thousands of lines
        fields, _, kind = line.partition(" - ")
        filesystem, _, options = kind.partition(" ")
        version = {"cgroup": "cpu", "cgroup2": ""}.get(filesystem)
        columns = fields.split(" ")
        if version not in own or len(columns) < 5:
            continue
        if version == "cpu" and "cpu" not in options.rpartition(" ")[2].split(","):
            continue  # a v1 hierarchy of other controllers
        # Spaces and backslashes stand as octal escapes.
        mounted, mount = (
            re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), column)
            for column in columns[3:5]
        )
        above = [*filter(None, mounted.split("/"))]
        parts = own[version][len(above) :]
        if own[version][: len(above)] != above or ".." in parts:
            if ".." not in (*own[version], *above):
                continue  # a mount of some other part of the tree
            # ".." leads out of this cgroup namespace, where paths have no names for us: the mount
            # itself is the nearest that can be seen.
            parts = []
        for depth in range(len(parts), -1, -1):
            folder = "/".join([root + mount, *parts[:depth]])
            if version == "":
                quota, _, period = _read(f"{folder}/cpu.max").partition(" ")
            else:
                quota = _read(f"{folder}/cpu.cfs_quota_us")
                period = _read(f"{folder}/cpu.cfs_period_us")
            numbers = _positive(quota), _positive(period)  # "max" and -1 mean no quota
            if numbers[0] is not None and numbers[1] is not None:
                yield numbers[0], numbers[1]


# --- backends ---------------------------------------------------------------------------------


class Handle(abc.ABC, Generic[T]):
    """What :meth:`ParallelBackend.put` returns, where the engine holds the object for its workers.
    Tasks receive the object; where there is a handle in hand, :meth:`ParallelBackend.get` makes one of
    it::

        assert backend.get(backend.put(42)) == 42
    """

    @abc.abstractmethod
    def load(self, timeout: float | None = None) -> T:
        """The object; ``TimeoutError``, if that takes longer than so many seconds."""


class ParallelBackend(abc.ABC):
    """Where tasks run: a base class, and the registry of the classes that derive from it.

    A subclass names itself, ``class Mine(ParallelBackend, backend_name="mine")``, and is then what
    ``init_parallel_backend("mine")`` returns. It

    - must provide :meth:`executor`: most simply, what :meth:`over` makes of another executor;
    - may override :meth:`put` where its engine can hold an object for its workers, :meth:`_value` and
      :meth:`_futures` where the engine has handles of its own, and :meth:`_cpus` where its CPUs are
      not this process's. Without, objects travel with each task.

    Raises:
        ImportError: if a package that the backend needs is not installed.
        ValueError: from the ``class`` statement, if another class has that ``backend_name``.
    """

    BACKENDS: ClassVar[dict[str, type[ParallelBackend]]] = {}
    _n_cpus_local: ClassVar[int | None] = None
    _uses_options: ClassVar[bool] = False  # whether TaskOptions mean anything here

    def __init_subclass__(cls, *, backend_name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if backend_name is None:
            return
        held = ParallelBackend.BACKENDS.get(backend_name)
        # The same class anew (a notebook cell run twice, a module reloaded) takes its own place.
        if held is not None and (held.__module__, held.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ValueError(
                f"backend_name {backend_name!r} is held by {held.__module__}.{held.__qualname__}; "
                "choose another name"
            )
        ParallelBackend.BACKENDS[backend_name] = cls

    def __init__(self) -> None:
        # By process, for what a forked child inherits is not its own.
        self._background: dict[int, Executor] = {}

    def __repr__(self) -> str:
        """Which engine it is, and how many workers an executor has by default."""
        return f"<{type(self).__name__}: {self.effective_n_jobs()} workers>"

    @classmethod
    @abc.abstractmethod
    def executor(
        cls,
        max_workers: int | None = None,
        *,
        config: ParallelConfig | None = None,
        cancel_futures: CancellationPolicy | bool = CancellationPolicy.PENDING,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        max_tasks_per_child: int | None = None,
        task_timeout: float | None = None,
        **options: Unpack[TaskOptions],
    ) -> ParallelExecutor:
        """A new executor::

            with backend.executor(4, cancel_futures=CancellationPolicy.ALL, task_timeout=60) as executor:
                print(*executor.map(fit, range(100)))

        Args:
            max_workers: how many tasks may run at once; ``effective_n_jobs(-1)`` by default.
            config: deprecated since 0.9.0; its ``n_cpus_local`` bounds ``max_workers``.
            cancel_futures: what becomes of the tasks when the executor ends; ``True`` means
                ``PENDING``, ``False`` means ``NONE``.
            initializer: called with ``initargs`` once in each worker, before its first task. What
                it sets in a global, tasks see. If it raises, the executor is broken: all pending
                and further tasks fail with ``BrokenProcessPool``.
            max_tasks_per_child: after so many tasks a worker is replaced by a fresh one; in the
                calling process, without effect. A chunk of a map's items is one task.
            task_timeout: seconds that a task, or an item of a map, may take once its worker has
                begun it. One that takes longer is stopped with its process, and fails with
                ``TimeoutError``. In the calling process, without effect.
            options: of Ray's tasks; ignored elsewhere.

        Raises:
            ValueError: a number is not above 0.
            TypeError: an argument is of the wrong type, or an option's name is unknown.
        """

    def put(self, v: T) -> T:
        """A handle to ``v``, sent to the workers once where the engine can do that::

            data = backend.put(load())
            futures = [executor.submit(fit, data, seed) for seed in range(1000)]

        Wherever it stands in a task (an argument, an item of a list, a closure) it arrives as the
        object, which is why it is typed as one; here, only :meth:`get` makes an object of it.
        Workers may see it read-only.
        """
        return v

    @overload
    def get(self, v: Future[T] | Handle[T], *, timeout: float | None = None) -> T: ...
    @overload
    def get(
        self, v: list[Future[T]] | list[Handle[T]], *, timeout: float | None = None
    ) -> list[T]: ...
    @overload
    def get(
        self, v: tuple[Future[T] | Handle[T], ...], *, timeout: float | None = None
    ) -> tuple[T, ...]: ...
    @overload
    def get(self, v: T, *, timeout: float | None = None) -> T: ...
    def get(self, v: Any, *, timeout: float | None = None) -> Any:
        """The value behind a handle or a future, or behind each in a list or tuple of them::

            scores = backend.get([executor.submit(fit, data, seed) for seed in range(10)], timeout=60)

        Lists and tuples may be nested; anything else comes back as it is.

        Args:
            timeout: seconds to wait, for all of them together.

        Raises:
            TimeoutError: the builtin one, on every version of Python.
            Exception: what the task behind it raised.
        """
        deadline = None if timeout is None else time.monotonic() + timeout

        def value(item: Any) -> Any:
            if type(item) is list:
                return [value(each) for each in item]
            if type(item) is tuple:
                return tuple(value(each) for each in item)
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            return self._value(item, left)

        try:
            return value(v)
        except FutureTimeoutError as error:
            if sys.version_info >= (3, 11):
                raise
            raise TimeoutError(*error.args) from error

    def wrap(
        self, fun: Callable[..., T], **options: Unpack[TaskOptions]
    ) -> Callable[..., Future[T]]:
        """A callable that starts ``fun`` in the background and returns a future at once::

            load, fit = backend.wrap(load), backend.wrap(fit)
            print(backend.get([fit(load(name)) for name in names]))

        A future among its arguments arrives as its result, and is waited for without a worker. Its
        tasks run to their end, also when the program ends.

        Args:
            options: of Ray's tasks; ignored elsewhere.
        """
        self._check_options(options)
        ours: dict[str, Any] = {**options} if self._uses_options else {}
        executors: dict[int, Executor] = {} if ours else self._background

        @functools.wraps(fun)
        def start(*args: Any, **kwargs: Any) -> Any:
            background = executors.get(os.getpid())
            if background is None:
                # Without a lock, which a forked child might inherit locked: if two threads make
                # one each, the second one is dropped.
                background = self._executor_for_wrap(ours)
                background = executors.setdefault(os.getpid(), background)
            return background.submit(fun, *args, **kwargs)

        return start

    @classmethod
    def _check_options(cls, options: Mapping[str, Any]) -> None:
        """``TypeError`` for a name that no backend knows."""
        for name, value in options.items():
            if not cls._has_option(name, value):
                raise _unknown_option(name)

    @classmethod
    def _has_option(cls, name: str, value: Any) -> bool:
        """Whether some backend knows it."""
        return name in TaskOptions.__annotations__

    def _executor_for_wrap(self, options: dict[str, Any]) -> Executor:
        executor: Executor = self.executor(cancel_futures=CancellationPolicy.NONE)
        if not isinstance(executor, ParallelExecutor):  # a plain one does not wait for futures
            workers = getattr(executor, "_max_workers", None) or self.effective_n_jobs()
            executor = self.over(executor, workers, cancel_futures=CancellationPolicy.NONE)
        return executor

    def wait(
        self, v: Sequence[Any], *, num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Any], list[Any]]:
        """Wait until ``num_returns`` of the handles or futures ``v`` are done::

            done, futures = backend.wait(futures, num_returns=2, timeout=60)

        Failed and cancelled ones are done; so is what is no handle at all.

        Args:
            timeout: seconds, after which fewer may be done.

        Returns:
            (done, not_done), each in the order of ``v``; as with :func:`ray.wait`, ``done`` holds
            ``num_returns`` at most.

        Raises:
            ValueError: if ``num_returns`` is below 1 or above the number of handles. Without any,
                there is nothing to wait for.
        """
        if not v:
            return [], []
        if not 1 <= num_returns <= len(v):
            raise ValueError(f"num_returns must be from 1 to {len(v)}, the number of handles")
        futures = self._futures(v)
        pending = {future for future in futures if future is not None and not future.done()}
        missing = num_returns - (len(futures) - sum(future in pending for future in futures))
        if missing > 0:
            with contextlib.suppress(FutureTimeoutError):
                for _ in islice(as_completed(pending, timeout), missing):
                    pass
        done: list[Any] = []
        not_done: list[Any] = []
        for item, future in zip(v, futures):
            ready = (future is None or future.done()) and len(done) < num_returns
            (done if ready else not_done).append(item)
        return done, not_done

    @classmethod
    def effective_n_jobs(cls, n_jobs: int | None = -1) -> int:
        """How many jobs ``n_jobs`` stands for here, by joblib's convention::

            executor = backend.executor(backend.effective_n_jobs(-2))  # all CPUs but one

        ``-1`` or ``None`` is all CPUs, ``-2`` all but one, and so on, never below 1. A positive
        number stands, unless the user has bounded it (``joblib.parallel_config(n_jobs=…)``, a
        deprecated ``n_cpus_local``) or the Ray cluster has fewer CPUs.

        Raises:
            ValueError: ``n_jobs`` is 0.
        """
        if n_jobs == 0:
            raise ValueError("n_jobs must not be 0: give a number of jobs, or -1 for all CPUs")
        cpus, bound = cls._cpus()
        jobs = n_jobs if n_jobs is not None and n_jobs > 0 else max(cpus + 1 + (n_jobs or -1), 1)
        return min(n for n in (jobs, bound, cls._n_cpus_local) if n is not None)

    @classmethod
    def _cpus(cls) -> tuple[int, int | None]:
        """All CPUs that the backend may use, and a bound on the number of jobs, if there is one."""
        return available_cpus(), None

    def _futures(self, handles: Sequence[Any]) -> list[Future[Any] | None]:
        """For each, a future of what it stands for; None if it is no handle, or done already."""
        return [handle if isinstance(handle, Future) else None for handle in handles]

    def _value(self, handle: Any, timeout: float | None) -> Any:
        """What ``handle`` stands for; itself if it is no handle. ``timeout`` is in seconds."""
        if isinstance(handle, Handle):
            return handle.load(timeout)
        return handle.result(timeout) if isinstance(handle, Future) else handle

    @staticmethod
    def over(
        executor: Executor,
        max_workers: int | None = None,
        *,
        cancel_futures: CancellationPolicy | bool = CancellationPolicy.PENDING,
    ) -> ParallelExecutor:
        """An executor of ours over any other one::

            executor = ParallelBackend.over(ThreadPoolExecutor(8))

        It gets the policies, ``map`` with chunks that size themselves and ``buffersize``, futures as
        arguments, and what else its ``Future.cancel`` allows.

        Args:
            executor: a ``ThreadPoolExecutor``, mpi4py's, dask's ``get_executor()``, … It is ours
                from now on, and shut down when this one ends.
            max_workers: how many of its tasks run at once; what it says itself, unless given.
            cancel_futures: as for :meth:`executor`.

        Raises:
            TypeError: it does not say how many workers it has, and ``max_workers`` does not either.
        """
        if max_workers is None:
            # Not public, but what every executor that has a number of them calls it.
            max_workers = getattr(executor, "_max_workers", None)
            if max_workers is None:
                raise TypeError(
                    f"{type(executor).__name__} does not say how many workers it has: give max_workers"
                )
        _check_number("max_workers", max_workers)
        policy = _as_policy(cancel_futures)
        return ParallelExecutor(_OverEngine(executor), max_workers, policy)

    @classmethod
    def _configured(cls, config: ParallelConfig) -> type[ParallelBackend]:
        """This class, bounded as the deprecated ``config`` says; an unnamed one, so unregistered.

        A class and not an instance carries the bound because ``executor`` is a class method.
        """
        if not isinstance(config, ParallelConfig):
            raise TypeError(f"config must be a ParallelConfig, not {config!r}")
        bounds = filter(None, (cls._n_cpus_local, config.n_cpus_local))
        metaclass: Any = type(cls)
        bounded = metaclass(cls.__name__, (cls,), {"_n_cpus_local": min(bounds, default=None)})
        return cast("type[ParallelBackend]", bounded)


_config_deprecated = functools.partial(
    deprecated,
    True,
    args_mapping={"config": "config"},
    deprecated_in="0.9.0",
    remove_in="0.10.0",
    instead="use `max_workers` instead, and for Ray's own settings ray.init()",
)


@_config_deprecated(
    instead='name the backend instead, as in init_parallel_backend("ray")',
    applies=lambda config: not isinstance(config, str),
)
def init_parallel_backend(
    config: ParallelConfig | str | None = None, backend_name: str | None = None
) -> ParallelBackend:
    """The backend of that name; without one, of the environment variable ``PARALLEL_BACKEND``,
    else ``"joblib"``::

        backend = init_parallel_backend("ray")
        print(backend.get(backend.wrap(pow)(2, 10)))

    Args:
        config: a :class:`ParallelConfig`, deprecated since 0.9.0. A string is the backend's name.
        backend_name: a name in ``ParallelBackend.BACKENDS``.

    Raises:
        NotImplementedError: no backend has that name.
        ImportError: a package that the backend needs is not installed.
        ConnectionError: Ray's own, if nobody answers at the address given.
    """
    if isinstance(config, str):
        if backend_name is not None:
            raise TypeError(
                f"init_parallel_backend() got two names, {config!r} and {backend_name!r}"
            )
        config, backend_name = None, config
    if config is not None and not isinstance(config, ParallelConfig):
        raise TypeError(f"config must be a ParallelConfig, not {config!r}")
    source = ""
    if backend_name is None and config is not None:
        backend_name = config.backend
    if backend_name is None:
        backend_name = os.environ.get("PARALLEL_BACKEND") or "joblib"
        source = " (which the environment variable PARALLEL_BACKEND asks for)"
    known = ParallelBackend.BACKENDS
    if backend_name not in known:
        import difflib

        hint = {
            "loky": "joblib's loky workers are here 'joblib'",
            "multiprocessing": "worker processes are here 'joblib'",
            "threading": "over threads, a backend is five lines: see ParallelBackend.over()",
        }.get(backend_name)
        nearest = difflib.get_close_matches(str(backend_name), known, n=1, cutoff=0)
        raise NotImplementedError(
            f"There is no parallel backend {backend_name!r}{source}. Choose from "
            f"{', '.join(sorted(known))}; {hint or f'the nearest is {nearest[0]!r}'}."
        )
    backend = known[backend_name]
    return (backend if config is None else backend._configured(config))()


# --- the engine contract and the executor core ------------------------------------------------
#
# An executor has two halves. Its core, which is the same for every backend, has the queue, the futures
# and the way to the end. Its engine has the workers. The engine asks the core for tasks, and the core may
# ask those back that have not begun.
#
#       submit(), map()            take()                      end()
#     ------------------> PENDING ---------> LENT ---------------------------> ENDING ---> DONE
#         |              ^ |   ^             |  |                                           ^
#         |     release()| | cancel()        |  | put_back(), unwanted; stopped()           |
#         v              | |   '-------------'  |                                           |
#      WAITING ----------' |     put_back()     v                                           |
#         '----------------'--------------> CANCELLED --------------------------------------'
#              cancel()                                      settle()
#
# Not drawn: what fails and has no reply (its worker could not be set up, a future among its arguments has
# failed, it took too long) goes from WAITING, PENDING or LENT to ENDING, by fail(). A task goes from
# WAITING to CANCELLED, too, if a future among its arguments was cancelled.
#
# A task that waits for futures among its arguments is in no queue. When they are done it joins the
# core's queue, from which the engine takes it when it has room: from then on it is lent. An engine may
# take more than it runs, so that its workers need not wait for the core. What has not begun there can
# still be cancelled, go to another worker, and outlive the death of its worker.
#
# For each task that an engine took comes exactly one of end() (it has run, or failed), put_back() (it has
# not begun) and stopped() (its worker was killed). To get one back, the core calls the engine's
# take_back() or stop(). These return nothing, for the task may end in another thread at that moment: the
# core looks afterwards where the task is.
#
# The rule of the locks. There are two, for all executors of the process:
#
# - ``_engine_lock`` guards what engines know of their workers: who has which task.
# - ``_lock`` guards what cores know: the place of each task, the queues, the stage, maps' outcomes.
#
# 1. While holding ``_lock``, take no other, not even a future's own. So while holding ``_engine_lock``,
#    an engine may take ``_lock``: it calls take(), ask(), put_back() and stopped() there.
# 2. Run no code of a user's under either: no callback, no pickling, no freeing of a last reference,
#    since its ``__del__`` may be a user's. What is to be told, dropped or done is noted in ``untold``,
#    ``dropped`` or ``deferred``, and settle() does it, under no lock.
# 3. The garbage collector and signal handlers may still run a user's code in a thread that holds one.
#    Both are reentrant, so submit() is safe there: it appends, and feed() takes no lock. cancel() and
#    shutdown() would have to call the engine: they find out by _under_a_lock(), and defer themselves.
#
# Why not one for each executor? A ``__del__`` that runs under the lock of A might wait for that of B,
# while another thread, under B's, waits for A's: a deadlock that nobody ever finds.

_lock = threading.RLock()
_engine_lock = threading.RLock()


def _under_a_lock() -> bool:
    """Whether this thread holds one of our locks: then the garbage collector, or a signal, has called us
    in the middle of our own code."""
    # Private, but what threading.Condition itself relies on, since Python 2.
    return bool(cast("Any", _lock)._is_owned() or cast("Any", _engine_lock)._is_owned())


def _report(message: str, error: BaseException | None = None) -> None:
    """Log an error in a thread of ours, which is not to end because a handler of the log's raises."""
    with contextlib.suppress(Exception):
        _log.critical(message, exc_info=error or True)


# What signal is made of, private but there since Python 3.4: without the enums that take most of its time.
_signal: Any = importlib.import_module("_signal")
_RAISING = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGALRM")]
"""The signals whose handlers usually raise: Ctrl-C, a request to end, a time limit."""


def _in_main_thread() -> bool:
    # Not current_thread(): for a thread that threading does not know, it makes an entry that stays.
    return threading.get_ident() == threading.main_thread().ident


def _have_room(frames: int) -> None:
    """RecursionError, if the stack has no room for so many: rather now than while a task moves."""
    if frames:
        _have_room(frames - 1)


class _LaterSignals:
    """A ``with`` block in which signals are put off until it is left, in the main thread, the only one that
    handles any. If a handler raised while a task goes from one place to the next, the task would be in
    neither, and shutdown() would wait for it for ever.

    So all that moves tasks is in one of these, from where the user has called until it returns. Only code of
    the user's inside of it, which may take its time and knows what to do with a Ctrl-C, is in a
    :func:`_signals_now`. (submit() does without, for its speed: it puts right what was interrupted.)
    """

    # A class, and no generator with @contextmanager: if a handler raised before the block is entered, a
    # generator would go on whenever it is dropped. (What siginterrupt() has set is lost: nobody can ask.)

    now: ClassVar[_LaterSignals | None] = None  # the outermost one, while it puts signals off

    def __init__(self) -> None:
        self.handlers: dict[int, Any] = {}  # the program's, in whose place is later()
        self.came: list[tuple[int, Any]] = []
        self.is_outermost = False

    def __enter__(self) -> None:
        if _LaterSignals.now is not None:
            return
        _have_room(40)
        if _in_main_thread():
            self.is_outermost = True
            try:
                self.begin()
            except BaseException:
                self.end()
                raise

    def __exit__(self, *_: object) -> None:
        if self.is_outermost:
            self.end()

    def begin(self) -> None:
        # First, so that a child which another thread forks just now finds who is to end().
        _LaterSignals.now = self
        for number in filter(None, _RAISING):
            handler = _signal.getsignal(number)
            if handler == self.later:
                continue
            self.handlers.pop(number, None)  # the user's code may have taken it away since
            if callable(handler):
                self.handlers[number] = handler
                try:
                    _signal.signal(number, self.later)
                except ValueError:  # in a subinterpreter, whose main thread handles none
                    self.handlers.clear()
                    break

    def later(self, number: int, frame: Any) -> None:
        if _LaterSignals.now is self:
            self.came.append((number, frame))
        else:  # the handler of another one has raised in put_back(), before this one's turn
            _signal.signal(number, self.handlers[number])
            self.handlers[number](number, frame)

    def put_back(self, numbers: list[int]) -> None:
        if numbers:
            number = numbers[0]
            try:
                if _signal.getsignal(number) == self.later:  # else the program has changed it
                    _signal.signal(number, self.handlers[number])
            finally:  # also if that handler is called at once, and raises
                self.put_back(numbers[1:])

    def end(self) -> None:
        try:
            try:
                self.put_back([*self.handlers])
            except BaseException:  # of a handler that is back already: the others, too
                self.put_back([*self.handlers])
                raise
        finally:
            _LaterSignals.now = None
            came, self.came = self.came, []
            with contextlib.ExitStack() as stack:  # which goes on where one of its callbacks raises
                for number, frame in reversed(came):
                    stack.callback(self.handlers[number], number, frame)


def _signals_now(function: Callable[..., T], *args: Any) -> T:
    """Call code of the user's inside of _LaterSignals: signals are handled, those that have come first. If
    their handlers raise, it is not called."""
    outer = _LaterSignals.now
    if outer is None or not _in_main_thread():
        return function(*args)
    # No context manager: a signal at the first step of its __exit__() would keep that from beginning.
    try:
        outer.end()
        return function(*args)
    finally:
        try:
            outer.begin()
        except BaseException:  # of a handler: those after it are put off
            outer.begin()
            raise


Call = tuple["Callable[..., Any]", Any, Any, "float | None"]
"""What a worker is to run. Of a task: (fn, its arguments, its keywords, None). Of a chunk: (fn, its items,
whether each is a tuple of arguments, the seconds after which the worker begins no further one)."""

Reply = tuple[list[Any], "BaseException | None", int, float]
"""What became of a call: (results, failure, begun, seconds). ``begun`` is how many of its items were
begun, one that failed included:

- none: the call could not be sent, or not be read. The items of a chunk are then tried one by one, so
  that only the bad one fails; a task fails.
- some: those are done; if there is a failure, it is that of the one after the last result. The rest goes
  back to the queue.
- all: nothing goes back. Where no seconds were measured, the worker was lost.
"""


def _name(call: Call | None) -> str:
    """What to call a task in an error."""
    fn: Any = call[0] if call is not None else None
    try:
        while isinstance(fn, functools.partial):  # which asks a proxy for its __class__
            fn = fn.func
        return str(fn.__qualname__)
    except Exception:
        return "a task" if call is None else f"a {type(fn).__name__}"


def _count(call: Call | None) -> int:
    """How many items a call has."""
    return 1 if call is None or call[3] is None else len(call[1])


def _lost(work: _Work, error: BaseException) -> tuple[_Work, Reply]:
    """The outcome of one that has failed as a whole, a chunk with all its items."""
    return work, ([], error, _count(work.call), 0.0)


class _Place(enum.Enum):
    """Where a task or a chunk is: in one place at a time, moved under ``_lock``."""

    WAITING = enum.auto()  # in nobody's queue: a future among its arguments is not done
    PENDING = enum.auto()  # in the core's queue
    LENT = enum.auto()  # an engine has it; it runs, or waits there and may be taken back
    ENDING = enum.auto()  # its future is being told what became of it; the end still waits for it
    CANCELLED = enum.auto()  # its future is being told that
    DONE = enum.auto()  # told


# By name, since an attribute of the class takes three times as long, and they are read for every task.
_WAITING, _PENDING, _LENT, _ENDING, _CANCELLED, _DONE = _Place
_UNLENT = (_WAITING, _PENDING)  # no engine has it: the core cancels it, or lets it fail, by itself


class _Stage(enum.IntEnum):
    """How far an executor is on its way to the end. It only ever goes up."""

    OPEN = 0  # takes tasks
    DRAINING = 1  # takes none; what is pending still runs
    DISCARDING = 2  # what is pending is cancelled, and what comes back from the engine, too
    CLOSING = 3  # there is no task left; the thread that saw it first closes the engine
    CLOSED = 4


class _Engine(abc.ABC):
    """What runs tasks. It asks the core for them, whenever it likes, and says what became of them.

    Of ``core``, which is set once the engine has been made (so a thread that it starts waits for the
    first :meth:`feed`), it calls:

    - ``take(n)``: up to n tasks, lent from now on. In one hold of ``_engine_lock`` with its own note of who
      has them. Where there are fewer, the next task that comes brings a feed();
    - ``ask()``: how many wait; and the next task brings a feed() as well. For an engine that may rest after a
      take() that gave all it wanted: nobody else would wake it;
    - ``end(outcomes)``: what became of some, ``(work, reply)`` each; under no lock;
    - ``put_back(works)``: they have not begun. ``stopped(work)``: what ran it was killed. Both in the same
      hold of ``_engine_lock`` in which it takes the task from its worker. Otherwise a cancel() or a
      shutdown() just then would find a task that is lent and that no worker has, could not have it back,
      and would say that it can't be cancelled;
    - ``settle()``: under no lock, soon after one of these was called under a lock;
    - ``break_down(error)``: workers can't be set up, so no task will run any more.

    The ``call`` of a task becomes None when it is cancelled, at any time and in any thread: copy it to a
    local once. ``seat`` and ``message`` are the engine's to set.
    """

    core: _Core
    chunk_seconds = 0.03
    """How long a chunk of a map's items should take, for its overhead not to count; 0: no chunks."""
    future_type: type[_Task] | None = None  # what submit() returns, if not a _Task
    look_after = 1.0
    """The share of a time limit after which began() is asked again. Less than 1 where it hears of a start
    only when it is asked: a task may then run longer than its limit by that share of it."""
    name = "an engine"  # in the executor's repr

    @abc.abstractmethod
    def feed(self) -> None:
        """There is work, or something to settle: wake your thread, and no more. It takes no lock, for it
        is called from a ``__del__`` and from signal handlers, in any thread, after close() too. (An engine
        without a thread, as the one in the calling process, runs the task right here.)"""

    @abc.abstractmethod
    def take_back(self, works: list[_Work]) -> None:
        """``put_back()`` those of them that have not begun. Called from any thread, as is stop(). Without
        settle(), which the core calls afterwards: a callback that exits would keep the rest from coming."""

    def running(self, work: _Work) -> bool:
        """Whether a worker has begun it; without a lock, and of any that was lent at some time."""
        return True

    def stop(self, work: _Work) -> None:
        """If a worker has begun it, or may have, kill that and call ``stopped()``. An engine that can't,
        does nothing. Where ``work.verdict`` is a TimeoutError, let the user see first where it hung."""

    def began(self) -> list[tuple[_Work, float]]:
        """(task, start by time.monotonic()) of all that runs, for time limits. If in doubt, a later time:
        an earlier one would stop a task within its limit. Without tasks whose end may have come, but is
        not read yet; or stop() sees to those."""
        return []

    def awaited(self, value: Any) -> Future[Any] | None:
        """What a task with this argument has to wait for; None if for nothing."""
        return value if isinstance(value, Future) else None

    def given(self, future: Future[Any]) -> Any:
        """What a task is given for a future that is done: its result, or what stands for that."""
        return future.result()

    def inside(self) -> bool:
        """Whether this thread is one that :meth:`close` would have to wait for."""
        return False

    def width(self, max_workers: int) -> int:
        """How many tasks it can run at once, of those that were asked for."""
        return max_workers

    def close(self) -> None:
        """Give back all resources; no task is left. Called once."""


class _Nothing(_Engine):
    """What is left of an engine in a forked child, which has none of our threads or workers."""

    def feed(self) -> None:
        pass

    def take_back(self, works: list[_Work]) -> None:
        pass


class _Work:
    """What an engine is lent: a task, or a chunk of a map's items."""

    core: _Core | None  # None when it is done: to hold a result is not to hold its executor
    # Here alone, so that nobody else need hold its arguments. None when it is done.
    call: Call | None
    place = _PENDING
    abandoned = False  # nobody wants it; only of a chunk
    unwanted = 0
    """How many threads are in cancel() for it: if the engine puts it back meanwhile, it is cancelled.
    A number, for the first one to leave must not say for the second that it is wanted."""
    verdict: BaseException | None = None  # what it fails with, if it is stopped and not cancelled
    reason = ""  # why it was cancelled
    seat: Any = None
    """Where the engine has it: on joblib a _Seat, on Ray a reference. Each time that it is lent it is
    another object, by which _Core.recall() sees whether the task has come back and was lent again."""
    message: Any = None  # the engine's own, too

    def finish(self, reply: Reply) -> None:
        """Tell whoever waits for it what became of it."""
        raise NotImplementedError

    def finish_cancelled(self, reason: str) -> None:
        """Tell that it was cancelled, and why, if it does not know. Two threads may do so at once."""
        raise NotImplementedError


class _Arrival(functools.partial[Any]):
    """A callback of our own, in which no signal is to be handled: the task that waits would wait for ever."""


class _Task(_Work, Future[Any]):
    """The future of one task."""

    awaits = 0  # how many futures among its arguments are not done; under _lock

    def __init__(self, core: _Core, fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
        super().__init__()
        self.core = core
        self.call = (fn, args, kwargs, None)

    # Future's own state stays PENDING until the task is done, since only the engine knows what runs. Hence
    # running() and cancel(). _state and _condition are private, but the same since Python 3.2.

    def running(self) -> bool:
        """Whether a worker has begun it."""
        core = self.core
        return self.place is _LENT and core is not None and core.engine.running(self)

    def cancel(self) -> bool:
        """Cancel it, unless it has ended, or runs and the executor's policy lets running tasks be.

        Under a policy with ``RUNNING``, what runs is stopped, and its worker with it.
        """
        core = self.core
        if core is not None:
            core.withdraw([self], CancellationPolicy.RUNNING in core.policy, "cancel() was called")
        return self.cancelled()

    def result(self, timeout: float | None = None) -> Any:
        """As ``Future.result``; a ``CancelledError`` says why."""
        try:
            return super().result(timeout)
        except CancelledError:
            if self.cancelled():
                raise CancelledError(self.reason) from None
            raise  # the task itself has raised it

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As ``Future.exception``; a ``CancelledError`` says why."""
        try:
            return super().exception(timeout)
        except CancelledError:
            raise CancelledError(self.reason) from None

    def __reduce__(self) -> Any:
        raise TypeError(
            "a future can't be sent to a worker inside something else: make it an argument of its "
            "own, and the task gets its value"
        )

    def __repr__(self) -> str:
        text = super().__repr__()
        return text.replace("state=pending", "state=running") if self.running() else text

    def _invoke_callbacks(self) -> None:
        # Future's own stops at the first one that exits or is interrupted. Those after it, asyncio's say,
        # would never be called, and whoever waits for them would wait for ever.
        raised = None
        callbacks = collections.deque(cast("Any", self)._done_callbacks)  # private, as above
        while callbacks:
            try:
                if isinstance(callbacks[0], _Arrival):
                    callbacks.popleft()(self)
                else:
                    # Taken out in there: if a signal comes first, and raises, it is still to be called.
                    _signals_now(lambda: callbacks.popleft()(self))
            except Exception:
                with contextlib.suppress(Exception):  # as in _report()
                    logging.getLogger("concurrent.futures").exception(
                        "exception calling callback for %r", self
                    )
            except BaseException as error:
                raised = raised or error
        if raised is not None:
            raise raised

    def finish(self, reply: Reply) -> None:
        values, failure, _, _ = reply
        if failure is None:
            self.set_result(values[0])
        else:
            self.set_exception(failure)

    def finish_cancelled(self, reason: str) -> None:
        self.reason = self.reason or reason
        try:
            super().cancel()  # which runs the callbacks; in a second thread it does nothing
        finally:
            with self._condition:
                if self._state == "CANCELLED":
                    # Tells wait() and as_completed(), which otherwise hear of it from a worker only.
                    self.set_running_or_notify_cancel()


class _Chunk(_Work):
    """Some items of a map: one task, to an engine and for cancellation."""

    def __init__(self, source: _Map, start: int, items: list[Any]) -> None:
        self.core = source.core
        self.source = source
        self.start = start
        # If its items take far longer than measured, its worker gives the last ones back: they are not
        # to wait behind a long one while other workers idle.
        seconds = source.core.engine.chunk_seconds if source.chunksize is None else float("inf")
        self.call = (source.fn, items, source.starred, seconds)

    @property
    def abandoned(self) -> bool:  # type: ignore[override]  # its map knows
        return self.source.abandoned

    def finish(self, reply: Reply) -> None:
        self.source.finish(self, reply)

    def finish_cancelled(self, reason: str) -> None:
        self.source.tell(self.start, [], CancelledError(self.reason or reason))


class _Map:
    """The items of one ``map``, cut into chunks as the engine takes them, and their outcomes."""

    def __init__(
        self, core: _Core, fn: Callable[..., Any], starred: bool, chunksize: int | None
    ) -> None:
        self.core = core
        self.fn = fn
        self.starred = starred
        self.chunksize = chunksize
        self.seconds: float | None = None  # of an item, of late
        self.known = 0  # the most items that one chunk has had, of those that have ended
        self.blocks: collections.deque[list[Any]] = collections.deque()
        """Items that are in no chunk yet, as they were read. Each block is in reverse order, so that its
        first items can be cut off at its end: fast, and without a reference that stays behind."""
        # How many these are. While there are any, this stands among the core's pending.
        self.left = 0
        self.first = 0  # the index of the first of them
        self.outcomes: dict[int, tuple[list[Any], BaseException | None]] = {}
        """By the index of its first item: the results, then what was raised. Under ``_lock``."""
        # Has something when the next outcome is there, if somebody waits for it, which is under ``_lock``.
        # No Condition: a Ctrl-C in the middle of its wait() may find the lock released, and become an error.
        self.news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.is_awaited = False
        self.abandoned = False  # nobody will ask for further results

    def size(self, left: int) -> int:
        """How many items a chunk shall have, of those that are left."""
        target = self.core.engine.chunk_seconds
        if not target or self.core.limit is not None:
            return 1  # a time limit is an item's
        if self.chunksize is not None or self.seconds is None:
            return self.chunksize or 1
        each = max(self.seconds, 1e-7)
        # A quarter of a worker's share, so that slow items are spread. But not so few that they take less
        # than a thirtieth of chunk_seconds, for then the overhead counts; nor more than chunk_seconds.
        share = left / (4 * self.core.engine.width(self.core.max_workers))
        return max(int(min(max(share, target / 30 / each), target / each)), 1)

    def cut(self) -> _Chunk:
        """The next chunk; under ``_lock``."""
        items: list[Any] = []
        size = min(self.size(self.left), self.left)
        while len(items) < size:
            block = self.blocks[0]
            part = block[len(items) - size :]
            del block[-len(part) :]
            part.reverse()
            items = items + part if items else part
            if not block:
                self.blocks.popleft()
        start, self.first, self.left = self.first, self.first + size, self.left - size
        self.core.uncut -= size
        return _Chunk(self, start, items)

    def grows(self, chunk: _Chunk) -> bool:
        """Whether a chunk is longer than any whose time is known."""
        return self.chunksize is None and _count(chunk.call) > self.known

    def clear(self) -> Any:
        """Take away the items that are in no chunk; under ``_lock``. They are returned, for the caller to
        drop them under no lock."""
        gone, self.blocks = self.blocks, collections.deque()
        self.core.uncut -= self.left
        self.left = 0
        return gone

    def tell(self, start: int, values: list[Any], failure: BaseException | None) -> None:
        with _lock:
            self.outcomes[start] = (values, failure)
            if self.is_awaited:
                self.is_awaited = False
                self.news.put(None)

    def finish(self, chunk: _Chunk, reply: Reply) -> None:
        values, failure, begun, seconds = reply
        items, size = cast("Call", chunk.call)[1], 1
        if begun:
            each = seconds / begun
            if seconds:  # none is known of a lost worker
                if begun > self.known:
                    self.seconds, self.known = each, begun
                else:
                    self.seconds = ((self.seconds or each) + each) / 2
            size = self.size(len(items) - begun + self.left)
        elif len(items) == 1:
            begun = 1  # it can't be sent, or not be read: it is this one that fails
        # Otherwise one of several is: each is tried alone, in a chunk of size 1.
        if begun:
            self.tell(chunk.start, values, failure)
        chunk.call = None
        rest = [
            _Chunk(self, chunk.start + n, items[n : n + size])
            for n in range(begun, len(items), size)
        ]
        with _lock:
            self.core.works.update(rest)
            self.core.put_back(rest)  # it runs next

    def abandon(self) -> None:
        """Nobody wants the rest: cancel what has not begun, and stop what runs if the policy may."""
        # The collector may call this anywhere, in a thread that holds one of our locks too.
        self.abandoned = True
        self.core.defer(self.withdraw)

    def withdraw(self) -> None:
        core = self.core
        with _lock:
            gone = self.clear()
            chunks = [
                each for each in core.works if isinstance(each, _Chunk) and each.source is self
            ]
        core.withdraw(chunks, CancellationPolicy.RUNNING in core.policy, "its map was given up")
        del gone


def _emptied(entries: collections.deque[T]) -> list[T]:
    """Take all out; another thread may do so at the same time."""
    taken: list[T] = []
    with contextlib.suppress(IndexError):
        while True:
            taken.append(entries.popleft())
    return taken


class _Core:
    """The state of an executor: what is pending, what is lent, and how far it is to its end.

    Apart from :class:`ParallelExecutor`, so that an engine's threads, which know this, do not keep
    alive an executor that everybody else has dropped.
    """

    live: ClassVar[weakref.WeakSet[_Core]] = weakref.WeakSet()

    def __init__(
        self,
        engine: _Engine,
        max_workers: int,
        policy: CancellationPolicy,
        limit: float | None = None,
    ) -> None:
        self.engine = engine
        self.max_workers = max_workers
        self.policy = policy
        self.limit = limit  # seconds that a task, or an item of a map, may take
        self.stage = _Stage.OPEN
        # The reason of those that are cancelled without one of their own.
        self.ending = "what ran it has cancelled it"
        self.broken: BaseException | None = None  # why no task will run any more
        self.killed_by = ""  # the method that has killed the workers
        self.works: set[_Work] = set()
        """All that are not DONE, wherever they are: what shutdown() cancels, and waits for. A task comes
        here first, so one that a Ctrl-C has kept out of ``pending`` is found all the same."""
        self.pending: collections.deque[_Work | _Map] = collections.deque()
        """In the order in which they run; cancelled ones too, until take() meets them."""
        self.uncut = 0  # items of maps that are in no chunk yet
        self.hungry = True
        """Whether add() is to call feed(), since some worker has got less than it could do with. Set by
        ask() and by a take() that came up short; cleared by who then calls feed(), add() or release(). If
        a take() that got what it wanted cleared it, another worker that is still short would sleep on."""
        # Notified when it is CLOSED; with a time limit, also when there is something to watch.
        self.changed = threading.Condition(_lock)
        # What was noted under a lock, for settle():
        self.untold: collections.deque[_Work] = collections.deque()  # CANCELLED: to be told
        self.dropped: collections.deque[Any] = collections.deque()  # references: to be let go
        self.deferred: collections.deque[Callable[[], Any]] = collections.deque()  # to be called
        self.telling: collections.Counter[int] = collections.Counter()
        """How many tell() are under way in each thread. In such a thread there is no waiting for the
        end, for it would wait for itself."""
        self.settling: set[int] = set()  # threads in settle(), which is not to be entered again
        self.is_unwatched = True  # the thread of the time limits sleeps until there is a task
        engine.core = self
        self.live.add(self)
        _at_exit(_end_all)
        if limit is not None:
            threading.Thread(
                target=self.keep_limit, args=(limit,), name="parallel_backend limits", daemon=True
            ).start()

    # What users do.

    def add(self, new: _Task | _Map, block: list[Any] | None = None) -> None:
        """Take a task, or further items of a map, in reverse order."""
        was_held = cast("Any", _lock)._is_owned()  # as in _under_a_lock()
        try:
            with _lock:
                self.check_open()
                if isinstance(new, _Map):
                    self.add_block(new, block or [])
                else:
                    self.works.add(new)
                    self.pending.append(new)
                hungry, self.hungry = self.hungry, False
            # An engine may be in ask() just now, which sets hungry. If it came first, feed() follows. If
            # it comes after this, it counts what has just been added.
            if hungry:
                self.engine.feed()
        except BaseException:
            # Since Python 3.14 a signal may come between the lock's __enter__() and what it protects.
            if not was_held and cast("Any", _lock)._is_owned():
                _lock.release()
            self.hungry = True  # feed() may not have been called: the next add() does it
            if not isinstance(new, _Map):
                self.drop_new(new)
            raise

    def add_block(self, new: _Map, block: list[Any]) -> None:
        """Take further items of a map; under ``_lock``."""
        try:
            if not new.left:
                self.pending.append(new)
            new.blocks.append(block)
            new.left += len(block)
            self.uncut += len(block)
        except BaseException:  # a Ctrl-C: perhaps one of the counts does not know of the block
            new.left = sum(map(len, new.blocks))
            maps = {each for each in self.pending if isinstance(each, _Map)}
            self.uncut = sum(each.left for each in maps)
            raise

    def drop_new(self, task: _Task) -> None:
        """submit() raises, so nobody gets its future, and it is not to run."""
        with _lock:
            if task not in self.works or task.place not in _UNLENT:
                return
            task.place = _DONE  # take() and release() pass it over
            self.works.discard(task)
        self.defer(self.close_if_over)  # a shutdown() just then may wait for it alone

    def check_open(self) -> None:
        """Raise if no task is taken any more; else wake who watches over a limit. Under ``_lock``."""
        if self.broken is not None:
            raise self.broken.with_traceback(None)
        if self.stage:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if self.is_unwatched and self.limit is not None:
            self.is_unwatched = False
            self.changed.notify_all()

    def add_waiting(self, task: _Task, futures: Sequence[Future[Any]]) -> None:
        """Take a task that has these futures among its arguments. It waits without a worker."""
        try:
            with _LaterSignals():
                with _lock:
                    self.check_open()
                    task.place = _WAITING
                    task.awaits = len(futures)
                    self.works.add(task)
                if not _under_a_lock() and all(future.done() for future in futures):
                    self.release(task)
                    return
                for future in futures:
                    future.add_done_callback(_Arrival(self.arrive, task))
        except BaseException:  # of a future of somebody else's; or a signal that was put off
            self.drop_new(task)
            raise

    def arrive(self, task: _Task, _: Future[Any]) -> None:
        """A future among its arguments is done: this is a callback, in whichever thread tells it."""
        with _LaterSignals():
            with _lock:
                task.awaits -= 1
                is_last = not task.awaits
            # Not released in here, in a callback of the future: its release may end it, whose callback
            # releases a third one, and a chain of some hundred would reach Python's limit of recursion.
            if is_last:
                self.defer(functools.partial(self.release, task))

    def release(self, task: _Task) -> None:
        """All futures among its arguments are done: it takes their values, or ends as they did."""
        call = task.call
        if call is None:
            return  # it was cancelled
        fn, args, kwargs, _ = call
        place, failure = _PENDING, None
        try:  # a future may be anybody's, and answer with an error
            for future in (*args, *kwargs.values()):
                if not isinstance(future, Future) or place is not _PENDING:
                    continue
                if future.cancelled():
                    place = _CANCELLED
                elif (failure := future.exception()) is not None:
                    place = _ENDING
            if place is _PENDING:
                values = [
                    self.engine.given(v) if isinstance(v, Future) else v
                    for v in (*args, *kwargs.values())
                ]
                named = dict(zip(kwargs, values[len(args) :]))
                call = (fn, values[: len(args)], named, None)
        except BaseException as error:
            place, failure = _ENDING, error
        with _lock:
            if task.place is not _WAITING:
                return
            task.place = place
            hungry = False
            if place is _PENDING:
                task.call = call
                self.pending.append(task)
                hungry, self.hungry = self.hungry, False
            elif place is _CANCELLED:
                task.reason = "a future among its arguments was cancelled"
                self.untold.append(task)
            else:
                self.fail(task, cast("BaseException", failure))
        if hungry:
            self.engine.feed()
        self.settle()

    def withdraw(self, works: Sequence[_Work], stop: bool, reason: str) -> None:
        """Cancel those that have not begun and, if ``stop``, those that run."""
        if _under_a_lock():
            self.defer(functools.partial(self.withdraw, works, stop, reason))
            return
        with _LaterSignals():
            try:
                with _lock:
                    for work in works:
                        if work.place in _UNLENT:
                            work.place = _CANCELLED
                            work.reason = reason
                    lent = [work for work in works if work.place is _LENT]
                    for work in lent:
                        work.unwanted += 1
                        work.reason = reason
                try:
                    self.recall(lent, stop)
                finally:
                    with _lock:
                        for work in lent:
                            work.unwanted -= 1
                            if work.place is _LENT:
                                work.reason = ""  # it goes on, and may be cancelled for another
            finally:
                try:
                    self.tell_cancelled(works)
                finally:
                    self.settle()

    def recall(self, lent: Sequence[_Work], stop: bool) -> None:
        """Have back of these what waits at the engine and, if ``stop``, stop what runs there."""
        seats = [(work, work.seat) for work in lent]
        # All that run are found before any is stopped. After a stop() another one may begin, which would
        # then be killed although it could have been taken back.
        for work in [work for work in lent if stop and self.engine.running(work)]:
            self.engine.stop(work)
        waiting = [work for work in lent if work.place is _LENT]
        if waiting:
            self.engine.take_back(waiting)
        # On Ray, what runs is a guess: what does not come back when it is asked for, does run, and is
        # stopped as well. But under RUNNING alone, one that has come back is wanted, and may have been lent
        # again, and have begun: it has another seat then.
        for work, seat in seats if stop else ():
            if work.place is _LENT and (work.seat is seat or self.is_unwanted(work)):
                self.engine.stop(work)

    def is_unwanted(self, work: _Work) -> bool:
        """Whether it is to be cancelled, should it come back."""
        return bool(work.unwanted or work.abandoned or self.stage >= _Stage.DISCARDING)

    def shutdown(self, wait: bool = True, policy: CancellationPolicy | None = None) -> None:
        """End: apply the policy and, if ``wait``, stay until nothing is left.

        Without a policy, the first call applies the executor's own, and later ones only wait.
        """
        if _under_a_lock():
            self.defer(functools.partial(self.shutdown, False, policy))
            return
        with _LaterSignals():
            try:
                dropped: list[Any] = []
                with _lock:
                    if policy is None:
                        policy = CancellationPolicy.NONE if self.stage else self.policy
                    discards = CancellationPolicy.PENDING in policy
                    stops = CancellationPolicy.RUNNING in policy
                    self.stage = max(self.stage, _Stage.DISCARDING if discards else _Stage.DRAINING)
                    if discards or stops:  # else it cancels none, and is not the reason
                        self.ending = (
                            f"its executor has ended under {policy}: collect results inside the "
                            "`with` block, or choose another policy"
                        )
                    if discards:
                        for work in self.works:
                            if work.place in _UNLENT:
                                work.place = _CANCELLED
                        dropped = self.drop_pending(CancelledError(self.ending))
                    lent = [work for work in self.works if work.place is _LENT]
                if discards or stops:
                    self.recall(lent, stops)
                del dropped, lent
            finally:
                # Last, since their callbacks may take their time.
                with _lock:
                    works = [*self.works]
                with contextlib.ExitStack() as each:  # also if a callback exits; the last one first
                    each.callback(self.close_if_over)
                    each.callback(self.engine.feed)  # a Ctrl-C in add() may have come before it
                    each.callback(self.settle)
                    each.callback(self.tell_cancelled, works)
                    del works
        if not wait or self.engine.inside() or threading.get_ident() in self.telling:
            return  # it would wait for itself
        try:
            with _lock:
                while self.stage < _Stage.CLOSED:
                    self.changed.wait()
        except BaseException:
            # Ctrl-C in the middle of the end: whoever asks again does not want to wait for tasks.
            self.shutdown(False, CancellationPolicy.ALL)
            raise

    def kill(self, what: str) -> None:
        """As :meth:`ParallelExecutor.kill_workers` says."""
        self.killed_by = what  # before any is stopped: stopped() looks
        self.shutdown(False, CancellationPolicy.ALL)

    def keep_limit(self, limit: float) -> None:
        """Stop what runs for longer than it may. The body of the thread that watches over the limit."""
        while True:
            with _lock:
                while self.stage < _Stage.CLOSED and not (self.works or self.uncut):
                    self.is_unwatched = True
                    self.changed.wait()
                if self.stage is _Stage.CLOSED:
                    return
            left = self.stop_late(limit)
            self.settle()
            with _lock:
                if self.stage < _Stage.CLOSED:
                    self.changed.wait(min(max(left, 0.001), threading.TIMEOUT_MAX))

    def stop_late(self, limit: float) -> float:
        """Stop what has run for that long; the seconds until there may be more. A function of its own, so
        that the thread has no task among its variables while it waits."""
        now = oldest = time.monotonic()
        for work, since in self.engine.began():
            if now - since < limit:
                oldest = min(oldest, since)
                continue
            message = f"{_name(work.call)} took longer than task_timeout, {limit:g} seconds"
            work.verdict = TimeoutError(message)
            self.engine.stop(work)
        # What begins from now on can't be late before the limit is over once more.
        return min(oldest + limit - time.monotonic(), limit * self.engine.look_after)

    def defer(self, what: Callable[[], Any]) -> None:
        """Let it be done under no lock, soon."""
        self.deferred.append(what)
        self.engine.feed()  # an engine's thread settles whenever it wakes

    # What engines do. put_back() and stopped() under _engine_lock; take() and ask() there or not; end(),
    # settle() and break_down() under no lock.

    def ask(self) -> int:
        """How many wait, about; and let the next add() call feed()."""
        with _lock:
            self.hungry = True
            return self.waiting()

    def waiting(self) -> int:
        """How many tasks and items wait, about: cancelled ones are counted until take() meets them."""
        return len(self.pending) + self.uncut

    def take(self, count: int) -> list[_Work]:
        """Up to ``count``, lent from now on. If it gives fewer, feed() comes at the next add()."""
        taken: list[_Work] = []
        most = count
        with _lock:
            while self.pending and len(taken) < most:
                head = self.pending[0]
                if isinstance(head, _Map):
                    if head.abandoned:
                        self.dropped.append(head.clear())
                    if not head.left:
                        self.dropped.append(self.pending.popleft())
                        continue
                    work: _Work
                    work = chunk = head.cut()
                    self.works.add(work)
                    if not head.left:
                        self.pending.popleft()
                    elif head.grows(chunk):
                        # One for this take(): before the next, it may be known how long its items take.
                        # The first item's time is mostly that of caches and imports: a bad measure.
                        most = len(taken) + 1
                else:
                    self.pending.popleft()
                    if head.place is not _PENDING:
                        self.dropped.append(head)  # perhaps the last reference, and this is a lock
                        continue
                    work = head
                if work.abandoned:
                    work.place = _CANCELLED
                    self.untold.append(work)
                    continue
                work.place = _LENT
                taken.append(work)
            if len(taken) < count:
                self.hungry = True
        return taken

    def take_all(self) -> list[_Work]:
        """All that is pending, for an engine that will run none of it."""
        works: list[_Work] = []
        with _lock:
            while taken := self.take(sys.maxsize):
                works += taken
        return works

    def put_back(self, works: Sequence[_Work]) -> None:
        """They have not begun: pending again, and first in the queue; or cancelled, if nobody wants
        them any more. It does not call feed(): the engine does, if it may be asleep."""
        with _lock:
            wanted = []
            for work in works:
                work.verdict = None
                if self.is_unwanted(work):
                    work.place = _CANCELLED
                    self.untold.append(work)
                elif self.broken is not None:
                    self.fail(work, self.broken)
                else:
                    work.place = _PENDING
                    wanted.append(work)
            self.pending.extendleft(reversed(wanted))

    def stopped(self, work: _Work) -> None:
        """What ran it was killed, and no end() comes."""
        from concurrent.futures.process import BrokenProcessPool

        with _lock:
            if self.killed_by and work.verdict is None:
                work.verdict = BrokenProcessPool(f"{self.killed_by}() was called while it ran")
            if work.verdict is not None:
                self.fail(work, work.verdict)
                return
            work.place = _CANCELLED
            self.untold.append(work)

    def fail(self, work: _Work, error: BaseException) -> None:
        """It fails with this, as settle() will tell; under ``_lock``."""
        work.place = _ENDING
        self.deferred.append(functools.partial(self.end, [_lost(work, error)]))

    def break_down(self, error: BaseException) -> None:
        """No task will run any more, and why; under no lock. What runs may go on to its end."""
        with _lock:
            if self.broken is None:
                self.broken = error
            dropped = self.drop_pending(error)
            for work in self.works:
                if work.place in _UNLENT:
                    self.fail(work, error)
        del dropped
        self.settle()

    def end(self, outcomes: Sequence[tuple[_Work, Reply]]) -> None:
        """What became of them. A batch, for a thread that reads replies has many at once."""
        with _lock:
            for work, _ in outcomes:
                work.place = _ENDING
        self.tell(outcomes)

    def settle(self) -> None:
        """Under no lock: tell who was cancelled, drop what was dropped, do what was asked for."""
        thread = threading.get_ident()
        if thread in self.settling:
            return  # we are in one of those below: it goes on when this is over
        if not (self.untold or self.dropped or self.deferred):
            return  # as most often: an engine's thread asks after each batch
        raised: BaseException | None = None
        with _LaterSignals():
            self.settling.add(thread)
            while self.untold or self.dropped or self.deferred:
                _emptied(self.dropped)
                calls = _emptied(self.deferred)
                calls.append(functools.partial(self.tell_cancelled, _emptied(self.untold)))
                while calls:
                    try:
                        calls[0]()
                    except Exception:  # of ours, or an engine's: put back, it would raise for ever
                        _report("Exception in what was put off")
                    except BaseException as error:  # has left a callback, when all were called
                        raised = raised or error
                    del calls[0]
            self.settling.discard(thread)
            if raised is not None:
                raise raised

    # Between the two.

    def drop_pending(self, error: BaseException) -> list[Any]:
        """Empty the queue, and fail what is in no chunk of its maps; under ``_lock``. What it returns is to
        be dropped under none."""
        dropped: list[Any] = [self.pending]
        for entry in self.pending:
            if isinstance(entry, _Map) and entry.left:
                entry.tell(entry.first, [], error)
                dropped.append(entry.clear())
        self.pending = collections.deque()
        return dropped

    def tell(self, outcomes: Sequence[tuple[_Work, Reply | None]]) -> None:
        """Tell futures and maps what became of their tasks; None: they are cancelled."""
        # In the main thread signals are put off here, as everywhere where tasks move. So nothing raises but
        # a callback that leaves by sys.exit(), or in which a Ctrl-C came.
        raised = None
        thread = threading.get_ident()
        self.telling[thread] += 1
        for work, reply in outcomes:
            try:
                self.tell_one(work, reply)
            except BaseException as error:
                # In the main thread it goes on when all are told; in any other, an engine's, it must not
                # end the thread.
                if _in_main_thread():
                    raised = raised or error
                else:
                    _report("Exception in a callback of a task", error)
        self.telling[thread] -= 1
        if not self.telling[thread]:
            del self.telling[thread]
        with _lock:
            for work, _ in outcomes:
                work.place = _DONE
            self.works.difference_update([work for work, _ in outcomes])
        if self.stage:
            self.close_if_over()
        if raised is not None:
            raise raised

    def tell_one(self, work: _Work, reply: Reply | None) -> None:
        call, message = work.call, work.message
        try:
            if reply is None:
                work.finish_cancelled(self.ending)
            else:
                work.finish(reply)
        finally:
            # Here, and not in the caller, so that nobody holds them while the next one's callbacks run.
            work.core = work.call = work.message = None
            del call, message

    def tell_cancelled(self, works: Iterable[_Work]) -> None:
        self.tell([(work, None) for work in works if work.place is _CANCELLED])

    def close_if_over(self) -> None:
        with _lock:
            if not _Stage.OPEN < self.stage < _Stage.CLOSING or self.works or self.uncut:
                return
            self.stage = _Stage.CLOSING
        try:
            self.engine.close()
        finally:
            with _lock:
                self.stage = _Stage.CLOSED
                self.changed.notify_all()

    def forget(self) -> None:
        """In a forked child, which has none of our threads, and no right to our workers."""
        self.engine = _Nothing()
        self.stage = _Stage.CLOSED
        self.pending.clear()
        self.works.clear()


class _Results(itertools.chain[T]):
    """What map() returns: the results, part after part, as one generator would yield them, and close. But
    it is C code that goes from one to the next, in half of the time."""

    parts: Generator[Iterator[Any]]

    def close(self) -> None:
        self.parts.close()
        collections.deque(self, 0)  # drops what is left of the part at hand


class ParallelExecutor(Executor):
    """What :meth:`ParallelBackend.executor` and :meth:`ParallelBackend.over` return: an executor of
    :mod:`concurrent.futures`, with what Python 3.14 gave to that, and a policy for its end."""

    def __init__(
        self,
        engine: _Engine,
        max_workers: int,
        policy: CancellationPolicy,
        task_timeout: float | None = None,
    ) -> None:
        self._core = _Core(engine, max_workers, policy, task_timeout)
        weakref.finalize(self, _drop, self._core).atexit = False

    def __repr__(self) -> str:
        core = self._core
        works = list(core.works)
        running = sum(core.engine.running(work) for work in works if work.place is _LENT)
        items = sum(_count(work.call) for work in works)
        state = "" if core.stage is _Stage.OPEN else f", {core.stage.name.lower()}"
        return (
            f"<{type(self).__name__} on {core.engine.name}: max_workers={self._max_workers}, "
            f"{max(items - running, 0) + core.uncut} pending, {running} running{state}>"
        )

    @property
    def _max_workers(self) -> int:
        """As the standard library's own executors have it, for dask and others read it."""
        return self._core.engine.width(self._core.max_workers)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run ``fn(*args, **kwargs)`` on a worker::

            future = executor.submit(pow, 2, 10)
            print(executor.submit(abs, future).result(timeout=60))

        A future among the arguments is waited for, without a worker, and arrives as its result. If
        it fails, so does this one, with its exception; if it is cancelled, so is this one.

        Raises:
            RuntimeError: after :meth:`shutdown`.
            concurrent.futures.BrokenExecutor: after an ``initializer`` has raised.
        """
        core = self._core
        task = (core.engine.future_type or _Task)(core, fn, args, kwargs)
        if args or kwargs:
            awaited = map(core.engine.awaited, (*args, *kwargs.values()))
            if futures := [future for future in awaited if future is not None]:
                core.add_waiting(task, futures)
                return task
        core.add(task)
        return task

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | None = None,
        buffersize: int | None = None,
        ordered: bool = True,
    ) -> Iterator[T]:
        """Like ``map(fn, *iterables)``, in parallel::

            for square in executor.map(pow, itertools.count(), itertools.repeat(2), buffersize=64): ...

        Args:
            timeout: seconds from now, after which the iterator raises.
            chunksize: how many items go to a worker at once. By default, as many as take some
                tens of milliseconds, as measured on those before. Items in one chunk run one
                after the other: where one must wait for another, give 1.
            buffersize: how many items may be in flight, read but not yielded. The iterables are
                then read as the results are, and may be endless; otherwise they are read now.
            ordered: ``False`` yields results as they come, as ``imap_unordered`` does.

        Raises:
            ValueError: ``chunksize`` or ``buffersize`` is below 1.
            concurrent.futures.TimeoutError: from the iterator; what has not started is cancelled.
            Exception: from the iterator, what ``fn`` raised for the item whose turn it is.
        """
        for name, value in (("chunksize", chunksize), ("buffersize", buffersize)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None; it is {value!r}")
        deadline = None if timeout is None else time.monotonic() + timeout
        core = self._core
        starred = len(iterables) != 1  # of one iterable, no item needs a tuple
        source = _Map(core, fn, starred, chunksize)
        unread: Iterator[Any] = zip(*iterables) if starred else iter(iterables[0])
        # How many are read at a time, with buffersize.
        step = sys.maxsize if buffersize is None else min(chunksize or 1, buffersize)

        def read(count: int | None) -> None:
            block = list(islice(unread, count))
            block.reverse()
            if block:
                core.add(source, block)

        read(buffersize and buffersize // step * step)
        if buffersize is None:
            unread = iter(())  # zip() holds the last tuple that it has yielded

        def parts() -> Generator[Iterator[T]]:
            """The results of a chunk, or of as many as are to be yielded before more are read."""
            _keep = self  # as long as somebody wants the results, the executor is not dropped
            # How many results were taken; in order, that is also the index of the next outcome.
            index = yielded = 0
            try:
                while True:
                    with _LaterSignals(), _lock:  # why both: see the except in _Core.add()
                        start = index if ordered else next(iter(source.outcomes), -1)
                        outcome = source.outcomes.pop(start, None)
                        source.is_awaited = outcome is None
                        if outcome is None and index == source.first + source.left:
                            return  # all that were read are yielded
                    if outcome is None:
                        left = None if deadline is None else max(deadline - time.monotonic(), 0)
                        try:
                            source.news.get(timeout=left)
                        except queue.Empty:
                            message = f"map() took longer than {timeout} seconds"
                            raise FutureTimeoutError(message) from None
                        continue
                    values, failure = outcome
                    del outcome
                    index += len(values)
                    values.reverse()
                    while values:
                        count = min(len(values), step - yielded % step)
                        # By pop(), so that nobody holds what is yielded.
                        yield map(list.pop, repeat(values, count))
                        yielded += count
                        if yielded % step == 0:
                            read(step)
                    if failure is not None:
                        try:
                            raise failure
                        finally:
                            del failure  # it holds this frame
            finally:
                with _LaterSignals(), _lock:  # lest a chunk be cut just between the two
                    read_so_far = source.first + source.left
                if index < read_so_far:
                    source.abandon()

        generator = parts()
        results: Any = _Results.from_iterable(generator)
        results.parts = generator
        return cast("Iterator[T]", results)

    def shutdown(
        self, wait: bool = True, *, cancel_futures: CancellationPolicy | bool | None = None
    ) -> None:
        """End: take no more tasks, and do with those there are as the policy says. The ``with`` block
        does it when it is left. A Ctrl-C while it waits ends all at once, as ``ALL`` does::

            executor.shutdown(cancel_futures=CancellationPolicy.ALL)

        Args:
            wait: return only when all tasks have ended, and the workers are given back.
            cancel_futures: a policy, a bool, or None for the executor's own.
        """
        self._core.shutdown(wait, None if cancel_futures is None else _as_policy(cancel_futures))

    def kill_workers(self) -> None:
        """End at once: what has not begun is cancelled, and what runs fails with ``BrokenProcessPool``,
        for its worker is killed. As in Python 3.14's ``ProcessPoolExecutor``. Where there are no
        processes to kill (over threads, in the calling process), what runs goes on to its end."""
        self._core.kill("kill_workers")

    def terminate_workers(self) -> None:
        """As :meth:`kill_workers`: a worker here has nothing to clean up."""
        self._core.kill("terminate_workers")


def _drop(core: _Core) -> None:
    """End an executor that nobody has any more."""
    # The collector calls this in any thread, perhaps one that holds a lock of ours or of somebody else's.
    # So it is the bare function: threading.Thread takes locks. At the interpreter's exit no thread can
    # start any more; there, _end_all() does what is to do.
    if core.stage is not _Stage.CLOSED:  # most are: by the end of their ``with`` block
        with contextlib.suppress(RuntimeError):
            _thread.start_new_thread(core.shutdown, (False,))


def _end_all() -> None:
    """At exit: apply the policies, to all executors first, so that they end side by side."""
    with contextlib.ExitStack() as each:  # of them all, even if a callback raises
        cores = list(_Core.live)
        for core in cores:
            each.callback(core.shutdown)
        for core in cores:
            each.callback(core.shutdown, wait=False)  # called first: what came last goes first


def _at_exit(function: Callable[[], None], priority: int = 100) -> None:
    """Call it when this process ends, in whichever way that is."""
    # Registered anew, for what is registered last is called first: before Ray's and multiprocessing's.
    atexit.unregister(function)
    atexit.register(function)
    # A process of multiprocessing (a loky worker, a child of ProcessPoolExecutor) leaves by
    # os._exit() and runs no atexit handler, but its own finalizers, those of highest priority first.
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        from multiprocessing import util

        key = (function, os.getpid())
        if key not in _registered:
            _registered.add(key)
            util.Finalize(None, function, exitpriority=priority)


_registered: set[tuple[Callable[[], None], int]] = set()
"""What multiprocessing has been told, and in which process."""


def _forget_all() -> None:
    """In a forked child: whoever held a lock in the parent is not here to release it."""
    for lock in (_lock, _engine_lock):
        cast("Any", lock)._at_fork_reinit()  # private, but what threading and logging rely on
    if (outer := _LaterSignals.now) is not None:
        outer.came.clear()  # they are the parent's
        outer.end()  # the thread that put them off may not be here to do it
    for core in list(_Core.live):
        core.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


# --- what workers run -------------------------------------------------------------------------


def _worker_functions() -> tuple[Callable[..., Any], ...]:
    """Functions defined inside a function go by value, so that a worker need not be able to import this
    file. They may use the standard library's modules, which cloudpickle sends by name, and each other, but
    no other global of this file."""

    def run(fn: Callable[..., Any], arguments: Any, how: Any, budget: float | None) -> Reply:
        """Run a call. Of a chunk, no further item is begun when one fails or the budget is over."""
        values: list[Any] = []
        error = None
        clock = time.perf_counter

        def run_block(items: list[Any]) -> None:
            # In C, and extend() keeps what came before an exception.
            expected = len(values) + len(items)
            values.extend(itertools.starmap(fn, items) if how else map(fn, items))
            if len(values) < expected:
                raise StopIteration  # of fn's own, which extend() has taken for the end

        started = clock()
        try:
            if budget is None:
                values.append(fn(*arguments, **how))
            elif budget == float("inf"):
                run_block(arguments)
            else:
                # In blocks that take a 256th of the budget: enough for the clock to cost nothing, and too
                # short to hold several items that take far longer than those before.
                size = 1
                while len(values) < len(arguments):
                    run_block(arguments[len(values) : len(values) + size])
                    spent = clock() - started
                    if spent > budget:
                        break
                    fits = len(values) * budget / (256 * spent + 1e-9)
                    size = max(min(int(fits), 4 * size), 1)
        except BaseException as raised:
            # Without this frame, which would hold the arguments.
            tb = raised.__traceback__
            error = raised.with_traceback(tb and tb.tb_next)
        try:
            return values, error, len(values) + (error is not None), clock() - started
        finally:
            del error  # or it and this frame hold each other

    def said(error: BaseException) -> str:
        """Type, message and notes of an exception, even of one whose __str__ fails."""
        try:
            lines = traceback.format_exception_only(type(error), error)
        except Exception:  # a SyntaxError whose text is none, say
            return type(error).__name__
        return "; ".join(map(str.strip, lines))

    def pack(error: BaseException | None, dumps: Callable[..., bytes]) -> tuple[bytes, str] | None:
        """An exception's pickle and its traceback's text; if it can't be pickled, an error's that says so."""
        if error is None:
            return None
        try:
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        except Exception:
            text = f"{type(error).__name__}, whose traceback can't be shown"
        try:
            return dumps(error), text
        except BaseException as reason:
            what = f"Could not pickle the exception that a task raised, {said(error)}"
            return pickle.dumps(pickle.PicklingError(f"{what}, {said(reason)}")), text

    def reborn(cls: Any, args: Any, state: Any = None) -> BaseException:
        """An exception made anew, without the ``__init__`` of its class: that may take other arguments than
        those in ``args``, and it ran when the exception was made."""
        builtin = cls
        while builtin.__module__ != "builtins":
            builtin = builtin.__base__  # the nearest one, which laid out its memory
        error: BaseException = builtin.__new__(cls, *args)
        builtin.__init__(error, *args)  # for what is not in args: an OSError's errno, say
        for name, value in (state or {}).items():
            object.__setattr__(error, name, value)  # it may refuse assignment
        return error

    def dumper(cloudpickle: Any) -> Callable[..., bytes]:
        """A ``dumps(value, buffers=None, more=None)`` as cloudpickle's, with three changes: code keeps the
        name of its file, ``lru_cache``d functions go by value where plain ones would, and exceptions are
        made anew by reborn(). ``more`` has further reducers, by type."""
        memoized = type(functools.lru_cache(len))
        by_type = cloudpickle.Pickler.dispatch_table

        def reduce_code(code: Any) -> Any:
            # cloudpickle 3.1.2 and newer leave the name out, and then no traceback shows a line.
            make, args = by_type[types.CodeType](code)
            return make, tuple(
                code.co_filename if type(arg) is str and arg == "<dynamic-code>" else arg
                for arg in args
            )

        def has_own(cls: Any, name: str) -> bool:
            return any(name in vars(base) for base in cls.__mro__ if base.__module__ != "builtins")

        def reduce_error(error: BaseException) -> Any:
            cls = type(error)
            own = ("__reduce__", "__reduce_ex__", "__setstate__")  # then it knows how
            if cls.__module__ == "builtins" or any(has_own(cls, name) for name in own):
                return NotImplemented
            made = error.__reduce__()
            return (reborn, made) if made[0] is cls else NotImplemented

        def reduce_memoized(function: Any) -> Any:
            module = getattr(function, "__module__", None)
            found = sys.modules.get(module) if module else None
            for name in getattr(function, "__qualname__", "").split("."):
                found = getattr(found, name, None)
            by_value = {"__main__", *cloudpickle.list_registry_pickle_by_value()}
            if found is function and module not in by_value:
                return NotImplemented
            how = function.cache_parameters()
            # What functools.lru_cache() itself calls, since Python 3.5.
            args = (
                function.__wrapped__,
                how["maxsize"],
                how["typed"],
                cast("Any", functools)._CacheInfo,
            )
            return memoized, args, vars(function)

        class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # a module found at run time
            def __init__(self, file: Any, buffers: Any, more: Any) -> None:
                table = {types.CodeType: reduce_code, **(more or {})}
                self.dispatch_table = collections.ChainMap(table, by_type)
                keep = None if buffers is None else buffers.append
                cloudpickle.Pickler.__init__(self, file, 5, keep)

            def reducer_override(self, value: Any) -> Any:
                if isinstance(value, BaseException):
                    return reduce_error(value)
                if type(value) is memoized:
                    return reduce_memoized(value)
                return cloudpickle.Pickler.reducer_override(self, value)

        def dumps(value: object, buffers: list[Any] | None = None, more: Any = None) -> bytes:
            file = io.BytesIO()
            Pickler(file, buffers, more).dump(value)
            return file.getvalue()

        return dumps

    def help_children(dumps: Callable[..., bytes]) -> None:
        """Let a task start processes by multiprocessing, as the main program may. Where these are not
        forked, what they run is pickled; and by its name nothing of the program's ``__main__`` would be
        found, for that of a worker is another one. So it goes by value."""
        from multiprocessing.reduction import ForkingPickler

        def reducer_override(_: object, value: Any) -> Any:
            if (
                issubclass(type(value), (types.FunctionType, type))
                and value.__module__ == "__main__"
            ):
                return pickle.loads, (dumps(value),)
            return NotImplemented

        cast("Any", ForkingPickler).reducer_override = reducer_override

    def opener(loads: Callable[[bytes], Any]) -> Callable[[bytes | None, bytes], Any]:
        """An ``open_call(head, body)``, which makes a call of a message. It keeps the functions that it has
        made: the same bytes are the same function, so what that stores in a global is there for its next
        call, as it is in a module."""
        functions: dict[bytes, Any] = {}

        def open_call(head: bytes | None, body: bytes) -> Any:
            call = loads(body)
            if head is None:
                return call
            if head in functions:
                return functions[head], *call
            function = loads(head)
            if len(head) < 1 << 16:  # what a closure may hold is not to be kept
                if len(functions) >= 64:
                    del functions[next(iter(functions))]
                functions[head] = function
            return function, *call

        return open_call

    def set_up(data: bytes, dumps: Callable[..., bytes]) -> Callable[[bytes], Any]:
        """Run an initializer, and return the loads() for what comes after it.

        cloudpickle gives the functions of each pickle globals of their own. Those of later pickles are to
        see what the initializer has set in its own, unless the program has changed that since.
        """
        spaces: list[dict[str, Any]] = []  # the globals of those that the initializer is made of
        set_by_it: dict[Any, dict[str, tuple[Any, bytes | None]]] = {}
        """By module and name: the value that it has set, and what the value that the program sent under
        that name looked like (None, if it has not been sent yet). If a later function comes with one
        that looks otherwise, the program has changed it since, and that one counts."""

        def look(value: object) -> bytes | None:
            if isinstance(value, (types.FunctionType, types.ModuleType, type)):
                line = getattr(getattr(value, "__code__", None), "co_firstlineno", 0)
                return f"{value.__name__} {line}".encode()  # its globals are no part of it
            with contextlib.suppress(Exception):
                return dumps(value)
            return None

        class Unpickler(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                found = super().find_class(module, name)
                if name != "_function_setstate":  # cloudpickle's, by which globals come
                    return found

                def set_state(function: Any, state: Any) -> None:
                    sent = dict(state[1]["__globals__"])
                    found(function, state)
                    space = function.__globals__
                    spaces.append(space)
                    names = set_by_it.get(space.get("__name__"), {})
                    for key, (value, before) in names.items():
                        if key not in sent:
                            space.setdefault(key, value)
                        elif before is None or look(sent[key]) == before:
                            names[key] = value, before or look(sent[key])
                            space[key] = value

                return set_state

        def loads(data: bytes) -> Any:
            try:
                return Unpickler(io.BytesIO(data)).load()
            finally:
                spaces.clear()

        initializer, initargs = Unpickler(io.BytesIO(data)).load()
        before = [(space, {k: (v, look(v)) for k, v in space.items()}) for space in spaces]
        spaces.clear()
        initializer(*initargs)
        for space, old in before:
            names = set_by_it.setdefault(space.get("__name__"), {})
            for name, value in space.items():
                was, looked = old.get(name, (None, None))
                if name != "__builtins__" and (value is not was or look(value) != looked):
                    names[name] = value, looked
        return loads

    class Plain(pickle.Pickler):
        """C code all through: it asks this about what is not of a builtin type, and gives up."""

        def reducer_override(self, value: object) -> Any:
            raise pickle.PicklingError

    def seal(reply: Reply, dumps: Callable[..., bytes], buffers: list[Any] | None = None) -> bytes:
        """The pickle of a reply, or else of the failure to pickle it; its buffers go to a list.

        Results of a chunk that are not plain are pickled one by one, into a tuple: so one that can't be
        pickled, or not be unpickled, costs no other.
        """
        values, error, begun, seconds = reply
        if error is None and buffers is None:
            with contextlib.suppress(Exception):
                file = io.BytesIO()
                Plain(file, 5).dump(reply)
                return file.getvalue()
        reason: BaseException = pickle.PicklingError()
        if len(values) <= 1 or buffers is not None:
            try:
                return dumps((values, pack(error, dumps), begun, seconds), buffers)
            except BaseException as raised:
                reason = raised
        good: list[Any] = []
        value = None
        for value in values:
            try:
                good.append(dumps(value))
            except BaseException as raised:
                # Those after it are never asked for.
                reason = raised
                break
        else:
            if len(values) > 1 and buffers is None:
                return pickle.dumps((tuple(good), pack(error, dumps), begun, seconds))
            good = good[:-1]  # each can be pickled alone, but not all together: the last one fails
        failure = reason  # what is no Exception, a SystemExit say, stays what it is
        if isinstance(reason, Exception):
            what = f"Could not pickle the result of a task, {type(value).__name__}: {said(reason)}"
            failure = pickle.PicklingError(what).with_traceback(reason.__traceback__)
        if buffers is not None:
            buffers.clear()
        return pickle.dumps((tuple(good), pack(failure, dumps), begun, seconds))

    def serve(
        connection: Any,
        permits: tuple[Any, Any] | None,
        parent: int,
        lifeline: Any,
        method: Any,
        cloudpickle: str,
    ) -> None:
        """The life of a worker process: read a batch of calls, run them, reply to each. What it writes:

        - ``b""``: it is ready, after its start, after an initializer, and after an executor's end; or,
          while it works, the rest of its batch has been taken back;
        - ``b"b"`` and ``b"e"``, if there is a time limit: it begins a call; the call has ended;
        - anything else: a reply, as seal() makes it.
        """
        import faulthandler
        import multiprocessing

        with contextlib.suppress(OSError):
            # A process that a task starts must not inherit our connection: it would stay open, and our
            # death would not be seen.
            for name in os.listdir("/dev/fd"):
                with contextlib.suppress(OSError):
                    os.set_inheritable(int(name), int(name) < 3)
        if sys.platform != "win32":
            # A group of its own: the terminal's Ctrl-C is for the parent alone, and what a task
            # has started is killed together with it.
            os.setpgid(0, 0)
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # forgets one that has come
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            signal.signal(signal.SIGINT, handler)
            # A forked child must not hold the connection open when this process is gone.
            os.register_at_fork(after_in_child=connection.close)
        else:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if sys.platform == "linux":
            import ctypes

            # Die with the thread that started us, even inside a C loop: prctl(2), PR_SET_PDEATHSIG.
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)  # it was gone before
        else:

            def watch() -> None:
                try:
                    lifeline.recv_bytes()
                except (EOFError, OSError):
                    os._exit(1)

            threading.Thread(target=watch, daemon=True).start()
        if not faulthandler.is_enabled():
            with contextlib.suppress(Exception):  # stderr may be None, or closed
                faulthandler.enable()
        # loky has made its own way to start processes the default. A task has the main program's.
        multiprocessing.set_start_method(method, force=True)

        def state() -> tuple[Any, ...]:
            """What is compared before the next executor gets this process; modules are not."""
            folder = None
            with contextlib.suppress(OSError):
                folder = os.getcwd()
            return folder, dict(os.environ), list(sys.path)

        # Files stay mapped from task to task, since to map one anew takes longer than many a task. But
        # only until nothing has come for a second: mapped, a file that is gone still takes its memory.
        maps: dict[str, Any] = {}
        process: Any = multiprocessing.current_process()
        process.parallel_backend_maps = maps  # map_file comes by value: this both can find

        def send(data: bytes) -> None:
            """As Connection.send_bytes() does, in a quarter of its time."""
            if sys.platform == "win32" or len(data) >= 1 << 31:
                connection.send_bytes(data)
                return
            data = len(data).to_bytes(4, "big") + data
            try:
                while data:
                    data = data[os.write(connection.fileno(), data) :]
            except BrokenPipeError:
                os._exit(1)  # nobody is there to hear it

        dumps = dumper(importlib.import_module(cloudpickle))
        help_children(dumps)
        open_call = opener(pickle.loads)
        born = state()
        send(b"")
        while True:
            try:
                if maps and not connection.poll(1):
                    maps.clear()
                message = connection.recv_bytes()
            except (EOFError, OSError):
                return
            if not message:  # the executor has ended: is this process good for another one?
                maps.clear()
                open_call = opener(pickle.loads)
                if state() != born:
                    return
                send(b"")
                continue
            semaphore, path, is_limited, calls = pickle.loads(message)
            if path is not None:
                sys.path[:] = path  # the program has changed it since this process was started
                born = (*born[:2], path)
            if semaphore is None:
                try:
                    open_call = opener(set_up(calls, dumps))
                except BaseException as error:
                    send(dumps(([], pack(error, dumps), 1, 0.0)))
                else:
                    send(b"")
                continue
            acquire = permits[semaphore].acquire if permits is not None else None
            calls.reverse()
            while calls:
                # A permit is taken only when the reply before it is written in full. So at any moment at
                # most one call has begun and is not replied to: rule 3 of joblib's engine.
                if acquire is not None and not acquire(False):
                    send(b"")
                    break
                head, body = calls.pop()
                try:
                    call = open_call(head, body)
                except BaseException as error:
                    data = dumps(([], pack(error, dumps), 0, 0.0))
                else:
                    if is_limited:
                        send(b"b")  # it begins: what it took to import its module does not count
                    reply: Any = run(*call)
                    if is_limited:
                        send(b"e")  # and what its result takes to be sent does not, either
                    # A call holds its arguments, and they what they like.
                    call = head = body = None
                    data = seal(reply, dumps)
                    reply = ()
                # What a task has printed is out when its result is: the process may be killed next.
                for stream in (sys.stdout, sys.stderr):
                    with contextlib.suppress(Exception):  # None, closed, or nobody reads it
                        stream.flush()
                send(data)
                data = b""
            message = calls = None

    def map_file(path: str, spans: list[tuple[int, int]]) -> Any:
        """Load an object from a file of :class:`_Shared`, of which its buffers stay a part."""
        import mmap
        import multiprocessing

        maps = getattr(multiprocessing.current_process(), "parallel_backend_maps", {})
        for gone in [other for other in maps if not os.path.exists(other)]:
            del maps[gone]
        if (content := maps.get(path)) is None:
            with open(path, "rb") as file:
                content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            maps[path] = content
        data, *buffers = (content[start : start + size] for start, size in spans)
        return pickle.loads(data, buffers=buffers)

    return run, said, pack, seal, dumper, help_children, opener, set_up, serve, map_file


(
    _run,
    _said,
    _pack,
    _seal,
    _dumper,
    _help_children,
    _opener,
    _set_up,
    _serve,
    _map_file,
) = _worker_functions()


def _unpack(packed: tuple[bytes, str] | None, name: str, begun: int) -> BaseException | None:
    """The exception that a worker has packed, with the worker's traceback as its cause."""
    if packed is None:
        return None
    blob, text = packed
    try:
        error = pickle.loads(blob)
        if not isinstance(error, BaseException):
            raise TypeError("it became none")
    except BaseException as reason:
        error = _broken(f"The exception that {name} raised could not be unpickled", reason)
    else:
        if not begun:
            error = _broken(f"The worker could not unpickle the call of {name}", error)
    return _traced(error, text)


def _traced(error: BaseException, text: str) -> BaseException:
    """An exception with the worker's traceback as its cause."""
    from concurrent.futures.process import _RemoteTraceback  # private, but what users' tools know

    with contextlib.suppress(Exception):  # what looks like a frame may be part of a message
        text = _FRAME.sub(_with_source, text)
    return _caused(error, _RemoteTraceback(cast("Any", f'\n"""\n{text}"""')))


_FRAME = re.compile(r'^( +)File "(.+)", line (\d+), in .+$(?!\n\1  )', re.MULTILINE)
"""The place of a frame, where the line itself does not follow."""


def _with_source(place: re.Match[str]) -> str:
    """With the line: of a notebook's cell, or of a file that is not on the worker's machine."""
    line = linecache.getline(place[2], int(place[3])).strip()
    return f"{place[0]}\n{place[1]}  {line}" if line else place[0]


def _caused(error: BaseException, cause: BaseException) -> BaseException:
    # Not by assignment, which an exception may refuse: one that is a frozen dataclass, say. One whose
    # class has a property of that name goes without.
    with contextlib.suppress(Exception):
        object.__setattr__(error, "__cause__", cause)
    return error


def _opened(data: bytes | None, rest: Any, name: str, count: int) -> Reply:
    """The reply that a worker has sealed: its pickle and buffers, or None and the reply itself."""
    opened: list[Any] = []
    begun, seconds = count, 0.0
    try:
        values, packed, begun, seconds = rest if data is None else pickle.loads(data, buffers=rest)
        if isinstance(values, tuple):  # each was pickled by itself
            for value in values:
                opened.append(pickle.loads(value))
            values = opened
    except BaseException as error:
        failure = _broken(f"The result of {name} could not be unpickled", error)
        return opened, failure, begun, seconds
    return values, _unpack(packed, name, begun), begun, seconds


def _broken(message: str, cause: BaseException | None = None) -> BaseException:
    from concurrent.futures.process import BrokenProcessPool  # brings in multiprocessing

    if cause is None:
        return BrokenProcessPool(message)
    return _caused(BrokenProcessPool(f"{message}: {_said(cause)}"), cause)


def _initializer_failed(error: BaseException | None) -> BaseException:
    return _broken("The initializer of this executor has failed, so it takes no more tasks", error)


def _import_or_explain(package: str) -> ModuleType:
    """A package that a backend can't do without, or a module of one."""
    top = package.partition(".")[0]
    if sys.modules.get(package) is None:  # None, where somebody has blocked it
        try:
            with warnings.catch_warnings():
                # Without semaphores (no /dev/shm, say) joblib says so, which is untrue of us.
                warnings.filterwarnings("ignore", message=".*joblib will operate in serial mode")
                # The package first: if it is missing, the import of its submodule may name another one.
                importlib.import_module(top)
        except ImportError as error:
            if error.name not in (top, None):
                raise  # it is there, but broken
            raise ImportError(f"This backend needs {top}: pip install {top}", name=top) from error
    return importlib.import_module(package)


# --- how calls are sent -----------------------------------------------------------------------

_ATOMS = frozenset({int, float, str, bytes, bool, type(None)})
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type(functools.lru_cache(len)))

Message = tuple["bytes | None", bytes]
"""The pickled function, and the rest of its call; or None, and all of it in one."""


class _Plain(pickle.Pickler):
    """Pickles what pickle and cloudpickle pickle alike, in a tenth of cloudpickle's time.

    Its C code asks only about what is not exactly of a builtin type, and gives up there; but for
    functions that go by name.
    """

    goes_by_name: Callable[[object], bool]

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, _FUNCTIONS) and self.goes_by_name(value):
            return NotImplemented
        raise pickle.PicklingError


class _Calls:
    """Makes messages of calls: by pickle where it does what cloudpickle would, else by joblib's
    cloudpickle, or Ray's."""

    def __init__(self, cloudpickle: ModuleType) -> None:
        self.registered: Callable[[], Any] = cloudpickle.list_registry_pickle_by_value
        self.dumps: Callable[..., bytes] = _dumper(cloudpickle)

    def goes_by_name(self, function: Any) -> bool:
        """Whether cloudpickle, too, would send it as its name; that it has one, pickle checks."""
        module = getattr(function, "__module__", None)
        return module in sys.modules and module != "__main__" and not self.registered()

    def plainly(self, value: object) -> bytes | None:
        """Its plain pickle, if that is what cloudpickle would make."""
        file = io.BytesIO()
        pickler = _Plain(file, 5)
        pickler.goes_by_name = self.goes_by_name
        try:
            pickler.dump(value)
        except Exception:
            return None
        return file.getvalue()

    def message(
        self, call: Call, heads: dict[Any, bytes], more: Any = None, left_out: Any = ()
    ) -> Message:
        """``heads`` has the pickles of this batch's functions: each is made once a batch, and sent once,
        since pickle remembers the bytes it has seen. They are not kept longer, for the globals that go
        with a function may change. ``more`` has further reducers, by type, and ``left_out`` lists the
        handles that a pickle meets."""
        fn, arguments, how, budget = call
        if not self.is_known_again(fn, arguments, how):
            return None, self.dumps(call, None, more)
        head = heads.get(fn)
        if head is None:
            before = len(left_out)
            head = self.plainly(fn) if self.goes_by_name(fn) else None
            head = head or self.dumps(fn, None, more)
            if len(left_out) > before:
                # With a handle in it: on Ray its bytes do not say which, and on joblib the worker
                # would keep the object with it, long after the handle has gone.
                del left_out[before:]
                head = b""
            heads[fn] = head
        if not head:
            return None, self.dumps(call, None, more)
        rest = arguments, how, budget
        return head, self.plainly(rest) or self.dumps(rest, None, more)

    def is_known_again(self, fn: Any, arguments: Any, how: Any) -> bool:
        """Whether a function may be sent apart from its arguments, and kept by its bytes."""
        if type(fn) not in _FUNCTIONS:  # nothing is asked of it: it may answer with an error
            return False
        owner = getattr(fn, "__self__", None)
        if owner is not None and not isinstance(owner, ModuleType):
            return False  # a method of a list, say: its list is no part of its name
        if self.goes_by_name(fn) or (not how and _ATOMS.issuperset(map(type, arguments))):
            return True
        # What a function by value and its arguments share is to stay shared: then they go together.
        return not _may_share(fn, arguments, how)

    def unpicklable(self, call: Call, reason: BaseException) -> BaseException:
        """What a task fails with that can't be sent."""
        fn, arguments, how, budget = call
        kind = "argument" if budget is None else "item"
        parts = [("", fn), *((f"{kind} {n}", value) for n, value in enumerate(arguments, 1))]
        parts += [] if budget is not None else how.items()
        name = _name(call)
        where = self.find(parts, name, 8)
        message = f"Could not pickle the call of {name}, or its arguments: {_said(reason)}"
        if where:
            message += f" (in {where})"
        return _caused(pickle.PicklingError(message), reason)

    def find(self, parts: Iterable[tuple[str, Any]], whole: str, depth: int) -> str:
        """The name of the innermost of them that can't be pickled; empty if each can."""
        # To look for it runs more of the user's code, which may raise what it likes; but the task's error
        # is to be told, and the thread that tells it is an engine's.
        with contextlib.suppress(BaseException):
            for name, value in islice(parts, 1000):
                try:
                    self.dumps(value)
                except BaseException:
                    place = f"{name} of {whole}" if name else whole
                    return (self.find(_parts(value), place, depth - 1) if depth else "") or place
        return ""


def _may_share(fn: Any, arguments: Any, how: Any) -> bool:
    """Whether an argument may be an object that the function's globals or closure have, too. Then both go
    in one pickle, so that it stays one object."""
    if getattr(fn, "__closure__", None) is not None or not hasattr(fn, "__code__"):
        return True
    used: set[int] = set()
    _add_used(fn.__code__, fn.__globals__, used)
    given = itertools.chain(*arguments) if how is True else arguments
    named = how.values() if isinstance(how, dict) else ()
    return any(type(v) not in _ATOMS and id(v) in used for v in itertools.chain(given, named))


def _add_used(code: types.CodeType, space: dict[str, Any], used: set[int]) -> None:
    """Add the ids of the globals that code uses, its lambdas and the functions among those globals, too."""
    for name in code.co_names:
        value = space.get(name)
        if id(value) not in used:
            used.add(id(value))
            if type(value) is types.FunctionType and value.__globals__ is space:
                _add_used(value.__code__, space, used)
    for constant in code.co_consts:
        if type(constant) is types.CodeType:
            _add_used(constant, space, used)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """(what to call it, the part) of what a value is made of; "" for one that needs no name."""
    if isinstance(value, types.FunctionType):
        used = inspect.getclosurevars(value)
        yield from ((f"the variable {name!r}", part) for name, part in used.nonlocals.items())
        yield from ((f"the global {name!r}", part) for name, part in used.globals.items())
    elif isinstance(value, types.MethodType):
        yield "", value.__self__
    elif isinstance(value, functools.partial):
        yield "", value.func
        yield from _parts(value.args)
        yield from value.keywords.items()
    elif isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"item {n}", part) for n, part in enumerate(value, 1))
    elif not isinstance(value, Future):  # which says by itself why it can't be sent
        attributes = getattr(value, "__dict__", {})
        yield from ((f"the attribute {name!r}", part) for name, part in attributes.items())


@functools.cache
def _cloudpickle() -> ModuleType:
    """The cloudpickle that joblib uses: a package of its own since 1.6, one inside joblib before."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("joblib.externals.cloudpickle")
    return _import_or_explain("cloudpickle")


@functools.cache
def _joblib_calls() -> _Calls:
    return _Calls(_cloudpickle())


# --- in the calling thread, and over any other executor ---------------------------------------


class _Wishes(NamedTuple):
    """What an executor wants of its engine."""

    workers: int
    setup: tuple[Callable[..., object], tuple[Any, ...]] | None  # an initializer and its arguments
    max_tasks: int | None  # of a worker process
    is_limited: bool  # began() will be asked
    options: dict[str, Any]  # Ray's


class _InlineEngine(_Engine):
    """Runs tasks in this process, one at a time: in the thread that submits, or in the one that has the
    turn."""

    chunk_seconds = 0.0
    name = "the calling process"

    def __init__(self, wishes: _Wishes) -> None:
        self.setup = wishes.setup  # until it was run; under turn
        # Held by the thread that runs tasks. Reentrant, for a task may submit another, and wait for it.
        self.turn = threading.RLock()
        self.depth = 0  # of tasks in tasks; under turn

    def feed(self) -> None:
        core = self.core
        if _under_a_lock():
            # A __del__ has submitted: another thread has to run it. At exit none can start.
            core.deferred.append(self.feed)
            with contextlib.suppress(RuntimeError):
                _thread.start_new_thread(core.settle, ())
            return
        with _LaterSignals():
            if not self.turn.acquire(blocking=False):
                if not core.pending:
                    return  # the thread that has the turn settles when it is out
                try:
                    _signals_now(self.turn.acquire)
                except BaseException:
                    if cast("Any", self.turn)._is_owned():  # private, as in _under_a_lock()
                        self.turn.release()
                    raise
            try:
                self.run_all()
            finally:
                self.turn.release()
                core.settle()

    def run_all(self) -> None:
        core = self.core
        self.depth += 1
        try:
            if self.setup is not None and core.pending:
                (initializer, args), self.setup = self.setup, None
                try:
                    _signals_now(initializer, *args)
                except KeyboardInterrupt:
                    self.setup = initializer, args  # it is still to be done
                    raise
                except BaseException as error:
                    core.break_down(_initializer_failed(error))
            while taken := core.take(1):
                core.ask()  # so that feed() comes for a task that this one submits
                self.run(taken.pop())
        finally:
            self.depth -= 1

    def run(self, work: _Work) -> None:
        call = work.call
        assert call is not None  # nobody takes back what this has been lent
        kept: list[Reply] = []

        def run_and_keep(*call: Any) -> None:
            kept.append(cast("Reply", _run(*call)))

        interrupt: BaseException | None = None
        try:
            _signals_now(run_and_keep, *call)
            reply = kept[0]
        except BaseException as error:  # a signal has come after it; or before, and it has not run
            reply = kept[0] if kept else ([], error, _count(call), 0.0)
            interrupt = error
        if isinstance(reply[1], KeyboardInterrupt):
            interrupt = reply[1]
        del call
        try:
            self.core.end([(work, reply)])
        finally:
            if interrupt is not None:
                raise interrupt  # of a task in this thread, but meant for the program

    def take_back(self, works: list[_Work]) -> None:
        pass  # it has none that does not run

    def inside(self) -> bool:
        return self.depth > 0 and cast("Any", self.turn)._is_owned()  # as in _under_a_lock()


@functools.cache
def _end_before_threads() -> None:
    """Pools of threads take no task at the interpreter's exit, so executors over them end earlier."""
    with contextlib.suppress(RuntimeError, AttributeError):
        cast("Any", threading)._register_atexit(_end_all)  # private, but what those pools use


class _OverEngine(_Engine):
    """Any other executor: it gets as many tasks as it can run, and gives back by Future.cancel().

    A thread of ours submits to it and hears of the ends, and not the user's: the executor may call back,
    or a ``__del__`` may submit, while the executor holds a lock of its own.
    """

    name = "another executor"

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.inner: dict[_Work, Future[Any] | None] = {}
        """What was lent, and its future; None while it is submitted. Under _engine_lock."""
        self.asked: set[_Work] = set()  # which take_back() has in hand, and nobody else
        # Notified when one is None no more, or asked no more.
        self.moved = threading.Condition(_engine_lock)
        self.news: queue.SimpleQueue[tuple[_Work, Future[Any]] | None] = queue.SimpleQueue()
        """What has ended; None: look for work."""
        self.closing = False
        _end_before_threads()
        self.thread = threading.Thread(target=self.live, name="parallel_backend over", daemon=True)
        self.thread.start()

    def feed(self) -> None:
        self.news.put(None)

    def inside(self) -> bool:
        return threading.get_ident() == self.thread.ident  # as in _in_main_thread()

    def live(self) -> None:
        while not self.closing:
            news = [self.news.get()]
            while not self.news.empty():  # nobody else takes of it
                news.append(self.news.get())
            try:
                self.hear([each for each in news if each is not None])
                self.lend()
            except Exception:
                # Of ours, or the executor's. A thread that ends would leave all waiting.
                _report("Exception in the thread over an executor")
            self.core.settle()
            del news

    def hear(self, ended: list[tuple[_Work, Future[Any]]]) -> None:
        # Before our lock is taken, for to ask a future takes one of its own.
        replies = [(work, inner, self.reply(work, inner)) for work, inner in ended]
        outcomes: list[tuple[_Work, Reply]] = []
        with _engine_lock:
            for work, inner, reply in replies:
                if self.inner.get(work) is not inner or work in self.asked:
                    continue  # put back, or about to be; if not, take_back() says so
                del self.inner[work]
                if reply is None:
                    self.core.stopped(work)  # not by us: a dask client that closes, say
                else:
                    outcomes.append((work, reply))
        del replies
        self.core.end(outcomes)

    def reply(self, work: _Work, inner: Future[Any]) -> Reply | None:
        """What became of it; None if it was cancelled."""
        try:
            if inner.cancelled():
                return None
            error = inner.exception()
            if error is None:
                values, failure, begun, seconds = inner.result()
                return values, failure, begun, seconds
        except BaseException as raised:  # by the future itself, or it is no reply
            error = raised
        return self.not_run(work, error)

    @staticmethod
    def not_run(work: _Work, error: BaseException) -> Reply:
        """An executor's own error: what a task raises comes as a reply. Either its worker was lost,
        or one item of the call could not be sent or read."""
        begun = _count(work.call) if isinstance(error, BrokenExecutor) else 0
        return [], error, begun, 0.0

    def lend(self) -> None:
        failed: list[tuple[_Work, Reply]] = []
        while True:
            with _engine_lock:
                taken = self.core.take(self.core.max_workers - len(self.inner))
                self.inner.update(dict.fromkeys(taken))
            if not taken:
                break
            for work in taken:
                inner = None
                try:
                    inner = self.executor.submit(_portable_run, *cast("Call", work.call))
                    with _engine_lock:
                        self.inner[work] = inner
                        self.moved.notify_all()
                    inner.add_done_callback(functools.partial(self.note, work))
                except BaseException as error:
                    with _engine_lock:
                        if self.inner.get(work) is inner:  # else it is put back already
                            del self.inner[work]
                            failed.append((work, self.not_run(work, error)))
                        self.moved.notify_all()
            self.core.end(failed)
            failed.clear()

    def note(self, work: _Work, inner: Future[Any]) -> None:
        """It has ended; in whichever thread says so, and under whatever lock."""
        self.news.put((work, inner))

    def take_back(self, works: list[_Work]) -> None:
        for work in works:
            with _engine_lock:
                # While it is submitted, there is no future yet by which it can be asked back.
                while not self.inside() and (
                    self.inner.get(work, work) is None or work in self.asked
                ):
                    _signals_now(self.moved.wait)  # a submit() may take as long as it likes
                inner = self.inner.get(work)
                if inner is None:
                    continue
                self.asked.add(work)
            is_back = False
            try:
                # Under no lock of ours: it takes one of the executor's, and whoever holds that may
                # be in a __del__ that waits for ours.
                is_back = _signals_now(inner.cancel)  # which may ask another machine
            except Exception:
                _log.warning("Could not cancel %r", inner, exc_info=True)
            finally:
                with _engine_lock:
                    self.asked.discard(work)
                    if is_back and self.inner.get(work) is inner:
                        del self.inner[work]
                        self.core.put_back([work])
                    self.moved.notify_all()
                if not is_back and inner.done():
                    self.note(work, inner)  # its end may have been passed over meanwhile
        self.feed()

    def running(self, work: _Work) -> bool:
        inner = self.inner.get(work)
        return inner is not None and inner.running()

    def close(self) -> None:
        self.closing = True
        try:
            self.executor.shutdown(wait=False)
        except Exception:  # a dask client that was closed before, say
            _log.warning("Could not shut down %r", self.executor, exc_info=True)
        self.feed()
        if not self.inside():
            self.thread.join(0.2)  # unless it is in a callback, say


class _Portable:
    """The function that runs a call, for executors whose workers may not have this file."""

    def __call__(self, *call: Any) -> Reply:
        return cast("Reply", _run(*call))

    def __reduce__(self) -> Any:
        with contextlib.suppress(ImportError):
            return pickle.loads, (_run_by_value(),)
        return "_portable_run"  # by name


@functools.cache
def _run_by_value() -> bytes:
    return _joblib_calls().dumps(_run)


_portable_run = _Portable()


class _EngineBackend(ParallelBackend):
    """A backend whose executors are the core over an engine."""

    # Whether its engine can stop a task; if not, limits have no effect.
    _stops: ClassVar[bool] = True

    @classmethod
    @_config_deprecated()
    def executor(
        cls,
        max_workers: int | None = None,
        *,
        config: ParallelConfig | None = None,
        cancel_futures: CancellationPolicy | bool = CancellationPolicy.PENDING,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        max_tasks_per_child: int | None = None,
        task_timeout: float | None = None,
        **options: Unpack[TaskOptions],
    ) -> ParallelExecutor:
        policy = _as_policy(cancel_futures)
        _check_number("max_workers", max_workers)
        _check_number("max_tasks_per_child", max_tasks_per_child)
        _check_number("task_timeout", task_timeout, (int, float))
        if task_timeout == float("inf") or not cls._stops:
            task_timeout = None
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be a callable, not {initializer!r}")
        cls._check_options(options)
        backend = cls if config is None else cast("type[_EngineBackend]", cls._configured(config))
        bound = backend._n_cpus_local or sys.maxsize
        workers = min(max_workers or backend._default_workers(), bound)
        setup = None if initializer is None else (initializer, tuple(initargs))
        wishes = _Wishes(workers, setup, max_tasks_per_child, task_timeout is not None, {**options})
        return ParallelExecutor(backend._engine(wishes), workers, policy, task_timeout)

    @classmethod
    def _default_workers(cls) -> int:
        return cls.effective_n_jobs(-1)

    @classmethod
    @abc.abstractmethod
    def _engine(cls, wishes: _Wishes) -> _Engine:
        """An engine for one executor."""


class SequentialParallelBackend(_EngineBackend, backend_name="sequential"):
    """Runs every task at once, in the calling process: for debuggers, profilers and ``print``."""

    _stops = False

    @classmethod
    def _engine(cls, wishes: _Wishes) -> _Engine:
        return _InlineEngine(wishes)


# --- joblib: processes ------------------------------------------------------------------------
#
# How a worker process is started, owned and ended, wherever this runs.

IDLE_SECONDS = 60  # without news from any worker, after which those without a task end

_JOBLIB_IS_QUIET = "ignore::UserWarning:joblib._multiprocessing_helpers"
"""Where there are no semaphores, joblib warns that it "will operate in serial mode"; we do not."""


def _loky_tracker() -> ModuleType:
    """loky's process that outlives this one to remove its files; no public name of joblib's."""
    has_semaphores = _import_or_explain("joblib._multiprocessing_helpers").mp is not None
    if not has_semaphores and _JOBLIB_IS_QUIET not in sys.warnoptions:
        sys.warnoptions.append(_JOBLIB_IS_QUIET)  # which the tracker, once started, inherits
    tracker = _import_or_explain("joblib.externals.loky.backend.resource_tracker")
    with _in_some_folder():
        tracker.ensure_running()
    return tracker


@contextlib.contextmanager
def _in_some_folder() -> Iterator[None]:
    """Where the working directory was removed, neither loky nor Python itself starts a process."""
    folder = None
    if sys.platform != "win32":  # where it can't be removed
        try:
            os.getcwd()
        except OSError:
            folder = os.open(".", os.O_RDONLY)  # which leads back
            os.chdir("/")
    try:
        yield
    finally:
        if folder is not None and sys.platform != "win32":
            os.fchdir(folder)
            os.close(folder)


class _Process:
    """A process of loky's: a fresh interpreter, which does not run ``__main__`` anew.

    loky's own executor is not used: one dead worker breaks all of it, and what waits inside it
    can't be told from what runs. Its context is no public name of joblib's, but is there since
    joblib 0.12.
    """

    alive: ClassVar[set[_Process]] = set()  # all until end(); _kill_workers() ends the rest at exit

    def __init__(self, env: dict[str, str]) -> None:
        import multiprocessing
        from multiprocessing import resource_tracker

        # What it inherits: as it is now, and not as it was when its executor was made.
        self.shape = _shape(env)
        self.path = list(sys.path)
        self.up = False  # it has said that it is ready
        # Held while it is killed or reaped: after that its id may belong to another process.
        self.reaping = threading.RLock()
        self.exitcode: int | None = None
        self.is_reaped = False
        self.permits: tuple[_Semaphore, _Semaphore] | None = None
        try:
            self.permits = _Semaphore(), _Semaphore()
        except (ImportError, OSError):
            # AWS Lambda and Android have none; nor is there one without /dev/shm. Then it is given
            # one call at a time.
            given = env.get("PYTHONWARNINGS", os.environ.get("PYTHONWARNINGS"))
            quiet = ",".join(filter(None, [given, _JOBLIB_IS_QUIET]))
            env = {**env, "PYTHONWARNINGS": quiet}
        context = _import_or_explain("joblib.externals.loky.backend").get_context("loky")
        if sys.platform != "win32":
            # Blocked in this thread, the starter, for good: the process inherits the mask, so that no
            # Ctrl-C can meet it before it has its own way with it. To start one of the two trackers
            # would take the mask away, so they are started first.
            with _in_some_folder():
                resource_tracker.ensure_running()
            _loky_tracker()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with contextlib.ExitStack() as opened:
            opened.callback(self.unlink)
            self.connection, theirs = multiprocessing.Pipe()
            opened.callback(self.connection.close)
            self.lifeline = watched = None
            if sys.platform != "linux":  # there, the kernel tells it that we are gone
                watched, self.lifeline = multiprocessing.Pipe(duplex=False)
                opened.callback(self.lifeline.close)
            try:
                method = multiprocessing.get_start_method(allow_none=True)
                args = theirs, self.permits, os.getpid(), watched, method, _cloudpickle().__name__
                # daemon=False: its tasks may have children of their own, even if this is a daemon.
                process = context.Process(target=_serve, args=args, env=env, daemon=False)
                with _in_some_folder():
                    self.popen = self.start(process)
            finally:
                theirs.close()
                if watched is not None:
                    watched.close()
            opened.pop_all()
        self.pidfd: int | None = None
        if sys.platform == "linux":
            # An old kernel, now or when this Python was built; or descriptors are short.
            with contextlib.suppress(OSError, AttributeError):
                self.pidfd = os.pidfd_open(self.popen.pid)
        self.alive.add(self)

    @staticmethod
    def start(process: Any) -> Any:
        """Start it by its Popen, and not by process.start(). That would

        - have multiprocessing join it when this process ends: for ever, if this is itself a process of
          multiprocessing, and a task runs;
        - fail in a daemonic process, as multiprocessing.Pool's workers are.
        """
        if sys.platform == "win32":
            return process._Popen(process)
        return _quiet_popen()(process)

    def unlink(self) -> None:
        """The worker has opened its semaphores, or never will: their names can go."""
        for permit in self.permits or ():
            permit.unlink()

    def kill(self) -> None:
        """SIGKILL to it and all that it has started. Only while it is not reaped, for its id may be
        another's then: under ``reaping``, or before the engine has let it go."""
        if sys.platform == "win32":
            self.popen.terminate()
            return
        for kill in (os.killpg, os.kill):  # it may have no group yet, or have gone to another
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self.popen.pid, signal.SIGKILL)

    def abort(self) -> None:
        """Let faulthandler print its stack, which ends it, in a C loop too. When, as for kill()."""
        if sys.platform == "win32":
            self.kill()
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.popen.pid, signal.SIGABRT)

    def await_abort(self) -> None:
        """Wait until that is done. If a task has a handler of its own for the signal, kill it."""
        from multiprocessing.connection import wait

        with contextlib.suppress(OSError, ValueError):  # it is gone already
            wait([self.popen.sentinel if self.pidfd is None else self.pidfd], 1)
        with self.reaping:
            if not self.is_reaped:
                self.kill()

    def reap(self) -> None:
        """Kill it and wait until it is gone."""
        with self.reaping:
            if not self.is_reaped:  # else its id may be another's by now
                self.kill()
                # None, where somebody else has reaped it: a program that ignores SIGCHLD, say.
                self.exitcode = self.popen.wait()
                self.is_reaped = True
                self.unlink()

    def end(self) -> None:
        """Kill it, wait until it is gone, and close our ends. For the thread that reads from it, or where
        nobody does any more."""
        with self.reaping:
            if self not in self.alive:
                return
            self.reap()
            self.alive.discard(self)
            self.connection.close()
            if self.lifeline is not None:
                self.lifeline.close()
            if self.pidfd is not None:
                os.close(self.pidfd)

    def has_died(self) -> bool:
        with self.reaping:
            if self.is_reaped:
                return True
            if sys.platform == "win32" or not hasattr(os, "waitid"):
                return self.popen.poll() is not None
            # Not reaped yet: what it has started is to be killed together with it.
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            with contextlib.suppress(ChildProcessError):  # somebody else has reaped it
                return os.waitid(os.P_PID, self.popen.pid, flags) is not None
            return True

    def how_it_ended(self) -> str:
        code = self.exitcode
        if code is None:
            return "in a way unknown"
        if code < 0:
            with contextlib.suppress(ValueError):  # a real-time signal has no name
                return f"by signal {-code} ({signal.Signals(-code).name})"
            return f"by signal {-code}"
        return f"with exit code {code}"


class _Semaphore:
    """A counting semaphore that one other process can open.

    loky's and multiprocessing's keep its name until it is dropped, and loky's tracker warns of all
    that a hard exit leaves. Here it goes when the worker is up: then there is nothing to leave. The
    class underneath is private, but what both are made of, since Python 2.6.
    """

    def __init__(self) -> None:
        _multiprocessing: Any = importlib.import_module("_multiprocessing")

        self.name = f"/parallel-{os.getpid() % 10**6}-{os.urandom(4).hex()}"  # macOS takes 31 bytes
        # 1: a semaphore; from 0, and no bound that matters
        self.semlock = _multiprocessing.SemLock(1, 0, 1 << 15, self.name, False)
        _loky_tracker().register(self.name, "semlock")  # should we be killed before unlink()
        self.owner: int | None = os.getpid()
        self.acquire = self.semlock.acquire
        self.release = self.semlock.release

    def unlink(self) -> None:
        _multiprocessing: Any = importlib.import_module("_multiprocessing")

        owner, self.owner = self.owner, None
        if owner == os.getpid() and sys.platform != "win32":
            with contextlib.suppress(OSError):  # a session that ends may have its names removed
                _multiprocessing.sem_unlink(self.name)
            _loky_tracker().unregister(self.name, "semlock")

    def __reduce__(self) -> Any:
        handle, rebuild = self.semlock.handle, type(self.semlock)._rebuild
        if sys.platform == "win32":  # where it has no name, but a handle to be duplicated
            from multiprocessing.context import get_spawning_popen

            handle = cast("Any", get_spawning_popen()).duplicate_for_child(handle)
            return rebuild, (handle, 1, 1 << 15, None)
        return rebuild, (handle, 1, 1 << 15, self.name)


@functools.cache
def _quiet_popen() -> Any:
    """loky's Popen for Linux and macOS, without its first step: it flushes stdout and stderr, and
    a service may have none, or have closed them. The rest is a method of its own since loky 1.0."""
    loky = _import_or_explain("joblib.externals.loky.backend.popen_loky_posix")

    class Popen(loky.Popen):  # type: ignore[misc, name-defined]  # a module found at run time
        __module__ = loky.__name__  # what the new process runs

        def __init__(self, process: Any) -> None:
            self.returncode = None
            self._fds: list[int] = []
            self._launch(process)

    return Popen


def _shape(env: dict[str, str]) -> tuple[Any, ...]:
    """What a new process would inherit. A warm one is used only if all this is as it was for it."""
    folder = None
    with contextlib.suppress(OSError):  # it has been removed
        folder = os.getcwd()
    streams: dict[int, tuple[int, int]] = {}  # where stdout and stderr lead to
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # it is closed
            status = os.fstat(descriptor)
            streams[descriptor] = status.st_dev, status.st_ino
    inherited = {**os.environ, **env}
    inherited.pop("PYTEST_CURRENT_TEST", None)  # which differs in each test: they may share workers
    return folder, tuple(sys.path), tuple(inherited.items()), tuple(streams.items())


class _Starter:
    """Starts processes for engines, and keeps those that they no longer need for the next one.

    In a thread that outlives every executor: the kernel ends a worker with the *thread* that has
    started it (PR_SET_PDEATHSIG). And away from the threads that read replies, since a start takes
    some 10 ms.
    """

    def __init__(self) -> None:
        self.orders: queue.SimpleQueue[_LokyEngine | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self.starting = threading.RLock()  # held while a process is started
        self.kept: list[tuple[float, _Process]] = []
        """Warm processes, and since when: its methods are atomic, so there is no lock. The first
        is the one kept longest."""

    def order(self, engine: _LokyEngine) -> None:
        thread = None
        with _engine_lock:
            if self.thread is None:
                self.thread = thread = threading.Thread(
                    target=self.live, name="parallel_backend starter", daemon=True
                )
            self.orders.put(engine)
        if thread is None:
            return
        try:
            # Not under the lock: it waits for the new thread, and the collector may run there.
            thread.start()
        except RuntimeError as error:  # no thread can be started
            with _engine_lock:
                self.thread = None
            with contextlib.suppress(queue.Empty):
                while True:
                    if (other := self.orders.get_nowait()) is not None:
                        self.deliver(other, error)

    def live(self) -> None:
        while True:
            with _engine_lock:  # so that no order comes in between
                if self.orders.empty() and not _Process.alive:
                    self.thread = None  # none that it has started would end with it
                    return
            engine = None
            with contextlib.suppress(queue.Empty):
                engine = self.orders.get(timeout=IDLE_SECONDS)
            if engine is not None:
                self.start_for(engine)
            self.drop_all_but(0, before=time.monotonic() - IDLE_SECONDS)

    def start_for(self, engine: _LokyEngine) -> None:
        with self.starting:
            if engine.closing:
                return
            started: _Process | BaseException
            try:
                started = _Process(engine.env)
            except BaseException as error:
                started = error.with_traceback(None)
        self.deliver(engine, started)

    def deliver(self, engine: _LokyEngine, started: _Process | BaseException) -> None:
        with _engine_lock:
            # Either close() comes after this and sees it, or this sees that it came.
            is_taken = not engine.closing
            if is_taken:
                engine.arrived.append(started)
        if is_taken:
            engine.feed()
        elif isinstance(started, _Process):
            self.keep(started)

    def keep(self, process: _Process) -> None:
        self.kept.append((time.monotonic(), process))

    def adopt(self, shape: tuple[Any, ...]) -> _Process | None:
        """A warm process of that shape, if there is one."""
        for entry in self.kept[::-1]:
            process = entry[1]
            if process.shape == shape:
                with contextlib.suppress(ValueError):  # another engine, or its idle time, was first
                    self.kept.remove(entry)
                    if not process.has_died():
                        return process
                    process.end()
        return None

    def drop_all_but(self, count: int, before: float = float("inf")) -> None:
        """End those kept since before then, but for the newest so many."""
        for entry in self.kept[: max(len(self.kept) - count, 0)]:
            if entry[0] <= before:
                with contextlib.suppress(ValueError):
                    self.kept.remove(entry)
                    entry[1].end()


_starter = _Starter()


def _kill_workers() -> None:
    """At exit, for which a script does not wait; and in tests."""
    # Not while one is started: it would miss its semaphores, and print a traceback.
    with _starter.starting:
        _starter.kept.clear()
        for process in _Process.alive.copy():
            process.end()
    _starter.orders.put(None)  # it may end now


def _forget_workers() -> None:
    """In a forked child: they are the parent's."""
    global _starter
    _starter = _Starter()
    _Process.alive.clear()


def _await_start() -> None:
    """Before a fork: a start holds a lock of multiprocessing's tracker, which in the child nobody would
    release; and the far end of its connection, by which the worker would seem to live on in the child."""
    _starter.starting.acquire()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_await_start,
        after_in_parent=lambda: _starter.starting.release(),
        after_in_child=_forget_workers,
    )


# --- joblib: the engine -----------------------------------------------------------------------
#
# A worker gets its calls in batches, one message each, every batch with a counting semaphore raised
# to the number of its calls.
#
# 1. A worker takes a permit of its batch before it begins a call, from the front; the driver takes calls
#    back by taking permits itself, from the end. There are as many as calls, so none is both begun and
#    taken back.
# 2. Permits are raised before the batch can be read. Two batches may be outstanding, each with a
#    semaphore of its own; one is used again only when its batch is over: every call is replied to,
#    or the worker has said that the rest was taken back.
# 3. A reply is fully written before the next permit is taken. So at most one call is begun and not
#    replied to: the first one of the front batch. It is the one that runs, and all that a death costs.
# 4. A task that runs is killed only when every call behind it has been taken back. If one of those
#    has begun, the task has ended, and its reply is on its way.
# 5. While a worker is idle, no call waits anywhere. One that runs dry takes half of what waits at the
#    fullest. When any worker is filled, what was lent to one that has been silent for 5 ms comes back
#    first. So nothing sits behind a long task, and two tasks that wait for each other meet; without a
#    timer. In which order those begin that were lent ahead is not promised.
# 6. A worker is lent what takes it 20 ms at the pace measured of late. A send never waits for a busy
#    worker: a large message goes to one that has nothing else to do.
#
# One thread of an executor, the reader, takes, pickles, sends and reads for all of its workers.
# submit() never sends; it wakes the reader if a worker is idle. Not one thread for all executors: a
# callback that waits for another executor's future must not stop that one's replies.

_BATCH = 64  # calls, at most
_AHEAD = 0.02  # seconds of work that a worker may have
_QUIET = 0.005  # seconds
_LARGE = 32 * 1024 if sys.platform != "darwin" else 4 * 1024  # bytes: what surely fits into a pipe
_BEGUN, _ENDED = b"b", b"e"  # what a worker with a time limit says before and after a call
_PATIENCE = 3  # workers in a row that could not be started, before what is pending fails


def _sizes(works: Sequence[_Work]) -> Iterator[int]:
    """How many bytes each adds to a message, in which a function is sent once."""
    heads = set()
    for work in works:
        head, body = work.message
        yield len(body) + (len(head) if head and head not in heads else 0)
        heads.add(head)


_pickling = threading.local()  # its ``handles``: a list of those met just now, or None


@contextlib.contextmanager
def _handles_met() -> Iterator[list[Any]]:
    """Learn which handles this thread meets while it pickles."""
    outer = getattr(_pickling, "handles", None)
    met: list[Any] = []
    _pickling.handles = met
    try:
        yield met
    finally:
        _pickling.handles = outer


class _Batch:
    """Calls sent in one message, until each is replied to or, from some one on, taken back."""

    def __init__(self, semaphore: int, works: Sequence[_Work]) -> None:
        self.semaphore = semaphore  # which of the worker's two
        self.size = sum(_sizes(works))  # bytes
        self.works = collections.deque(works)  # less those replied to, taken back or stopped
        self.left = len(works)  # calls not replied to, nor said to be taken back; 0: it is over


class _Seat:
    """Where a lent task sits: what the engine has for ``work.seat``."""

    __slots__ = ("batch", "worker")

    def __init__(self, worker: _Worker) -> None:
        self.worker = worker
        self.batch: _Batch | None = None  # None: it is just being pickled


class _Worker:
    """A process and what it has been lent; all of it under ``_engine_lock``."""

    def __init__(self, process: _Process, is_new: bool, spare: int) -> None:
        self.process = process
        # Whether it was started for us. If so, its death before it is up is a failure; a warm one may
        # have ended because something in it was no longer as it was at first.
        self.is_new = is_new
        self.inbox = bytearray()
        self.batches: collections.deque[_Batch] = collections.deque()
        """At most two; the first is what it works on."""
        self.outstanding = 0  # calls not replied to, of both
        self.is_ready = False  # it is up, and its initializer, if there is one, has run
        self.spare = spare  # how many tasks it may still be lent
        self.since = float("inf")  # when the call that runs began, if the worker has said so
        self.is_read = False  # what it has written is in the reader's hands
        self.doomed = False  # killed, or about to be: it is lent nothing any more
        self.heard = time.perf_counter()

    def take_back(self, most: int = sys.maxsize, down_to: _Work | None = None) -> list[_Work]:
        """Take back calls that have not begun, from the end of its queue: ``most`` of them, or until
        ``down_to`` is among them. Returned in the order of the queue."""
        back: list[_Work] = []
        permits = self.process.permits
        for batch in reversed(self.batches):
            # The first call of the first one runs, or is about to. Not where the worker has died.
            keep = int(batch is self.batches[0] and not self.doomed)
            while len(batch.works) > keep and len(back) < most:
                if back and back[-1] is down_to:
                    break
                if permits is None or not permits[batch.semaphore].acquire(False):
                    break  # all that are left here have begun, and so have those before
                work = batch.works.pop()
                work.seat = None
                back.append(work)
            if len(batch.works) > keep:
                break
        self.outstanding -= len(back)
        self.spare += len(back)
        back.reverse()
        return back


class _LokyEngine(_Engine):
    """See above."""

    name = "joblib"

    def __init__(self, wishes: _Wishes, env: dict[str, str]) -> None:
        from multiprocessing import Pipe

        self.max_workers = wishes.workers
        self.max_tasks = wishes.max_tasks or sys.maxsize  # of a worker
        self.setup = None if wishes.setup is None else _joblib_calls().dumps(wishes.setup)
        self.held = wishes.setup  # what handles in it refer to must stay
        self.is_limited = wishes.is_limited  # workers say when they begin a call
        self.env = env
        self.workers: list[_Worker] = []
        self.idle: list[_Worker] = []  # those of them that are up and have nothing
        # Those that have work, or may have, in the order in which they were heard of last.
        self.by_last_news: dict[_Worker, None] = {}
        self.pace = 1.0  # seconds of a call, of late
        self.starting = 0  # ordered and not arrived
        self.arrived: collections.deque[_Process | BaseException] = collections.deque()
        """What the starter has started, or why it could not."""
        self.limit = self.max_workers  # fewer for a while, when no more can be started
        self.failures = 0  # of starts, in a row
        self.closing = False
        self.watch = _Watch()
        self.woken = False  # there is a message in the bell
        self.bell, ring = Pipe(duplex=False)
        self.ring: Callable[[bytes], None] = ring.send_bytes
        self.watch.add(self.bell, (None, False))
        self.reader = threading.Thread(
            target=self.live, name="parallel_backend reader", daemon=True
        )
        self.reader.start()
        _at_exit(_kill_workers, 50)  # after the policies were applied

    # What the core calls.

    def feed(self) -> None:
        # Without a lock, since it may come from a __del__. If two threads both ring, the reader wakes up
        # once more. It clears ``woken`` before it looks for work, so whoever finds that set can rely on a
        # look that is still to come.
        if not self.woken:
            try:
                self.woken = True
                # The reader has just closed its end; or, on Windows, another thread rings right now.
                with contextlib.suppress(OSError, ValueError):
                    self.ring(b"")
            except BaseException:
                self.woken = False  # a Ctrl-C: nobody would ring ever after
                raise

    def inside(self) -> bool:
        starter = _starter.thread
        return threading.get_ident() in (self.reader.ident, starter and starter.ident)

    def running(self, work: _Work) -> bool:
        try:
            batch = work.seat.batch
            return batch.works[0] is work and work.seat.worker.batches[0] is batch
        except (AttributeError, IndexError):
            return False  # it is pickled, or moves just now

    def take_back(self, works: list[_Work]) -> None:
        with _engine_lock:
            for work in works:
                seat = work.seat
                if seat is None:
                    continue  # put back, or replied to
                worker = seat.worker
                if seat.batch is None:
                    work.seat = None  # it is being pickled: it will not be sent
                    self.core.put_back([work])
                elif not worker.doomed and not self.running(work):
                    self.core.put_back(worker.take_back(down_to=work))
        if self.core.pending:
            self.feed()

    def stop(self, work: _Work) -> None:
        with _engine_lock:
            seat = work.seat
            if seat is None or seat.batch is None or seat.worker.doomed:
                return
            worker = seat.worker
            self.core.put_back(worker.take_back())
            left = [each for batch in worker.batches for each in batch.works]
            if left[-1:] != [work]:
                return  # it came back just now; or one behind it has begun, so its reply is on its way
            seat.batch.works.pop()
            worker.outstanding -= 1
            work.seat = None
            worker.doomed = True  # nothing follows, so the signal hits this task or none
            is_late = isinstance(work.verdict, TimeoutError)
            (worker.process.abort if is_late else worker.process.kill)()
            self.core.stopped(work)
        if is_late:
            worker.process.await_abort()
        self.feed()

    def began(self) -> list[tuple[_Work, float]]:
        with _engine_lock:
            # Not one whose reply may have come. The pipe is looked at before is_read, since the reader
            # sets that before it empties the pipe: one of the two shows it.
            return [
                (worker.batches[0].works[0], worker.since)
                for worker in self.workers
                if worker.since < float("inf")
                and not worker.doomed
                and worker.outstanding
                and worker.batches[0].works
                and not _has_written(worker.process.connection)
                and not worker.is_read
                and not worker.inbox
            ]

    def close(self) -> None:
        with _engine_lock:
            self.closing = True
            doomed = [worker for worker in self.workers if worker.doomed]
        self.feed()
        if not self.inside():
            # It keeps what is warm for the next executor. Unless it is in a callback, say: then
            # it does so later.
            self.reader.join(0.2)
        for worker in doomed:
            worker.process.reap()  # the reader may be just about to read from it

    # The reader.

    def live(self) -> None:
        try:
            while not self.closing:
                try:
                    self.once()
                except Exception:
                    # Of ours. A thread that ends would leave all waiting.
                    _report("Exception in the reader of an executor")
        finally:
            self.part()

    def once(self) -> None:
        """Wait for news, handle all there is, and lend what there is to lend."""
        news = self.watch.wait(IDLE_SECONDS if self.idle else None)
        for worker, is_dead in news:
            if self.closing:
                return  # also if a callback has just closed us: nothing is to be read any more
            if worker is None:
                self.bell.recv_bytes()
                self.woken = False
            elif worker in self.workers:  # not lost just now
                self.read(worker, is_dead)
        if not news:  # nobody has had work for long: the idle ones go
            for worker in [*self.idle]:
                self.lose(worker)
        if self.closing:
            return
        self.welcome()
        self.core.settle()  # a task that has waited for another one may be pending then
        self.fill_idle()
        if len(self.workers) + self.starting < self.limit:
            self.start_more()
        self.core.settle()

    def start_more(self) -> None:
        """Have as many workers started as there is work for."""
        with _engine_lock:
            # What is lent beyond what runs waits, too: a fresh worker takes it over.
            waiting = self.core.ask()
            waiting += sum(max(worker.outstanding - 1, 0) for worker in self.workers)
            coming = self.starting + sum(not worker.is_ready for worker in self.workers)
            room = self.limit - len(self.workers) - self.starting
            count = max(0, min(room, waiting - len(self.idle) - coming))
        shape = _shape(self.env) if count else ()
        for _ in range(count):
            process = _starter.adopt(shape)
            if process is None:
                self.starting += 1
                _starter.order(self)
            else:
                self.employ(process, is_new=False)

    def welcome(self) -> None:
        while self.arrived:
            started = self.arrived.popleft()
            self.starting -= 1
            if isinstance(started, _Process):
                self.employ(started, is_new=True)
            else:
                self.refuse(started)

    def employ(self, process: _Process, is_new: bool) -> None:
        worker = _Worker(process, is_new, self.max_tasks)
        with _engine_lock:
            self.workers.append(worker)
        self.watch.add(process.connection, (worker, False))
        if process.pidfd is not None:
            # What a task has forked may hold the connection open when the worker is gone.
            self.watch.add(process.pidfd, (worker, True))

    def refuse(self, error: BaseException) -> None:
        """A worker could not be started: go on with fewer; with none, fail what is pending."""
        self.failures += 1
        there = len(self.workers) + self.starting
        if there:
            self.limit = there  # until another one is up, as is tried when one of these ends
            return
        self.limit = self.max_workers
        if self.failures < _PATIENCE:
            return  # start_more() tries again
        self.failures = 0  # start_more() tries again, if more is pending by then
        with _engine_lock:
            works = self.core.take_all()
        message = "No worker process could be started. Are there processes, descriptors and memory left (ulimit -a)?"
        self.core.end([_lost(work, _broken(message, error)) for work in works])

    def fill_idle(self) -> None:
        while self.idle and (self.core.pending or self.core.ask()) and not self.closing:
            with _engine_lock:
                worker = self.idle.pop()
            self.fill(worker)

    def take_for(self, worker: _Worker) -> list[_Work]:
        """Tasks to lend to this worker now; under ``_engine_lock``."""
        if worker.doomed or not worker.is_ready or len(worker.batches) == 2 or self.closing:
            return []
        core = self.core
        is_dry = not worker.outstanding
        there = len(self.workers) + self.starting
        # Nothing is lent ahead while another worker, idle or still to be started, could run it now.
        is_alone = not self.idle and there >= self.limit and worker.process.permits is not None
        room = min(int(_AHEAD / self.pace), 2 * _BATCH) - worker.outstanding if is_alone else 0
        if is_dry:
            room = max(room, 1)
        room = min(room, worker.spare)
        if room < 1:
            return []
        # One that has been silent may be in a long task: what waits behind that, others can run.
        now = time.perf_counter()
        for other in self.by_last_news:
            if now - other.heard < _QUIET:
                break
            if other.outstanding > 1 and other is not worker:
                core.put_back(other.take_back())
        count = min(room, _BATCH, 1 + core.waiting() // there)
        works = core.take(count)
        while is_dry and not works and self.take_from_fullest():
            works = core.take(count)  # none, if just those are being cancelled
        for work in works:
            work.seat = _Seat(worker)
        if is_dry:
            if worker in self.idle:
                self.idle.remove(worker)
            if not works:
                self.by_last_news.pop(worker, None)
                self.idle.append(worker)
        return works

    def take_from_fullest(self) -> bool:
        """Take half of what the fullest worker has been lent, or the next; under ``_engine_lock``."""
        lenders = [worker for worker in self.workers if worker.outstanding > 1]
        for fullest in sorted(lenders, key=lambda worker: -worker.outstanding):
            if back := fullest.take_back(fullest.outstanding // 2):
                self.core.put_back(back)
                return True
        return False

    def fill(self, worker: _Worker) -> None:
        """Lend a worker what it may have."""
        while True:
            with _engine_lock:
                is_spent = worker.is_ready and not (
                    worker.spare or worker.outstanding or worker.doomed
                )
                worker.doomed |= is_spent
                works = self.take_for(worker)
            if is_spent:
                self.lose(worker)
            if not works:
                return
            heads: dict[Any, bytes] = {}
            failed: list[tuple[_Work, Reply]] = []
            with _handles_met() as met:
                for work in works:
                    call = work.call
                    if work.message is not None or call is None:  # it is cancelled meanwhile
                        continue
                    try:
                        work.message = _joblib_calls().message(call, heads, None, met)
                    except BaseException as error:
                        failure = _joblib_calls().unpicklable(call, error)
                        failed.append((work, ([], failure, 0, 0.0)))
            call = None  # it holds its arguments
            del heads, met
            with _engine_lock:
                # Less those taken back while we pickled: they have no seat, for nobody else gives one.
                failed = [outcome for outcome in failed if outcome[0].seat is not None]
                for work, _ in failed:
                    work.seat = None
                mine = [work for work in works if work.seat is not None]
                fitting = 0 if worker.doomed else self.fitting(worker, mine)
                for work in mine[fitting:]:
                    work.seat = None
                self.core.put_back(mine[fitting:])
                message = self.record(worker, mine[:fitting]) if fitting else None
            for work in works:
                if work.call is None:
                    work.message = None  # it was cancelled before it had one
            if failed:
                self.core.end(failed)
            if message is not None:
                with contextlib.suppress(OSError):  # it is gone: its end is read after its replies
                    worker.process.connection.send_bytes(message)
            elif worker.outstanding or worker.doomed:
                return

    def fitting(self, worker: _Worker, works: Sequence[_Work]) -> int:
        """How many of them can be sent now: the first, if it is dry; more, if they are small."""
        total = sum(batch.size for batch in worker.batches)
        for count, size in enumerate(_sizes(works)):
            total += size
            if (count or worker.outstanding) and (self.idle or total > _LARGE):
                return count
        return len(works)

    def record(self, worker: _Worker, works: Sequence[_Work]) -> bytes:
        """Give them a permit each; the message to send. Under ``_engine_lock``."""
        semaphore = 1 - worker.batches[-1].semaphore if worker.batches else 0
        batch = _Batch(semaphore, works)
        permits = worker.process.permits
        for work in works:
            work.seat.batch = batch
            if permits is not None:
                permits[semaphore].release()
        worker.batches.append(batch)
        if not worker.outstanding:
            self.hear(worker)
        worker.outstanding += len(works)
        worker.spare -= len(works)
        return self.letter(worker, semaphore, [work.message for work in works])

    def letter(self, worker: _Worker, semaphore: int | None, content: object) -> bytes:
        """The message to a worker: a batch with that semaphore or, without one, what sets it up."""
        path = None
        if sys.path != worker.process.path:
            path = worker.process.path = list(sys.path)
            folder, _, *rest = worker.process.shape
            worker.process.shape = folder, tuple(path), *rest
        return pickle.dumps((semaphore, path, self.is_limited, content), 5)

    def hear(self, worker: _Worker) -> None:
        worker.heard = time.perf_counter()
        self.by_last_news.pop(worker, None)
        self.by_last_news[worker] = None

    def read(self, worker: _Worker, is_dead: bool) -> None:
        """Handle what a worker has written, and its death when it has written all it could."""
        connection = worker.process.connection
        messages: list[bytes] = []
        is_over = is_dead and not connection.poll()
        worker.is_read = True
        if not is_over:
            messages, is_over = self.watch.receive(connection, worker.inbox)
        replies: list[Any] = []
        for message in messages:
            # Under no lock, for it runs code of the user's, and maybe for long.
            reply: Any = message
            if len(message) > 1:  # else it is a word
                try:
                    reply = pickle.loads(message)
                    if isinstance(reply[0], tuple) or reply[1] is not None:
                        reply = message  # to be opened with the name of its task
                except BaseException:
                    reply = message
            replies.append(reply)
        del messages
        ended: list[tuple[_Work, Any]] = []
        was_up, broken = worker.process.up, None
        with _engine_lock:
            self.hear(worker)
            for reply in replies:
                if reply == b"":
                    if worker.is_ready:
                        worker.batches.popleft()  # its rest has been taken back
                    elif worker.process.up:
                        worker.is_ready = True  # its initializer has run
                    else:
                        worker.process.up = True
                        worker.process.unlink()
                        self.failures, self.limit = 0, self.max_workers
                        worker.is_ready = self.setup is None
                    continue
                if reply in (_BEGUN, _ENDED):
                    worker.since = time.monotonic() if reply == _BEGUN else float("inf")
                    continue
                if not worker.is_ready:
                    broken = reply
                    continue
                batch = worker.batches[0]
                batch.left -= 1
                if batch.works:  # none: it was stopped, and had just ended
                    work = batch.works.popleft()
                    work.seat = None
                    worker.outstanding -= 1
                    ended.append((work, reply))
                if not batch.left:
                    worker.batches.popleft()
            worker.is_read = False
        if broken is not None:
            raised = _opened(broken, (), "the initializer", 1)[1]
            self.core.break_down(_initializer_failed(raised))
        elif worker.process.up and not was_up and self.setup is not None:
            with contextlib.suppress(OSError):  # it is gone, as is read next
                connection.send_bytes(self.letter(worker, None, self.setup))
        outcomes: list[tuple[_Work, Reply]] = []
        pace = self.pace
        for work, reply in ended:
            if isinstance(reply, bytes):
                try:
                    reply = _opened(reply, (), _name(work.call), _count(work.call))
                except BaseException as error:  # of the user's code: it is to cost no other task
                    reply = _lost(work, error)[1]
            pace = (pace + reply[3]) / 2
            outcomes.append((work, reply))
        self.pace = max(pace, 1e-6)
        if outcomes:
            self.core.end(outcomes)
        if is_over:
            self.lose(worker)
        else:
            self.fill(worker)

    def lose(self, worker: _Worker) -> None:
        """A worker has ended, and its last reply is read."""
        process = worker.process
        self.watch.remove(process.connection)
        if process.pidfd is not None:
            self.watch.remove(process.pidfd)
        with _engine_lock:
            worker.doomed = True  # from here on only end() kills it, which knows if it is reaped
            self.workers.remove(worker)
            self.by_last_news.pop(worker, None)
            if worker in self.idle:
                self.idle.remove(worker)
            self.core.put_back(worker.take_back())
            lost = [work for batch in worker.batches for work in batch.works]
            for work in lost:
                work.seat = None
        process.end()
        how = process.how_it_ended()
        for work in lost:
            name = _name(work.call)
            failure = _broken(
                f"A worker process ended {how} while it ran {name}. It may have crashed in native "
                "code, have called os._exit(), or have been killed for its memory. Only what it "
                "ran is lost; the executor goes on."
            )
            self.core.end([_lost(work, failure)])
        if worker.is_new and not process.up:
            self.refuse(RuntimeError(f"a worker process ended {how} while it started"))
        elif self.setup is not None and process.up and not worker.is_ready:
            self.core.break_down(_initializer_failed(RuntimeError(f"its process ended {how}")))

    def part(self) -> None:
        """The reader's last: keep what is warm, end the rest, and give back the descriptors."""
        with _engine_lock:
            workers, self.workers, self.idle, self.by_last_news = self.workers, [], [], {}
            arrived = [each for each in self.arrived if isinstance(each, _Process)]
            self.arrived.clear()
        self.watch.close()
        # A thread in feed() may hold the old one: the last one closes its end.
        self.ring = lambda _: None
        self.bell.close()
        for worker in workers:
            process = worker.process
            if worker.doomed or worker.outstanding or worker.batches or self.setup is not None:
                process.end()  # no executor finds what another one has set up
                continue
            if process.up:
                process.up = False  # until it says that its state is what it was at its start
                with contextlib.suppress(OSError):  # it is gone, as whoever adopts it will see
                    process.connection.send_bytes(b"")
            arrived.append(process)
        for process in arrived:
            _starter.keep(process)
        # A program that changes its environment leaves some of another shape behind each time.
        _starter.drop_all_but(4 * (os.cpu_count() or 1) + len(workers))


def _has_written(connection: Any) -> bool:
    try:
        return bool(connection.poll(0))
    except OSError:
        return True  # its end


class _Watch:
    """Waits for any of many connections, and reads what they bring.

    Many replies come with one system call, and the selector is kept from wait to wait. On Windows it
    is multiprocessing.connection.wait(), which takes no more than 63 of them.
    """

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}
        self.selector: Any = None
        if sys.platform != "win32":
            import selectors

            self.selector = selectors.DefaultSelector()

    def add(self, source: Any, data: Any) -> None:
        if self.selector is None:
            self.known[source] = data
        else:
            self.selector.register(source, 1, data)  # EVENT_READ

    def remove(self, source: Any) -> None:
        if self.selector is None:
            del self.known[source]
        else:
            self.selector.unregister(source)

    def wait(self, timeout: float | None) -> list[Any]:
        """The data of those that have something; none, if that takes longer than so many seconds."""
        if self.selector is not None:
            return [key.data for key, _ in self.selector.select(timeout)]
        from multiprocessing.connection import wait

        return [self.known[source] for source in wait(list(self.known), timeout)]

    def receive(self, connection: Any, inbox: bytearray) -> tuple[list[bytes], bool]:
        """The messages that are there, and whether none will follow."""
        if self.selector is None:
            try:
                return [connection.recv_bytes()], False
            except (EOFError, OSError):
                return [], True
        try:
            # Not recv_bytes(), which takes two calls for each message. Its framing is this: the
            # length in 4 bytes, or -1 and then the length in 8.
            data = os.read(connection.fileno(), max(1 << 16, min(_missing(inbox), 1 << 24)))
        except OSError:
            data = b""  # reset: it had not read all that it was sent
        inbox += data
        messages = []
        at = 0
        while _missing(inbox, at) <= 0:
            size, head = _framed(inbox, at)
            at += head + size
            messages.append(bytes(inbox[at - size : at]))
        del inbox[:at]
        return messages, not data

    def close(self) -> None:
        if self.selector is not None:
            self.selector.close()


def _framed(inbox: bytearray, at: int) -> tuple[int, int]:
    """(size, bytes before it) of the message that begins there."""
    size = int.from_bytes(inbox[at : at + 4], "big", signed=True)
    return (int.from_bytes(inbox[at + 4 : at + 12], "big"), 12) if size == -1 else (size, 4)


def _missing(inbox: bytearray, at: int = 0) -> int:
    """How many bytes of the message that begins there have not come yet."""
    there = len(inbox) - at
    if there < 4 or (there < 12 and inbox[at] == 255):
        return 12 - there
    size, head = _framed(inbox, at)
    return head + size - there


# --- joblib: objects in shared memory ---------------------------------------------------------


class _Shared(Handle[Any]):
    """A handle to an object that workers read from shared memory.

    Unpickled anywhere on this machine, it is the object. What is large, is written once to a
    file, with pickle protocol 5 (PEP 574), so that the buffers of NumPy, pandas and Arrow data
    are mapped and not copied; what is small, is pickled along. The file goes with the handle;
    should this process be killed, loky's resource tracker removes it.
    """

    SMALL = 64 * 1024  # bytes, below which a copy is as fast as a file

    def __init__(self, value: object) -> None:
        buffers: list[pickle.PickleBuffer] = []
        with _handles_met() as self._inner:  # what value refers to must not go before it
            data = _joblib_calls().dumps(value, buffers)
        views = [buffer.raw() for buffer in buffers]
        if len(data) + sum(view.nbytes for view in views) < self.SMALL:
            data = _joblib_calls().dumps(value) if buffers else data
            self._call: Any = pickle.loads, (data,)
            return
        self._call = _map_file, self._write([memoryview(data), *views])
        # That function has to go by value, which plain pickle can't do. So it is inside of a pickle that
        # cloudpickle makes, and what plain pickle sends is those bytes.
        self._call = pickle.loads, (_joblib_calls().dumps(self),)

    def _write(self, parts: list[memoryview]) -> tuple[str, list[tuple[int, int]]]:
        import tempfile  # a fifth of the time that importing this file takes

        tracker = _loky_tracker()
        needed = sum(part.nbytes + 64 for part in parts)
        prefix = f"parallel_backend_{os.getpid()}_"
        # The temporary directory is the last resort, and only then asked for: on a read-only root
        # there is none, and asking is an error.
        folders = filter(None, [os.environ.get("JOBLIB_TEMP_FOLDER"), "/dev/shm"])
        reason = None
        for folder in [*folders, ""]:
            try:
                folder = folder or tempfile.gettempdir()
                if not _has_room(folder, needed):
                    reason = OSError(f"{folder} has no room for {needed} bytes")
                    continue
                descriptor, path = tempfile.mkstemp(prefix=prefix, dir=folder)
            except OSError as error:
                reason = error  # there is no such folder, or it is not for us
                continue
            tracker.register(path, "file")
            try:
                with open(descriptor, "wb") as file:
                    spans = []
                    for part in parts:
                        file.seek(-file.tell() % 64, os.SEEK_CUR)  # aligned, for vector units
                        spans.append((file.tell(), part.nbytes))
                        file.write(part)
            except OSError as error:
                tracker.maybe_unlink(path, "file")
                reason = error  # no space left, most likely
                continue
            weakref.finalize(self, _forget_file, tracker.maybe_unlink, path, os.getpid())
            _at_exit(_end_all)  # anew, to be called before it: tasks that still run need the file
            return path, spans
        raise OSError(
            "Could not write a shared object to JOBLIB_TEMP_FOLDER, /dev/shm or the temporary "
            f"directory: {reason}"
        ) from reason

    def load(self, timeout: float | None = None) -> Any:
        function, args = self._call
        return function(*args)

    def __reduce__(self) -> Any:
        if (handles := getattr(_pickling, "handles", None)) is not None:
            handles.append(self)
        return self._call


def _has_room(folder: str, needed: int) -> bool:
    """Whether so many bytes fit there, and leave an eighth of it to others: where shared memory is
    full, the semaphores and pipes of other processes, and loky's own tracker, fail."""
    if not hasattr(os, "statvfs"):
        return True
    room = os.statvfs(folder)
    return bool((room.f_bavail - room.f_blocks // 8) * room.f_frsize >= needed)


def _forget_file(unlink: Callable[[str, str], None], path: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked child has a copy of the handle
        unlink(path, "file")


class JoblibParallelBackend(_EngineBackend, backend_name="joblib"):
    """Runs tasks in processes of loky, joblib's own, on this machine.

    Each worker may use ``available_cpus() // max_workers`` threads for BLAS and OpenMP, unless
    the environment or ``joblib.parallel_config(inner_max_num_threads=…)`` says otherwise.
    """

    def __init__(self) -> None:
        _import_or_explain("joblib")
        super().__init__()

    @classmethod
    def _engine(cls, wishes: _Wishes) -> _Engine:
        active, _ = cls._active()
        inner = getattr(active, "inner_max_num_threads", None)
        threads = str(inner or max(available_cpus() // wishes.workers, 1))
        # As joblib.Parallel does, to keep n workers from starting n threads each.
        names = (n for n in active.MAX_NUM_THREADS_VARS if inner or n not in os.environ)
        return _LokyEngine(wishes, dict.fromkeys(names, threads))

    @classmethod
    def _active(cls) -> tuple[Any, int | None]:
        """joblib's backend and n_jobs, as joblib.parallel_config() may have set them."""
        backend, jobs = _import_or_explain("joblib.parallel").get_active_backend()
        return backend, jobs

    @classmethod
    def _cpus(cls) -> tuple[int, int | None]:
        cpus, (_, jobs) = available_cpus(), cls._active()
        if jobs is None:
            return cpus, None
        bound = jobs if jobs > 0 else max(cpus + 1 + jobs, 1)
        return min(cpus, bound), bound

    def put(self, v: T) -> T:
        return cast("T", _Shared(v))


# --- Ray --------------------------------------------------------------------------------------


def _ray_functions(setup: bytes = b"") -> tuple[Callable[..., Any], ...]:
    """What Ray runs, and what that needs; by value, as above. ``setup`` is an initializer's pickle."""
    run, pack, seal, dumper, opener, set_up = _run, _pack, _seal, _dumper, _opener, _set_up
    help_children = _help_children

    def here() -> dict[Any, Any]:
        """What is kept in this process, by name; each thread's shelf, by its number."""
        # By way of a module: functions that go by value have no other place that each can find.
        import multiprocessing

        process: Any = multiprocessing.current_process()
        kept: dict[Any, Any] = vars(process).setdefault("parallel_backend", {})
        return kept

    def tools() -> dict[Any, Any]:
        """All that work() needs, made once: asked for anew, it would cost more than a short task."""
        kept = here()
        if "openers" not in kept:
            ray = importlib.import_module("ray")
            # The bare function: what signal makes of its answer takes ten times as long.
            asked = getattr(signal.getsignal, "__wrapped__", signal.getsignal)
            kept.update(ray=ray, context=ray.get_runtime_context(), getsignal=asked, handler=None)
            kept.update(dumps=dumper(ray.cloudpickle), openers={None: opener(pickle.loads)})
            help_children(kept["dumps"])
        return kept

    def shield(kept: dict[Any, Any]) -> None:
        """From here on no interrupt meets this task but one that is not about it.

        ray.cancel() of a task that has just begun interrupts it, though the driver only wanted it
        back if it had not. Ray interrupts by SIGINT, and so do others, whose handlers get theirs.
        """
        task_id = kept["context"].get_task_id
        before = kept["getsignal"](signal.SIGINT)
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and before is not kept["handler"]:

            def handler(number: int, frame: Any) -> None:
                if before == signal.SIG_IGN:
                    return
                if task_id() is None or task_id() != kept["task"]:
                    (before if callable(before) else signal.default_int_handler)(number, frame)

            kept.update(task=None, handler=handler)
            signal.signal(signal.SIGINT, handler)
        kept["task"] = task_id()

    def pick(number: int, is_inside: bool) -> Any:
        """What stands in a pickle for a handle, which Ray has to see: it is among the values that
        came with the pickle, by itself if its object is meant, in a list if Ray's own reference is."""
        value = here()[threading.get_ident()][number]
        return value[0] if is_inside else value

    def shelve(values: Sequence[Any] | None) -> None:
        """Put there what pick() is to find in this thread."""
        here()[threading.get_ident()] = values

    def work(spec: bytes, *values: Any) -> Any:
        """Run a task or a chunk. ``values`` are the objects behind the handles in it."""
        kept = tools()
        shield(kept)
        ray, dumps, openers = kept["ray"], kept["dumps"], kept["openers"]
        head, body, (executor, mark, reraise, stays) = pickle.loads(spec)

        def answer(*status: Any, value: Any = None) -> Any:
            return (status, value) if stays else status

        if values:
            shelve(values)
        try:
            if executor not in openers:
                try:
                    openers[executor] = opener(set_up(setup, dumps))
                except BaseException as raised:
                    return answer("failed", pack(raised, dumps))
            try:
                call = openers[executor](head, body)
            except BaseException as reason:
                return answer(seal(([], reason, 0, 0.0), dumps, []), [], [])
        finally:
            if values:
                shelve(None)
        del values

        def say(word: bytes) -> None:
            key = mark[0] + kept["context"].get_worker_id()
            importlib.import_module("ray.experimental.internal_kv")._internal_kv_put(key, word)

        if mark is not None:
            # Which task runs here now, and which of its attempts, if Ray retries it.
            say(f"{mark[1]} {os.urandom(8).hex()}".encode())
        values, error, begun, seconds = run(*call)
        if mark is not None:
            say(b"")  # none: what its result takes to be sent does not count
        del call
        if reraise and isinstance(error, Exception):
            raise error
        if stays and error is None:
            return answer(None, ([], None, begun, seconds), [], value=values[0])
        plain = {bool, int, float, str, bytes, type(None)}
        if error is None and plain.issuperset(map(type, values)):
            # Bytes go as they are. Ray's own account of a tuple takes as long as a short task.
            return pickle.dumps((values, None, begun, seconds), 5)
        # Not left to Ray: it unpickles in its I/O thread, where a failure would go unheard.
        buffers: list[Any] = []
        refs: list[Any] = []

        def reduce_ref(ref: Any) -> Any:
            refs.append([ref])
            return pick, (len(refs) - 1, True)

        more = {ray.ObjectRef: reduce_ref, ray.actor.ActorHandle: reduce_ref}
        seen = functools.partial(dumps, more=more)
        return answer(seal((values, error, begun, seconds), seen, buffers), buffers, refs)

    def fetch(ref: Any) -> Any:
        return importlib.import_module("ray").get(ref)

    return work, pick, shelve, fetch


_ray_work, _ray_pick, _ray_shelve, _ray_fetch = _ray_functions()


@functools.cache
def _ray_remote() -> Any:
    """The remote function, made once: Ray exports it when it is first called in each session."""
    return _only_connected(_import_or_explain("ray").remote(_ray_work))


@functools.cache
def _ray_calls() -> _Calls:
    return _Calls(_import_or_explain("ray.cloudpickle"))


def _ray_with(remote: Any, options: dict[str, Any]) -> Any:
    if "max_calls" in options:  # the one option that can't be changed afterwards
        return _only_connected(_import_or_explain("ray").remote(**options)(remote._function))
    return remote.options(**options)


def _only_connected(remote: Any) -> Any:
    """A remote function of ours that raises after ``ray.shutdown()``, for its executor has ended.
    By itself, Ray would start a new cluster then, or join another one."""
    bare = _unhooked(type(remote)._remote)  # private; where it is not so wrapped, nothing changes
    if bare is not type(remote)._remote:
        remote._remote = functools.partial(_ray_gate.call, bare, remote)
    return remote


def _unhooked(function: Any) -> Any:
    """One of Ray's functions without the ``ray.init()`` that Ray wraps around each since 2.0."""
    name = getattr(getattr(function, "__code__", None), "co_name", "")
    return function.__wrapped__ if name == "auto_init_wrapper" else function


class _RayGate:
    """Makes ray.shutdown() wait while a thread of ours is inside Ray, and lets none in from then on. A
    call into Ray's core when that is gone ends this process ("The core worker has already been
    shutdown")."""

    def __init__(self) -> None:
        self.turn = threading.Condition()  # guards what follows; held for an instant only
        self.inside = 0  # how many are
        self.is_shut = False
        self.engines: weakref.WeakSet[_RayEngine] = weakref.WeakSet()
        self.kept: list[Any] = []

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.turn:
            if self.is_shut:
                raise _broken("Ray was shut down while this executor lived")
            self.inside += 1
        try:
            return function(*args, **kwargs)
        finally:
            with self.turn:
                self.inside -= 1
                if self.is_shut:
                    self.turn.notify_all()

    def watch(self, ray: Any) -> None:
        """Learn of this session's end, which Ray tells nobody. What marks it is a method of Ray's
        worker, since 2.50; with an older Ray, shutting down while tasks run is at one's own risk."""
        worker = ray._private.worker.global_worker
        mark = getattr(worker, "set_is_connected", None)
        if mark is None or getattr(mark, "func", None) == self.pass_on:
            return
        self.is_shut = False
        worker.set_is_connected = functools.partial(self.pass_on, mark)

    def pass_on(self, mark: Callable[[bool], None], is_connected: bool) -> None:
        with self.turn:
            self.is_shut = not is_connected
            if self.is_shut:
                self.turn.wait_for(lambda: not self.inside, 5)  # they do not take that long
        # To drop a reference is a call into Ray's core, too, and no better while that goes.
        engines = list(self.engines)
        self.kept = [] if is_connected else [[*engine.lent] for engine in engines]
        mark(is_connected)
        for engine in engines:
            engine.feed()  # a task that waits for a reference of Ray's has nothing else to wake it


_ray_gate = _RayGate()


def _started_ray(**options: Any) -> Any:
    """The ray module, connected: as the user has, else to a cluster found, else to a new one."""
    ray = _import_or_explain("ray")
    if not ray.is_initialized():
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        _log.info("Ray is not initialised yet: calling ray.init(%s)", given)
        ray.init(**options)
    return ray


# Tasks are lent to Ray ahead of time, more than the cluster can run: for speed, and so that an
# autoscaler sees what is wanted. What has not begun there is taken back with ray.cancel().
#
# 1. ray.cancel() is called in Ray's I/O thread only, where replies are handled, too: so the two can't
#    overlap. From any other thread it may come while Ray has entered one half of the task's end and not
#    yet the other, and Ray then aborts this process ("Tried to complete task that was not pending").
# 2. A reference that is resolved as cancelled when that call returns was never given to a worker: the
#    task is put back. Any other goes on, and its end comes by end().
# 3. A task that had begun by then is interrupted, and ignores that; see shield() above. One that was on
#    its way into a worker comes back as cancelled, though later: it is lent anew.
# 4. Before the waiter rests, it hangs a bell on each of the oldest references, as many as can run: a
#    callback of Ray's at its end. Ray begins tasks in their order, so whichever runs, has one; but for
#    those with objects among their arguments, which each have one.
#
# One thread of an executor, the waiter, takes, submits and hears of the ends. Others take back and stop.

_RAY_WINDOW = 64  # tasks lent, at least, where the cluster is the bound: what speed needs
_RAY_GATHER = 16  # replies that are awaited together while they come fast


class _RayEngine(_Engine):
    """See above."""

    name = "Ray"
    chunk_seconds = 0.1  # some milliseconds pass from one task's end to the next one's start
    look_after = 0.1  # began() asks Ray's key-value store, into which tasks write when they begin

    def __init__(self, ray: Any, wishes: _Wishes, stays: bool) -> None:
        self.ray = ray
        self.nudge = ray.put(None)  # something that is there, for callbacks in the I/O thread
        self.ref_type = type(self.nudge)
        # Ray Client's references are of their own type. There is no I/O thread behind them: what comes
        # from the cluster comes in one thread of the client's, in which a call to Ray waits for itself.
        self.is_client = self.ref_type is not ray.ObjectRef
        options = wishes.options
        self.held = wishes.setup  # what handles in it refer to must stay
        key = os.urandom(8).hex()
        self.mark = f"parallel_backend {key} " if wishes.is_limited else None
        # Where tasks write down that they have begun, under that key.
        self.store = importlib.import_module("ray.experimental.internal_kv")
        self.numbers = itertools.count()
        self.marked: dict[int, _Work] = {}  # what is lent, by number, if there is a mark
        self.seen: dict[bytes, tuple[bytes, float]] = {}  # by worker: its last word, and since when
        self.base = _ray_remote()
        self.setup_refs: list[Any] = []
        if wishes.setup is not None:
            setup = _ray_calls().dumps(wishes.setup, None, self.by_number(self.setup_refs))
            self.base = _only_connected(ray.remote(_ray_functions(setup)[0]))
            # Processes of its own: whatever an initializer leaves there, no other executor finds.
            env = dict(options.get("runtime_env") or {})
            env["env_vars"] = {**env.get("env_vars", {}), "PARALLEL_BACKEND_EXECUTOR": key}
            options["runtime_env"] = env
        if wishes.max_tasks is not None:
            # One function for all names, since Ray counts calls by function.
            self.base = _ray_with(self.base, {"max_calls": wishes.max_tasks})
        self.stays = stays  # results stay in the object store
        if stays:
            self.future_type = _RayFuture
            options["num_returns"] = 2  # what became of it, and its result
        self.executor = None if wishes.setup is None else key
        # Ray wraps each of these so that it calls ray.init() where there is no session. Bare ones here:
        # an executor ends with its session, and is not to start another one.
        _ray_gate.watch(ray)
        self.wait, self.get, self.cancel, self.resources = (
            functools.partial(_ray_gate.call, _unhooked(function))
            for function in (ray.wait, ray.get, ray.cancel, ray.cluster_resources)
        )
        self.options = options
        self.max_workers = wishes.workers  # sys.maxsize: what the cluster allows
        # With retry_exceptions, a task has to raise in Ray's sight, or Ray would not run it again. And it
        # has to be alone: Ray would run a whole chunk again.
        self.reraise = bool(options.get("retry_exceptions"))
        self.chunk_seconds = 0.0 if self.reraise else self.chunk_seconds
        self.retries = options.get("max_retries", 3)
        self.remotes: dict[str, Any] = {}
        self.remote("")  # an option that is none of Ray's is an error here, and not at each task
        self.needs = {"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus")}
        self.needs.update({"memory": options.get("memory"), **(options.get("resources") or {})})
        self.has_warned = False
        self.measure()
        self.context = ray.get_runtime_context()  # asking it does not start Ray, as asking ray does
        self.session = self.identity()
        _broken("")  # imports what can't be imported any more when the interpreter exits
        self.lent: dict[Any, _Work] = {}
        """By reference, oldest first. Under _engine_lock, as is what follows."""
        # Tasks in the waiter's hands: it submits them, or reads their reply. They have no reference in
        # ``lent``, so take_back() and stop() wait until it lets go of them.
        self.in_hand: set[_Work] = set()
        self.handed_on = threading.Condition(_engine_lock)  # notified when in_hand or asked is less
        self.asked: set[Any] = set()  # references that a take_back() has in hand, and nobody else
        self.belled: set[Any] = set()
        # Replies come so fast that it costs less to wait for some together than to hear a bell for each.
        # This and the next are the waiter's own.
        self.is_streaming = False
        self.heard = 0.0  # when the last ones were handled
        # Bells beyond as many as can run, for tasks that wait in ray.get() and give back their CPUs.
        self.more_bells = 0
        self.refused: dict[Any, float] = {}  # when a take_back() found that one had begun
        # The oldest, as many as can run. Ray does not say what runs, but it begins them in order.
        self.front: frozenset[_Work] = frozenset()
        self.stopping: set[Any] = set()  # references of what was killed and is not known to be gone
        self.dependents: set[Any] = set()  # those with objects among their arguments: out of order
        self.news: queue.SimpleQueue[Any] = queue.SimpleQueue()  # references that rang; None: look
        self.woken = False
        self.io_thread = 0
        self.closing = False
        self.waiter = threading.Thread(target=self.live, name="parallel_backend ray", daemon=True)
        self.waiter.start()
        self.learn_io_thread()
        _ray_gate.engines.add(self)

    def learn_io_thread(self) -> None:
        learnt = threading.Event()

        def note(_: object) -> None:
            self.io_thread = threading.get_ident()
            learnt.set()

        if not self.is_client:
            _when_done(self.nudge, note)
            learnt.wait(1)  # in vain, if this is that thread

    # What the core calls.

    def feed(self) -> None:
        if not self.woken:
            try:
                self.woken = True
                self.news.put(None)
            except BaseException:
                self.woken = False  # a Ctrl-C: nobody would ring ever after
                raise

    def inside(self) -> bool:
        return threading.get_ident() in (self.waiter.ident, self.io_thread)

    def width(self, max_workers: int) -> int:
        return max(min(max_workers, self.capacity), 1)

    def running(self, work: _Work) -> bool:
        return work in self.front

    def began(self) -> list[tuple[_Work, float]]:
        with contextlib.suppress(Exception):  # its head is away, or the session is gone
            for key in self.store._internal_kv_list(self.mark):
                word = self.store._internal_kv_get(key)
                if word is not None and word != self.seen.get(key, (b"", 0))[0]:
                    self.seen[key] = word, time.monotonic()
        latest: dict[int, float] = {}  # a task's last attempt: the worker of an earlier one is gone
        for word, since in self.seen.values():
            if word:
                number = int(word.split()[0])
                latest[number] = max(since, latest.get(number, 0.0))
        return [(self.marked[n], since) for n, since in latest.items() if n in self.marked]

    def awaited(self, value: Any) -> Future[Any] | None:
        if not isinstance(value, self.ray.ObjectRef):
            return super().awaited(value)
        # One of Ray's own. A task with it is not to be lent, and take a place, before it can run.
        arrival: Future[Any] = Future()
        with contextlib.suppress(Exception):  # the session is gone, as the task is told
            if self.wait([value], timeout=0, fetch_local=False)[1]:
                _when_done(value, lambda _: arrival.set_result(None))
                return arrival
        return None

    def given(self, future: Future[Any]) -> Any:
        # What another task has left in the object store goes from there to this one.
        return future.handle if isinstance(future, _RayFuture) else future.result()

    def by_number(self, values: list[Any]) -> dict[type, Callable[[Any], Any]]:
        """Reducers that leave handles and references out of a pickle, and list them here."""

        def handle(handle: Any) -> Any:
            values.append(handle.ref)
            return _ray_pick, (len(values) - 1, False)

        def reference(reference: Any) -> Any:
            values.append([reference])
            return _ray_pick, (len(values) - 1, True)

        kinds = self.ref_type, self.ray.actor.ActorHandle
        return {_RayHandle: handle, **dict.fromkeys(kinds, reference)}

    def take_back(self, works: list[_Work]) -> None:
        # Oldest first: Ray looks for each from the front of its queue. So many at once, so that
        # its I/O thread is not kept for long.
        for start in range(0, len(works), 500):
            refs: list[Any] = []
            taken: set[Any] = set()
            try:
                with _engine_lock:
                    some = works[start : start + 500]
                    while not self.inside() and not self.closing and self.are_in_hand(some):
                        # The waiter may pickle something that takes long.
                        _signals_now(self.handed_on.wait)
                    for work in some:
                        ref = work.seat
                        if self.lent.get(ref) is work and ref not in self.asked:
                            refs.append(ref)
                            self.asked.add(ref)
                taken = self.cancelled_in_time(refs) if refs else set()
            finally:
                self.give_back(refs, taken)
        self.feed()

    def are_in_hand(self, works: list[_Work]) -> bool:
        """Whether the waiter, or another take_back(), has any of them; under ``_engine_lock``."""
        return bool(self.in_hand & {*works} or self.asked & {work.seat for work in works})

    def cancelled_in_time(self, refs: list[Any]) -> set[Any]:
        """Ask Ray for them; those that it has not given to a worker, nor will."""
        if not self.in_io_thread(lambda: self.cancel_all(refs)):
            return set()
        seconds = 0.5 if self.is_client else 0  # it hears of them later
        try:
            ready = self.wait(refs, num_returns=len(refs), timeout=seconds, fetch_local=False)[0]
        except self.ray.exceptions.RayError:
            return set()  # the session is gone: the waiter ends them
        return {ref for ref in ready if self.was_never_begun(ref)}

    def give_back(self, refs: list[Any], taken: set[Any]) -> None:
        with _engine_lock:
            self.asked.difference_update(refs)
            self.handed_on.notify_all()
            refs = [ref for ref in refs if ref in self.lent]  # less those stopped meanwhile
            works = [self.lent[ref] for ref in refs if ref in taken]
            for ref in refs:
                if ref in taken:
                    self.forget(ref)
                else:
                    self.refused[ref] = time.monotonic()
                    self.news.put(ref)  # the waiter may have passed it over while we had it
            self.core.put_back(works)

    def cancel_all(self, refs: Sequence[Any], force: bool = False) -> None:
        for ref in refs:
            self.cancel(ref, force=force, recursive=False)

    def was_never_begun(self, ref: Any) -> bool:
        errors = self.ray.exceptions
        try:
            self.get(ref)
        except errors.TaskCancelledError as error:
            # By itself this is the word of its owner, this process: it was still in the queue, or waited
            # for arguments. If it is a RayTaskError, too, it is a worker's word: it had begun.
            return not isinstance(error, errors.RayTaskError)
        except Exception:
            return False  # it has ended, somehow: the waiter sees to that
        return False

    def in_io_thread(self, function: Callable[[], None]) -> bool:
        """Call it where Ray's replies are handled, and wait for that; whether it was called."""
        over = threading.Event()
        raised: list[BaseException] = []

        def call(_: object = None) -> None:
            try:
                function()
            except BaseException as error:
                raised.append(error)
            finally:
                over.set()

        if threading.get_ident() == self.io_thread or self.is_client:
            call()  # we are there, or can't be
        else:
            try:
                _when_done(self.nudge, call)
            except (AttributeError, BrokenExecutor):
                return False  # Ray was shut down
            while not over.wait(1):
                if self.lost() is not None:
                    return False
        return not raised

    def stop(self, work: _Work) -> None:
        if isinstance(work.verdict, TimeoutError) and self.has_ended(work.seat):
            return  # in time, but it was not heard of yet
        with _engine_lock:
            while work in self.in_hand and not self.inside():
                _signals_now(self.handed_on.wait)
            ref = work.seat
            if self.lent.get(ref) is not work:
                return
            self.forget(ref)
            self.stopping.add(ref)
            self.core.stopped(work)
        self.kill([ref])
        self.feed()

    def has_ended(self, ref: Any) -> bool:
        with contextlib.suppress(Exception):  # the session is gone: the waiter ends it
            return bool(self.wait([ref], timeout=0, fetch_local=False)[0])
        return True

    def kill(self, refs: Sequence[Any]) -> None:
        with contextlib.suppress(Exception):  # the session is gone, and its workers with it
            self.in_io_thread(lambda: self.cancel_all(refs, force=True))

    def make_sure(self, seconds: float) -> None:
        """Wait so many seconds for the end of what was stopped, and kill again what lives on: Ray ignores
        a cancel() while another one of the same task is on its way."""
        refs = list(self.stopping)
        if refs:
            ready, rest = self.wait(refs, num_returns=len(refs), timeout=seconds, fetch_local=False)
            self.kill(rest)
            with _engine_lock:
                self.stopping.difference_update(ready)

    def close(self) -> None:
        self.closing = True
        with contextlib.suppress(Exception):  # the session is gone, as in kill()
            deadline = time.monotonic() + 5
            while self.stopping and time.monotonic() < deadline and self.lost() is None:
                self.make_sure(0.02)  # stopped means that its process is gone
            if self.mark is not None:
                self.store._internal_kv_del(self.mark, del_by_prefix=True)
        self.news.put(None)
        if not self.inside():
            self.waiter.join(0.2)

    # The waiter.

    def live(self) -> None:
        while not self.closing:
            try:
                rung = self.rest()
                self.hear_and_lend(rung)
                del rung
            except BaseException:
                reason = self.lost()
                if reason is not None:
                    self.fail_all(reason)
                else:
                    # Of ours, or a cluster that can't be asked just now. A thread that ends would
                    # leave all waiting.
                    _report("Exception in the waiter of an executor")
            self.core.settle()

    def rest(self) -> set[Any]:
        """Wait for news, unless replies stream in; the references that rang."""
        rung = set()
        with contextlib.suppress(queue.Empty):
            if not self.is_streaming:
                self.hang_bells()
                # Nobody tells us that the cluster has grown, nor does an older Ray that its session
                # has ended. Only while tasks are lent: an idle executor does not wake up.
                timeout = 0.02 if self.stopping else 1.0 if self.lent else None
                rung.add(self.news.get(timeout=timeout))
            while True:
                rung.add(self.news.get_nowait())
        # Before it looks for work: whoever finds it set can rely on a look that is still to come.
        self.woken = False
        rung.discard(None)
        return rung

    def hang_bells(self) -> None:
        """Let the end of whatever can run wake the waiter: of the oldest, and of those out of order."""
        with _engine_lock:
            oldest = islice(self.lent, max(self.capacity, 4) + self.more_bells)
            refs = {*oldest, *self.dependents} - self.belled
            self.belled.update(refs)
        for ref in refs:
            self.ring_for(ref)

    def ring_for(self, ref: Any) -> None:
        put = self.news.put
        _when_done(ref, lambda _: put(ref))

    def hear_and_lend(self, rung: set[Any]) -> None:
        """Handle what has ended, and lend as much as there may be."""
        was_streaming, self.is_streaming = self.is_streaming, False  # whatever happens below
        # Asked again each time: in another session, nobody knows of our references.
        reason = self.lost()
        if reason is not None:
            self.fail_all(reason)
            return
        self.make_sure(0)
        with _engine_lock:
            head = [ref for ref in islice(self.lent, _RAY_WINDOW) if ref not in self.asked]
        ready: list[Any] = []
        comes_fast = was_streaming or (rung and time.monotonic() < self.heard + 0.003)
        if comes_fast and len(head) > _RAY_GATHER:
            # To wait for some more costs less than to look at each by itself, or to hear its bell.
            ready = self.wait(head, num_returns=_RAY_GATHER, timeout=0.01, fetch_local=False)[0]
        self.is_streaming = len(ready) > 2
        any_rang = bool(rung)
        if not self.is_streaming:
            rung.update(head)
        rung.difference_update(ready)
        with _engine_lock:
            refs = [ref for ref in rung if ref in self.lent and ref not in self.asked]
        if refs:
            late = self.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[0]
            if not any_rang and not ready and not self.belled.issuperset(late):
                # It was not heard when it ended.
                self.more_bells = 2 * self.more_bells + _RAY_GATHER
            ready += late
        if ready:
            self.hear(ready)
        del head, refs, rung, ready
        self.heard = time.monotonic()
        self.lend()

    def hear(self, ready: list[Any]) -> None:
        values: dict[Any, Any] = {}
        with contextlib.suppress(Exception):
            # Together, for a tenth of the time; or each alone, if one has failed.
            values.update(zip(ready, self.get(ready)))
        ended: list[tuple[_Work, Any]] = []
        with _engine_lock:
            for ref in ready:
                if ref in self.lent and ref not in self.asked:
                    work = self.lent[ref]
                    get = functools.partial(values.pop if ref in values else self.get, ref)
                    ended.append((work, (get, self.refused.get(ref))))
                    self.forget(ref)
                    self.in_hand.add(work)  # in our hands until it is told, or put back
        del ready
        outcomes: list[tuple[_Work, Reply]] = []
        again: list[_Work] = []
        while ended:
            work, (get, refused) = ended.pop(0)
            reply = self.reply(work, get, refused)
            if reply is None:
                again.append(work)
            elif isinstance(reply[1], CancelledError) and not reply[2]:
                with _engine_lock:
                    self.in_hand.discard(work)
                    self.core.stopped(work)
            else:
                outcomes.append((work, reply))
        with _engine_lock:
            self.in_hand.difference_update([work for work, _ in outcomes], again)
            self.core.put_back(again)
            self.handed_on.notify_all()
        self.core.end(outcomes)

    def reply(self, work: _Work, get: Callable[[], Any], refused: float | None) -> Reply | None:
        """What became of it; None if it has to be lent anew. ``refused``: when it was asked back."""
        name, count = _name(work.call), _count(work.call)
        errors = self.ray.exceptions
        try:
            answer = get()
            if isinstance(answer, bytes):
                return cast("Reply", pickle.loads(answer))
            data, *rest = answer
            if isinstance(data, str):  # "failed", to set up its worker
                failure = _initializer_failed(_unpack(rest[0], "the initializer", 1))
                self.core.break_down(failure)
                return [], failure, count, 0.0
            _ray_shelve(rest[1])
            try:
                reply = _opened(data, rest[0], name, count)
            finally:
                _ray_shelve(None)
            if self.stays and reply[1] is None:
                return [_RayHandle(work.message)], *reply[1:]
            return reply
        except errors.TaskCancelledError as error:
            # A take_back() has met it on its way into a worker; or its worker has died after a take_back()
            # that came too late, and Ray does not run again what somebody has cancelled.
            is_interrupted = isinstance(error, errors.RayTaskError)
            if refused is None:
                if is_interrupted and self.reraise:
                    return [], _ray_cause(error), count, 0.0
                # We have not asked for it: somebody has cancelled its argument, or the task itself.
                return [], CancelledError(), 0, 0.0
            # With max_retries=0, one that may have begun is not lent anew. One that was met on its way in had
            # not: it is interrupted, or its end comes soon after it was asked for.
            if self.retries or is_interrupted or time.monotonic() < refused + 0.25:
                return None
            failure = _broken(f"Ray lost {name}, or its worker: {error}")
            return [], _caused(failure, error), count, 0.0
        except errors.RayTaskError as error:
            # Not of the task, whose exceptions come as values, but from around it.
            if isinstance(error.cause, errors.RaySystemError):
                failure = _broken(f"The worker could not unpickle the call of {name}")
                return [], _caused(failure, error), 0, 0.0
            # Or what is behind one of a chunk's handles has failed: then its items are tried singly.
            return [], _ray_cause(error), 0, 0.0
        except errors.RayError as error:  # a worker, a node, an object or a whole session is gone
            failure = _broken(f"Ray lost {name}, or its result: {error}")
            return [], _caused(failure, error), count, 0.0
        except BaseException as error:
            return [], error, count, 0.0

    def lend(self) -> None:
        """Give Ray what it may have."""
        if time.monotonic() > self.measured + 1:
            with contextlib.suppress(Exception):  # its head is away: what was measured stands
                self.measure()
        window = self.capacity if self.is_unbounded else self.max_workers
        if not self.is_unbounded and self.capacity <= self.max_workers:
            # The cluster is the bound. An autoscaler adds nodes for what waits: with twice of what it has,
            # it grows at its own pace.
            window = max(_RAY_WINDOW, 2 * self.capacity)
        elif len(self.lent) > window:
            # It has grown beyond what was asked for: no more than that shall run.
            with _engine_lock:
                late = [
                    self.lent[ref]
                    for ref in islice(self.lent, window, None)
                    if ref not in self.refused
                ]
            if late:
                self.take_back(late)
        while True:
            reason = self.lost()  # or Ray would run in another session what is of this one
            if reason is not None:
                self.fail_all(reason)
                return
            with _engine_lock:
                works = self.core.take(min(window - len(self.lent), _RAY_GATHER))
                self.in_hand.update(works)
            if not works:
                break
            failed: list[tuple[_Work, Reply]] = []
            while works:
                if self.core.stage >= _Stage.DISCARDING:  # nobody is to wait for their pickling
                    with _engine_lock:
                        self.in_hand.difference_update(works)
                        self.core.put_back(works)
                        self.handed_on.notify_all()
                    break
                failed += self.send(works.pop(0))
            self.core.end(failed)  # when none is in our hands any more: a callback may ask for it
        with _engine_lock:
            room = min(self.capacity, self.max_workers)
            self.front = frozenset(islice(self.lent.values(), room))
            if not self.lent:
                self.more_bells = 0

    def send(self, work: _Work) -> list[tuple[_Work, Reply]]:
        """Submit it to Ray; it is in ``in_hand``, and nobody takes it back until it is sent. What
        became of it, if that can't be."""
        call = work.call
        assert call is not None
        failure: BaseException | None = None
        ref = None
        number = next(self.numbers)
        # What is behind handles, Ray has to see: it fetches it before the task starts, places the task
        # near it, and counts and frees it.
        values = list(self.setup_refs)
        try:
            # In one piece: several arguments take Ray longer.
            more = self.by_number(values)
            head, body = _ray_calls().message(self.with_handles(call), {}, more, values)
            mark = None if self.mark is None else (self.mark, number)
            data = pickle.dumps((head, body, (self.executor, mark, self.reraise, self.stays)), 5)
            made = self.remote(_name(call)).remote(data, *values)
            ref, work.message = made if self.stays else (made, number)
        except BaseException as error:
            failure = error
        with _engine_lock:
            self.in_hand.discard(work)
            self.handed_on.notify_all()
            if ref is not None:
                work.seat = ref
                self.lent[ref] = work
                if self.mark is not None:
                    self.marked[number] = work
                if values:
                    self.dependents.add(ref)
        if failure is None:
            return []
        if isinstance(failure, self.ray.exceptions.RayError):  # it was shut down just now
            return [_lost(work, _broken("Ray took no more tasks", failure))]
        if isinstance(failure, Exception) and not isinstance(failure, BrokenExecutor):
            return [(work, ([], _ray_calls().unpicklable(call, failure), 0, 0.0))]
        return [_lost(work, failure)]

    def with_handles(self, call: Call) -> Call:
        """As an argument, or an item of a map, one of Ray's own references means its object, too."""
        fn, arguments, how, budget = call
        kind = self.ref_type

        def handles(values: Iterable[Any]) -> list[Any]:
            return [_RayHandle(value) if type(value) is kind else value for value in values]

        if budget is not None and how:
            return fn, [tuple(handles(item)) for item in arguments], how, budget
        if budget is None and kind in map(type, how.values()):
            how = dict(zip(how, handles(how.values())))
        if kind in map(type, arguments):
            arguments = handles(arguments)
        return fn, arguments, how, budget

    def remote(self, name: str) -> Any:
        """The remote function under the name of the user's, for the dashboard and Ray's logs."""
        if name not in self.remotes:
            if len(self.remotes) > 100:
                self.remotes.clear()
            self.remotes[name] = _ray_with(self.base, {"name": name, **self.options})
        return self.remotes[name]

    def forget(self, ref: Any) -> None:
        """It is lent no more; under ``_engine_lock``."""
        self.marked.pop(self.lent.pop(ref).message, None)
        self.belled.discard(ref)
        self.refused.pop(ref, None)
        self.dependents.discard(ref)

    def measure(self) -> None:
        """Ask how many tasks the cluster can run at once; it may grow, or lose nodes."""
        self.measured = time.monotonic()
        has = self.resources()
        counts = [int(has.get(name, 0) / each + 1e-9) for name, each in self.needs.items() if each]
        self.is_unbounded = not counts  # nothing that Ray would wait for: so the bound is ours
        if self.is_unbounded:
            counts = [self.max_workers, max(int(has.get("CPU", 1)), 1)]
        self.capacity = min(counts)
        if not self.capacity and not self.has_warned:
            self.has_warned = True
            wants = ", ".join(f"{name}: {each:g}" for name, each in self.needs.items() if each)
            _log.warning("Tasks wait: no node of Ray's has what each of them needs (%s)", wants)

    def identity(self) -> tuple[Any, Any]:
        """Of the session that Ray is connected to."""
        return self.context.gcs_address, self.context.get_job_id()

    def lost(self) -> BaseException | None:
        """Why no reply will come any more, if so."""
        session = None
        with contextlib.suppress(Exception):  # by which it says that Ray is not initialised
            session = _ray_gate.call(self.identity)
        if session != self.session:
            return _broken("Ray was shut down while this executor lived")
        return None

    def fail_all(self, reason: BaseException) -> None:
        """The session is gone: what it had, and what is pending, ends with it."""
        with _engine_lock:
            works = list(self.lent.values())
            for ref in list(self.lent):
                self.forget(ref)
        self.core.end([_lost(work, reason) for work in works])
        self.core.break_down(reason)


def _ray_cause(error: Any) -> BaseException:
    """The exception inside a RayTaskError, with the worker's traceback as its cause."""
    cause = error.cause
    if not isinstance(cause, BaseException):
        return cast("BaseException", error)
    # Its text and not its traceback_str: what is raised as the task's own type too, has none.
    return _traced(cause, str(error))


def _when_done(ref: Any, callback: Callable[[Any], None]) -> None:
    """Call it in Ray's I/O thread when there is an object or an error behind ``ref``."""
    _ray_gate.call(ref._on_completed, callback)  # private, but there since Ray 1.0


class _RayHandle(Handle[Any]):
    """A handle to an object in Ray's object store; ``ref`` is Ray's own."""

    def __init__(self, ref: Any) -> None:
        self.ref = ref

    def load(self, timeout: float | None = None) -> Any:
        ray = _import_or_explain("ray")
        try:
            return _unhooked(ray.get)(self.ref, timeout=timeout)
        except ray.exceptions.RayTaskError as error:
            cause = _ray_cause(error)
            raise cause from cause.__cause__

    def __reduce__(self) -> Any:
        return _ray_fetch, (self.ref,)  # where Ray itself pickles it, inside put(), say


class _RayFuture(_Task):
    """What ``wrap`` returns: its result stays in the object store until somebody asks for it."""

    value: Any = None  # (it,), when somebody has

    @property
    def handle(self) -> _RayHandle:
        return cast("_RayHandle", super().result())

    @property
    def ref(self) -> Any:
        """Ray's own reference to the result, when it is done."""
        return self.handle.ref

    def result(self, timeout: float | None = None) -> Any:
        deadline = None if timeout is None else time.monotonic() + timeout
        handle = super().result(timeout)
        if self.value is None:
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            self.value = (handle.load(left),)
        return self.value[0]


class RayParallelBackend(_EngineBackend, backend_name="ray"):
    """Runs tasks on a Ray cluster: the one Ray is connected to, else what ``ray.init()`` finds
    (``RAY_ADDRESS``, or a cluster on this machine), else a new one on this machine.

    What ``put`` and ``wrap`` return has Ray's own ``ObjectRef`` as its ``ref``. One of Ray's own may be
    given to a task, and to ``get`` and ``wait``, too.
    """

    _uses_options = True

    def __init__(self) -> None:
        _started_ray()
        super().__init__()

    @classmethod
    def _configured(cls, config: ParallelConfig) -> type[ParallelBackend]:
        bounded = super()._configured(config)
        address = config.address
        options = {
            "address": "{}:{}".format(*address) if isinstance(address, tuple) else address,
            "num_cpus": config.n_cpus_local,
            "logging_level": config.logging_level,
        }
        _started_ray(**{key: value for key, value in options.items() if value is not None})
        return bounded

    @classmethod
    def _has_option(cls, name: str, value: Any) -> bool:
        if super()._has_option(name, value):
            return True
        with contextlib.suppress(ValueError):  # Ray's, of a name that it does not know either
            _ray_remote().options(**{name: value})
            return name != "num_returns"
        return False

    @classmethod
    def _engine(cls, wishes: _Wishes, stays: bool = False) -> _Engine:
        ray = _started_ray()
        worker = getattr(ray.get_runtime_context(), "worker", None)
        if getattr(worker, "mode", None) == ray.WORKER_MODE:  # get_task_id() warns elsewhere
            # This is a task, which will wait for those: they use its CPU, for there may be no other.
            wishes.options.setdefault("num_cpus", 0)
        return _RayEngine(ray, wishes, stays)

    @classmethod
    def _default_workers(cls) -> int:
        return sys.maxsize  # what the cluster's resources allow, as it grows and shrinks

    @classmethod
    def _cpus(cls) -> tuple[int, int | None]:
        cpus = max(int(_started_ray().cluster_resources().get("CPU", 1)), 1)
        return cpus, cpus

    def put(self, v: T) -> T:
        return cast("T", _RayHandle(_started_ray().put(v)))

    def _executor_for_wrap(self, options: dict[str, Any]) -> Executor:
        workers = self._n_cpus_local or sys.maxsize
        engine = self._engine(_Wishes(workers, None, None, False, {**options}), stays=True)
        return ParallelExecutor(engine, workers, CancellationPolicy.NONE)

    def _futures(self, handles: Sequence[Any]) -> list[Future[Any] | None]:
        ray = _import_or_explain("ray")
        # Asked first, since the future even of what is done is done a little later.
        refs = list({handle for handle in handles if isinstance(handle, ray.ObjectRef)})
        wait = _unhooked(ray.wait)
        late = wait(refs, num_returns=len(refs), timeout=0)[1] if refs else []
        futures = {ref: ref.future() for ref in late}
        return [
            futures.get(handle) if isinstance(handle, ray.ObjectRef) else future
            for handle, future in zip(handles, super()._futures(handles))
        ]

    def _value(self, handle: Any, timeout: float | None) -> Any:
        if isinstance(handle, _import_or_explain("ray").ObjectRef):
            handle = _RayHandle(handle)
        return super()._value(handle, timeout)


# --- the self-test ----------------------------------------------------------------------------


def _checks(backend: ParallelBackend, cancels: bool) -> Iterator[tuple[str, bool]]:
    """(what is checked, whether it holds), one after the other, for a backend."""
    wait = 60  # seconds, for an answer that should take none
    with backend.executor() as executor:
        yield "worker starts, one task", executor.submit(lambda: 6 * 7).result(wait) == 42
        squares = executor.map(pow, range(1000), [2] * 1000, timeout=wait)
        yield "map of 1,000 items", list(squares) == [number**2 for number in range(1000)]
        error = executor.submit(divmod, 1, 0).exception(wait)
        yield "a task's exception", type(error) is ZeroDivisionError
    value = bytes(range(256)) * 4096
    handle = backend.put(value)
    length = backend.get(backend.wrap(len)(handle), timeout=wait)
    got = backend.get(handle, timeout=wait)
    yield "put and get of 1 MiB", length == len(value) and got == value
    for policy in map(CancellationPolicy, range(4)):
        # In this process, all is done before there is anything to cancel.
        pends = cancels and CancellationPolicy.PENDING in policy
        runs = cancels and CancellationPolicy.RUNNING in policy
        with backend.executor(1, cancel_futures=policy) as executor:
            running = executor.submit(time.sleep, wait if runs else 0.3)
            pending = executor.submit(int)
            while cancels and not running.running():
                time.sleep(0.001)
            time.sleep(0.1 * cancels)  # on Ray, running() is a guess
        yield (
            f"cancellation: {policy.name}",
            (pending.cancelled(), running.cancelled()) == (pends, runs),
        )


def _costs(backend: ParallelBackend) -> Iterator[tuple[str, str]]:
    """(what it is, how much), for whoever wants to know which tasks are worth their while here."""
    clock = time.perf_counter
    with backend.executor() as executor:
        yield "max_workers, by default", str(executor._max_workers)
        for count in (100, 1000):  # the first ones start all workers
            started = clock()
            backend.get([executor.submit(abs, number) for number in range(count)])
            seconds = (clock() - started) / count
        yield "a task costs", f"{_amount(seconds)}: make yours longer than {_amount(40 * seconds)}"
        started = clock()
        collections.deque(executor.map(abs, range(50_000)), maxlen=0)
        yield "an item of a map", _amount((clock() - started) / 50_000)
    try:
        started = clock()
        handle = backend.put(pickle.PickleBuffer(bytearray(10**8)))  # goes as arrays do
        seconds = clock() - started
        started = clock()
        backend.get(backend.wrap(lambda data: memoryview(data).nbytes)(handle))
        yield (
            "put of 100 MB",
            f"{_amount(seconds)}, and {_amount(clock() - started)} to its first task",
        )
    except (OSError, MemoryError) as error:
        yield "put of 100 MB", str(error)


def _amount(seconds: float) -> str:
    """With two digits, in the unit that suits."""
    units = ("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)
    unit, size = next((each for each in units if seconds >= each[1]), units[-1])
    return f"{float(f'{seconds / size:.2g}'):g} {unit}"


def _surroundings(name: str) -> str:
    """What there is for the backend of that name, and whether we had to start it."""
    if name == "joblib":
        if not hasattr(os, "statvfs") or not os.path.isdir("/dev/shm"):
            return "put writes to the temporary directory"
        room = os.statvfs("/dev/shm")
        return f"{room.f_bavail * room.f_frsize / 1e9:.1f} GB free in shared memory"
    if name == "ray":
        ray = _started_ray(logging_level=logging.ERROR, log_to_driver=False)
        # Private: nothing public says who has started a cluster.
        is_ours = getattr(getattr(ray._private.worker, "_global_node", None), "head", False)
        return f"{'started here' if is_ours else 'found'}; nodes: {len(ray.nodes())}"
    return "in this process"


def main(arguments: Sequence[str] | None = None) -> int:
    """The self-test; its exit status, which is 1 if anything that is installed fails."""
    import argparse
    import platform

    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}" if __spec__ else None,
        description="Check what parallel_backend can run on here, on the real engines.",
        epilog="The exit status is 1 if anything that is installed fails; what is missing is none, unless it was asked for.",
    )
    names = list(ParallelBackend.BACKENDS)
    again = "check this one only, and fail if it is missing; can be given several times"
    parser.add_argument("--backend", action="append", choices=names, help=again)
    asked = parser.parse_args(arguments).backend
    chosen = asked or names

    def say(what: str, result: str, seconds: float | None = None) -> None:
        time_taken = "" if seconds is None else f"{seconds * 1000:8,.0f} ms"
        print(f"  {what:<24} {result:<6}{time_taken}".rstrip(), flush=True)

    limits = _cpu_limits()
    count, reason = min(limits)
    of = f" of {limits[0][0]}" if limits[0][0] > count else ""
    print(f"parallel_backend {__version__}")
    say("Python", f"{platform.python_version()} on {platform.platform()}")
    say("CPUs", f"{count}{of}: {reason}")
    failed = []
    for name in chosen:
        print()
        try:
            version = "" if name == "sequential" else _import_or_explain(name).__version__
        except ImportError as error:
            print(f"{name}: {'not installed: ' if error.name == name else ''}{error}")
            if error.name != name or asked:
                failed.append(name)
            continue
        print(f"{name} {version}".rstrip())
        started = time.perf_counter()
        try:
            say("where", _surroundings(name))
            backend = init_parallel_backend(name)
            say("start", "ok", time.perf_counter() - started)
            started = time.perf_counter()
            for what, holds in _checks(backend, cancels=name != "sequential"):
                say(what, "ok" if holds else "FAILED", time.perf_counter() - started)
                failed += [] if holds else [name]
                started = time.perf_counter()
            for what, amount in _costs(backend):
                say(what, amount)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failed.append(name)
    which = ", ".join(dict.fromkeys(failed))
    print(f"\nFailed: {which}" if failed else "\nAll that is installed works.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
