"""What an output folder is: whose it is, what was done there, and which of its files may be deleted.

A folder belongs to one stage. `claim.json` says which, and names the ids that its files are called by, before the first
of them is written; with the patterns of the stage's `Outputs` this tells its own files from a user's, which are never
deleted. `manifest.json` is written last: its work is whole. One run at a time works there (`lease`).
"""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stas_core
from stas_core import local_files, places, storage
from stas_core.config import Config, build
from stas_core.errors import (
    ConfigError,
    DeletedOutputError,
    ForeignOutputError,
    OccupiedOutputError,
    StaleOutputError,
    StorageError,
    WriteError,
)
from stas_core.local_files import Counted
from stas_core.spelling import without_password
from workflows import lease, report_pages, run_log, run_metrics, tracking
from workflows.address import JOB_VARIABLE
from workflows.lease import LEASE, Lease
from workflows.planned import Account
from workflows.progress import doing

MANIFEST, CLAIM = "manifest.json", "claim.json"
OWN = (MANIFEST, "config.resolved.yaml", *report_pages.PAGES, f"{tracking.FOLDER}/**")
"""What every stage writes, beside its claim."""
SHOWN = 3
COUNTED_WITHIN_S = 5.0
"""How long the files of a folder are counted for a plan: there may be millions."""
CLEARED_WITHIN_S = 10
"""How long a run whose folder was deleted waits for the last of what its workers still write there."""
_DELETED = f"{{}} or its {CLAIM} was deleted while this run worked there"


def code_version() -> dict[str, str]:
    """Return where the running code lies and which commit it is."""
    root = Path(stas_core.__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # there is no git
        found = ""
    # A Ray job runs an uploaded copy, without .git.
    return {"path": str(root), "commit": found or "unknown (no git checkout)"}


def command_line() -> str:
    """Return the command of this process as one would type it again."""
    program, *arguments = sys.argv
    called = ["stas"] if Path(program).name == "stas" else ["python", program]
    return shlex.join([*called, *map(without_password, arguments)])


def require_uri(key: str, value: str | None, example: str) -> str:
    """Return a path that is safe to use on any node, or raise with the key to set.

    Raises:
        ConfigError: the path is unset, or relative in a Ray job, whose working directory is a temporary copy.
    """
    command = f"{command_line()} {key}={example}"
    if value is None or not value.strip():
        raise ConfigError(f"{key} is {'not set' if value is None else 'empty'}; give it, or run: {command}")
    if JOB_VARIABLE in os.environ and not storage.is_absolute(value):
        raise ConfigError(
            f"{key} = {value} is relative, but a Ray job works in a temporary copy that is deleted; give an absolute "
            f"path or URI that every node can reach, for example: {command}"
        )
    return places.absolute(value)


def require_out(value: str | None, example: str) -> str:
    """Return the output folder, or raise with the reason why it cannot be one.

    Raises:
        ConfigError: as `require_uri`; or it is a place that holds more than a stage's outputs.
    """
    out = require_uri("out", value, example)
    place = places.place(out)
    taken = {
        "/": "the root of the file system",
        places.place(str(Path.home())): "your home directory",
        places.place(str(Path.cwd())): "the working directory",
        f"{place.partition('://')[0]}://": "no bucket",
    }
    if place in taken:
        raise ConfigError(f"out = {value} is {taken[place]}; give a folder of its own, for example out={example}")
    return out


def require_apart(out: str, read: Mapping[str, str | None], listed: Iterable[str] = ()) -> None:
    """Refuse an output folder that contains an input, or lies in a folder that is listed.

    Inputs would be overwritten or deleted, outputs taken for inputs. Paths count by the place they lead to.

    Args:
        out: the output folder.
        read: every path that the stage reads, by its key.
        listed: keys of those whose files are searched for at any depth.

    Raises:
        ConfigError: naming both keys.
    """
    roots = {key: places.fixed_root(places.absolute(uri)) for key, uri in read.items() if uri is not None}
    for key, root in roots.items():
        if places.is_within(root, out):
            raise ConfigError(
                f"out = {out} holds {key} = {read[key]}, which is read: they must not lie within each other; give "
                "out= a folder of its own"
            )
    for key in listed:
        if key in roots and places.is_within(out, roots[key]):
            raise ConfigError(
                f"out = {out} and {key} = {read[key]} lie within each other: outputs would be taken for inputs; give "
                "out= a folder beside it"
            )


@dataclass(frozen=True)
class Outputs:
    """Which files a stage writes in its folder, beside claim, manifest and resolved config."""

    stage: str
    patterns: tuple[str, ...]
    """Paths relative to the folder: `{id}` stands for an id of the claim, `{number}` for a number, `*` for part of a
    name, `**` for any path."""

    def owns(self, path: str, ids: frozenset[str]) -> bool:
        """Tell whether the stage wrote a file, or was about to."""
        folder, _, name = path.rpartition("/")
        name = local_files.leftover_of(name) or name
        path = f"{folder}/{name}" if folder else name
        own = (*OWN, *self.patterns)
        matches = (re.fullmatch(_regex(pattern), path) for pattern in own)
        return any(match is not None and set(match.groups()) <= ids for match in matches)

    def below(self, folder: str) -> tuple[str, ...]:
        """Return the patterns of all files of such a folder that lies deeper in another stage's."""
        return tuple(f"{folder}/{name}" for name in (CLAIM, LEASE, *OWN, *self.patterns))


def _regex(pattern: str) -> str:
    parts = {"**": ".+", "*": "[^/]*", "{id}": "([^/]+)", "{number}": "[0-9]+"}
    return "".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*|\{id\}|\{number\})", pattern))


class OutFolder:
    """An output folder that this run has claimed, and whose lease it holds."""

    def __init__(self, uri: str, outputs: Outputs, held: Lease, account: Account, *, has_page: bool = True):
        self.uri = uri
        self._has_page = has_page
        self._outputs = outputs
        self._lease = held
        self._named: set[str] = set()
        self.manifest: Mapping[str, Any] = {}
        """What this run has written, or found finished."""
        self.account = account
        """Of what this run takes."""

    def verify(self) -> None:
        """Check that the folder is still this run's; call it before results are gathered.

        Raises:
            OccupiedOutputError: another run has taken it over.
            DeletedOutputError: it was deleted.
        """
        if self.is_deleted():
            raise DeletedOutputError(_DELETED.format(self.uri))
        self._lease.verify()

    def is_deleted(self) -> bool:
        """Tell whether the folder, or its claim, was deleted since this run claimed it."""
        return not storage.exists(storage.join(self.uri, CLAIM))

    @property
    def ids(self) -> frozenset[str]:
        """The ids in the names of the stage's files."""
        return frozenset({*(_read_mark(self.uri, CLAIM) or {}).get("ids", ()), *self._named})

    def name_ids(self, ids: Iterable[str]) -> None:
        """Record the ids that file names will contain, before the files are written.

        Raises:
            DeletedOutputError: the folder was deleted.
        """
        self._named |= set(ids)
        claim = _read_mark(self.uri, CLAIM)
        if claim is None:
            raise DeletedOutputError(_DELETED.format(self.uri))
        if new := self._named - set(claim.get("ids", ())):
            claim["ids"] = sorted({*claim.get("ids", ()), *new})
            storage.write_json(storage.join(self.uri, CLAIM), claim)

    def discard(self, *, within: str = "") -> list[str]:
        """Delete the stage's own files whose paths begin with `within`; return the paths of others' files.

        What a database of MLflow tells of earlier runs stays; the run that begins now is another one there.
        """
        files = [path for path in storage.walk(self.uri) if path.startswith(within) and path not in (CLAIM, LEASE)]
        files = [path for path in files if path == tracking.IDS or not path.startswith(f"{tracking.FOLDER}/")]
        if not within:
            self.account.goes_on = False
        ids = self.ids
        own = [path for path in files if self._outputs.owns(path, ids)]
        own.sort(key=lambda path: path != MANIFEST)  # first the files that vouch for others
        storage.remove_files(self.uri, own)
        return [path for path in files if path not in own]

    def clear(self) -> list[str]:
        """Delete what the workers of this run, which end about now, wrote after its folder was deleted.

        All of it is left there, and its paths are returned, unless every file of the stage was written after this run
        last renewed its lease: where a claim alone was deleted, or a folder is being restored, results lie there.
        """
        self._lease.ended.set()  # that it is lost need not be told any more
        end = time.monotonic() + CLEARED_WITHIN_S
        left = storage.walk(self.uri)
        while time.monotonic() < end:
            own = [path for path in left if self._outputs.owns(path, frozenset(self._named))]
            if len(own) < len(left) or not all(self._lease.is_renewed_before(path) for path in own):
                break
            storage.remove_files(self.uri, own)
            time.sleep(0.5)
            left = storage.walk(self.uri)
            if not left:
                break
        return left

    def is_finished(self, config: Config, inputs: str) -> bool:
        """Tell whether the folder holds a finished run of exactly this work: its config and its inputs' fingerprint."""
        self.manifest = _finished(self.uri, config, inputs) or {}
        return bool(self.manifest)

    def write_manifest(self, config: Config, inputs: str, facts: Mapping[str, Any]) -> None:
        """Write the stage's manifest: the last file, so that its presence means the rest is whole; and then its pages.

        Raises:
            OccupiedOutputError: another run has taken the folder over.
            DeletedOutputError: it was deleted.
            WriteError: the disk takes no more.
        """
        self.verify()
        made = {"commit": code_version()["commit"], "machine": report_pages.machine()}
        if self._has_page:  # a trial's process was started by Ray, with a command that nobody types
            made["command"] = command_line()
            facts = {**facts, **self.account.facts()}
        made["run_id"] = self._lease.run_id
        record = {"stage": self._outputs.stage, **made, "finished_unix_time_s": round(time.time()), **facts}
        record |= {"config": _identity(config), "inputs": inputs}
        self._vouch(record)
        if self._has_page:  # after the manifest: a driver that many pictures are too much for has its results
            try:
                with doing("writing the report"):
                    record |= report_pages.write_pages(self.uri, record, type(config))
            except WriteError:
                storage.remove(storage.join(self.uri, MANIFEST))  # the same command goes on
                raise
            self._vouch(record | tracking.finished(record))
            run_log.finished(record)
            if says := record["forecast"].get("says"):
                print(f"plan -> run: {says}", flush=True)
            self.account.settle()

    def _vouch(self, record: Mapping[str, Any]) -> None:
        uri = storage.join(self.uri, MANIFEST)
        storage.write_json(uri, record)
        self.manifest = record
        try:
            self.verify()
        except OccupiedOutputError:  # taken over just now: it must not vouch for the other run's files
            storage.remove(uri)
            raise


@contextmanager
def claim_for_stage(
    out: str,
    outputs: Outputs,
    *,
    force: bool,
    work: tuple[Config, str] | None = None,
    ids: Iterable[str] = (),
    within: str | None = None,
) -> Iterator[OutFolder]:
    """Record that `out` belongs to a stage, and hold it while the block runs.

    Args:
        out: the folder.
        outputs: the stage, and what it writes.
        force: delete first what the stage left there; the files of others stay, and are named.
        work: config and fingerprint of the inputs, where the folder is for this work alone.
        ids: what files will be called by.
        within: the folder of the search that this run is a trial of.

    Raises:
        ForeignOutputError: it is another stage's, or another program's.
        StaleOutputError: it belongs to other work, naming the config keys that differ.
        ConfigError: it is nobody's, and not empty.
        OccupiedOutputError: another run works there.
        DeletedOutputError: the folder was deleted meanwhile.
    """
    _require_own(out, outputs.stage, force)  # before anything is written there
    account = Account(outputs.stage, out)
    with lease.hold(out, outputs.stage, within) as held:
        _require_own(out, outputs.stage, force)
        account.since(storage.join(out, LEASE))
        folder = OutFolder(out, outputs, held, account, has_page=within is None)  # a search shows its trials
        uri = storage.join(out, CLAIM)
        claim = None if force else _read_mark(out, CLAIM)
        account.goes_on = claim is not None
        if force and (kept := folder.discard()):
            print(f"--force: kept {_some(kept)}, which {outputs.stage} did not write", flush=True)
        if claim is None:
            record: dict[str, Any] = {"stage": outputs.stage}
            if work is not None:
                record |= {"config": _identity(work[0]), "inputs": work[1]}
            storage.write_json(uri, record | {"ids": sorted(set(ids))})
        else:
            _require_same_work(out, claim, work)
        folder.name_ids(ids)
        with (
            _told_if_deleted(folder),
            run_log.of_run(outputs.stage, out, held.run_id, goes_on=account.goes_on),
            run_metrics.of_run(outputs.stage, out, held.run_id),
            tracking.of_stage(outputs.stage, out),
            account.current(),
        ):
            yield folder
            run_log.settle(folder.manifest)
            if folder.manifest:  # one that was found finished, too: its plan is not of what is run later
                account.settle()


@contextmanager
def _told_if_deleted(folder: OutFolder) -> Iterator[None]:
    """Whatever ends the block: where the folder was deleted, that is the reason, and what was written since goes.

    Raises:
        DeletedOutputError: it was.
    """
    try:
        yield
    except BaseException as error:
        with suppress(StorageError):  # then it cannot be told
            if folder.is_deleted():
                left = folder.clear()
                told = f"{_some(left)} is still there and was left alone: move it away, then" if left else "now"
                raise DeletedOutputError(
                    f"{_DELETED.format(folder.uri)}; {told} run the same command to start anew, or give another out="
                ) from error
        raise


def is_finished(out: str, config: Config, inputs: str) -> bool:
    """Tell whether a folder holds a finished run of exactly this work."""
    return _finished(out, config, inputs) is not None


def _finished(out: str, config: Config, inputs: str) -> dict[str, Any] | None:
    """Return the manifest of a finished run of exactly this work; None: there is none."""
    manifest = _read_mark(out, MANIFEST)
    return None if manifest is None or _changes(out, MANIFEST, manifest, config, inputs) else manifest


def own_bytes(out: str, outputs: Outputs) -> Counted:
    """Return what the stage's own files take that lie in a local folder; none are counted in an object store."""
    if not storage.is_local(out) or not storage.exists(out):
        return Counted(0)
    ids, root = frozenset((_read_mark(out, CLAIM) or {}).get("ids", ())), str(storage.local_path(out)).rstrip("/")
    return local_files.count_bytes(
        local_files.find_all(root), COUNTED_WITHIN_S, lambda path: outputs.owns(path.removeprefix(f"{root}/"), ids)
    )


def require_claimable(out: str, outputs: Outputs, *, force: bool, work: tuple[Config, str] | None = None) -> None:
    """Check, without writing, that a stage could claim `out` now.

    Raises:
        WriteError: it cannot be written.
        ConfigError, ForeignOutputError, StaleOutputError: as `claim_for_stage`.
    """
    path = storage.local_path(out) if storage.is_local(out) else None
    there = None if path is None else next(place for place in (path, *path.parents) if place.exists())
    if there is not None and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise WriteError(f"out = {out}: {there} is no folder that may be written; give another out=")
    _require_own(out, outputs.stage, force)
    claim = None if force else _read_mark(out, CLAIM)
    if claim is not None:
        _require_same_work(out, claim, work)


def _require_same_work(out: str, claim: Mapping[str, Any], work: tuple[Config, str] | None) -> None:
    if work is not None and (changes := _changes(out, CLAIM, claim, *work)):
        raise StaleOutputError(
            f"{out} holds a run that differs in: {', '.join(changes)}; use another out=, or --force to start over"
        )


def _require_own(out: str, stage: str, force: bool) -> None:
    """Refuse a folder that is not this stage's and not empty."""
    claim = _read_mark(out, CLAIM)
    mark = claim if claim is not None else _read_mark(out, MANIFEST)
    if mark is None:
        if found := [name for name in storage.entries(out) if not _is_leases(name)]:
            raise ConfigError(
                f"out = {out}, which holds none of this stage's outputs, is not empty: it has {_some(found)}; give a "
                "new folder, or an empty one"
            )
        return
    owner = mark.get("stage")
    if owner != stage:
        made = owner if isinstance(owner, str) else "another program"
        raise ForeignOutputError(f"{out} holds what {made} made, not {stage}; use another out=")
    named = None if claim is None else claim.get("ids")
    is_list = isinstance(named, list) and all(isinstance(name, str) for name in named)
    if not is_list and (force or named is not None):
        raise StaleOutputError(
            f"{out}/{CLAIM} does not name the files that were written there, so that they cannot be told from yours; "
            "use another out="
        )


def _is_leases(name: str) -> bool:
    """Tell whether a file was left by a run that was killed before it had claimed its folder."""
    return name == LEASE or local_files.leftover_of(name) in (LEASE, CLAIM)


def _some(paths: list[str]) -> str:
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return f"{', '.join(paths[:SHOWN])}{more}"


def _read_mark(out: str, name: str) -> dict[str, Any] | None:
    """Read a claim or manifest; None: there is none. Anything but a mapping is read as an empty one.

    Raises:
        StaleOutputError: it cannot be read.
    """
    uri = storage.join(out, name)
    if not storage.exists(uri):
        return None
    try:
        mark = storage.read_json(uri)
    except StorageError as error:
        raise StaleOutputError(f"{error}; restore it, or use another out=") from error
    return mark if isinstance(mark, dict) else {}


def _identity(config: Config) -> dict[str, Any]:
    """Return the settings that make it the same work: who is told of it does not."""
    return config.model_dump(mode="json", exclude={"tracking"})


def _changes(out: str, name: str, record: Mapping[str, Any], config: Config, inputs: str) -> list[str]:
    """Describe the differences between the recorded work and this work.

    The recorded config is completed with today's defaults, so that an option added since does not count as a change.

    Raises:
        StaleOutputError: the record does not say what was done.
    """
    missing = [key for key in ("config", "inputs") if key not in record]
    if missing:
        raise StaleOutputError(f"{out}/{name} has no key {missing[0]!r}; restore it, or use another out=")
    old: Any = record["config"]
    if isinstance(old, dict):
        with suppress(ConfigError):  # of another version: the keys that are gone count as changes
            old = _identity(build(type(config), old))
    changes = _differences(old, _identity(config))
    return changes if record["inputs"] == inputs else [*changes, "the input data"]


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(set(old) | set(new))
        return [line for k in keys for line in _differences(old.get(k), new.get(k), f"{path}.{k}" if path else str(k))]
    return [] if old == new else [f"{path} (was {old!r}, now {new!r})"]
