"""Errors that no stage foresaw, terminals and pipes: a sentence, a status, and the traceback in a file."""

import io
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import create_server, socket
from typing import Any

import pytest
import ray

from stas_core.config import Config
from stas_core.errors import ConfigError, ResourceError, StorageError
from tests.conftest import ROOT
from workflows import address, cli, cluster


class Settings(Config):
    out: str | None = None


def status_of(run: Callable[[Any, bool], int], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["stage.py", "--config", "/dev/null", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main("stage", Settings, run, "", plan=lambda config, force: [])
    return ended.value.code


def raising(error: BaseException) -> Callable[[Any, bool], int]:
    def run(config: Any, force: bool) -> int:
        raise error

    return run


def test_an_unforeseen_error_is_a_sentence_and_its_traceback_is_filed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert status_of(raising(KeyError("b\u00fc\udcb2")), monkeypatch) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message and "stage stopped: KeyError" in message
    named = re.search(r"traceback in (\S+\.log)\.", message)
    assert named is not None
    log = Path(named[1])
    assert "KeyError" in log.read_text() and "in run" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_where_nothing_can_be_filed_the_traceback_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/none")
    assert status_of(raising(ZeroDivisionError("0")), monkeypatch) == 1
    message = capsys.readouterr().err
    assert "Traceback" in message and "Nobody foresaw this" in message


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (StorageError("cannot read x"), 2, "StorageError: cannot read x\n"),
        (
            ray.exceptions.RayTaskError("f", "a traceback", ConfigError("y")).as_instanceof_cause(),
            2,
            "ConfigError: y\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted; the same command again"),
    ],
)
def test_what_is_known_keeps_its_words(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert status_of(raising(error), monkeypatch) == status
    assert capsys.readouterr().err.startswith(message)


def test_names_that_the_terminal_cannot_show_do_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)

    def run(config: Settings, force: bool) -> int:
        print(f"{config.out} \udcb2")
        return 0

    assert status_of(run, monkeypatch, "out=/x/Müller") == 0
    out.seek(0)
    assert "/x/M\\xfcller \\udcb2" in out.read()


def test_a_pipe_that_is_closed_ends_quietly() -> None:
    program = (
        "import sys; from workflows import cli; from stas_core.config import Config\n"
        "sys.argv[1:] = ['--config', '/dev/null']\n"
        "cli.main('stage', Config, lambda c, f: print('x' * 1_000_000) or 0, '', plan=None)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


@pytest.mark.parametrize("where", ["nowhere", ":6379", "host:", "host:x", "host:0", "host:99999", ""])
def test_an_address_that_is_none_is_refused(where: str) -> None:
    with pytest.raises(ConfigError, match="expected host:port of the head node"):
        address.require_cluster(where)


def answering(answer: bytes) -> tuple[socket, str]:
    server = create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = server.accept()
        connection.sendall(answer)
        connection.recv(100)

    threading.Thread(target=serve, daemon=True).start()
    return server, f"127.0.0.1:{server.getsockname()[1]}"


def test_a_cluster_that_does_not_answer_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with create_server(("127.0.0.1", 0)) as closed:
        free = f"127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was asked"))
    monkeypatch.setenv("RAY_ADDRESS", free)
    with pytest.raises(ResourceError, match=rf"no Ray answers at RAY_ADDRESS = {free} .*unset RAY_ADDRESS"):  # noqa: SIM117
        with cluster.ray_session():
            pass
    silent = create_server(("127.0.0.1", 0))
    with silent, pytest.raises(ResourceError, match=r"no Ray answers .*timed out"):
        address.require_cluster(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
    server, where = answering(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with server, pytest.raises(ResourceError, match="is no Ray"):
        address.require_cluster(where)
    server, where = answering(bytes(3) + b"\x04" + bytes(5))
    with server:
        address.require_cluster(where)


def test_a_cluster_on_loopback_alone_is_named_where_ray_would_look_elsewhere() -> None:
    ray_answers = bytes(3) + b"\x04" + bytes(5)
    server, where = answering(ray_answers)
    with (
        server,
        pytest.raises(ResourceError, match=rf"{where} listens on loopback alone, .* at 127\.0\.0\.2:\d+; set "),
    ):
        address.require_beyond_loopback(where, "127.0.0.2")  # another address of this machine
    address.require_beyond_loopback(where, "127.0.0.1")  # where Ray takes the node for loopback itself
    address.require_beyond_loopback("10.0.0.1:6379", "127.0.0.2")
    address.require_beyond_loopback("auto", "127.0.0.2")


def test_what_ray_raises_on_joining_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: Any) -> None:
        raise RuntimeError("Version mismatch: the cluster was started with Ray 2.1\nlong text")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(cluster, "require_cluster", lambda where: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ResourceError, match=r"RAY_ADDRESS = 10.0.0.1:6379: Version mismatch.*RAY_AUTH_TOKEN"):  # noqa: SIM117
        with cluster.ray_session():
            pass


def test_without_a_home_rays_token_lies_in_a_private_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    cluster._provide_token()
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.is_relative_to(tmp_path) and len(token.read_text()) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and stat.S_IMODE(token.parent.stat().st_mode) == 0o700


def test_another_programs_backend_does_not_matter() -> None:
    program = "import workflows; from stas_core.figures import cohort; cohort.targets_histogram([1, 2])"
    environment = {
        "MPLBACKEND": "another_programs",
        "PATH": "/usr/bin",
        "HOME": "/tmp",
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run([sys.executable, "-c", program], env=environment, cwd="/", check=True)


def test_a_wheel_holds_the_configs_that_stages_default_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    distribution = pytest.importorskip("setuptools").Distribution({"script_name": "setup.py"})
    distribution.parse_config_files(["pyproject.toml"])
    build = distribution.get_command_obj("build_py")
    build.build_lib = str(tmp_path)
    build.ensure_finalized()
    shipped = {Path(target).relative_to(tmp_path) for target in build.get_outputs(include_bytecode=False)}
    expected = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    expected |= {Path("stas_core/pages") / name for name in ("page.html.j2", "page.css", "page.js")}
    assert expected <= shipped and Path("workflows/cli.py") in shipped
    assert cli.CONFIGS.relative_to(Path(cli.__file__).parents[1]) == Path("configs")


def test_a_machine_that_is_too_busy_for_ray_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(*_: Any, **__: Any) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray raises it

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", time_out)
    with pytest.raises(ResourceError, match=r"cannot start Ray .* timed out during startup; .* short of memory"):  # noqa: SIM117
        with cluster.ray_session():
            pass


def test_a_cluster_that_refuses_the_token_is_told_in_time() -> None:
    grpc: Any = pytest.importorskip("grpc")

    def refuse(_: Any, context: Any) -> None:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")

    class Refusing(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, _: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Refusing()])
    where = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    program = "from workflows.cluster import ray_session\nwith ray_session(): pass"
    environment = os.environ | {"RAY_ADDRESS": where}
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    server.stop(None)
    assert time.monotonic() - began < 20
    assert "ResourceError: cannot join the Ray at RAY_ADDRESS" in ended.stderr and "RAY_AUTH_TOKEN" in ended.stderr
    assert re.search(cluster.RAYS_WARNING, ended.stderr, re.MULTILINE) is None


def test_ray_is_heard_only_where_it_meets_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    said = (
        b"[2026-11-26 03:00:01,326 W 6016 6016] rpc_client.h:153: Failed to connect to GCS\n"
        b"[2026-11-26 03:00:01,327 I 6016 6016] core_worker.cc:1: starting\n"
    )
    heard = b"[2026-11-26 03:00:02,326 C 6016 6016] gcs_client.cc:9: Check failed\n\xff plain words\n"
    with pytest.raises(KeyboardInterrupt), cluster.without_rays_warnings():
        print("a warning of Python's", file=sys.stderr)  # first: what the filter passes on comes when it comes
        os.write(2, said + heard + said)
        raise KeyboardInterrupt
    os.write(2, said)
    written = capfd.readouterr().err.encode("utf-8", "surrogateescape").replace(b"\xef\xbf\xbd", b"\xff")
    assert written == b"a warning of Python's\n" + heard + said
