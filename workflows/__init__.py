"""The stages, one runnable file each, and the only place that imports Ray.

Ray reads its environment when it is imported, so what it should find is set here, before any module of the package
can import it. A value the user has set stays, but for matplotlib's backend.
"""

import os
import sys

if sys.argv[:1] == ["-m"]:  # so it is until `python -m workflows.<stage>` has found the stage, and nowhere else
    from workflows import environment  # noqa: F401 - ends where this Python lacks what a stage imports

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # `uv run` would re-upload the tree for every worker
# report() waits for the controller's next look at its workers: the default of 2 s would be added to every epoch.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
# Idle workers beyond one per CPU end after a second, and scoring's short tasks would each start a process of their own.
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # else Ctrl-C ends a search as if it were complete
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # else Tune prints boxes of its own beside our lines
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing albumentations asks the network
os.environ["MPLBACKEND"] = "agg"  # figures are files; a backend set for another program may not be installed here
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    # A one-machine Ray must not listen on the network. Despite its name this works everywhere: the node's address
    # is then the loopback one, and servers bind to that, metrics exporters (which ask for no token) included.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
else:
    # The cluster has answered before Ray is asked to join it (`address`): what it then refuses, a token above all, it
    # refuses for good. Ray would ask 20 times.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "5")

if "".join(sys.argv[:1]).endswith("default_worker.py"):  # a process that Ray starts for actors and tasks
    from workflows import signals

    signals.end_hung_exit()
