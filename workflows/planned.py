"""What a run took, beside what its plan had foreseen: `forecast` in its manifest.

`--plan` keeps its figures in the user's cache folder, by stage and `out`; the same command finds them there when it
runs, and takes them away when it has ended. No run tries work for their sake: without a plan there is no forecast.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from stas_core import places, storage
from stas_core.config import Config
from stas_core.errors import StorageError
from workflows.address import JOB_VARIABLE
from workflows.progress import duration, size, still

NOT_PLANNED = "this user has not planned it on this machine: the same command with --plan, before it is run"
OTHER_SETTINGS = "the last plan for this out was of other settings"
NOT_IN_PLAN = "the plan does not say"
TICK_S = 2.0
MOST_LOOKING = 0.02
"""Of the time; where thousands of processes run, a look takes a good part of a second."""
MOST_COUNTING_S = 5.0
"""How long the files of `out` are counted; on a slow disk millions would take minutes."""


@dataclass(frozen=True)
class Price:
    """What an hour costs."""

    amount: float
    of_gpus: bool
    """Of a GPU-hour, and work on CPUs alone costs nothing of it; else of an hour of the whole cluster."""

    def cost(self, seconds: float | None, gpu_hours: float | None) -> float | None:
        """Return what a run costs; None: its time is not known."""
        hours = gpu_hours if self.of_gpus else None if seconds is None else seconds / 3600
        return None if hours is None else self.amount * hours


@dataclass(frozen=True)
class Foreseen:
    """What a plan says of a stage, in figures; None: it does not say."""

    stage: str
    out: str
    work: str
    basis: str
    """Where the time is known from, or why it is not."""
    seconds: float | None
    gpu_hours: float | None
    memory_bytes: float | None
    """At the peak, of the largest process."""
    disk_bytes: float | None
    price: Price | None


@dataclass(frozen=True)
class Kept:
    """A plan that was kept for its run."""

    uri: str
    config: Mapping[str, Any]
    unix_time_s: float
    stages: tuple[Foreseen, ...]

    def write(self) -> None:
        """Keep it; without stages nothing is kept.

        Raises:
            WriteError: it cannot be written.
        """
        if self.stages:
            storage.write_json(self.uri, asdict(self))
        else:
            storage.remove(self.uri)


_kept: ContextVar[Kept | str] = ContextVar("kept", default=NOT_PLANNED)
_accounts: ContextVar[tuple["Account", ...]] = ContextVar("accounts", default=())


def keep(stage: str, out: str, config: Config, stages: list[Foreseen]) -> str | None:
    """Keep a plan for its run; return why that was not possible."""
    try:
        Kept(_place_of(stage, out), _identity(config), round(time.time()), tuple(stages)).write()
    except (StorageError, RuntimeError) as error:  # RuntimeError: there is no home
        return f"the run's manifest will not have this forecast, which cannot be kept: {error}"
    return None


@contextmanager
def followed(stage: str, out: str, config: Config) -> Iterator[None]:
    """Hold what is begun in the block against the plan that was kept of the same command."""
    token = _kept.set(_read(stage, out, config))
    try:
        yield
    finally:
        _kept.reset(token)


def _read(stage: str, out: str, config: Config) -> Kept | str:
    try:
        uri = _place_of(stage, out)
        if not storage.exists(uri):
            return NOT_PLANNED
        kept = TypeAdapter(Kept).validate_json(storage.read_bytes(uri))
    except ValidationError:
        return f"the plan that was kept cannot be read, and may be of another version: {uri}; plan again"
    except (StorageError, RuntimeError) as error:
        return f"the plan that was kept cannot be read: {error}"
    return kept if kept.config == _identity(config) else OTHER_SETTINGS


def _identity(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"tracking", "accept_warnings"})


def cache_folder() -> Path:
    """Return where plans are kept.

    Raises:
        RuntimeError: this user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "stas", "plans")


def _place_of(stage: str, out: str) -> str:
    return str(cache_folder() / f"{storage.fingerprint(stage, places.place(out))}.json")


class Account:
    """What a run of a stage takes, from its claim of `out` on."""

    def __init__(self, stage: str, out: str):
        self.num_gpus = 0.0
        """Held while it runs; for the stage to set."""
        self.goes_on = False
        """Whether it goes on from an earlier run, whose work is not counted."""
        self._stage, self._out = stage, out
        self._start = time.monotonic()
        self._gpu_hours_of_stages = 0.0
        """Of the stages that ran within this one: a pipeline holds no GPU itself."""
        self._since: float | None = None
        self._before = {key: peak for key, (peak, _) in process_memory().items()}
        self._largest = 0
        self._lock = threading.Lock()

    def since(self, mark: str) -> None:
        """Count what is written to its folder from now on, when a file there was written, by the clock of its disk."""
        self._since = Path(storage.local_path(mark)).stat().st_mtime if storage.is_local(mark) else None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Have `look` find it while the block runs, and a thread look and say what the run is at if it is silent.

        The thread is not that of the lease, which must go on where a terminal that is stopped holds up every line.
        """
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(ended,), name="watch", daemon=True)
        outer = _accounts.get()
        token = _accounts.set((*outer, self))
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(TICK_S)
            _accounts.reset(token)
            if outer:
                outer[-1]._gpu_hours_of_stages += self._gpu_hours()

    def _watch(self, ended: threading.Event) -> None:
        due = 0.0
        while not ended.wait(TICK_S):
            began = time.monotonic()
            if began >= due:
                self.look()
                due = began + (time.monotonic() - began) / MOST_LOOKING
            try:
                still()
            except (OSError, ValueError):  # nobody reads any more; the run's next line tells
                return

    def look(self) -> None:
        """Note the largest of this process and those that it, or a Ray of its own, has started."""
        found = process_memory()
        # What a process that was there before has held at its peak may be another stage's.
        sizes = [now if self._before.get(key) == peak else peak for key, (peak, now) in found.items()]
        with self._lock:
            self._largest = max([self._largest, *sizes])

    def _gpu_hours(self) -> float:
        return self.num_gpus * (time.monotonic() - self._start) / 3600 + self._gpu_hours_of_stages

    def facts(self) -> dict[str, Any]:
        """Return forecast and actual of each figure, why one is missing, and what a terminal shows."""
        kept = _kept.get()
        plan = _of_stage(kept, self._stage, self._out)
        came, missing = self._actual()
        wanted = {name: None if plan is None else getattr(plan, name) for name in came}
        both = {"forecast": wanted, "actual": came}
        why = kept if isinstance(kept, str) else NOT_IN_PLAN
        if plan is not None and plan.seconds is None and plan.basis:  # why nothing was tried
            why = plan.basis
        missing |= {f"{name}.forecast": why for name, value in wanted.items() if value is None}
        record: dict[str, Any] = {name: {kind: both[kind][name] for kind in both} for name in came}
        if plan is not None and plan.price is not None:
            costs = {name: plan.price.cost(values["seconds"], values["gpu_hours"]) for name, values in both.items()}
            record["cost"] = {name: None if cost is None else round(cost, 2) for name, cost in costs.items()}
            if costs["forecast"] is None:
                missing["cost.forecast"] = why
        record |= {"missing": missing, "goes_on": self.goes_on}
        if isinstance(kept, Kept) and plan is not None:
            record |= {"planned_unix_time_s": kept.unix_time_s, "planned_work": plan.work}
            record["says"] = _line(record)
        return {"forecast": record}

    def _actual(self) -> tuple[dict[str, float | None], dict[str, str]]:
        """Return each figure, and why one is missing."""
        seconds, missing = time.monotonic() - self._start, dict[str, str]()
        memory_bytes: int | None = None
        if "RAY_ADDRESS" in os.environ or JOB_VARIABLE in os.environ:
            missing["memory_bytes.actual"] = "of a cluster's processes it is not watched"
        else:
            self.look()
            memory_bytes = self._largest or None
            if memory_bytes is None:
                missing["memory_bytes.actual"] = "this system does not tell"
        disk_bytes, why = _written_bytes(self._out, self._since)
        if disk_bytes is None:
            missing["disk_bytes.actual"] = why
        named = {"seconds": round(seconds, 1), "gpu_hours": round(self._gpu_hours(), 4)}
        return {**named, "memory_bytes": memory_bytes, "disk_bytes": disk_bytes}, missing

    def settle(self) -> None:
        """Take what was foreseen away: it has been held against what came."""
        kept = _kept.get()
        if isinstance(kept, Kept) and (spent := _of_stage(kept, self._stage, self._out)) is not None:
            is_whole = kept.uri == _place_of(self._stage, self._out)  # what it says of stages that had no run goes, too
            left = replace(kept, stages=() if is_whole else tuple(one for one in kept.stages if one != spent))
            _kept.set(left)
            try:
                left.write()
            except StorageError as error:  # the run itself is whole
                print(f"{kept.uri}, its plan, could not be taken away, and the next run may show it: {error}")


def look() -> None:
    """Have the accounts of this run look at the memory of its processes, before these end."""
    for account in _accounts.get():
        account.look()


def _of_stage(kept: Kept | str, stage: str, out: str) -> Foreseen | None:
    stages = () if isinstance(kept, str) else kept.stages
    place = places.place(out)
    return next((one for one in stages if one.stage == stage and places.place(one.out) == place), None)


def _line(record: Mapping[str, Any]) -> str:
    names = {
        "seconds": ("time", duration),
        "gpu_hours": ("GPU-hours", lambda hours: f"{hours:.1f}"),
        "cost": ("cost", lambda cost: f"{cost:.2f}"),
        "memory_bytes": ("memory of a process", size),
        "disk_bytes": ("disk", size),
    }
    parts = []
    for name, (text, shown) in names.items():
        pair = record.get(name, {})
        if pair.get("forecast") and pair.get("actual") is not None:
            parts.append(f"{text} {shown(pair['forecast'])} -> {shown(pair['actual'])}")
    own = "; it went on from an earlier run, and only its own work is counted" if record["goes_on"] else ""
    return f"{'; '.join(parts)}{own}" if parts else ""


def _written_bytes(out: str, since: float | None) -> tuple[int | None, str]:
    """Return what the files written below a folder take; None, and why, where that is not known."""
    if since is None:
        return None, "the files of an object store are not counted"
    total, end = 0, time.monotonic() + MOST_COUNTING_S
    for folder, _, names in os.walk(storage.local_path(out)):
        for name in names:
            if time.monotonic() > end:
                return None, f"its files could not be counted within {MOST_COUNTING_S:g} s"
            try:
                found = os.lstat(os.path.join(folder, name))
            except FileNotFoundError:  # a temporary file
                continue
            except OSError as error:
                return None, f"its files cannot be counted: {error}"
            total += found.st_size if found.st_mtime >= since else 0
    return total, ""


def process_memory() -> dict[str, tuple[int, int]]:
    """Return bytes at the peak and now of this process and those below it, by id and start; empty: not on Linux."""
    parents, starts = dict[int, int](), dict[int, str]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            values = stat.read_text(errors="replace").rpartition(")")[2].split()  # a name that was cut is no UTF-8
        except OSError:  # it has ended
            continue
        parents[int(stat.parent.name)], starts[int(stat.parent.name)] = int(values[1]), values[19]
    below, found = [os.getpid()], dict[str, tuple[int, int]]()
    for pid in below:
        below += [child for child, parent in parents.items() if parent == pid and child not in below]
        try:
            status = Path(f"/proc/{pid}/status").read_text(errors="replace")
        except OSError:
            continue
        lines = dict(line.split(":", 1) for line in status.split("\n") if ":" in line)
        if pid in starts and "VmHWM" in lines and "VmRSS" in lines:  # a zombie has neither
            found[f"{pid} {starts[pid]}"] = (_kib(lines["VmHWM"]), _kib(lines["VmRSS"]))
    return found


def _kib(text: str) -> int:
    return 1024 * int(text.split()[0])
