"""What MLflow is told of a run (extra `tracking`), where a user asks for it.

One thread tells it, in order and from the files of the run, so that no step waits for an answer. The first thing that
fails ends that, with one line, and the run goes on. The ids that MLflow gave lie in `<out>/tracking/runs.json`, so that
the same command goes on with them; what is up to date tells nothing.
"""

import logging
import os
import re
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from stas_core import config as configs
from stas_core import local_files, places, storage
from stas_core.config import Config
from stas_core.errors import ConfigError
from stas_core.runs import EpochMetrics, TrainingRun
from stas_core.spelling import without_password, without_passwords

FOLDER = "tracking"
"""Below `out`: the ids, and the database where no other is named."""
IDS = f"{FOLDER}/runs.json"
SQLITE = "sqlite:///"
PATIENCE_S, STOP_S = 20.0, 3.0
"""How long a stage's end waits for MLflow while it answers nothing; the same where the run was stopped."""
LONGEST = 3
"""So many times as long it waits in all, where MLflow answers but has not heard everything."""
LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "GIT_PYTHON_REFRESH": "quiet"}
SHOWN = ("figures", "report.html", "report.md", "config.resolved.yaml", "folds.parquet", "trials.parquet")
"""Files and folders of a run that MLflow keeps, where they are there."""
MOST_CHARACTERS, MOST_AT_ONCE = 500, 100
"""Of a parameter; parameters or metrics that are sent at once."""

Deed = Callable[[Any, str], None]
"""Something that is told, given MLflow's client and the id of the experiment."""


class TrackingConfig(Config):
    """Whether and where MLflow is told of the run; passwords and tokens go into MLflow's own environment variables."""

    enabled: bool = False
    """Tell MLflow of the run; to give `uri` does so too."""
    uri: str | None = Field(None, min_length=1)
    """MLflow's server (http://host:5000) or database (sqlite:////path/mlflow.db); null: a database in `out`, under
    tracking/mlflow.db."""
    experiment: str = Field("stas", min_length=1)
    """MLflow's experiment that runs belong to; it is made where there is none."""

    @field_validator("uri")
    @classmethod
    def _holds_no_secret(cls, uri: str | None) -> str | None:
        if uri is not None and without_password(uri) != uri:
            raise ValueError(
                "this would be written into logs and configs; leave user, password and token out, and give them as "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN, or in the database's "
                "own file or variables, such as PGPASSWORD"
            )
        return uri

    @property
    def is_on(self) -> bool:
        """Whether MLflow is told."""
        return self.enabled or self.uri is not None


class _Teller:
    """The thread that talks to MLflow; it starts with the first thing that is told."""

    def __init__(self, uri: str, experiment: str):
        self.uri, self.experiment = uri, experiment
        self.failure: str | None = None
        self._deeds = deque[Deed]()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._heard_s = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether anything was told that may have begun a run."""
        return self._thread is not None and self.failure is None

    def tell(self, deed: Deed) -> None:
        """Have something told, after all that came before."""
        with self._changed:
            if self.failure is not None:
                return
            self._deeds.append(deed)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
                self._thread.start()

    def settle(self, patience_s: float) -> None:
        """Wait until all is told; give up where nothing was answered for so long, or after `LONGEST` times as long."""
        with self._changed:
            self._heard_s = start_s = time.monotonic()
            while self._deeds and self.failure is None:
                now_s, end_s = time.monotonic(), start_s + LONGEST * patience_s
                if now_s >= self._heard_s + patience_s:
                    self._fail(f"no answer for {patience_s:g} s")
                elif now_s >= end_s:
                    self._fail(f"it is slow: not all was told within {LONGEST * patience_s:g} s")
                else:
                    self._changed.wait(min(self._heard_s + patience_s, end_s) - now_s)

    def hear(self) -> None:
        """Note that MLflow has answered.

        Raises:
            TimeoutError: it is told nothing more.
        """
        self._heard_s = time.monotonic()
        if self.failure is not None:
            raise TimeoutError(self.failure)

    def _work(self) -> None:
        try:
            client, experiment = self._open()
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._deeds)
                    deed = self._deeds[0]
                if self.failure is not None:
                    return
                deed(client, experiment)
                with self._changed:
                    self._deeds.popleft()
                    self._changed.notify_all()
        except Exception as error:  # noqa: BLE001 - whatever a tracker does, the run goes on
            self._fail(f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}")

    def _fail(self, why: str) -> None:
        with self._changed:
            if self.failure is None:
                self.failure = without_passwords(why)[:MOST_CHARACTERS]
                print(
                    f"tracking: MLflow at {self.uri} is told nothing more: {self.failure}. The run goes on", flush=True
                )
            self._deeds.clear()
            self._changed.notify_all()

    def _open(self) -> tuple[Any, str]:
        for name, value in {**LIMITS, **QUIET}.items():
            os.environ.setdefault(name, value)
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        _require_database(self.uri)
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.ERROR)  # its import has set it
        client = _Heard(MlflowClient(tracking_uri=self.uri, registry_uri=self.uri), self)
        found = client.get_experiment_by_name(self.experiment)
        if found is not None:
            return client, found.experiment_id
        database = _database(self.uri)
        place = None if database is None else str(database.parent / "artifacts")
        return client, client.create_experiment(self.experiment, artifact_location=place)


class _Heard:
    """MLflow's client, each answer of which is a sign of life."""

    def __init__(self, client: Any, teller: _Teller):
        self._client, self._teller = client, teller

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            self._teller.hear()
            answer = getattr(self._client, name)(*given, **named)
            self._teller.hear()
            return answer

        return call


def _database(uri: str) -> Path | None:
    """Return the file of a database, beside which artifacts lie; None: it is a server's, or SQLite's own URI."""
    if not uri.startswith(SQLITE) or uri.startswith(f"{SQLITE}file:"):
        return None
    return Path(uri.removeprefix(SQLITE)).absolute()


def _require_database(uri: str) -> None:
    """Open a database file, which MLflow would try for minutes.

    Raises:
        sqlite3.Error, OSError: it cannot be opened.
    """
    if (path := _database(uri)) is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path)) as opened:
            opened.execute("pragma schema_version")


@dataclass
class _Run:
    """A run of MLflow's: of a stage, or of a fold or trial within it. What begins with `do_` is done by the thread."""

    name: str
    out: str
    """Folder of the stage."""
    parent: "_Run | None" = None
    started_s: float = field(default_factory=time.time)
    id: str | None = None
    last_epoch: int = 0
    """Up to which MLflow knows its metrics."""
    ended: bool = False

    def do_begin(self, client: Any, experiment: str, params: Mapping[str, Any] | None = None) -> str:
        """Return the id, of the run that an earlier command began, or of a new one."""
        if self.id is not None:
            return self.id
        above = None if self.parent is None else self.parent.do_begin(client, experiment)
        known = self._read_ids().get("runs", {}).get(self.name)
        if isinstance(known, str) and _is_there(client, known, experiment):
            self.id = known
            client.update_run(known, status="RUNNING")
            history = client.get_metric_history(known, "train_loss")
            self.last_epoch = max((metric.step for metric in history), default=0)
            return known
        tags = {"stas.out": without_password(self.out)} | ({} if above is None else {"mlflow.parentRunId": above})
        made = client.create_run(experiment, start_time=int(self.started_s * 1000), tags=tags, run_name=self.name)
        self.id = str(made.info.run_id)
        self._keep_id(self.id)
        self.do_params(client, self.settings() if params is None else params)
        return self.id

    def settings(self) -> dict[str, Any]:
        """Return the resolved config of a stage, flat; empty where it writes none."""
        uri = storage.join(self.out, "config.resolved.yaml")
        if not storage.exists(uri):
            return {}
        return dict(_flat(configs.parse_yaml(storage.read_bytes(uri).decode(), uri), ""))

    def _read_ids(self) -> dict[str, Any]:
        uri = storage.join(self.out, IDS)
        found = storage.read_json(uri) if storage.exists(uri) else {}
        return found if isinstance(found, dict) else {}

    def _keep_id(self, run_id: str) -> None:
        found = self._read_ids()
        storage.write_json(storage.join(self.out, IDS), {**found, "runs": {**found.get("runs", {}), self.name: run_id}})

    def do_end(self, client: Any, status: str) -> None:
        """Say how it ended, once."""
        if self.id is not None and not self.ended:
            client.set_terminated(self.id, status)
            self.ended = True

    def do_params(self, client: Any, params: Mapping[str, Any]) -> None:
        """Log parameters, cut to what MLflow takes."""
        from mlflow.entities import Param

        logged = [Param(_key(key), without_passwords(str(value))[:MOST_CHARACTERS]) for key, value in params.items()]
        for start in range(0, len(logged), MOST_AT_ONCE):
            client.log_batch(self.id, params=logged[start : start + MOST_AT_ONCE])

    def do_metrics(self, client: Any, values: Mapping[str, float], *, step: int, unix_time_s: float) -> None:
        """Log figures."""
        from mlflow.entities import Metric

        logged = [Metric(_key(key), float(value), int(unix_time_s * 1000), step) for key, value in values.items()]
        for start in range(0, len(logged), MOST_AT_ONCE):
            client.log_batch(self.id, metrics=logged[start : start + MOST_AT_ONCE])

    def do_epochs(self, client: Any, history: Sequence[EpochMetrics]) -> None:
        """Log the epochs that MLflow does not know yet."""
        for row in history:
            if row.epoch > self.last_epoch:
                left_out = ("fold", "epoch", "unix_time_s")
                figures = {k: v for k, v in asdict(row).items() if v is not None and k not in left_out}
                self.do_metrics(client, figures, step=row.epoch, unix_time_s=row.unix_time_s)
                self.last_epoch = row.epoch

    def do_finish(self, client: Any, record: Mapping[str, Any]) -> None:
        """Log what a stage's manifest says, and its figures."""
        facts = {key: value for key, value in record.items() if key not in ("config", "inputs", "verdict")}
        numbers = {k: v for k, v in _flat(facts, "") if isinstance(v, int | float) and not isinstance(v, bool)}
        self.do_metrics(client, numbers, step=0, unix_time_s=time.time())
        verdict = record.get("verdict")
        if isinstance(verdict, Mapping):
            client.set_tag(self.id, "stas.verdict", str(verdict.get("level")))
            client.set_tag(self.id, "stas.reasons", without_passwords(str(verdict.get("reasons", "")))[:4000])
        for key in ("stage", "commit", "command"):
            client.set_tag(self.id, f"stas.{key}", without_passwords(str(record.get(key, "")))[:4000])
        with local_files.temporary_folder() as folder:
            for name in SHOWN:
                for path in _files(self.out, name):
                    target = Path(folder, Path(path).name)
                    data = storage.read_bytes(storage.join(self.out, path))
                    is_text = path.endswith((".yaml", ".md"))
                    target.write_bytes(without_passwords(data.decode()).encode() if is_text else data)
                    client.log_artifact(self.id, str(target), path.rpartition("/")[0] or None)
        self.do_end(client, "FINISHED")
        found = self._read_ids()
        told = {**found.get("told", {}), self.name: _digest(record)}
        storage.write_json(storage.join(self.out, IDS), {**found, "told": told})

    def is_told(self, record: Mapping[str, Any]) -> bool:
        """Tell whether an earlier command has told the very same."""
        return self.id is None and self._read_ids().get("told", {}).get(self.name) == _digest(record)


def _digest(record: Mapping[str, Any]) -> str:
    return storage.fingerprint(*(str(record.get(key)) for key in ("config", "inputs", "verdict", "verdicts")))


def _is_there(client: Any, run_id: str, experiment: str) -> bool:
    """Tell whether MLflow still has a run in the experiment: it may be another server than before."""
    from mlflow.exceptions import MlflowException

    try:
        info = client.get_run(run_id).info
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return bool(info.lifecycle_stage == "active" and info.experiment_id == experiment)


def _files(out: str, name: str) -> list[str]:
    if "." in name:
        return [name] if storage.exists(storage.join(out, name)) else []
    folder = storage.join(out, name)
    return (
        [f"{name}/{entry}" for entry in storage.entries(folder) if entry.endswith(".png")]
        if storage.exists(folder)
        else []
    )


def _flat(values: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items() if isinstance(values, Mapping) else ():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _key(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


@dataclass
class _Stage:
    """A stage that MLflow is told of."""

    teller: _Teller
    run: _Run
    within: dict[str, _Run] = field(default_factory=dict)
    finished: bool = False

    def child(self, name: str) -> _Run:
        """Return the run of a fold or trial."""
        return self.within.setdefault(name, _Run(name, self.run.out, self.run))


_teller: ContextVar[_Teller | None] = ContextVar("teller", default=None)
_stage: ContextVar[_Stage | None] = ContextVar("stage", default=None)


@contextmanager
def following(config: Any, out: str | None) -> Iterator[None]:
    """Tell MLflow of the stages that run in the block, if the settings of the command say so.

    Raises:
        ConfigError: the package is not installed, or there is no place for a database.
    """
    settings = getattr(config, "tracking", None)
    if not isinstance(settings, TrackingConfig) or not settings.is_on:
        yield
        return
    if find_spec("mlflow") is None:
        raise ConfigError("tracking needs MLflow: pip install 'stas-on-ray[tracking]', or leave tracking out")
    uri = settings.uri
    if uri is None:
        if out is None or not storage.is_local(out):
            raise ConfigError(
                f"tracking.enabled: out = {out} cannot hold a database; set tracking.uri, such as http://host:5000 or "
                "sqlite:////data/mlflow.db"
            )
        uri = f"{SQLITE}{storage.local_path(places.absolute(out)) / FOLDER / 'mlflow.db'}"
    teller = _Teller(uri, settings.experiment)
    token = _teller.set(teller)
    try:
        yield
    finally:
        teller.settle(STOP_S)
        _teller.reset(token)


@contextmanager
def of_stage(name: str, out: str) -> Iterator[None]:
    """Attribute what is told in the block to a stage, within that of the stages that runs it, if one does."""
    teller = _teller.get()
    if teller is None:
        yield
        return
    above = _stage.get()
    stage = _Stage(teller, _Run(name, out, None if above is None else above.run))
    token, status = _stage.set(stage), "FAILED"
    try:
        yield
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        _stage.reset(token)
        if teller.is_busy and not stage.finished:  # stages within may have begun its run
            teller.tell(lambda client, _: _end_all(client, stage, status))
            teller.settle(STOP_S)


def _end_all(client: Any, stage: _Stage, status: str) -> None:
    for run in (*stage.within.values(), stage.run):
        run.do_end(client, status)


def begin() -> None:
    """Say that the stage has work to do."""
    if (stage := _stage.get()) is None:
        return
    run = stage.run

    def deed(client: Any, experiment: str) -> None:
        run.do_begin(client, experiment)

    stage.teller.tell(deed)


def log_fold(number: int) -> None:
    """Tell of the epochs that a fold's metrics have and MLflow has not; of its out-of-fold scores once it is done."""
    if (stage := _stage.get()) is None:
        return
    run, folder = stage.child(f"fold {number}"), TrainingRun(stage.run.out).fold(number)

    def deed(client: Any, experiment: str) -> None:
        is_done, history = folder.is_done, folder.metrics()
        if not history:
            return
        run.do_begin(client, experiment, {"fold": number})
        run.do_epochs(client, history)
        if is_done:
            result = folder.result()
            scores = {f"oof_{name}": getattr(result, name) for name in ("dice", "precision", "recall")}
            run.do_metrics(client, scores, step=history[-1].epoch, unix_time_s=history[-1].unix_time_s)
            run.do_end(client, "FINISHED")

    stage.teller.tell(deed)


def log_trial(name: str, setting: Mapping[str, Any], epoch: int, figures: Mapping[str, float], state: str) -> None:
    """Tell of a trial's epoch, or of its end (`state`: training, done, stopped, failed)."""
    if (stage := _stage.get()) is None:
        return
    run, now = stage.child(f"trial {name}"), time.time()

    def deed(client: Any, experiment: str) -> None:
        run.do_begin(client, experiment, setting)
        if figures and epoch:
            run.do_metrics(client, figures, step=epoch, unix_time_s=now)
        if state != "training":
            client.set_tag(run.id, "stas.state", state)
            run.do_end(client, {"done": "FINISHED", "stopped": "KILLED"}.get(state, "FAILED"))

    stage.teller.tell(deed)


def finished(record: Mapping[str, Any]) -> dict[str, Any]:
    """Tell of a finished stage; return what its manifest says of that, empty where MLflow is not asked for."""
    if (stage := _stage.get()) is None:
        return {}
    run, teller = stage.run, stage.teller

    def deed(client: Any, experiment: str) -> None:
        run.do_begin(client, experiment, {})
        if not client.get_run(run.id).data.params:  # it was begun before its settings were written, or now
            run.do_params(client, run.settings() or dict(_flat(record.get("config"), "")))
        run.do_finish(client, record)

    if not run.is_told(record):
        teller.tell(deed)
    teller.settle(PATIENCE_S)
    stage.finished = True
    failure = {} if teller.failure is None else {"failed": teller.failure}
    return {"tracking": {"uri": teller.uri, "experiment": teller.experiment, "run": run.id, **failure}}
