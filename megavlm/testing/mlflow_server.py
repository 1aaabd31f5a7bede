"""A real MLflow server on this machine, that can be frozen, thawed, killed and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from megavlm_launchers.environment import LOOPBACK, held_port

ADMIN_PASSWORD = "a password of tests"
_START_TIMEOUT_S = 240.0
DEAD_SERVER = f"http://{LOOPBACK}:9"
"""Refuses every connection at once: the port of a service (discard, RFC 863) that nobody runs, nor is any program given it."""


class MlflowServer:
    """with MlflowServer(folder) as server: ...  Everything it keeps is in `folder`; the process group it leads ends with the block.

    Args:
        arguments: of `mlflow server`; none: an sqlite store and artifacts in `folder`.
        auth: with users and passwords; the user is "admin", its password ADMIN_PASSWORD.
    """

    def __init__(self, folder: Path, arguments: list[str] | None = None, auth: bool = False) -> None:
        self.folder, self._auth = folder, auth
        self._held = contextlib.ExitStack()  # also while it is killed: it comes back on the same port
        self.port = self._held.enter_context(held_port())
        self.uri = f"http://{LOOPBACK}:{self.port}"
        if arguments is None:
            store = ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder / "artifacts")]
            arguments = ["server", *store, *(["--app-name", "basic-auth"] if auth else [])]
        self._command = [sys.executable, "-m", "mlflow", *arguments, "--host", LOOPBACK, "--port", str(self.port), "--workers", "1"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it (again), and wait until it answers. Raises RuntimeError with the end of its log when it does not."""
        secrets = {"MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN_PASSWORD, "MLFLOW_FLASK_SERVER_SECRET_KEY": "of tests"} if self._auth else {}
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1", **secrets}
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # seven processes that no run needs
        log = self.folder / "server.log"
        with open(log, "ab") as file:
            self._process = subprocess.Popen(
                self._command, stdout=file, stderr=subprocess.STDOUT, cwd=self.folder, start_new_session=True, env=environment
            )
        end = time.monotonic() + _START_TIMEOUT_S
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError(f"the MLflow server did not start: {log.read_text()[-3000:]}")
            time.sleep(0.25)

    def answers(self) -> bool:
        """Whether it says that it is well."""
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return True  # asks for a password
        except OSError:
            return False

    def freeze(self) -> None:
        """From here on connections are accepted, and nobody answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Ends it and all that it started; asked politely, it takes ten seconds over it."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait(10)
            self._process = None

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "the server is not running"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()
        self._held.close()
