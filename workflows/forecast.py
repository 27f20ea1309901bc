"""What `--plan` says of a run: what there is to do, how long it takes on the cluster at hand, and what it needs.

A stage's `plan` opens all that its run opens, so that what can be refused is refused now. It tries a little of the work
in this process, and neither writes into `out` nor starts a Ray; where a cluster is named, it is asked for its nodes.
"""

import os
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import TypeVar

import numpy as np
import pyarrow as pa

from stas_core import failures, local_files, storage, tables
from stas_core.config import Config
from stas_core.data import images, overlay
from stas_core.errors import ConfigError, InputError, StorageError
from stas_core.failures import Failure
from stas_core.local_files import Counted
from workflows.address import JOB_VARIABLE
from workflows.cluster import Node, describe, ray_session
from workflows.out_folder import COUNTED_WITHIN_S, Outputs, is_finished, own_bytes, require_claimable
from workflows.planned import Foreseen, Price, process_memory
from workflows.progress import at, doing, duration, size

T = TypeVar("T")
R = TypeVar("R")
START_S = 15.0
"""Before the first item of a run, and after its last: Ray, processes, imports, figures."""
DRIVER_BYTES = 150e6
"""Memory of a run's own process, beside what its plan loads: Ray and Ray Data, what a session holds, Matplotlib."""
FIGURE_BYTES = 60e3
"""Of a diagram; those of all stages take 30 to 110 kB."""
RECORDS_BYTES = 20e3
"""Of manifest, claim, settings and a report without its pictures."""


@dataclass(frozen=True)
class Tried:
    """A little of the work, done here."""

    seconds: float
    """Of an item, the median of those that followed the first, which starts up what the others find running."""
    num_bytes: float
    """Written for an item."""
    num_items: int

    def basis(self, what: str) -> str:
        """Say where a time is known from."""
        return f"from {self.num_items} {what} tried here" if self.num_items else ""


@dataclass(frozen=True)
class Forecast:
    """What a run of a stage would take."""

    stage: str
    out: str
    work: str
    """What there is to do, in words."""
    layout: str
    """How it is laid on the cluster, in words."""
    seconds: float | None = None
    """From start to end; None: not known, for the reason in `basis`."""
    basis: str = ""
    """Where the time is known from."""
    num_gpus: float = 0.0
    """Held while it runs; of the layout, where the time is not known, too."""
    may_use_gpus: bool = False
    """Whether the stage takes GPUs of this cluster for any of its work, if not for what is to do now."""
    memory_bytes: float | None = None
    """At the peak, of each process that does the work."""
    disk_bytes: float | None = None
    """Written to `out`, and left there."""
    scratch_bytes: float = 0.0
    """Beside these, while it runs."""
    replaced_bytes: float = 0.0
    """Files of this stage that lie in `out` now, and that the run deletes or writes over: they need no new room."""
    uncounted: str = ""
    """Why these may be more, so that nobody knows whether room is short."""
    room_bytes: float | None = None
    """New room that it needs at its worst moment; None: for all that it writes, less what it replaces."""
    faster: str = ""
    """The cluster on which it takes half as long."""
    faster_costs: float = 1.0
    """Of what it costs on the cluster at hand, what it costs there: twice as much for half as long is the same."""
    notes: Sequence[str] = field(default_factory=tuple)
    """What else a user should know before the start."""

    @property
    def gpu_hours(self) -> float | None:
        """GPU-hours that it holds."""
        return None if self.seconds is None else self.num_gpus * self.seconds / 3600

    @property
    def is_nothing(self) -> bool:
        """Whether all is done already."""
        return self.seconds == 0.0

    def lines(self, price: Price | None = None) -> list[str]:
        """Return the forecast in words."""
        cost = "" if price is None or self.is_nothing else _cost(self, price)
        time_text = f"about {duration(self.seconds)}" if self.seconds is not None else "not known"
        rows = {
            "to do": self.work,
            "on": self.layout,
            "time": ", ".join(filter(None, (time_text, self.basis))) if self.layout else "",
            "faster": self._faster_text(price),
            "GPU-hours": f"{self.gpu_hours:.1f}" if self.gpu_hours else "",
            "cost": cost,
            "memory": "" if self.memory_bytes is None else f"about {size(self.memory_bytes)} a process",
            "disk": _disk(self),
        }
        lines = [f"plan of {self.stage}; nothing was started or written to out"]
        lines += [f"  {name:<10}{text}" for name, text in rows.items() if text]
        short = f"the disk of {self.out} has no room for this: free {size(self.short_bytes)}, or use another"
        return [*lines, *(f"  note      {note}" for note in (*self.notes, *([short] if self.short_bytes else [])))]

    def _faster_text(self, price: Price | None) -> str:
        if not self.faster:
            return ""
        stays = "the price stays" if self.faster_costs == 1 else f"{self.faster_costs:.0%} of the price"
        cost = None if price is None else price.cost(self.seconds, self.gpu_hours)
        amount = "" if cost is None else f": {self.faster_costs * cost:.2f}"
        return f"{self.faster}; {stays}{amount}"

    def in_place_of(self, found: Counted) -> "Forecast":
        """Return the forecast of a run that writes over these files, where it is not known to delete all anyway."""
        if self.replaced_bytes:
            return self
        return replace(self, replaced_bytes=found.num_bytes, uncounted=self.uncounted or found.missing)

    @property
    def short_bytes(self) -> float:
        """Room that the disk of `out` lacks for this; 0 where nobody knows."""
        free = free_bytes(self.out)
        return 0.0 if free is None or self.uncounted else max(0.0, self.needed_bytes - free)

    @property
    def needed_bytes(self) -> float:
        """New room that it needs, as far as that is known."""
        if self.room_bytes is not None:
            return self.room_bytes
        return (self.disk_bytes or 0.0) + self.scratch_bytes - self.replaced_bytes

    def foreseen(self, price: Price | None = None) -> Foreseen:
        """Return the forecast as the run's manifest has it."""
        return Foreseen(
            self.stage,
            self.out,
            self.work,
            self.basis,
            seconds=_rounded(self.seconds, 1),
            gpu_hours=_rounded(self.gpu_hours, 4),
            memory_bytes=_rounded(self.memory_bytes),
            disk_bytes=_rounded(self.disk_bytes),
            price=price,
        )


def _rounded(value: float | None, digits: int | None = None) -> float | None:
    return None if value is None else round(value, digits)


def price_of(amount: float | None, forecasts: Sequence[Forecast]) -> Price | None:
    """Return what `--price` is of: a GPU-hour where any of these stages may take GPUs, else an hour of the cluster.

    What is left to do now, and what of it could be planned, does not decide: the amount would mean something else then.
    """
    of_gpus = any(one.num_gpus or one.may_use_gpus for one in forecasts)
    return None if amount is None else Price(amount, of_gpus=of_gpus)


def _cost(forecast: Forecast, price: Price) -> str:
    cost = price.cost(forecast.seconds, forecast.gpu_hours)
    if not price.of_gpus:
        return "" if cost is None else f"{cost:.2f}, at {price.amount:g} an hour of this cluster"
    if not forecast.num_gpus:
        return "" if cost is None else f"0: it takes no GPU, and {price.amount:g} is the price of a GPU-hour"
    return "" if cost is None else f"{cost:.2f}, at {price.amount:g} a GPU-hour"


def _disk(forecast: Forecast) -> str:
    if not forecast.disk_bytes:
        return ""
    free = free_bytes(forecast.out)
    text = f"about {size(forecast.disk_bytes)} in {forecast.out}"
    text += f", and {size(forecast.scratch_bytes)} more while it runs" if forecast.scratch_bytes else ""
    least = "at least " if forecast.uncounted else ""
    if forecast.replaced_bytes or forecast.uncounted:
        text += f", in place of {least}{size(forecast.replaced_bytes)} that lie there"
    text += f" ({forecast.uncounted})" if forecast.uncounted else ""
    return text if free is None else f"{text}; {size(free)} free there"


@dataclass(frozen=True)
class Failing:
    """The inputs of which is known, before any is tried, that they fail."""

    known: Sequence[Failure]
    num_inputs: int
    """Those that are known to fail among them."""
    allowed: float
    """Share of them that may fail before the run ends with status 1."""
    key: str = "max_failed_fraction"
    """The setting that says so."""
    refusal: str | None = None
    """How the run refuses to end where all fail; None: it ends with status 1, as where too many do."""

    def notes(self, tried: Sequence[Failure] = ()) -> list[str]:
        """Return what a plan says of them, and of others that failed when they were tried.

        Raises:
            ConfigError: no input is left, and the run would refuse that.
        """
        failed = [*self.known, *tried]
        if self.refusal is not None and len(failed) >= self.num_inputs:
            raise ConfigError("".join([f"{self.refusal}:", *(f"\n  {line}" for line in failures.kinds(failed))]))
        found = [*failures.lines(self.known, "known to fail"), *failures.lines(tried, "refused of those tried")]
        if len(failed) <= self.allowed * self.num_inputs:
            return found
        return [
            *found,
            f"the run would end with status 1: {len(failed)} of {self.num_inputs} inputs fail, more than {self.key} = "
            f"{self.allowed:g} allows",
        ]


def begin(
    out: str,
    outputs: Outputs,
    work: tuple[Config, str] | None = None,
    *,
    force: bool,
    is_for_one: bool = False,
    starts_over: bool = False,
) -> Forecast:
    """Check that a run could claim `out`; return a forecast that says what it replaces there, or has nothing to do.

    Args:
        out: the folder.
        outputs: the stage, and what it writes.
        work: config and fingerprint of the inputs; None: whether it is done is told by item.
        force: begin anew.
        is_for_one: whether the folder is for one such work alone.
        starts_over: whether the stage discards what it wrote for other work, without `force`, too.

    Raises:
        WriteError, ConfigError, ForeignOutputError, StaleOutputError: as `require_claimable`.
    """
    require_claimable(out, outputs, force=force, work=work if is_for_one else None)
    if work is not None and not force and is_finished(out, *work):
        return Forecast(outputs.stage, out, "nothing: it is up to date", "", seconds=0.0, disk_bytes=0.0)
    base = Forecast(outputs.stage, out, "", "")
    return base.in_place_of(own_bytes(out, outputs)) if force or starts_over else base


def free_bytes(out: str) -> int | None:
    """Return how many bytes are free where `out` is, or will be; None: nobody knows, of an object store."""
    if not storage.is_local(out):
        return None
    path = storage.local_path(out)
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def nodes_at_hand() -> list[Node]:
    """Return the nodes of the cluster that a run would join; without one, this machine."""
    if "RAY_ADDRESS" in os.environ or JOB_VARIABLE in os.environ:
        with ray_session() as nodes:
            return nodes
    import torch

    from workflows.ray_internals import machine_cpus

    return [Node(machine_cpus(), torch.cuda.device_count())]


def num_cpus(nodes: Sequence[Node]) -> float:
    """Return the CPUs of all nodes."""
    return max(1.0, sum(node.num_cpus for node in nodes))


def bytes_there(uris: Iterable[str]) -> Counted:
    """Return what those of these local files take that are there; 0 of an object store, whose room nobody knows."""
    paths = (str(storage.local_path(uri)) for uri in uris if storage.is_local(uri))
    return local_files.count_bytes(paths, COUNTED_WITHIN_S)


def bytes_in(uris: Iterable[str]) -> Counted:
    """Return what the files below these local folders take; 0 of an object store."""
    paths = (str(storage.local_path(uri)) for uri in uris if storage.is_local(uri))
    return local_files.count_bytes((file for path in paths for file in local_files.find_all(path)), COUNTED_WITHIN_S)


def spread(items: Sequence[T], count: int) -> list[T]:
    """Return so many items, evenly spread over the sequence."""
    return [items[index] for index in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int))]


def try_out(do: Callable[[T, str], object], items: Sequence[T], most_s: float = 20.0) -> Tried:
    """Do the work of some items, into a folder that is deleted again.

    Args:
        do: is given an item, and the folder.
        items: none if nothing is left to do.
        most_s: no item is begun later than this.
    """
    if not items:
        return Tried(0.0, 0.0, 0)
    taken, start = list[float](), time.monotonic()
    forget_peak()
    with local_files.temporary_folder() as folder, doing("trying a little of the work here", at_once=True):
        for item in items:
            at(f"{len(taken)} of {len(items)} done")
            if taken and time.monotonic() - start > most_s:
                break
            began = time.perf_counter()
            do(item, folder)
            taken.append(time.perf_counter() - began)
        written = local_files.bytes_below(folder)
    return Tried(median(taken[1:] or taken), written / len(taken), len(taken))


def forget_peak() -> None:
    """Have `peak_bytes` tell of what comes from now on: a stage planned before this one may have held more."""
    with suppress(OSError):  # another system, or it may not be written: the peak is then that of all so far
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> float:
    """Return the most memory that this process has held since `forget_peak`, or one of its children in its life."""
    found = [peak for peak, _ in process_memory().values()]  # unlike `getrusage`, nothing of who started this process
    return float(max(found, default=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def table_bytes(tried: pa.Table, num_rows: float) -> float:
    """Return about what a Parquet file of so many rows takes, from a few of them."""
    with local_files.temporary_folder() as folder:
        uri = storage.join(folder, "tried.parquet")
        tables.write_table(uri, tried)
        few = storage.size(uri)
    return few + max(0.0, num_rows - len(tried)) * tried.nbytes / max(1, len(tried))


def shown_bytes(num_figures: int, sheet: "Sheet | None" = None) -> float:
    """Return about what a run's records take, with so many diagrams and a contact sheet."""
    return RECORDS_BYTES + FIGURE_BYTES * num_figures + (0.0 if sheet is None else sheet.num_bytes())


@dataclass(frozen=True)
class Sheet:
    """A contact sheet, and a few of the images that it may show."""

    uris: Sequence[str]
    num_pictures: int
    width_px: int
    max_pixels: int = images.MAX_PIXELS

    def num_bytes(self) -> float:
        """Return about what it takes; call it after what is timed, for it reads the images."""
        found = list[int]()
        for uri in self.uris:
            with suppress(InputError, StorageError):  # the run draws it on white, or has it among its failures
                picture = overlay.thumbnail(images.read_image(uri, max_pixels=self.max_pixels), width_px=self.width_px)
                found.append(len(images.encode_png(picture)))
        return mean(found) * self.num_pictures if found else 0.0


def on_all_cpus(
    base: Forecast, nodes: Sequence[Node], item: str, seconds: float, *, longest_s: float = 0.0
) -> Forecast:
    """Return the forecast of work that takes so long on one CPU, and is shared out over all.

    Args:
        base: with its memory. Who looks for GPUs loads torch, which no process of such a run does.
        nodes: of the cluster.
        item: what is shared out, in words.
        seconds: of one CPU.
        longest_s: of the longest item, which one CPU does.
    """
    seconds = max(seconds / num_cpus(nodes), longest_s) + START_S
    return replace(base, layout=f"{describe(nodes)}, {item}", seconds=seconds, faster=doubled(nodes))


def doubled(nodes: Sequence[Node]) -> str:
    """Return the cluster on which work that is shared out by item takes half as long: how many nodes of which kind."""
    kinds = Counter((node.num_cpus, node.num_gpus) for node in nodes if node.num_cpus or node.num_gpus)
    shape = " and ".join(
        f"{2 * num} node(s) of {cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        for (cpus, gpus), num in sorted(kinds.items(), reverse=True)
    )
    ids = {node.node_id is None for node in nodes}
    limit = ", for which its autoscaler's limit must be raised" if ids == {True, False} else ""
    return f"half the time on twice as much: {shape}{limit}"
