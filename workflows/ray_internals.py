"""Everything that uses private parts of Ray, which may change with its next version.

`tests/workflows/test_ray_internals.py` says which part did; `pyproject.toml` admits the versions that were tested.
Every worker process of a scoring pipeline loads this module with the pipeline's settings, so it imports nothing heavy.
"""

import functools
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray._private.state
from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
    ConcurrencyCapBackpressurePolicy,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.exceptions import ExecutionTimeoutError

from stas_core import storage
from stas_core.errors import StaleOutputError, StasError

if TYPE_CHECKING:
    from ray.data import Dataset
    from ray.train import Result
    from ray.train.torch import TorchTrainer

_LIMIT = "stas.run_ahead_bytes"
NODE_LABEL = "ray.io/node-id"
"""The label that Ray gives every node: its id."""
KUBERNETES_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""Where a pod that has rights finds its namespace."""
FULL_CLUSTER = "tasks with infeasible resource requests"
RAYLETS_LOG = " Last 20 lines of the Raylet logs"
NO_RIGHT = 403
"""What Kubernetes answers to whom it does not know as the cluster's head."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Where Ray Train lists the states that a fold has saved."""


def machine_cpus() -> int:
    """Return how many CPUs a Ray of this machine has: those of its container, where that is given fewer."""
    from ray._private.utils import get_num_cpus

    return int(get_num_cpus())


class RunAhead(BackpressurePolicy):
    """Pauses a step while enough of its results wait for the next step, or its tasks already fill the cluster."""

    def can_add_input(self, op: Any) -> bool:
        """Tell whether the step may start another block."""
        usage = self._resource_manager.get_op_usage(op)
        # How large results are is known only from the first: until then, tasks that cannot run yet must not pile up.
        fits = usage.cpu < self._resource_manager.get_global_limits().cpu
        return bool(fits and usage.object_store_memory < self._data_context.get_config(_LIMIT))


def limit_run_ahead(context: DataContext, waiting_bytes: int) -> None:
    """Cap the bytes of results queued after each step, in place of Ray's reservations.

    Reservations would leave the last step nothing where actors hold most CPUs, and nothing would be written until all
    is read.
    """
    context.op_resource_reservation_enabled = False
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [ConcurrencyCapBackpressurePolicy, RunAhead])
    context.set_config(_LIMIT, waiting_bytes)


class EndedByLook(ExecutionTimeoutError):
    """A pipeline was ended by what a look at it raised, its cause; of other errors Ray Data prints long traces."""


def looked_at(pipeline: "Dataset", look: Callable[[], None], every_s: float) -> "Dataset":
    """Have a pipeline call `look` now and then while it runs, in the thread that runs it; what that raises ends it."""

    class Looking(ExecutionCallback):
        def __init__(self) -> None:
            self._due = time.monotonic() + every_s

        def on_execution_step(self, executor: Any) -> None:
            if time.monotonic() >= self._due:
                try:
                    look()
                except StasError as error:
                    raise EndedByLook(str(error)) from error
                self._due = time.monotonic() + every_s

    pipeline.context.custom_execution_callback_classes = [Looking]
    return pipeline


def reported_groups() -> list[tuple[dict[str, float], int]]:
    """Return the kinds of nodes that an autoscaler has told the cluster of: resources, and how many there may be.

    Ray's own tell nothing. A limit that is none is a very large number.
    """
    found = ray._private.state.state.get_cluster_config()
    groups = [] if found is None else found.node_group_configs
    return [(dict(group.resources), sys.maxsize if group.max_count < 0 else group.max_count) for group in groups]


def kuberay_config() -> dict[str, Any]:
    """Return the configuration that Ray's autoscaler makes of this pod's RayCluster; empty where there is none.

    The pod of a head whose cluster autoscales may read it, as its autoscaler beside it does.
    """
    if not KUBERNETES_NAMESPACE.exists() or "RAY_CLUSTER_NAME" not in os.environ:
        return {}
    import requests
    from ray.autoscaler._private.kuberay import autoscaling_config

    producer = autoscaling_config.AutoscalingConfigProducer(
        os.environ["RAY_CLUSTER_NAME"], KUBERNETES_NAMESPACE.read_text().strip()
    )
    try:  # not as the autoscaler calls it: it would try for half a minute, where it may not
        cluster = producer.kubernetes_api_client.get(producer._ray_cr_path)
    except requests.RequestException as error:
        if error.response is not None and error.response.status_code == NO_RIGHT:
            return {}  # an autoscaler beside it would have the right, and so would this pod
        print(f"what the autoscaler may add is not known, as this pod's RayCluster cannot be read: {error}", flush=True)
        return {}
    if not cluster["spec"].get("enableInTreeAutoscaling"):
        return {}
    config: dict[str, Any] = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)
    return config


@functools.cache
def ask_for_no_nodes() -> None:
    """Have the Ray Data of this process, which a pipeline runs in, ask the autoscaler for nothing.

    What it asks for adds up over pipelines, and is remembered for three minutes where one is ended: nodes idle, and
    autoscaler 2 does nothing where the sum goes beyond its limits. The driver asks, who knows what is left to do.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import DefaultAutoscalingCoordinator

    register = DefaultAutoscalingCoordinator.request_resources

    def register_alone(self: Any, resources: Any, **options: Any) -> None:
        register(self, [], **options | {"label_selectors": None})

    DefaultAutoscalingCoordinator.request_resources = register_alone  # type: ignore[method-assign,assignment]


@functools.cache
def quieten_full_clusters() -> None:
    """Have this driver pass over what Ray prints of nodes that are no news: a full cluster, the log of a lost node.

    Autoscaler 2 warns of "infeasible" requests whenever a cluster has all its nodes and more to do: as it should be.
    """
    from ray._private import worker

    show = worker.print_to_stdstream

    def show_news(data: dict[str, Any], *args: Any, **options: Any) -> None:
        lines = [line.split(RAYLETS_LOG)[0] for line in data["lines"] if FULL_CLUSTER not in line]
        if lines:
            show(data | {"lines": lines}, *args, **options)

    worker.print_to_stdstream = show_news


def quieten_train_reports() -> None:
    """Silence Ray Train's log line for every report, which ignores LoggingConfig."""
    from ray.train.v2._internal.execution import context  # heavy, and only in the workers of folds

    logging.getLogger(context.__file__).setLevel(logging.WARNING)


def fit_without_datasets(trainer: "TorchTrainer") -> "Result":
    """Fit a trainer that was given no Ray datasets, without the process that Ray Train starts to split them.

    A fold reads its images itself; that process would cost as much as a second of its training.
    """
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback

    create = trainer._create_default_callbacks
    trainer._create_default_callbacks = lambda: [one for one in create() if not isinstance(one, DatasetsCallback)]
    return trainer.fit()


def require_own_states(uri: str) -> None:
    """Refuse Ray Train's list of saved states where it names folders elsewhere: it would load and delete those.

    Raises:
        StaleOutputError: naming the entry.
    """
    snapshot = storage.join(uri, SNAPSHOT)
    names = _values_of(storage.read_json(snapshot), "checkpoint_dir_name") if storage.exists(snapshot) else []
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"epoch_\d{4,}", name):
            raise StaleOutputError(
                f"{snapshot}: checkpoint_dir_name = {name!r}, expected a folder there such as epoch_0001; delete "
                f"{uri}, and the fold starts over"
            )


def _values_of(value: Any, key: str) -> Iterator[Any]:
    """Yield the values of a key at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        if name == key:
            yield item
        yield from _values_of(item, key)
