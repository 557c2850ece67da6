"""The processes that share a run: torch.distributed, as torchrun and accelerate start them.

A run by itself is a world of one process, in which everything is already where it belongs; the code
that works is the same for one and for many.  Tensors go from GPU to GPU by NCCL and between CPUs by
gloo, all other values as pickles between CPUs.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from quantkit.calibration.processes.watch import HERE, SEVERAL, Watch, several_processes
from quantkit.errors import RanksError

T = TypeVar("T")

# For all to be there, and for one to be waited for while it works: who is gone is noticed by
# `Watch`, within a minute.
_BEGIN, _WORK = timedelta(minutes=5), timedelta(hours=12)
# Bytes that go in one message.
_PIECE = 1 << 30


class World:
    """One process by itself, rank 0 of 1; see `Ranks` for one of several."""

    rank = 0
    size = 1
    # How many of them run on this machine.
    here = 1

    def first(self, work: Callable[[], T]) -> T:
        """What rank 0 makes of it, known to all; the others do not do it."""
        return work()

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""
        return [value]

    def spread(self, owners: Sequence[int], tasks: Sequence[Callable[[], T]]) -> Iterator[T]:
        """What each task comes to, in order, known to all: each is worked out by its owner.

        One process works when the next result is asked for, several do all their own at once.
        """
        return (task() for task in tasks)

    def send(self, value: object, to: int) -> None:
        """Hands a value to another rank, which receives it at this point."""
        raise AssertionError("there is nobody else")

    def receive(self, source: int) -> Any:
        """What another rank sends at this point."""
        raise AssertionError("there is nobody else")

    def device(self, device: str) -> str:
        """This rank's own of the kind of device."""
        return device

    def apart(self) -> World:
        """This process by itself, for work of its own beside that of others."""
        return self


ALONE = World()


class Planned(World):
    """What a run of so many processes is planned for, by one of them."""

    def __init__(self, size: int, here: int) -> None:
        self.size, self.here = size, here

    @classmethod
    def launched(cls) -> Planned:
        """As a launcher started this process."""
        size = _number(SEVERAL[1])
        return cls(size, processes_here(size))


def processes_here(size: int) -> int:
    """How many of all processes run on this machine, by what torchrun sets; else all of them."""
    return _number(HERE) if os.environ.get(HERE) else size


class Ranks(World):
    """One of several processes.  Raises LostError wherever another one is gone."""

    def __init__(self, rank: int, size: int, local_rank: int, watch: Watch) -> None:
        self.rank, self.size, self._local_rank, self._watch = rank, size, local_rank, watch
        self.here = processes_here(size)
        self._device = torch.device("cpu")

    def first(self, work: Callable[[], T]) -> T:
        """What rank 0 makes of it, known to all; the others do not do it."""
        return self._shared(work() if self.rank == 0 else None, 0)  # type: ignore[return-value]

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""
        return [self._shared(value, rank) for rank in range(self.size)]

    def spread(self, owners: Sequence[int], tasks: Sequence[Callable[[], T]]) -> Iterator[T]:
        """What each task comes to, in order, known to all: each is worked out by its owner."""
        mine = {k: tasks[k]() for k, owner in enumerate(owners) if owner == self.rank}
        for k, owner in enumerate(owners):
            yield self._shared(mine.pop(k, None), owner)  # type: ignore[misc]

    def send(self, value: object, to: int) -> None:
        """Hands a value to another rank, which receives it at this point."""
        self._tell(value, lambda tensor: dist.send(tensor, to))

    def receive(self, source: int) -> Any:
        """What another rank sends at this point; tensors of a GPU come to this rank's."""
        return self._hear(lambda tensor: dist.recv(tensor, source))

    def device(self, device: str) -> str:
        """This rank's own of the kind of device.  Raises RanksError if there is none for it."""
        if device == "cpu":
            return device
        if device != "cuda":
            raise RanksError(
                f"--device {device}: each of {self.size} processes takes a GPU of its own; give "
                "--device cuda"
            )
        if not dist.is_nccl_available():
            raise RanksError(
                "this torch comes without NCCL, which processes on GPUs need; use --device cpu, or "
                "one process"
            )
        count = torch.cuda.device_count()
        if self._local_rank >= count:
            raise RanksError(
                f"process {self._local_rank} of this machine has no GPU: torch sees {count}; start "
                f"with --nproc-per-node {count}"
            )
        torch.cuda.set_device(self._local_rank)
        self._device = torch.device("cuda", self._local_rank)
        return str(self._device)

    def apart(self) -> World:
        """This process by itself, on its own device, for work of its own beside that of others."""
        return _Apart(self)

    def _shared(self, value: T, owner: int) -> T:
        """The owner's value, which is this one there."""
        if owner == self.rank:
            self._tell(value, lambda tensor: dist.broadcast(tensor, owner))
            return value
        heard: T = self._hear(lambda tensor: dist.broadcast(tensor, owner))
        return heard

    def _tell(self, value: object, hand: Callable[[Tensor], object]) -> None:
        head, tensors = _packed(value)
        with self._noticing():
            hand(torch.tensor([len(head)], dtype=torch.int64))
            hand(torch.frombuffer(bytearray(head), dtype=torch.uint8))
            for tensor in tensors:
                for piece in _pieces(tensor.detach().contiguous()):
                    hand(piece)

    def _hear(self, hand: Callable[[Tensor], object]) -> Any:
        with self._noticing():
            length = torch.empty(1, dtype=torch.int64)
            hand(length)
            head = torch.empty(int(length), dtype=torch.uint8)
            hand(head)
            skeleton, shapes = pickle.loads(head.numpy().tobytes())
            tensors = []
            for shape, dtype, kind in shapes:
                device = torch.device("cpu") if kind == "cpu" else self._device
                tensor = torch.empty(shape, dtype=dtype, device=device)
                for piece in _pieces(tensor):
                    hand(piece)
                tensors.append(tensor)
        return _Unpickler(io.BytesIO(skeleton), tensors).load()

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        """A context in which the backend's errors are those of a rank that is gone."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise self._watch.lost() from error


class _Apart(World):
    """One of several that works by itself."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self.here = ranks, ranks.here

    def device(self, device: str) -> str:
        """That of the rank."""
        return self._ranks.device(device)


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """This process's world, by what torchrun and accelerate set (RANK, WORLD_SIZE, ...).

    An error inside ends all ranks: the others raise LostError with its sentence.  Raises RanksError
    if they do not find each other.
    """
    if not several_processes():
        yield ALONE
        return
    rank, size, local_rank = (_number(name) for name in SEVERAL)
    try:
        store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=_BEGIN)))
        watch = Watch(PrefixStore("quantkit-watch", store.clone()), rank, size)
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            store=PrefixStore("quantkit", store),
            rank=rank,
            world_size=size,
            timeout=_WORK,
        )
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RanksError(
            f"rank {rank} of {size} did not find the others: {reason[:200]}; start all of them "
            "with torchrun or accelerate launch"
        ) from error
    with watch.over():
        ranks = Ranks(rank, size, local_rank, watch)
        yield ranks
        # Rank 0 may hold what the others find each other by: nobody leaves before all are done.
        ranks.gathered(None)
    dist.destroy_process_group()


def same_everywhere(world: World, facts: Mapping[str, str]) -> None:
    """Raises RanksError, on all ranks, naming the first fact in which one differs from rank 0."""
    for rank, others in enumerate(found := world.gathered(dict(facts))):
        for name in sorted(set(found[0]) | set(others)):
            was, now = found[0].get(name), others.get(name)
            if was != now:
                raise RanksError(
                    f"{name} is {str(was)[:200]} on rank 0, but {str(now)[:200]} on rank {rank}; "
                    "start all processes with the same command, files and packages"
                )


def owners_of(costs: Mapping[str, float], size: int) -> dict[str, int]:
    """Who does each task so that all are done soon: the dearest first, to who has least to do."""
    loads = [0.0] * size
    owners = {}
    for key in sorted(costs, key=lambda key: -costs[key]):
        owners[key] = rank = loads.index(min(loads))
        loads[rank] += costs[key]
    return owners


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise RanksError(
            f"{name}={text!r} in the environment: several processes are started by torchrun or "
            "accelerate launch, which set it"
        )
    return int(text)


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Bytes of a contiguous tensor, which every backend hands on whatever its dtype."""
    if tensor.numel() == 0:
        return ()
    return tensor.reshape(-1).view(torch.uint8).split(_PIECE)


def _packed(value: object) -> tuple[bytes, list[Tensor]]:
    """A pickle without tensors and what it says of them, and the tensors."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(value)
    shapes = [(tuple(t.shape), t.dtype, t.device.type) for t in pickler.tensors]
    return pickle.dumps((buffer.getvalue(), shapes)), pickler.tensors


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: object) -> int | None:
        """The number of a tensor, which goes by itself."""
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        """The tensor of that number."""
        return self._tensors[number]
