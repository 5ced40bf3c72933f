"""The processes of a run: which one this is, what they exchange, and how they stay in agreement.

No collective here is ever differentiated. What all ranks must decide alike is decided by one of
them, or by the largest value of all; an error on one is raised on all.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fasterase.errors import FaseraseError, InputError, LostRankError, NonFiniteError
from fasterase.parallel.heartbeat import Heartbeat, connect
from fasterase.signals import Stopped, current_stop

T = TypeVar("T")

# Rank 0 may write tens of gigabytes while the others wait for it.
_PATIENCE = timedelta(hours=2)
# A killed process is a zombie until its launcher collects it; it is looked for this long.
_OBITUARY_SECONDS = 3.0
# Longest pause between two looks at an exchange that others have not come to yet.
_LOOK_SECONDS = 0.02


class Ranks:
    """The only process of a run: every exchange returns at once what it was given."""

    rank = 0  # number of this process
    world_size = 1  # how many there are
    on_this_host = 1  # how many of them run on this machine
    heartbeat: Heartbeat | None = None  # tells which rank has fallen silent

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files, shows progress and warns."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return which of `count` items belong to this rank: a slice; they differ by at most one.

        The slices of all ranks, one after the other, are all items in their order.
        """
        size = self.world_size
        return range(count * self.rank // size, count * (self.rank + 1) // size)

    def gather_objects(self, value: T) -> list[T]:
        """Return the values of all ranks; they are pickled."""
        return [value]

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Return each rank's rows [n_r, ...] of one tensor, where n_r = `counts[r]`, detached."""
        return [rows.detach()]

    def all_max(self, *values: float) -> list[float]:
        """Return the largest of all ranks' values, one by one."""
        return [float(max(those)) for those in zip(*self.gather_objects(values), strict=True)]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks, in place."""

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Replace the tensor by rank 0's, in place."""

    def broadcast(self, value: T) -> T:
        """Return rank 0's value; it is pickled."""
        return value

    def raise_together(self, error: BaseException | None) -> None:
        """Raise on every rank the error of the first rank that has one."""
        mine = None if error is None else _describe_error(error, self.rank)
        found = [each for each in self.gather_objects(mine) if each is not None]
        if error is not None:
            raise error
        if found:
            kind, message = found[0]
            raise kind(message)

    @contextlib.contextmanager
    def raising_together(self) -> Iterator[None]:
        """Run a block, which must exchange nothing; an error on one rank is raised on all."""
        error: BaseException | None = None
        try:
            yield
        except (LostRankError, Stopped):
            raise  # the others have ended, or are told by the heartbeat
        except (Exception, KeyboardInterrupt) as raised:
            error = raised
        self.raise_together(error)

    def on_first(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 alone and return its result, or raise its error, everywhere."""
        result: Any = None
        with self.raising_together():
            if self.is_first:
                result = function()
        return self.broadcast(result)

    @contextlib.contextmanager
    def first_enters(self, open_: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
        """Enter a context on rank 0 alone, for a block of all ranks, which get its value.

        An error on entering it is raised everywhere, one on leaving it on rank 0.
        """
        with contextlib.ExitStack() as stack:
            yield self.on_first(lambda: stack.enter_context(open_()))


ALONE = Ranks()


class LinkedRanks(Ranks):
    """A process among several, over torch.distributed.

    Objects travel between CPUs through a group of their own, so that they need no GPU; tensors
    travel through the default group, on their device.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._stop = current_stop()
        self._control: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)
        host = socket.gethostname()
        self._processes: list[tuple[str, int]] = []
        self._processes = self.gather_objects((host, os.getpid()))
        hosts = [where for where, _ in self._processes]
        self.on_this_host = hosts.count(host)
        sockets = connect(self.rank, hosts, self.gather_objects)
        if sockets is not None:
            self.heartbeat = Heartbeat(self.rank, sockets, self._stop)
            self.heartbeat.on_silence = lambda: self._stop.fail(self._silence())

    def close(self) -> None:
        """Release what this object has made; the caller's process group stays."""
        if self.heartbeat is not None:
            if self._stop.number:
                self.heartbeat.leave()
            self.heartbeat.close()
        if self in _abandoned:
            return
        # Its threads and sockets last as long as somebody holds it.
        control, self._control = self._control, None
        dist.destroy_process_group(control)

    def gather_objects(self, value: T) -> list[T]:
        # On the CPU, whatever the caller's default device is.
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        size = torch.tensor([len(data)], device="cpu")
        sizes = [int(each) for each in self._gather(size, [1] * self.world_size, self._control)]
        return [
            pickle.loads(each.numpy().tobytes())
            for each in self._gather(data, sizes, self._control)
        ]

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
        return self._gather(rows.detach(), counts)

    def _gather(self, rows: Tensor, counts: Sequence[int], group: Any = None) -> list[Tensor]:
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        self._exchange(
            lambda: dist.all_gather(gathered, padded, group=group, async_op=True), padded
        )
        return [part[:count] for part, count in zip(gathered, counts, strict=True)]

    def average(self, tensors: Sequence[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._exchange(lambda: dist.all_reduce(flat, async_op=True), flat)
        flat /= self.world_size
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def broadcast_tensor(self, tensor: Tensor) -> None:
        self._exchange(lambda: dist.broadcast(tensor, src=0, async_op=True), tensor)

    def broadcast(self, value: T) -> T:
        return self.gather_objects(value if self.is_first else None)[0]  # type: ignore[return-value]

    def _exchange(self, begin: Callable[[], Any], tensor: Tensor) -> None:
        """Begin an exchange of a tensor, and wait: a signal or a silent rank ends the waiting.

        Raises:
            Stopped: the run is on its way out, or others have left it for the same reason.
            LostRankError: a rank has ended or fallen silent.
        """
        if self._stop.is_raised:
            raise self._stop.reason()
        _abandoned.append(self)
        try:
            work = begin()
            pause = 1e-4
            # Of a GPU, the exchange is only queued here.
            while not (tensor.is_cuda or work.is_completed()):
                time.sleep(pause)
                pause = min(1.1 * pause, _LOOK_SECONDS)
                self._stop.check()
                if self.heartbeat is not None and self.heartbeat.silent:
                    self._stop.finish()
                    raise self._silence()
            work.wait()
            _abandoned.remove(self)
        except RuntimeError as error:
            lost = self.find_lost()
            if self._stop.number and not lost:
                self._stop.is_raised = True
                raise self._stop.reason() from None
            raise self.loss(lost, str(error).splitlines()[0]) from error

    def loss(self, lost: str, reason: str) -> LostRankError:
        """Return the error that names the ranks which are lost; it is said undisturbed."""
        self._stop.finish()
        return LostRankError(
            f"{lost or 'another rank'} ended, so the others cannot go on ({reason}). Its own "
            "output says why; the same command continues from the last checkpoint."
        )

    def _silence(self) -> LostRankError:
        """Return the error that names the ranks which give no sign of life."""
        assert self.heartbeat is not None
        names = " and ".join(self._name(rank) for rank in sorted(self.heartbeat.silent))
        return LostRankError(
            f"{names} gave no sign of life for {self.heartbeat.limit:g} s (stopped, or its host is "
            "out of reach), so the others cannot go on. End it, and run the same command again to "
            "continue from the last checkpoint; `rank_timeout` is the limit."
        )

    def _name(self, rank: int) -> str:
        host, pid = self._processes[rank]
        return f"rank {rank} (process {pid} on {host})"

    def find_lost(self, patience: float = _OBITUARY_SECONDS) -> str:
        """Name the ranks of this host that no longer run, or else those on other hosts.

        One that was told to stop has not been lost.
        """
        host, until = socket.gethostname(), time.monotonic() + patience
        stopping = self.heartbeat.stopping if self.heartbeat is not None else {}
        while True:
            lost = [
                self._name(rank)
                for rank, (where, pid) in enumerate(self._processes)
                if where == host and rank not in stopping and not is_running(pid)
            ]
            if lost:
                return " and ".join(lost)
            if self._stop.number:  # a run that was told to stop takes the others for stopping too
                return ""
            if time.monotonic() >= until:
                break
            time.sleep(0.1)
        others = [str(r) for r, (where, _) in enumerate(self._processes) if where != host]
        return f"one of the ranks {', '.join(others)} on other hosts" if others else ""


@contextlib.contextmanager
def join_ranks(*, alone_too: bool = False) -> Iterator[Ranks]:
    """Find the other processes of this run: those of the caller's process group or of a launcher.

    A process group that is there already is used and left in place. Otherwise the launcher's
    environment (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`) says how to make one, which
    lasts as long as the block. `alone_too` makes a group of one without a launcher, for DeepSpeed,
    which keeps groups of its own in it: one that it has used serves the next run too, until the
    process ends or the environment differs.

    Raises:
        InputError: the environment names several processes, but not how to reach them.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    if _joined:
        with _naming_lost(_joined[-1]):
            yield _joined[-1]
        return
    if _kept and dist.is_initialized() and dist.get_world_size() != launched:
        _leave(_kept.pop())
    if dist.is_available() and dist.is_initialized():
        with _linked(dist.get_world_size()) as ranks:
            yield ranks
        return
    if launched == 1 and not alone_too:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if launched == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        missing = [
            name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
        ]
        if missing:
            raise InputError(
                f"WORLD_SIZE={launched}, but {', '.join(missing)} is not set, so the processes "
                "cannot find each other. Start them with torchrun or the deepspeed launcher, or "
                "unset WORLD_SIZE to run one process."
            )
        device = launched_device()
        if device is not None:
            torch.cuda.set_device(device)  # what "cuda" without a number means
        dist.init_process_group(backend)
    group = dist.group.WORLD
    try:
        with _linked(launched) as ranks:
            yield ranks
    finally:
        if alone_too and _serves_deepspeed():
            _kept[:] = [group]
            atexit.register(_leave, group)
        else:
            _leave(group)


def _serves_deepspeed() -> bool:
    """Whether DeepSpeed has begun to use the process group."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and deepspeed.comm.is_initialized()


def _leave(group: dist.ProcessGroup | None) -> None:
    """Destroy a group that we have made, unless it was destroyed and another one has its place."""
    if dist.is_initialized() and dist.group.WORLD is group and not _abandoned:
        dist.destroy_process_group()


# Those that left an exchange: to destroy its group would wait for a rank that may never come.
_abandoned: list[LinkedRanks] = []
# The group of ours that is there between runs.
_kept: list[Any] = []
# The ranks of the run that this process is in.
_joined: list[LinkedRanks] = []


@contextlib.contextmanager
def _linked(count: int) -> Iterator[Ranks]:
    """Link the ranks of a process group for a block; what that makes is released afterwards."""
    if count == 1:
        yield ALONE
        return
    ranks = LinkedRanks()
    _joined.append(ranks)
    try:
        with _naming_lost(ranks):
            yield ranks
    finally:
        _joined.remove(ranks)
        ranks.close()


@contextlib.contextmanager
def _naming_lost(ranks: LinkedRanks) -> Iterator[None]:
    """Say which rank has died: launchers send SIGTERM to the others as soon as one has."""
    try:
        yield
    except Stopped as error:
        if lost := ranks.find_lost(0.0):
            raise ranks.loss(lost, "the launcher ended this one too") from error
        raise


def launched_device() -> torch.device | None:
    """Return the GPU that a launcher means for this process; None without a launcher or GPU."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or not torch.cuda.is_available():
        return None
    return torch.device("cuda", int(local) % torch.cuda.device_count())


def _describe_error(error: BaseException, rank: int) -> tuple[type[BaseException], str]:
    """Return what other ranks raise: an error of the same kind, which takes a message alone."""
    message = f"{error} (on rank {rank})"
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt, message
    if isinstance(error, FaseraseError) and not isinstance(error, NonFiniteError):
        return type(error), message
    return FaseraseError, f"{type(error).__name__}: {message}"


def is_running(pid: int) -> bool:
    """Whether a process of this host runs; one that ended but was not collected does not."""
    if Path("/proc/self/stat").is_file():
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state not in ("Z", "X")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's process
    return True
