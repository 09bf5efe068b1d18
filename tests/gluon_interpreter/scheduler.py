"""Who goes on: a thread for each partition, of which one runs at a time, chosen by a seed.

What the partitions have done in common is kept as *events*, one bit each: an access to memory is an
event, a partition's ``known`` has the bits of all that happened before where it stands, and each
barrier hands on what those who arrived knew. So an access that another one may overtake is found in
whatever order the two came this time.
"""

import linecache
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

HERE = str(Path(__file__).parent)
SPINS = 20  # idle atomics of every partition in a row that make a livelock


class Hazard(AssertionError):
    """What a kernel must not do, though it may end well on a GPU, or on most days."""


class Deadlock(Hazard):
    """Nobody can go on, or everybody spins."""


class _Stop(BaseException):
    """Ends the thread of a partition when another one has failed."""


class Known:
    """Events that happened before, and those of them that asynchronous engines see too.

    Attributes:
        known: all.
        fenced: those ahead of a fence for shared memory; ``fenced_global``, for global memory.
    """

    def __init__(self, known: int = 0, fenced: int = 0, fenced_global: int = 0) -> None:
        self.known, self.fenced, self.fenced_global = known, fenced, fenced_global

    def learn(self, other: "Known") -> None:
        self.known |= other.known
        self.fenced |= other.fenced
        self.fenced_global |= other.fenced_global


class Agent(Known):
    """A partition of a program.

    Attributes:
        threads: how many of the GPU's it stands for.
        ready: whether what it waits for has come; None while it waits for nothing.
        waits: what that is.
        products: of the tensor cores, in their order, those that no wait has covered.
        copies: out of shared memory, in their order; ``written``: events of those it has awaited.
        spins: its last atomics, in a row, that changed nothing.
    """

    def __init__(self, program: Any, name: str, warps: int, weight: float) -> None:
        super().__init__()
        self.program, self.name, self.threads, self.weight = program, name, 32 * warps, weight
        self.ready: Callable[[], bool] | None = None
        self.waits, self.spins = "", 0
        self.products: list[Any] = []
        self.copies: list[Any] = []
        self.written = 0
        self.ended = False
        self.turn = threading.Lock()
        self.turn.acquire()

    def __str__(self) -> str:
        return f"program {self.program.id}, {self.name}"


class Task:
    """What an engine does on its own, at a time of its choice."""

    def __init__(self, work: Callable[[], None], weight: float) -> None:
        self.work, self.weight, self.spins = work, weight, 0


class Scheduler:
    """Runs agents and tasks, one at a time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.agents: list[Agent] = []
        self.tasks: list[Task] = []
        self.events: list[tuple[Agent, str, CodeType, int]] = []
        self.current: Agent = None  # type: ignore[assignment]
        self.error: BaseException | None = None
        self.over = threading.Lock()
        self.over.acquire()

    def weight(self) -> float:
        """Some are quick, others so slow that all else overtakes them."""
        return 4.0 ** -self.random.randrange(4)

    def start(self, agent: Agent, work: Callable[[], None]) -> None:
        """A new agent, which begins when it is chosen."""

        def run() -> None:
            agent.turn.acquire()
            try:
                if self.error is None:
                    work()
            except _Stop:
                pass
            except BaseException as error:
                self.error = self.error or error
            agent.ended = True
            self.agents.remove(agent)
            self._hand_on()

        self.agents.append(agent)
        threading.Thread(target=run, daemon=True).start()

    def run(self) -> None:
        """Run all agents and tasks to their end; raises the first error."""
        self._hand_on()
        self.over.acquire()
        if self.error is not None:
            raise self.error

    def _hand_on(self) -> None:
        """To any agent, from none."""
        chosen = None
        try:
            chosen = self._choose() if self.error is None else None
        except BaseException as error:
            self.error = error
        if self.error is not None and self.agents:
            chosen = self.agents[0]  # which stops
        self._go_to(chosen)

    def _go_to(self, chosen: Agent | None) -> None:
        if chosen is None:
            self.over.release()
        else:
            self.current = chosen
            chosen.turn.release()

    def pause(
        self, ready: Callable[[], bool] | None = None, waits: str = "", idle: bool = False
    ) -> None:
        """Let others go on, here and as long as this one is not ready; what it does comes after.

        ``idle``: what it does changes nothing.
        """
        me = self.current
        me.ready = ready
        me.waits = waits and f"{waits} at {line()}"
        me.spins += idle
        chosen = self._choose()
        if chosen is not me:
            self._go_to(chosen)
            me.turn.acquire()
            if self.error is not None:
                raise _Stop
        me.ready = None
        if not idle:
            self.progress()

    def progress(self) -> None:
        """Something has changed that spinning agents may see."""
        for agent in self.agents:
            agent.spins = 0

    def _choose(self) -> Agent | None:
        """Who goes on, after what engines did in between; None when all have ended."""
        while True:
            able: list[Any] = [a for a in self.agents if a.ready is None or a.ready()]
            if not self.tasks:
                if not self.agents:
                    return None
                if not any(a.spins < SPINS for a in able):
                    raise Deadlock(self._all_that_wait())
            able += self.tasks
            (chosen,) = self.random.choices(able, [a.weight / (1 + a.spins) for a in able])
            if type(chosen) is Agent:
                return chosen
            self.tasks.remove(chosen)
            chosen.work()
            self.progress()

    def _all_that_wait(self) -> str:
        waiting = (f"{a} {f'waits for {a.waits}' if a.ready else 'spins'}" for a in self.agents)
        return "nothing can go on: " + "; ".join(waiting)

    def later(self, work: Callable[[], None]) -> None:
        """Leave work to an engine."""
        self.tasks.append(Task(work, self.weight()))

    def event(self, what: str) -> int:
        """The bit of something that the current agent does, or has an engine do."""
        frame = _kernel()
        self.events.append((self.current, what, frame.f_code, frame.f_lineno))
        return 1 << (len(self.events) - 1)

    def first(self, events: int) -> str:
        """What one of some events was."""
        agent, what, code, number = self.events[(events & -events).bit_length() - 1]
        return f"{agent} {what} at {_place(code, number)}"


def _kernel() -> FrameType:
    """The function of the kernel that runs."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_code.co_filename.startswith(HERE):
        frame = frame.f_back
    return frame


def line() -> str:
    """Where the kernel stands."""
    frame = _kernel()
    return _place(frame.f_code, frame.f_lineno)


def _place(code: CodeType, number: int) -> str:
    return f"{code.co_filename.rpartition('/')[2]}:{number} ({code.co_name})"


def target() -> str:
    """The variable that the kernel's line assigns to, or the line."""
    frame = _kernel()
    name = linecache.getline(frame.f_code.co_filename, frame.f_lineno).partition("=")[0].strip()
    return name if name.isidentifier() else f"memory of line {frame.f_lineno}"


run: Scheduler = None  # type: ignore[assignment]  # what interprets now
