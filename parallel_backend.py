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

The version is ``__version__`` below; README.md ends with the list of changes.

SPDX-License-Identifier: MIT
Copyright (c) 2026 the parallel_backend developers
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
import warnings
import weakref
from concurrent.futures import CancelledError, Executor, Future, as_completed
from concurrent.futures import TimeoutError as FutureTimeoutError  # not the builtin before 3.11
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast, overload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import ModuleType
    from typing import Generic, Literal, TypeAlias

T = TypeVar("T")

__version__ = "0.9.0"
__all__ = [
    "CancellationPolicy",
    "JoblibParallelBackend",
    "ParallelBackend",
    "ParallelConfig",
    "RayParallelBackend",
    "SequentialParallelBackend",
    "available_cpus",
    "deprecated",
    "init_parallel_backend",
]

_log = logging.getLogger(__name__)


class CancellationPolicy(enum.Flag):
    """What becomes of an executor's tasks when it ends: at the end of its ``with`` block, at
    ``shutdown()``, when it is dropped, and when the interpreter exits."""

    NONE = 0
    """All tasks run to their end."""
    PENDING = 1
    """Tasks not started are cancelled; those running run to their end."""
    RUNNING = 2
    """Running tasks are stopped, and their workers with them; those not started still run."""
    ALL = PENDING | RUNNING
    """Nothing goes on: the executor ends at once, whatever its tasks do."""


def _as_policy(value: CancellationPolicy | bool) -> CancellationPolicy:
    if isinstance(value, bool):
        return CancellationPolicy.PENDING if value else CancellationPolicy.NONE
    if not isinstance(value, CancellationPolicy):
        raise TypeError(f"cancel_futures must be a CancellationPolicy or a bool, not {value!r}")
    return value


# --- deprecation ------------------------------------------------------------------------------


def _warn_caller(message: str, category: type[Warning]) -> None:
    """Warn at the nearest line outside this file: there stands what the reader can change."""
    level, frame = 1, sys._getframe()
    # Nor can they change the event loop, which before Python 3.12 may be what steps a coroutine.
    while frame.f_back is not None and (
        frame.f_globals is globals() or str(frame.f_globals.get("__name__")).startswith("asyncio.")
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _meant(value: object, parameter: inspect.Parameter | None) -> bool:
    """Whether a caller who passes ``value`` says more than the parameter's default does."""
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
    """Deprecate a callable, or some of its arguments.

    The warning is attributed to the caller's line, so that Python's filters show it once a place.
    Functions, methods, class and static methods, ``__init__`` and coroutine functions can be
    decorated; name, docstring, signature and pickling stay as they are.

    Args:
        target: ``True`` deprecates the arguments in ``args_mapping``, ``None`` the callable
            itself; a function likewise, and every call is forwarded to that function.
        args_mapping: what becomes of an argument: ``{"old": "new"}`` passes its value on as
            ``new``, ``{"old": None}`` drops it, ``{"old": "old"}`` only warns. With
            ``target=True`` a value other than the argument's default warns, and nothing else.
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
        places, seats = (
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
            placed = dict(zip(places, args))
            moved = []
            for old, new in mapping.items():
                source = placed if old in placed else named
                if old not in source:
                    continue
                value = source[old]
                meant = _meant(value, given.get(old))
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
                    if new in source and _meant(source.pop(new), taken.get(new)):
                        raise TypeError(f"{name}() got both {new!r} and {old!r}, its old name")
                renamed[new] = value
            placed.update(renamed)
            leading = list(takewhile(placed.__contains__, seats))
            args = (*map(placed.pop, leading), *args[len(places) :])
            return args, {**named, **placed}

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = translate(args, kwargs)
            return receiver(*args, **kwargs)

        if inspect.iscoroutinefunction(receiver):
            if sys.version_info >= (3, 12):
                inspect.markcoroutinefunction(wrapper)
            else:
                # Only a coroutine function passes for one there, and it warns at its first step:
                # of the line that awaits it, or failing that, of the one that runs the event loop.
                plain = wrapper

                async def stepped(*args: Any, **kwargs: Any) -> Any:
                    return await plain(*args, **kwargs)

                wrapper = functools.wraps(function)(stepped)
        if target is not True:
            cast("Any", wrapper).__deprecated__ = whole  # as PEP 702 has it
        return wrapper

    return decorate


def _evaluated(cls: type[T]) -> type[T]:
    """Let dataclass() see types and not strings, for which it needs sys.modules[__name__]: that is
    missing where the file was loaded from its path and nobody has put it there."""
    cls.__annotations__ = {k: eval(v) for k, v in cls.__annotations__.items()}
    return cls


@dataclass(frozen=True)
@_evaluated
class ParallelConfig:
    """The configuration of old, still honoured; deprecated since 0.9.0, gone in 0.10.0.

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
    """How many CPUs this process may keep busy, at least 1.

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
            continue  # soon: there may be thousands
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
            # One is beyond this cgroup namespace, the way there without names: the mount is as
            # near as we can see.
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

if TYPE_CHECKING:
    _Work: TypeAlias = "_Task | _Chunk"  # what an engine is given

    class Handle(Generic[T]):
        """What ``wrap(…)(…)`` returns, to type checkers; what it really is, is the engine's."""


class ParallelBackend(abc.ABC):
    """Where tasks run: a base class, and the registry of the classes that derive from it.

    A subclass names itself, ``class Mine(ParallelBackend, backend_name="mine")``, and is then what
    ``init_parallel_backend("mine")`` returns. It

    - must provide :meth:`executor`, which returns any :class:`concurrent.futures.Executor`;
    - may override :meth:`put` with :meth:`_value` where its engine can hold an object for its
      workers, :meth:`wrap` with :meth:`_futures` where the engine has handles of its own, and
      :meth:`_cpus` where its CPUs are not this process's. Without, objects travel with each task,
      and handles are futures of a background executor, whose tasks always run to their end.

    Raises:
        ImportError: if a package that the backend needs is not installed.
        ValueError: from the ``class`` statement, if another class has that ``backend_name``.
    """

    BACKENDS: ClassVar[dict[str, type[ParallelBackend]]] = {}
    _n_cpus_local: ClassVar[int | None] = None

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

    @classmethod
    @abc.abstractmethod
    def executor(
        cls,
        max_workers: int | None = None,
        *,
        config: ParallelConfig | None = None,
        cancel_futures: CancellationPolicy | bool = CancellationPolicy.PENDING,
    ) -> Executor:
        """A new executor.

        Args:
            max_workers: how many tasks may run at once; ``effective_n_jobs(-1)`` by default.
            config: deprecated since 0.9.0; its ``n_cpus_local`` bounds ``max_workers``.
            cancel_futures: what becomes of the tasks when the executor ends; ``True`` means
                ``PENDING``, ``False`` means ``NONE``.

        Raises:
            ValueError: ``max_workers`` is below 1.
            TypeError: ``max_workers`` is no int, or ``cancel_futures`` neither policy nor bool.
        """

    def put(self, v: T) -> T:
        """A handle to ``v``, sent to the workers once where the engine can do that.

        As an argument of a task it arrives as the object, which is why it is typed as one; here,
        only :meth:`get` makes an object of it. Workers may see it read-only.
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
        """The value behind a handle or a future, or behind each in a list or tuple of them.

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

    def wrap(self, fun: Callable[..., T], **options: Any) -> Callable[..., Handle[T]]:
        """A callable that starts ``fun`` in the background and returns a handle to its result.

        Handles among its arguments arrive as what they stand for. Where the engine can't wait for
        that, the callable does, before it returns.

        Args:
            options: the engine's, such as Ray's ``num_cpus``; ignored by an engine without them.
        """

        @functools.wraps(fun)
        def start(*args: Any, **kwargs: Any) -> Any:
            try:
                args = tuple(v.result() if isinstance(v, Future) else v for v in args)
                kwargs = {k: v.result() if isinstance(v, Future) else v for k, v in kwargs.items()}
            except Exception as error:
                failed: Future[Any] = Future()
                failed.set_exception(error)
                return failed
            background = self._background.get(os.getpid())
            if background is None:  # no lock, which a forked child might inherit locked
                background = self.executor(cancel_futures=CancellationPolicy.NONE)
                background = self._background.setdefault(os.getpid(), background)
            return background.submit(fun, *args, **kwargs)

        return start

    def wait(
        self, v: Sequence[Any], *, num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Any], list[Any]]:
        """Wait until ``num_returns`` of the handles or futures ``v`` are done.

        Failed and cancelled ones are done; so is what is no handle at all.

        Args:
            timeout: seconds, after which fewer may be done.

        Returns:
            (done, not_done), each in the order of ``v``; as with :func:`ray.wait`, ``done`` holds
            ``num_returns`` at most.

        Raises:
            ValueError: if ``num_returns`` is below 1 or above the number of handles.
        """
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
        """How many jobs ``n_jobs`` stands for here, by joblib's convention.

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
        return handle.result(timeout) if isinstance(handle, Future) else handle

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
    else ``"joblib"``.

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

        nearest = difflib.get_close_matches(str(backend_name), known, n=1, cutoff=0)
        raise NotImplementedError(
            f"There is no parallel backend {backend_name!r}{source}. "
            f"Choose from {', '.join(sorted(known))}; the nearest is {nearest[0]!r}."
        )
    backend = known[backend_name]
    return (backend if config is None else backend._configured(config))()


# --- the executor core ------------------------------------------------------------------------
#
# What follows keeps every promise that does not need to know an engine. One lock, the core's,
# guards all of its state and that of its mappings. It is never held while an engine, a callback
# or other code of the user's runs; a future's own lock may be taken inside it, never around it.

Items = list[tuple[Any, ...]]
"""The positional arguments of each item; a task has but one."""

Call = tuple["Callable[..., Any]", Items, dict[str, Any], float]
"""What a worker is given: the callable, the items, keywords for all of them, and the seconds after
which it begins no further item. Dropped as soon as it can't be needed, for it may hold much."""

Reply = tuple[list[Any], "BaseException | None", int, float]
"""What became of a task's items: the results up to the first failure, that failure, how many
items were begun (0 with a failure: none is known to have been, for what was sent could not be
read), and seconds that they took in the worker."""

AHEAD_SECONDS = 0.05  # how much work may wait at an engine that wants its tasks early


class _Engine(abc.ABC):
    """What runs tasks: starts one, says when it is done, can stop what runs. Nothing else."""

    stoppable = False
    """Whether :meth:`stop` can."""
    chunk_seconds = 0.03
    """How long a chunk of a map's items should take, for its overhead not to count; 0: no chunks."""
    inline = False
    """Whether :meth:`start` runs the task itself."""
    early = 0
    """How many more than may run it takes while tasks are short, bounding them itself."""

    @abc.abstractmethod
    def start(self, work: _Work, done: Callable[[_Work, Reply], None]) -> Reply | None:
        """Run ``work.call``; the reply, or None and ``done(work, reply)`` later, in any thread.

        The core has seen to it that there is room. An exception counts as a failure to start.
        """

    def stop(self, work: _Work) -> None:
        """Kill what runs ``work``, if it still does. Its reply comes as for any other."""

    def close(self) -> None:
        """Give back all resources; nothing runs any more."""

    def limit(self, max_workers: int) -> int:
        """How many tasks it runs at once, of those that were asked for."""
        return max_workers

    def lost(self) -> BaseException | None:
        """Why no reply will come any more, if so."""
        return None


class _Task(Future[Any]):
    """The future of one task, which holds its call too: nobody else need hold either."""

    stopped = False  # the policy has stopped it: a failure means that it was cancelled

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> None:
        super().__init__()
        self.call: Call | None = (fn, [args], kwargs, 0.0)

    # _condition and _state are Future's, private but the same since Python 3.2.

    def cancel(self) -> bool:
        try:
            return super().cancel()
        finally:
            with self._condition:  # also if a callback has left by sys.exit()
                if self._state == "CANCELLED":
                    self.call = None
                    # Tell wait() and as_completed() now, not when a worker would be free for it.
                    self.set_running_or_notify_cancel()

    def claim(self) -> bool:
        with self._condition:  # cancel() must not come between the two
            return not self.cancelled() and self.set_running_or_notify_cancel()

    def complete(self, reply: Reply) -> None:
        values, failure, _, _ = reply
        self.call = None
        if self.done():
            return  # Ctrl-C came between this and what makes room for the next
        if failure is None:
            self.set_result(values[0])
        else:
            self.set_exception(failure)

    def cancel_running(self) -> None:
        with self._condition:
            self._state = "PENDING"  # as if it had never run: cancel() refuses what does
        self.cancel()


class _Mapping:
    """The items of one ``map``, cut into chunks as workers get free, and their outcomes.

    Guarded by the core's lock.
    """

    def __init__(self, core: _Core, fn: Callable[..., Any], chunksize: int | None) -> None:
        self.core = core
        self.fn = fn
        self.chunksize = chunksize
        self.seconds: float | None = None  # of an item, of late
        self.items: collections.deque[tuple[Any, ...]] = collections.deque()
        """Those in no chunk yet; while there are any, this stands among the core's pending."""
        self.first = 0  # index of items[0]
        self.outcomes: dict[int, tuple[list[Any], BaseException | None]] = {}
        """By the index of its first item: the results, then what was raised."""
        self.changed = threading.Condition(core.lock)  # notified of outcomes
        self.abandoned = False  # nobody will ask for further results

    def size(self, left: int) -> int:
        """How many items a chunk shall have, of those that are left."""
        target = self.core.engine.chunk_seconds
        if not target:
            return 1
        if self.chunksize is not None or self.seconds is None:
            return self.chunksize or 1
        each = max(self.seconds, 1e-7)
        # A quarter of a worker's share, so that what turns out longer than expected is spread;
        # but not so few that the overhead counts, nor more than need be for it not to.
        share = left / (4 * self.core.engine.limit(self.core.max_workers))
        return max(int(min(max(share, target / 60 / each), target / each)), 1)

    def cut(self) -> _Chunk:
        """The next chunk."""
        if self.abandoned:
            self.items.clear()
        left = len(self.items)
        start = self.first
        items = [self.items.popleft() for _ in range(min(self.size(left), left))]
        self.first += len(items)
        return _Chunk(self, start, items)

    def cancel(self) -> None:
        """Cancel what is in no chunk."""
        with self.changed:
            self.outcomes[self.first] = ([], CancelledError())
            self.items.clear()
            self.changed.notify_all()


class _Chunk:
    """Some items of a map; to an engine, and for cancellation, it is one task."""

    stopped = False  # as of a task

    def __init__(self, mapping: _Mapping, start: int, items: Items) -> None:
        self.mapping = mapping
        self.start = start
        # A chunk that takes far longer than measured comes back early: its last items are not
        # stranded behind a long one while other workers idle.
        budget = mapping.core.engine.chunk_seconds if mapping.chunksize is None else float("inf")
        self.call: Call | None = (mapping.fn, items, {}, budget)

    def claim(self) -> bool:
        return not self.mapping.abandoned

    def complete(self, reply: Reply) -> None:
        if self.call is None:
            return  # as above
        values, failure, begun, seconds = reply
        items, self.call = self.call[1], None
        mapping = self.mapping
        with mapping.changed:
            size = 1
            if begun:
                each = seconds / begun
                mapping.seconds = each if mapping.seconds is None else (mapping.seconds + each) / 2
                size = mapping.size(len(items) - begun + len(mapping.items))
            elif len(items) == 1:
                begun = 1
            # Otherwise one of them can't be sent, or not be read: it alone shall fail.
            if begun:
                mapping.outcomes[self.start] = (values, failure)
                mapping.changed.notify_all()
            mapping.core.give_back(
                [
                    _Chunk(mapping, self.start + n, items[n : n + size])
                    for n in range(begun, len(items), size)
                ]
            )

    def cancel(self) -> None:
        self.call = None
        with self.mapping.changed:
            self.mapping.outcomes[self.start] = ([], CancelledError())
            self.mapping.changed.notify_all()

    cancel_running = cancel  # a chunk has no state of its own


class _Core:
    """The state of an executor: what is pending, what runs, and what is to become of it.

    Apart from :class:`_Executor`, so that an engine's threads, which know this, do not keep an
    executor alive that everybody else has dropped.
    """

    live: ClassVar[weakref.WeakSet[_Core]] = weakref.WeakSet()

    def __init__(self, engine: _Engine, max_workers: int, policy: CancellationPolicy) -> None:
        self.engine = engine
        self.max_workers = max_workers
        self.policy = policy
        # Reentrant: a reference dropped under it may be the last to an object whose __del__ submits.
        self.lock = threading.RLock()
        self.ended = threading.Condition(self.lock)  # notified when closed
        self.pending: collections.deque[_Work | _Mapping] = collections.deque()
        self.running: set[_Work] = set()
        self.finishing: set[_Work] = set()  # of those, they whose end is being told
        self.short: tuple[weakref.ref[Any], float] | None = None
        """What was run last and the seconds that it takes, for an engine that takes tasks early."""
        self.taking = False  # in take()
        self.shut = False  # no more tasks are taken
        self.discard = False  # nor are those run that are pending
        self.closing = self.closed = False  # the engine, by whoever has set the first
        self.inside: set[int] = set()  # threads in feed(), where callbacks and inline tasks run
        self.live.add(self)
        # The handler called last is the one registered first: be before Ray's and multiprocessing's.
        atexit.unregister(_end_all)
        atexit.register(_end_all)

    def add(self, new: _Task | _Mapping, items: Items | None = None) -> None:
        """Take a task, or further items of a mapping."""
        with self.lock:
            if self.shut:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if isinstance(new, _Task) or not new.items:
                self.pending.append(new)
            if isinstance(new, _Mapping):
                new.items.extend(items or ())
            room = self.engine.limit(self.max_workers) + self.engine.early
            is_room = len(self.running) < room
        if is_room:
            self.feed()
        self.fail_lost()  # rather than to wait for what will never end

    def give_back(self, entries: Sequence[_Work | _Mapping]) -> None:
        """What is next to run, because it could not yet; under the lock."""
        if not self.discard:
            self.pending.extendleft(reversed(entries))
            return
        for entry in entries:
            entry.cancel()

    def feed(self, work: _Work | None = None, reply: Reply | None = None) -> None:
        """Finish ``work``, if given, and hand the engine all that it has room for."""
        thread = threading.get_ident()
        outermost = thread not in self.inside
        self.inside.add(thread)
        try:
            while True:
                if work is not None and reply is not None:
                    self.finish(work, reply)
                work = reply = None  # an engine that is slow to start must not keep them alive
                try:
                    with self.lock:
                        work = self.take()
                    if work is None:
                        break
                    reply = self.engine.start(work, self.feed)
                    if reply is not None and isinstance(reply[1], KeyboardInterrupt):
                        raise reply[1]  # of a task in this thread, but meant for the program
                except BaseException as error:
                    if work is not None:
                        self.finish(work, reply or ([], error, 0, 0.0))
                    if work is None or not isinstance(error, Exception):
                        raise
                    reply = None
        finally:
            if outermost:
                self.inside.discard(thread)
        self.close_if_ended()

    def take(self) -> _Work | None:
        """The next to run, counted as running from now on; under the lock."""
        if self.taking:
            return None  # some __del__ that runs in here has submitted: the take() outside goes on
        self.taking = True
        try:
            room = self.engine.limit(self.max_workers)
            while self.pending and len(self.running) < room + self.ahead(self.pending[0], room):
                head = self.pending.popleft()
                work: _Work = head.cut() if isinstance(head, _Mapping) else head
                if isinstance(head, _Mapping) and head.items:
                    self.give_back([head])
                if work.claim():
                    self.running.add(work)
                    return work
            return None
        finally:
            self.taking = False

    def ahead(self, head: _Work | _Mapping, room: int) -> int:
        """How many more than may run the engine may have of what is next; under the lock."""
        if not self.engine.early or self.short is None:
            return 0
        # Short tasks may wait at the engine; others stay here, where they can be cancelled.
        function, seconds = self.short
        fn = head.fn if isinstance(head, _Mapping) else head.call and head.call[0]
        if fn is None or function() is not fn:
            return 0
        return min(int(AHEAD_SECONDS * room / max(seconds, 1e-9)), self.engine.early)

    def finish(self, work: _Work, reply: Reply) -> None:
        """Tell a task's future what became of it; only then make room for the next."""
        with self.lock:
            if work not in self.running or work in self.finishing:
                return  # Ctrl-C hit start() when the engine had it already; or the engine is lost
            self.finishing.add(work)
        _, failure, begun, seconds = reply
        fn = work.call[0] if work.call and self.engine.early and begun else None
        try:
            if work.stopped and failure is not None:
                work.cancel_running()
            else:
                work.complete(reply)
        except BaseException:
            if threading.current_thread() is threading.main_thread():
                raise  # Ctrl-C
            # A callback has left by sys.exit(), say. The engine's thread lives on.
            _log.critical("Exception in a callback of a task", exc_info=True)
        finally:
            # Not before: never are more than max_workers running().
            with self.lock:
                self.running.discard(work)
                self.finishing.discard(work)
                if fn is not None:
                    with contextlib.suppress(TypeError):  # not everything can be weakly referenced
                        known = self.short is not None and self.short[0]() is fn
                        mean = (self.short[1] + seconds) / 2 if known and self.short else seconds
                        self.short = weakref.ref(fn), mean

    def shutdown(self, wait: bool = True, policy: CancellationPolicy | None = None) -> None:
        """End: apply the policy and, if ``wait``, stay until nothing runs any more.

        Without a policy, the executor's own is applied the first time; later there is but to wait.
        """
        stopped: set[_Work] = set()
        cancelled: collections.deque[_Work | _Mapping] = collections.deque()
        raised = None
        with self.lock:
            if policy is None:
                policy = CancellationPolicy.NONE if self.shut else self.policy
            self.shut = True
            if CancellationPolicy.PENDING in policy:
                self.discard = True
                cancelled, self.pending = self.pending, cancelled
            if CancellationPolicy.RUNNING in policy and self.engine.stoppable:
                stopped = self.running - self.finishing
                for work in stopped:
                    work.stopped = True
        while stopped or cancelled:  # emptied, for who waits below is to hold none of them
            try:
                if stopped:
                    self.engine.stop(stopped.pop())
                else:
                    cancelled.popleft().cancel()
            except BaseException as error:
                raised = error  # Ctrl-C, or a callback has left by sys.exit(): the others first
        if raised is not None:
            raise raised
        self.fail_lost()
        self.feed()  # Ctrl-C may have come before it where tasks were added
        if not wait or threading.get_ident() in self.inside:
            return  # a task or callback of ours that waited here would wait for itself
        try:
            with self.lock:  # which some __del__ that comes here may hold already, and wait() frees
                while not self.closed:
                    self.ended.wait()
        except BaseException:
            # Ctrl-C in the middle of the end: whoever asks again does not want to wait for tasks.
            self.shutdown(wait=False, policy=CancellationPolicy.ALL)
            raise

    def fail_lost(self) -> None:
        """Fail what runs, if no reply will come any more."""
        if not self.running:
            return  # in a forked child too, where an engine had better not be asked
        running = list(self.running)
        reason = self.engine.lost()
        if self.engine.inline and not self.inside:  # asked last: it may be, by now, that none runs
            reason = KeyboardInterrupt()  # which has hit feed() itself
            self.finishing.clear()
        if reason is not None:
            for work in running:
                self.feed(work, ([], reason, 1, 0.0))

    def close_if_ended(self) -> None:
        with self.lock:
            if not self.shut or self.pending or self.running or self.taking or self.closing:
                return
            self.closing = True
        try:
            self.engine.close()
        finally:
            with self.lock:
                self.closed = True
                self.ended.notify_all()

    def forget(self) -> None:
        """In a forked child, which has none of our threads, and no right to our workers."""
        self.lock = threading.RLock()
        self.ended = threading.Condition(self.lock)
        self.shut = self.closing = self.closed = True
        self.pending.clear()
        self.running.clear()


class _Executor(Executor):
    """An executor over an engine; what it promises stands in the README."""

    def __init__(self, engine: _Engine, max_workers: int, policy: CancellationPolicy) -> None:
        self._core = _Core(engine, max_workers, policy)
        self._max_workers = max_workers  # read by dask and others, as the standard library's
        weakref.finalize(self, _drop, self._core).atexit = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run ``fn(*args, **kwargs)`` on a worker, once there is room.

        Raises:
            RuntimeError: after :meth:`shutdown`.
        """
        task = _Task(fn, args, kwargs)
        self._core.add(task)
        return task

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | None = None,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Like ``map(fn, *iterables)``, in parallel; results come in order.

        Args:
            timeout: seconds from now, after which the iterator raises.
            chunksize: how many items go to a worker at once. By default, as many as take some
                tens of milliseconds, as measured on those before. Items in one chunk run one
                after the other: where one must wait for another, give 1.
            buffersize: how many items may be in flight, read but not yielded. The iterables are
                then read as the results are, and may be endless; otherwise they are read now.

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
        mapping = _Mapping(core, fn, chunksize)
        source: Iterator[tuple[Any, ...]] = zip(*iterables)
        step = min(chunksize or 1, buffersize or 1)  # how many are read at a time, with buffersize

        def read(count: int | None) -> int:
            items = list(islice(source, count))
            if items:
                core.add(mapping, items)
            return len(items)

        known = read(buffersize and buffersize // step * step)  # how many items there are
        if buffersize is None:
            source = iter(())  # zip() holds the first that it has yielded

        def results() -> Iterator[T]:
            nonlocal known
            _keep = self  # as long as somebody wants the results, the executor is not dropped
            index = yielded = 0
            try:
                while index < known:
                    with core.lock:
                        while index not in mapping.outcomes:
                            left = None if deadline is None else deadline - time.monotonic()
                            if (left is not None and left <= 0) or not mapping.changed.wait(left):
                                raise FutureTimeoutError(
                                    f"map() took longer than {timeout} seconds"
                                )
                        values, failure = mapping.outcomes.pop(index)
                    index += len(values)
                    values.reverse()
                    while values:
                        yield values.pop()  # keeps no reference to what it yields
                        yielded += 1
                        if buffersize is not None and yielded % step == 0:
                            known += read(step)
                    if failure is not None:
                        try:
                            raise failure
                        finally:
                            del failure  # it holds this frame
            finally:
                # No lock here: the garbage collector may close this anywhere, inside ours too.
                mapping.abandoned = True

        return results()

    def shutdown(
        self, wait: bool = True, *, cancel_futures: CancellationPolicy | bool | None = None
    ) -> None:
        """End: take no more tasks, and do with those there are as the policy says.

        Args:
            wait: return only when nothing runs any more and the workers are given back.
            cancel_futures: a policy, a bool, or None for the executor's own.
        """
        self._core.shutdown(wait, None if cancel_futures is None else _as_policy(cancel_futures))


def _drop(core: _Core) -> None:
    """End an executor that nobody has any more."""
    # The garbage collector calls this in any thread, maybe inside our lock: never take it here.
    # threading.Thread takes locks of its own, so it is the bare function. At the interpreter's
    # exit no thread can start any more; there, _end_all() does what is to do.
    with contextlib.suppress(RuntimeError):
        _thread.start_new_thread(core.shutdown, (False,))


def _end_all() -> None:
    """At exit: apply the policies, to all executors first, so that they end side by side."""
    cores = list(_Core.live)
    for core in cores:
        core.shutdown(wait=False)
    for core in cores:
        core.shutdown()


def _forget_all() -> None:
    for core in _Core.live:
        core.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


# --- what workers run -------------------------------------------------------------------------


def _worker_functions() -> tuple[Callable[..., Any], ...]:
    """(run, said, seal, serve, map_file): defined in here so that cloudpickle sends them by value.

    A worker need not be able to import this file. They use nothing of it but the names of the
    standard library's modules, which cloudpickle sends as such.
    """

    def run(fn: Callable[..., Any], items: Items, kwargs: dict[str, Any], budget: float) -> Reply:
        """Call ``fn`` for each item, until one fails or ``budget`` seconds are over."""
        values: list[Any] = []
        error = None
        started = time.perf_counter()
        for args in items:
            try:
                values.append(fn(*args, **kwargs))
            except BaseException as raised:
                # Without this frame, which would hold the arguments.
                tb = raised.__traceback__
                error = raised.with_traceback(tb and tb.tb_next)
                break
            if time.perf_counter() - started > budget:
                break
        try:
            return values, error, len(values) + (error is not None), time.perf_counter() - started
        finally:
            del error  # or it and this frame hold each other

    def said(error: BaseException) -> str:
        """Type and message of an exception, even of one whose __str__ fails."""
        return traceback.format_exception_only(type(error), error)[-1].strip()

    def pack(error: BaseException | None, dumps: Callable[..., bytes]) -> tuple[bytes, str] | None:
        """An exception and its traceback, so that it can't fail to be pickled."""
        if error is None:
            return None
        try:
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        except Exception:
            text = f"{type(error).__name__}, whose traceback can't be shown"
        try:
            return dumps(error), text
        except BaseException as reason:
            what = f"Could not pickle the exception that a task raised, {type(error).__name__}"
            return pickle.dumps(pickle.PicklingError(f"{what}: {said(reason)}")), text

    def seal(reply: Reply, dumps: Callable[..., bytes], buffers: list[Any] | None = None) -> bytes:
        """The pickle of a reply, or else of the failure to pickle it; its buffers go to a list."""
        keep = None if buffers is None else buffers.append
        values, error, begun, seconds = reply
        try:
            return dumps((values, pack(error, dumps), begun, seconds), buffer_callback=keep)
        except BaseException as raised:
            reason = raised
        # One of the results, then. The first that can't be pickled fails; those after it are never
        # asked for. If each alone can be, the last one has to stand for all.
        good, value = 0, None
        for good, value in enumerate(values):
            try:
                dumps(value)
            except BaseException as raised:
                reason = raised
                break
        error = reason  # sys.exit(), say, stays what it is
        if isinstance(reason, Exception):
            what = f"Could not pickle the result of a task, {type(value).__name__}: {said(reason)}"
            error = pickle.PicklingError(what).with_traceback(reason.__traceback__)
        if buffers is not None:
            buffers.clear()
        return dumps((values[:good], pack(error, dumps), begun, seconds), buffer_callback=keep)

    def serve(connection: Any, parent: int, lifeline: Any, dumps: Callable[..., bytes]) -> None:
        """The life of a worker process: read a call, run it, write its reply."""
        import faulthandler
        import multiprocessing

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
        if not faulthandler.is_enabled() and sys.stderr is not None:
            faulthandler.enable()

        # Mapped files stay mapped from task to task, for which page faults would take longer
        # than many a task, but no longer than a second: they may be large, and gone elsewhere.
        maps: dict[str, Any] = {}
        process: Any = multiprocessing.current_process()
        process.parallel_backend_maps = maps  # map_file comes by value: this both can find
        while True:
            try:
                if maps and not connection.poll(1):
                    maps.clear()
                message = connection.recv_bytes()
            except (EOFError, OSError):
                return
            try:
                call = pickle.loads(message)
            except BaseException as error:
                message = dumps(([], pack(error, dumps), 0, 0.0))
            else:
                del message
                reply = run(*call)
                del call
                message = seal(reply, dumps)
                del reply
            connection.send_bytes(message)
            del message

    def map_file(path: str, spans: list[tuple[int, int]]) -> Any:
        """Load an object from a file of :class:`_Shared`."""
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

    return run, said, seal, serve, map_file


_run, _said, _seal, _serve, _map_file = _worker_functions()


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

    return _caused(error, _RemoteTraceback(cast("Any", f'\n"""\n{text}"""')))


def _caused(error: BaseException, cause: BaseException) -> BaseException:
    # Not by assignment, which an exception may refuse: one that is a frozen dataclass, say.
    object.__setattr__(error, "__cause__", cause)
    return error


def _opened(data: bytes | None, rest: Any, name: str, count: int) -> Reply:
    """The reply that a worker has sealed: its pickle and buffers, or None and the reply itself."""
    try:
        reply = rest if data is None else pickle.loads(data, buffers=rest)
    except BaseException as error:
        return [], _broken(f"The result of {name} could not be unpickled", error), count, 0.0
    values, packed, begun, seconds = reply
    return values, _unpack(packed, name, begun), begun, seconds


def _broken(message: str, cause: BaseException | None = None) -> BaseException:
    from concurrent.futures.process import BrokenProcessPool  # brings in multiprocessing

    if cause is None:
        return BrokenProcessPool(message)
    return _caused(BrokenProcessPool(f"{message}: {_said(cause)}"), cause)


def _unpicklable(name: str, reason: BaseException) -> BaseException:
    message = f"Could not pickle the call of {name}, or its arguments: {_said(reason)}"
    return _caused(pickle.PicklingError(message), reason)


def _name(work: _Work) -> str:
    """What to call a task in an error."""
    fn = work.call[0] if work.call else work
    try:
        return str(cast("Any", fn).__qualname__)
    except Exception:
        return f"a {type(fn).__name__}"


def _required(package: str) -> ModuleType:
    """A package that a backend can't do without, or a module of one."""
    top = package.partition(".")[0]
    try:
        # By itself: where it is blocked, an error of its submodule's import may name otherwise.
        importlib.import_module(top)
    except ImportError as error:
        if error.name not in (top, None):
            raise  # it is there, but broken
        raise ImportError(f"This backend needs {top}: pip install {top}", name=top) from error
    return importlib.import_module(package)


# --- sequential -------------------------------------------------------------------------------


class _InlineEngine(_Engine):
    """Runs a task in the thread that submits it, or in the one that makes room for it."""

    inline = True

    def __init__(self) -> None:
        self.depths: collections.Counter[int] = collections.Counter()  # of tasks in each thread

    def limit(self, max_workers: int) -> int:
        # One; but a task that submits another one, and waits for it, must not wait for ever.
        return 1 + self.depths[threading.get_ident()]

    def start(self, work: _Work, done: Callable[[_Work, Reply], None]) -> Reply | None:
        assert work.call is not None
        thread = threading.get_ident()
        self.depths[thread] += 1
        try:
            return cast("Reply", _run(*work.call))
        finally:
            self.depths[thread] -= 1


class _EngineBackend(ParallelBackend):
    """A backend whose executors are the core over an engine."""

    @classmethod
    @_config_deprecated()
    def executor(
        cls,
        max_workers: int | None = None,
        *,
        config: ParallelConfig | None = None,
        cancel_futures: CancellationPolicy | bool = CancellationPolicy.PENDING,
        **options: Any,
    ) -> Executor:
        policy = _as_policy(cancel_futures)
        if isinstance(max_workers, bool) or not isinstance(max_workers, (int, type(None))):
            raise TypeError(f"max_workers must be an int, not {max_workers!r}")
        if max_workers is not None and max_workers < 1:
            raise ValueError("max_workers must be greater than 0")
        if config is not None:
            bounded: Any = cls._configured(config)
            return cast("Executor", bounded.executor(max_workers, cancel_futures=policy, **options))
        workers = min(max_workers or cls.effective_n_jobs(-1), cls._n_cpus_local or sys.maxsize)
        return _Executor(cls._engine(workers, **options), workers, policy)

    @classmethod
    @abc.abstractmethod
    def _engine(cls, workers: int) -> _Engine:
        """An engine for an executor with so many workers, and options for its tasks, if it has any."""


class SequentialParallelBackend(_EngineBackend, backend_name="sequential"):
    """Runs every task at once, in the calling process: for debuggers, profilers and ``print``."""

    @classmethod
    def _engine(cls, workers: int) -> _Engine:
        return _InlineEngine()


# --- joblib -----------------------------------------------------------------------------------

IDLE_SECONDS = 60  # after which a worker without a task ends


def _loky_tracker() -> ModuleType:
    """loky's process that outlives this one to remove its files; no public name of joblib's."""
    return _required("joblib.externals.loky.backend.resource_tracker")


class _LokyWorker:
    """A loky process and the thread of ours that drives it.

    loky's own executor is not used: one dead worker breaks all of it, and what waits inside it
    can't be told from what runs. Here a process's death costs the task it ran, no other.
    """

    alive: ClassVar[weakref.WeakSet[_LokyWorker]] = weakref.WeakSet()
    spawning: ClassVar[dict[Any, int]] = {}
    """The far ends of connections to processes that are being started, and by which thread."""

    def __init__(self, env: dict[str, str], shape: tuple[object, ...]) -> None:
        self.env = env
        self.shape = shape
        self.engines: queue.SimpleQueue[_LokyEngine | None] = queue.SimpleQueue()
        """Whom to work for next; None: no more."""
        self.lock = threading.Lock()  # guards process and work: only what runs work may be killed
        self.process: Any = None
        self.connection: Any = None
        self.lifeline: Any = None
        self.work: _Work | None = None
        self.crashed = False
        self.alive.add(self)
        threading.Thread(target=self._live, name="parallel_backend worker", daemon=True).start()

    def _live(self) -> None:
        while True:
            try:
                engine = self.engines.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                try:
                    _LokyEngine.parked.remove(self)  # atomic
                except ValueError:
                    continue  # an engine has just taken it
                break
            if engine is None:
                break
            while self._work_for(engine):
                pass
            del engine  # not to be held while waiting
        self.kill()

    def _work_for(self, engine: _LokyEngine) -> bool:
        """Run one task of the engine; whether there may be another."""
        try:
            order = engine.orders.get(timeout=IDLE_SECONDS if self.process else None)
        except queue.Empty:
            self.kill()
            return True
        if order is None:
            return False
        work, done = order
        try:
            reply = self._execute(work)
        except BaseException as error:  # of ours; a thread that ends would leave all waiting
            reply = [], error, 1, 0.0
        engine.clean &= not self.crashed
        done(work, reply)
        with engine.lock:
            engine.taken -= 1
        return True

    def _execute(self, work: _Work) -> Reply:
        call = work.call
        if call is None:
            return [], CancelledError(), 1, 0.0  # finished already, by a Ctrl-C in start()
        name, count = _name(work), len(call[1])
        try:
            message = _dumps(call)
        except BaseException as error:
            return [], _unpicklable(name, error), 0, 0.0
        del call
        with self.lock:
            if work.stopped:
                return [], CancelledError(), count, 0.0
            self.work = work  # from now on, stop() finds it
        try:
            if self.process is None or not self.process.is_alive():
                self.kill()
                self._spawn(work)
            self.connection.send_bytes(message)
            del message
            reply = self.connection.recv_bytes()
        except BaseException as error:
            # It could not be started, or is gone; or it is out of step with us, if this end failed.
            failure = error if self.process is None else self._died(name)
            return [], failure, count, 0.0
        finally:
            with self.lock:
                self.work = None
            if work.stopped:
                self.kill()  # the signal may be on its way, and must not hit the next task
        return _opened(reply, (), name, count)

    def _spawn(self, work: _Work) -> None:
        from multiprocessing import Pipe, resource_tracker

        # loky's process starts a fresh interpreter that does not run __main__ anew. Its context
        # is no public name of joblib's, but has been there since joblib 0.12.
        context = _required("joblib.externals.loky.backend").get_context("loky")
        if sys.platform != "win32":
            # The process inherits the mask and is safe from Ctrl-C while it starts. To start one
            # of the trackers, which start() would do, removes the mask: so it is done before.
            resource_tracker.ensure_running()
            _loky_tracker().ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        ours, theirs = Pipe()
        watched, self.lifeline = Pipe(duplex=False)  # its end tells the process of ours
        self.spawning[theirs] = threading.get_ident()
        try:
            args = theirs, os.getpid(), watched, _cloudpickle().dumps
            process = context.Process(target=_serve, args=args, env=self.env)
            process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            self.spawning.pop(theirs)
            theirs.close()
            watched.close()
        self.connection = ours
        with self.lock:
            self.process = process
            if work.stopped:  # stop() came too early to find a process
                _kill(process)

    def _died(self, name: str) -> BaseException:
        process = self.process
        self.crashed = True
        process.join(1)  # it has closed its connection, so it is gone, or as good as
        code = process.exitcode
        self.kill()
        how = "in a way unknown" if code is None else f"with exit code {code}"
        if code is not None and code < 0:
            how = f"by signal {-code} ({signal.Signals(-code).name})"
        return _broken(
            f"A worker process ended {how} while it ran {name}. It may have crashed in native code, "
            "have called os._exit(), or have been killed for its memory. Only what it ran is lost; "
            "the executor goes on."
        )

    def stop(self, work: _Work) -> None:
        """Kill the process, if it is this work that it runs."""
        with self.lock:
            if self.work is work and self.process is not None:
                _kill(self.process)

    def kill(self) -> None:
        """End the process, if there is one, and wait until it is gone."""
        with self.lock:
            process, self.process = self.process, None
            if process is not None:
                _kill(process)
        if process is not None:
            process.join()
            self.connection.close()
            self.lifeline.close()


def _kill(process: Any) -> None:
    """SIGKILL to a worker process and all that it has started."""
    if sys.platform == "win32":
        process.terminate()
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
        return
    if process.exitcode is None:  # it has no group yet
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


class _LokyEngine(_Engine):
    """Puts tasks into a queue, from which its workers take them."""

    stoppable = True
    parked: ClassVar[list[_LokyWorker]] = []
    """Warm workers of executors that ended well, for the next one of the same shape."""

    def __init__(self, max_workers: int, env: dict[str, str]) -> None:
        self.max_workers = max_workers
        self.env = env
        # What a new process would inherit: only for whom it is the same may a warm one do.
        self.shape = (os.path.abspath("."), *sys.path, *{**os.environ, **env}.items())
        self.lock = threading.Lock()  # guards workers and taken
        self.workers: list[_LokyWorker] = []
        self.clean = True  # no worker was stopped or has crashed: they may serve another executor
        self.taken = 0  # tasks that wait in orders, run, or whose callbacks do
        self.orders: queue.SimpleQueue[tuple[_Work, Callable[..., None]] | None] = (
            queue.SimpleQueue()
        )
        atexit.unregister(_kill_workers)
        atexit.register(_kill_workers)

    def start(self, work: _Work, done: Callable[[_Work, Reply], None]) -> Reply | None:
        with self.lock:
            if len(self.workers) < min(self.taken + 1, self.max_workers):
                worker = self.adopt() or _LokyWorker(self.env, self.shape)
                self.workers.append(worker)
                worker.engines.put(self)
            self.taken += 1
        self.orders.put((work, done))
        return None

    def adopt(self) -> _LokyWorker | None:
        for worker in self.parked[::-1]:
            if worker.shape == self.shape:
                with contextlib.suppress(ValueError):  # another engine, or its idle time, was first
                    self.parked.remove(worker)
                    return worker
        return None

    def stop(self, work: _Work) -> None:
        self.clean = False
        for worker in self.workers:
            worker.stop(work)

    def close(self) -> None:
        for worker in self.workers:
            self.orders.put(None)  # for any of them: each leaves this engine at its first
            if self.clean and worker.process is not None:
                self.parked.append(worker)
            else:
                worker.kill()
                worker.engines.put(None)
        # A program that changes its environment leaves some of another shape behind each time.
        for worker in self.parked[: -(4 * available_cpus() + len(self.workers))]:
            with contextlib.suppress(ValueError):
                self.parked.remove(worker)
                worker.engines.put(None)


def _kill_workers() -> None:
    """At exit, for which a script does not wait; and in tests."""
    _LokyEngine.parked.clear()
    for worker in list(_LokyWorker.alive):
        worker.kill()
        worker.engines.put(None)


def _forget_workers() -> None:
    """In a forked child: they are the parent's."""
    _LokyEngine.parked.clear()
    _LokyWorker.alive.clear()
    for connection, thread in _LokyWorker.spawning.items():
        # Or the parent would not see the worker's end while this child lives; unless this is the
        # worker, which older versions of loky fork in the thread that starts it.
        if thread != threading.get_ident():
            connection.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


@functools.cache
def _cloudpickle() -> ModuleType:
    """The cloudpickle that joblib uses: a package of its own since 1.6, one inside joblib before."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("joblib.externals.cloudpickle")
    return _required("cloudpickle")


def _dumps(value: object, buffers: list[pickle.PickleBuffer] | None = None) -> bytes:
    keep = None if buffers is None else buffers.append
    return cast("bytes", _cloudpickle().dumps(value, buffer_callback=keep))


class _Shared:
    """A handle to an object that workers read from shared memory.

    Unpickled anywhere on this machine, it is the object. What is large, is written once to a
    file, with pickle protocol 5 (PEP 574), so that the buffers of NumPy, pandas and Arrow data
    are mapped and not copied; what is small, is pickled along. The file goes with the handle;
    should this process be killed, loky's resource tracker removes it.
    """

    SMALL = 64 * 1024  # bytes, below which a copy is as fast as a file

    def __init__(self, value: object) -> None:
        buffers: list[pickle.PickleBuffer] = []
        outer, _pickling.handles = getattr(_pickling, "handles", None), []
        try:
            data = _dumps(value, buffers)
            self._inner = _pickling.handles  # what value refers to must not go before it
        finally:
            _pickling.handles = outer
        views = [buffer.raw() for buffer in buffers]
        if len(data) + sum(view.nbytes for view in views) < self.SMALL:
            self._call: Any = pickle.loads, (_dumps(value),)
            return
        self._call = _map_file, self._write([memoryview(data), *views])
        # Plain pickle can't send that function by value: it is to send a pickle that has it.
        self._call = pickle.loads, (_dumps(self),)

    def _write(self, parts: list[memoryview]) -> tuple[str, list[tuple[int, int]]]:
        import tempfile  # a fifth of the time that importing this file takes

        tracker = _loky_tracker()
        folders = [os.environ.get("JOBLIB_TEMP_FOLDER"), "/dev/shm", tempfile.gettempdir()]
        reason = None
        for folder in filter(None, folders):
            try:
                descriptor, path = tempfile.mkstemp(prefix="parallel_backend_", dir=folder)
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
            return path, spans
        raise OSError(f"Could not write a shared object to any of {folders}") from reason

    def load(self) -> Any:
        function, args = self._call
        return function(*args)

    def __reduce__(self) -> Any:
        if (handles := getattr(_pickling, "handles", None)) is not None:
            handles.append(self)
        return self._call


_pickling = threading.local()
"""Its ``handles``: those met while a thread pickles what another handle is made for."""


def _forget_file(unlink: Callable[[str, str], None], path: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked child has a copy of the handle
        unlink(path, "file")


class JoblibParallelBackend(_EngineBackend, backend_name="joblib"):
    """Runs tasks in processes of loky, joblib's own, on this machine.

    Each worker may use ``available_cpus() // max_workers`` threads for BLAS and OpenMP, unless
    the environment or ``joblib.parallel_config(inner_max_num_threads=…)`` says otherwise.
    """

    def __init__(self) -> None:
        _required("joblib")
        super().__init__()

    @classmethod
    def _engine(cls, workers: int) -> _Engine:
        active, _ = cls._active()
        inner = getattr(active, "inner_max_num_threads", None)
        threads = str(inner or max(available_cpus() // workers, 1))
        # As joblib.Parallel does, to keep n workers from starting n threads each.
        names = (n for n in active.MAX_NUM_THREADS_VARS if inner or n not in os.environ)
        return _LokyEngine(workers, dict.fromkeys(names, threads))

    @classmethod
    def _active(cls) -> tuple[Any, int | None]:
        """joblib's backend and n_jobs, as joblib.parallel_config() may have set them."""
        backend, jobs = _required("joblib.parallel").get_active_backend()
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

    def _value(self, handle: Any, timeout: float | None) -> Any:
        return handle.load() if isinstance(handle, _Shared) else super()._value(handle, timeout)


# --- Ray --------------------------------------------------------------------------------------


def _ray_functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(work, call): what Ray runs for an executor, and for ``wrap``; by value, as above."""
    run, seal = _run, _seal

    def work(spec: Any, *args: Any) -> Sequence[Any]:
        """Run a task or a chunk. Ray sees a task's arguments one by one if there are handles
        among them, to wait for those and to send what is behind them."""
        ray = importlib.import_module("ray")
        dumps = ray.cloudpickle.dumps
        fn, items, kwargs, names, budget, reraise = spec
        if args:
            split = len(args) - len(names)
            items, kwargs = [args[:split]], dict(zip(names, args[split:]))

        def resolved(*args: Any) -> Any:
            return fn(*(ray.get(a) if isinstance(a, ray.ObjectRef) else a for a in args))

        handles = any(isinstance(arg, ray.ObjectRef) for item in items for arg in item)
        values, error, begun, seconds = run(resolved if handles else fn, items, kwargs, budget)
        if reraise and isinstance(error, Exception):
            raise error
        plain = {bool, int, float, str, bytes, type(None), ray.ObjectRef}
        if error is None and plain.issuperset(map(type, values)):
            # Ray must see a handle that is a result, or it would keep the object for ever.
            # Lists of such are what Ray need not pickle.
            return [None, [values, None, begun, seconds]]
        # Not left to Ray: it unpickles in its I/O thread, where a failure would go unheard.
        buffers: list[Any] = []
        return seal((values, error, begun, seconds), dumps, buffers), buffers

    def call(fn: Any, names: list[str], *args: Any) -> Any:
        split = len(args) - len(names)
        return fn(*args[:split], **dict(zip(names, args[split:])))

    return work, call


@functools.cache
def _ray_remotes() -> tuple[Any, Any]:
    """Remote functions, made once: Ray exports them when first called in each session."""
    ray = _required("ray")
    work, call = _ray_functions()
    return ray.remote(work), ray.remote(call)


def _ray_with(remote: Any, options: dict[str, Any]) -> Any:
    if "max_calls" in options:  # the one option that can't be changed afterwards
        return _required("ray").remote(**options)(remote._function)
    return remote.options(**options) if options else remote


def _started_ray(**options: Any) -> Any:
    """The ray module, connected: as the user has, else to a cluster found, else to a new one."""
    ray = _required("ray")
    if not ray.is_initialized():
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        _log.info("Ray is not initialised yet: calling ray.init(%s)", given)
        ray.init(**options)
    return ray


class _RayEngine(_Engine):
    """Starts Ray tasks, and hears of their end in a thread of its own.

    Ray calls back in its I/O thread, which must not be kept busy, let alone wait for an object:
    there, the news is put into a queue and no more.
    """

    stoppable = True
    chunk_seconds = 0.1  # some milliseconds pass from one task's end to the next one's start
    BATCH = 16  # short tasks that are awaited together

    def __init__(self, ray: Any, max_workers: int, options: dict[str, Any]) -> None:
        self.ray = ray
        self.remote = _ray_with(_ray_remotes()[0], options)
        # What fails is Ray's to see, if it is to run it again; and nothing else with it.
        self.reraise = bool(options.get("retry_exceptions"))
        self.chunk_seconds = 0.0 if self.reraise else self.chunk_seconds
        self.max_workers = max_workers
        self.needs = {"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus")}
        self.needs.update({"memory": options.get("memory"), **(options.get("resources") or {})})
        self.measure()
        self.context = ray.get_runtime_context()  # asking it does not start Ray, as asking ray does
        self.session = self._session()
        _broken("")  # imports what can't be imported any more when the interpreter exits
        self.nudge = ray.put(None)
        self.refs: dict[_Work, Any] = {}
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._live, name="parallel_backend ray", daemon=True).start()

    def start(self, work: _Work, done: Callable[[_Work, Reply], None]) -> Reply | None:
        assert work.call is not None
        fn, items, kwargs, budget = work.call
        args: tuple[Any, ...] = ()
        if not isinstance(work, _Chunk):
            args = (*items[0], *kwargs.values())
            if not any(isinstance(value, self.ray.ObjectRef) for value in args):
                args = ()  # in one piece: half the time
        sent = ([], {}) if args else (items, kwargs)
        if (reason := self.lost()) is not None:
            return [], reason, 1, 0.0  # or Ray would start a cluster of its own
        try:
            ref = self.remote.remote((fn, *sent, list(kwargs), budget, self.reraise), *args)
        except self.ray.exceptions.RayError:
            raise
        except Exception as error:
            return [], _unpicklable(_name(work), error), 0, 0.0
        except BaseException:
            # Ctrl-C. Ray may take the function for exported that it had no time to export.
            _ray_remotes.cache_clear()
            raise
        self.refs[work] = ref
        if work.stopped:  # stop() came too early to find it
            self.stop(work)
        if len(self.refs) > self.room + self.BATCH:
            # Handed over early, so these are short tasks: to wait for many of them at once costs
            # Ray half of what it costs to be called back for each.
            self.inbox.put((work, ref, None, done))
        else:
            self._watch(work, ref, done)
        return None

    def measure(self) -> None:
        """Ask how many tasks the cluster can run at once; it may grow, or lose nodes."""
        self.measured = time.monotonic()
        has = self.ray.cluster_resources()
        counts = [int(has.get(name, 0) / each + 1e-9) for name, each in self.needs.items() if each]
        self.room = max(min([self.max_workers, *counts]), 1)
        # Where the CPUs are the bound and not max_workers, Ray may wait for them with short tasks.
        is_bound = bool(counts) and self.room >= min(counts)
        self.early = max(4 * self.BATCH, self.room) if is_bound else 0

    def limit(self, max_workers: int) -> int:
        return self.room

    def _watch(self, work: _Work, ref: Any, done: Callable[[_Work, Reply], None]) -> None:
        ref.future().add_done_callback(lambda future: self.inbox.put((work, ref, future, done)))

    def _live(self) -> None:
        batch: list[Any] = []
        while True:
            batch.append(self.inbox.get())
            with contextlib.suppress(queue.Empty):
                while len(batch) < self.BATCH and batch[-1] is not None:
                    batch.append(self.inbox.get_nowait())
            ended = batch[-1] is None
            self._handle(batch[:-1] if ended else batch)
            if ended:
                return
            batch.clear()

    def _handle(self, batch: list[Any]) -> None:
        """Pass on what is done; a function of its own, so that nothing is held while waiting."""
        refs = [ref for _, ref, future, _ in batch if future is None]
        values: dict[Any, Any] = {}
        if refs and self.lost() is None:
            # Together, for a tenth of the time; or each alone, if one has failed or is not short.
            with contextlib.suppress(Exception):
                values.update(zip(refs, self.ray.get(refs, timeout=AHEAD_SECONDS)))
        while batch:
            work, ref, future, done = batch.pop(0)
            if future is not None:
                reply = self._reply(work, future.result)
            elif ref in values:
                reply = self._reply(work, functools.partial(values.pop, ref))
            elif (reason := self.lost()) is not None:
                reply = [], reason, 1, 0.0
            else:
                self._watch(work, ref, done)
                continue
            self.refs.pop(work, None)
            done(work, reply)

    def _reply(self, work: _Work, result: Callable[[], Any]) -> Reply:
        name, count = _name(work), len(work.call[1]) if work.call else 1
        errors = self.ray.exceptions
        try:
            data, rest = result()
            return _opened(data, rest, name, count)
        except errors.RayTaskError as error:
            # Not from the task, whose exceptions come as values, but from around it.
            if isinstance(error.cause, errors.RaySystemError):
                failure = _broken(f"The worker could not unpickle the call of {name}")
                return [], _caused(failure, error), 0, 0.0
            return [], _ray_cause(error), count, 0.0
        except errors.RayError as error:  # a worker, a node, an object or a whole session is gone
            failure = _broken(f"Ray lost {name}, or its result: {error}")
            return [], _caused(failure, error), count, 0.0
        except BaseException as error:
            return [], error, count, 0.0

    def stop(self, work: _Work) -> None:
        if (ref := self.refs.get(work)) is None or self.lost() is not None:
            return
        # From any other thread, cancel() may meet the end of its task between two halves of Ray's
        # own account of it, and Ray then aborts this whole process ("Tried to complete task that
        # was not pending"). In Ray's I/O thread, replies and this come one after the other.
        kill = functools.partial(self.ray.cancel, ref, force=True)
        if hasattr(self.nudge, "_on_completed"):  # private, and Ray Client's references have none
            self.nudge._on_completed(lambda _: kill())
        else:
            kill()

    def close(self) -> None:
        self.inbox.put(None)

    def _session(self) -> tuple[str, str]:
        return self.context.gcs_address, self.context.get_job_id()

    def lost(self) -> BaseException | None:
        session = None
        with contextlib.suppress(Exception):  # by which it says that Ray is not initialised
            session = self._session()
        if session != self.session:
            return _broken("Ray was shut down while this executor lived")
        if time.monotonic() > self.measured + 1:
            with contextlib.suppress(Exception):  # its head is away: what was measured stands
                self.measure()
        return None


def _ray_cause(error: Any) -> BaseException:
    """The exception inside a RayTaskError, with the worker's traceback as its cause."""
    cause = error.cause
    if not isinstance(cause, BaseException):
        return cast("BaseException", error)
    # Its text and not its traceback_str: what is raised as the task's own type too, has none.
    return _traced(cause, str(error))


class RayParallelBackend(_EngineBackend, backend_name="ray"):
    """Runs tasks on a Ray cluster: the one Ray is connected to, else what ``ray.init()`` finds
    (``RAY_ADDRESS``, or a cluster on this machine), else a new one on this machine.

    ``put`` and ``wrap`` return Ray's own ``ObjectRef``.
    """

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
    def _engine(cls, workers: int, **options: Any) -> _Engine:
        """``options`` are those of Ray's tasks: ``num_cpus``, ``resources``, ``max_retries``, …"""
        if "num_returns" in options:
            raise TypeError("A task of an executor has one result, so there is no num_returns")
        ray = _started_ray()
        if ray.get_runtime_context().get_task_id() is not None:
            # This is a task, which will wait for those: they use its CPU, for there may be no other.
            options.setdefault("num_cpus", 0)
        return _RayEngine(ray, workers, options)

    @classmethod
    def _cpus(cls) -> tuple[int, int | None]:
        cpus = max(int(_started_ray().cluster_resources().get("CPU", 1)), 1)
        return cpus, cpus

    def put(self, v: T) -> T:
        return cast("T", _started_ray().put(v))

    def wrap(self, fun: Callable[..., T], **options: Any) -> Callable[..., Handle[T]]:
        _started_ray()
        remote = _ray_with(_ray_remotes()[1], options)

        @functools.wraps(fun)
        def start(*args: Any, **kwargs: Any) -> Any:
            return remote.remote(fun, list(kwargs), *args, *kwargs.values())

        return start

    def _futures(self, handles: Sequence[Any]) -> list[Future[Any] | None]:
        ray = _required("ray")
        # Asked first, since the future even of what is done is done a little later.
        refs = list({handle for handle in handles if isinstance(handle, ray.ObjectRef)})
        late = ray.wait(refs, num_returns=len(refs), timeout=0)[1] if refs else []
        futures = {ref: ref.future() for ref in late}
        return [
            futures.get(handle) if isinstance(handle, ray.ObjectRef) else future
            for handle, future in zip(handles, super()._futures(handles))
        ]

    def _value(self, handle: Any, timeout: float | None) -> Any:
        ray = _required("ray")
        if not isinstance(handle, ray.ObjectRef):
            return super()._value(handle, timeout)
        try:
            return ray.get(handle, timeout=timeout)
        except ray.exceptions.RayTaskError as error:
            cause = _ray_cause(error)
            raise cause from cause.__cause__


# --- the self-test ----------------------------------------------------------------------------


def _checks(name: str) -> Iterator[tuple[str, bool]]:
    """(what is checked, whether it holds), one after the other, for a backend."""
    wait = 60  # seconds, for an answer that should take none
    if name == "ray":
        _started_ray(logging_level=logging.ERROR, log_to_driver=False)
    backend = init_parallel_backend(name)
    yield "start", True
    with backend.executor() as executor:
        yield "first task", executor.submit(lambda: 6 * 7).result(wait) == 42
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
        cancels = name != "sequential"
        pends = cancels and CancellationPolicy.PENDING in policy
        runs = cancels and CancellationPolicy.RUNNING in policy
        with backend.executor(1, cancel_futures=policy) as executor:
            running = executor.submit(time.sleep, wait if runs else 0.1)
            pending = executor.submit(int)
        yield (
            f"cancellation: {policy.name}",
            (pending.cancelled(), running.cancelled()) == (pends, runs),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The self-test; its exit status, which is 1 if anything that is installed fails."""
    import argparse
    import platform

    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}" if __spec__ else None,
        description="Check what parallel_backend can run on here, on the real engines.",
        epilog="The exit status is 1 if anything that is installed fails; what is missing is no failure.",
    )
    names = list(ParallelBackend.BACKENDS)
    again = "check this one only; can be given several times"
    parser.add_argument("--backend", action="append", choices=names, help=again)
    chosen = parser.parse_args(arguments).backend or names

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
            version = "" if name == "sequential" else _required(name).__version__
        except ImportError as error:
            print(f"{name}: {'not installed: ' if error.name == name else ''}{error}")
            if error.name != name:
                failed.append(name)
            continue
        print(f"{name} {version}".rstrip())
        started = time.perf_counter()
        try:
            for what, holds in _checks(name):
                say(what, "ok" if holds else "FAILED", time.perf_counter() - started)
                failed += [] if holds else [name]
                started = time.perf_counter()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failed.append(name)
    which = ", ".join(dict.fromkeys(failed))
    print(f"\nFailed: {which}" if failed else "\nAll that is installed works.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
