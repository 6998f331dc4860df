"""How processes hand tensors to each other, and what passes over which link.

`Processes` is torch.distributed; `Simulated` runs every rank as a thread of this process and hands tensors
over in memory. Both note every message, so that the traffic of any number of processes can be had on one
machine: `traffic` sends the messages over a ring or over direct links and adds up the bytes of each.
"""

from __future__ import annotations

import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_Found = TypeVar("_Found")
_PATIENCE = 300.0  # seconds that a simulated rank waits for another
_GONE = re.compile(  # gloo's, nccl's and the store's words; a launch of CUDA can time out too
    r"(closed|reset) by (remote )?peer|broken pipe|remote process exit|ncclRemoteError|(?<!launch )timed ?out"
    r"|(read|write|connect|socket|operation) timeout|timeout caused pair closure|likely closed",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Message:
    """One tensor on its way.

    Attributes:
        step: those of one step travel at the same time.
        source, target: ranks.
        bytes: its size.
    """

    step: int
    source: int
    target: int
    bytes: int


class Links(Protocol):
    """The links of one rank."""

    rank: int
    size: int
    messages: list[Message]

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        """Starts to send (target, tensor) and to fill (source, tensor); call what it returns to wait."""
        ...

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on every rank."""
        ...

    def gather(self, tensor: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """The tensors of all ranks, of these shapes, on every rank."""
        ...


class Processes:
    """The links of a process group of torch.distributed (gloo, nccl).

    Attributes:
        lost: what is raised where another process ended or does not answer; it says which.

    Raises:
        ValueError: torch.distributed was not started, or this process is not in the group.
    """

    lost: type[Exception] = ConnectionError

    def __init__(self, group: Any = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "torch.distributed was not started: run under torchrun and call "
                "torch.distributed.init_process_group('gloo') (or 'nccl' on GPUs) first"
            )
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not in the group; only its members may take part")
        self.messages: list[Message] = []
        self._step = 0

    def _peer(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)

    @contextmanager
    def _meeting(self, peers: Sequence[int]) -> Iterator[None]:
        """Says whom it is that a message to or from these failed for."""
        try:
            yield
        except RuntimeError as error:
            if not _GONE.search(str(error)):
                raise
            peers = self._lost(sorted({*peers} - {dist.get_rank()}))
            who = "rank" if len(peers) == 1 else "one of the ranks"
            raise self.lost(
                f"{who} {', '.join(map(str, peers))} of {dist.get_world_size()} ended, or does not answer; read what it printed last "
                "(nothing if it was killed for want of memory: use more processes), then start all anew"
            ) from error

    def _lost(self, peers: Sequence[int]) -> Sequence[int]:
        """Those of the peers that failed first: who fails for another leaves word of whom, then ends too.

        Nobody who left word is among them, nor this rank; of several words what they have in common counts.
        """
        own = dist.get_rank()
        try:
            store = dist.distributed_c10d._get_default_store()
            word = {rank: f"lens_kernels/lost_by_{rank}" for rank in (*peers, own)}
            tellers = [rank for rank in peers if store.check([word[rank]])]
            told = [
                {*map(int, store.get(word[rank]).split())} - {own, *tellers} for rank in tellers
            ]
            silent = [rank for rank in peers if rank not in tellers] or peers
            lost = (sorted(set.intersection(*told)) if told else []) or silent
            store.set(word[own], " ".join(map(str, lost)))
        except RuntimeError:  # the store went with its process: rank 0, or torchrun
            return [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
        return lost

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        """See `Links`."""
        self.messages += _noted(self._step, self.rank, sends)
        self._step += 1
        return self._travel(sends, receives)

    def _travel(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        held = [(target, tensor.contiguous()) for target, tensor in sends]
        ways = [(dist.isend, *one) for one in held] + [(dist.irecv, *one) for one in receives]
        messages = [(way, tensor, self._peer(rank)) for way, rank, tensor in ways]
        running: list[tuple[list[int], Any]] = []
        if any(tensor.is_cuda for _, tensor, _ in messages):  # nccl has one handle for all
            peers = [peer for *_, peer in messages]
            together = [dist.P2POp(*message, self._group) for message in messages]
            with self._meeting(peers):
                running += [(peers, one) for one in dist.batch_isend_irecv(together)]
        else:
            for way, tensor, peer in messages:
                with self._meeting([peer]):
                    running.append(([peer], way(tensor, peer, self._group)))

        def wait() -> None:
            for peers, one in running:
                with self._meeting(peers):
                    one.wait()
            held.clear()

        return wait

    def add(self, tensor: Tensor) -> Tensor:
        """See `Links`."""
        total = tensor.clone()
        with self._meeting(list(map(self._peer, range(self.size)))):
            dist.all_reduce(total, group=self._group)
        return total

    def gather(self, tensor: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `Links`."""
        own = tensor.contiguous()
        parts = [tensor.new_empty(tuple(shape)) for shape in shapes]
        others = [rank for rank in range(self.size) if rank != self.rank]
        self._travel([(rank, own) for rank in others], [(rank, parts[rank]) for rank in others])()
        parts[self.rank] = own
        return parts


class Simulated:
    """The links of one rank that is a thread; `Simulated.run` starts them all."""

    def __init__(self, rank: int, size: int, boxes: dict[tuple[int, int], queue.Queue]) -> None:
        self.rank, self.size, self._boxes = rank, size, boxes
        self.messages: list[Message] = []
        self._step = 0

    @classmethod
    def run(cls, size: int, function: Callable[[Simulated], _Found]) -> list[_Found]:
        """What `function(links)` gives on each of `size` ranks, in their order; its error is raised."""
        boxes: dict[tuple[int, int], queue.Queue] = {
            (one, other): queue.Queue() for one in range(size) for other in range(size)
        }
        found: list[Any] = [None] * size
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                found[rank] = function(cls(rank, size, boxes))
            except BaseException as error:
                errors.append(error)
                for other in range(size):
                    boxes[rank, other].put(error)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return found

    def exchange(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]
    ) -> Callable[[], None]:
        """See `Links`."""
        self.messages += _noted(self._step, self.rank, sends)
        self._step += 1
        for target, tensor in sends:
            self._boxes[self.rank, target].put(tensor.clone())

        def wait() -> None:
            for source, tensor in receives:
                tensor.copy_(self._receive(source))

        return wait

    def _receive(self, source: int) -> Tensor:
        found = self._boxes[source, self.rank].get(timeout=_PATIENCE)
        if isinstance(found, BaseException):
            raise RuntimeError(f"rank {source} failed: {found}") from found
        return found

    def add(self, tensor: Tensor) -> Tensor:
        """See `Links`."""
        return torch.stack(self.gather(tensor, [tensor.shape] * self.size)).sum(0)

    def gather(self, tensor: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """See `Links`."""
        for target in range(self.size):
            self._boxes[self.rank, target].put(tensor.clone())
        return [self._receive(source) for source in range(self.size)]


def _noted(step: int, rank: int, sends: Sequence[tuple[int, Tensor]]) -> list[Message]:
    return [Message(step, rank, target, tensor.nbytes) for target, tensor in sends]


@dataclass(frozen=True)
class Traffic:
    """What passes over links.

    Attributes:
        steps: in which anything passes.
        total: bytes sent, over each link that they pass.
        busiest: bytes over the busiest link, one direction.
        critical: bytes of the busiest link of each step, added up: divided by a link's bytes per second, the
            time that nothing but the transfer takes.
    """

    steps: int
    total: int
    busiest: int
    critical: int


def traffic(messages: Sequence[Message], size: int, wiring: Literal["ring", "direct"]) -> Traffic:
    """The traffic of messages of all ranks.

    Args:
        messages: of all ranks.
        size: number of ranks.
        wiring: "ring": each rank has a link to its two neighbours, each link both ways at once, and what goes
            further passes through them, the shorter way; "direct": a link between every two ranks.

    Example:
        >>> both = [Message(0, 0, 1, 8), Message(0, 0, 3, 8), Message(1, 0, 2, 4)]
        >>> traffic(both, 4, "ring")
        Traffic(steps=2, total=24, busiest=12, critical=12)
    """
    if not isinstance(messages, Iterable) or not all(isinstance(one, Message) for one in messages):
        raise TypeError("messages must be a list of Message")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be the number of ranks, got {size!r}")
    if wiring not in ("ring", "direct"):
        raise ValueError(f"wiring must be 'ring' or 'direct', got {wiring!r}")
    whole: Counter[tuple[int, int]] = Counter()
    steps: dict[int, Counter[tuple[int, int]]] = {}
    for message in messages:
        hops = [(message.source, message.target)]
        if wiring == "ring":
            forward = (message.target - message.source) % size
            way = 1 if forward <= size - forward else -1
            count = min(forward, size - forward)
            at = [(message.source + way * hop) % size for hop in range(count + 1)]
            hops = list(pairwise(at))
        for hop in hops:
            whole[hop] += message.bytes
            steps.setdefault(message.step, Counter())[hop] += message.bytes
    return Traffic(
        steps=len(steps),
        total=sum(whole.values()),
        busiest=max(whole.values(), default=0),
        critical=sum(max(step.values()) for step in steps.values()),
    )
