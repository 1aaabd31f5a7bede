"""Spools of versions that had one for each node instead of one for each program: their records are moved to where they are delivered from.

Such a spool is <run_dir>/mlflow-spool itself, or <run_dir>/mlflow-spool-node-<N>, with a lock that its delivering process held.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from megavlm.tracking.console import get_logger
from megavlm.tracking.spool_folders import OLD_LOCK, SPOOL_FOLDER, SpoolLock, TakenSpool, make_spool, old_spools

_log = get_logger(__name__)


def adopt_old_spools(run_dir: Path) -> None:
    """Move what ended programs of an earlier version left to spools of their own, before all others. A disk that refuses is warned of."""
    for folder in old_spools(run_dir):
        try:
            if not (folder / OLD_LOCK).exists():  # touched only then: without locks, the folder's age says whether its program ended
                (folder / OLD_LOCK).touch()
            lock = SpoolLock.take(folder / OLD_LOCK, own=False)
            if lock is None:
                continue  # a program of that version still runs
            try:
                _move(folder, run_dir)
            finally:
                lock.release()
        except OSError as error:
            _log.warning("what an earlier version left for MLflow in %s stays there until the next start: %s", folder, error)


def _move(folder: Path, run_dir: Path) -> None:
    """Killed anywhere in here, the next start moves the rest to another spool."""
    is_root = folder.name == SPOOL_FOLDER
    spool, lock = make_spool(run_dir, "old" if is_root else f"old{folder.name.removeprefix(SPOOL_FOLDER)}", begun_ns=0)
    found = [path for path in folder.iterdir() if path.name != OLD_LOCK and (path.name == "system" or path.is_file())]
    # How far it was delivered goes first: a file without that is sent again, but one that is not there is not taken for delivered.
    for path in sorted(found, key=lambda path: (not path.name.startswith("delivered.json"), path.name)):
        path.rename(spool / path.name)
    (folder / OLD_LOCK).unlink(missing_ok=True)
    if not is_root:
        with contextlib.suppress(OSError):
            folder.rmdir()
    lock.release()
    taken = TakenSpool.take(spool)
    if taken is not None:
        taken.remove_if_done()
        taken.release()
