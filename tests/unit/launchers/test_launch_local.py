"""Ranks are started, watched and ended on this machine; nothing is left behind, whatever happens."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megavlm_launchers import local
from megavlm_launchers.errors import LaunchError
from megavlm_launchers.local import launch_local

REPOSITORY = Path(__file__).parents[3]
IGNORE = "import signal, time, os; [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGTERM, signal.SIGINT)]; "
RECORD = """
import os, pathlib, signal, sys, time
def note(number, frame):
    with open(f"{folder}/got{os.environ['RANK']}", "a") as f: f.write(signal.Signals(number).name + "\\n")
    if number in (signal.SIGINT, signal.SIGTERM): time.sleep(0.3); sys.exit(0)
folder = sys.argv[1]
for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1): signal.signal(s, note)
pathlib.Path(f"{folder}/ready{os.environ['RANK']}").write_text(str(os.getpid()))
for _ in range(600): time.sleep(0.05)
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def launch(code: str, num_ranks: int, folder: Path, **options: object) -> tuple[int, list[str]]:
    said: list[str] = []
    code_returned = launch_local(python(code, str(folder)), num_ranks, log_dir=folder / "logs", say=said.append, **options)  # type: ignore[arg-type]
    return code_returned, said


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def start_launcher(folder: Path, code: str = RECORD, num_ranks: int = 3) -> tuple[subprocess.Popen, list[int]]:
    """A launcher in a process of its own, and the process ids of its ranks once they are ready."""
    program = (
        "import sys; from megavlm_launchers.local import launch_local; "
        f"sys.exit(launch_local([sys.executable, '-c', {code!r}, {str(folder)!r}], {num_ranks}, log_dir={str(folder / 'logs')!r}))"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY / "launchers")}
    launcher = subprocess.Popen(python(program), env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: all((folder / f"ready{r}").exists() and (folder / f"ready{r}").read_text() for r in range(num_ranks)))
    return launcher, [int((folder / f"ready{r}").read_text()) for r in range(num_ranks)]


def all_gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids)


def test_every_rank_gets_its_place(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS"
    code = f"import os, sys; open(sys.argv[1] + '/' + os.environ['RANK'], 'w').write(' '.join(os.environ[n] for n in '{names}'.split()))"
    assert launch(code, 3, tmp_path) == (0, [])
    rows = [(tmp_path / str(r)).read_text().split() for r in range(3)]
    assert [row[:5] for row in rows] == [[str(r), str(r), "3", "3", "127.0.0.1"] for r in range(3)]
    assert len({row[5] for row in rows}) == 1
    assert rows[0][6] == str(max(1, len(os.sched_getaffinity(0)) // 3))


def test_thread_count_that_is_set_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch("import os, sys; sys.exit(0 if os.environ['OMP_NUM_THREADS'] == '7' else 1)", 2, tmp_path)[0] == 0


def test_first_failure_ends_the_others_and_gives_the_exit_code(tmp_path):
    code = "import os, sys, time\nif os.environ['RANK'] == '1': print('no such thing', flush=True); sys.exit(7)\ntime.sleep(60)"
    begin = time.monotonic()
    returned, said = launch(code, 3, tmp_path)
    assert returned == 7
    assert time.monotonic() - begin < 20
    assert said[0] == "rank 1 ended with exit code 7; stopping the other 2"
    assert "[rank 1] no such thing" in said


def test_a_rank_that_does_not_follow_is_killed(tmp_path):
    code = IGNORE + (
        f"open({str(tmp_path)!r} + '/r' + os.environ['RANK'], 'w').close()\n"
        f"while len([f for f in os.listdir({str(tmp_path)!r}) if f[0] == 'r']) < 2: time.sleep(0.01)\n"
        "if os.environ['RANK'] == '0': os._exit(3)\ntime.sleep(60)"
    )
    returned, said = launch(code, 2, tmp_path, grace_s=0.5)
    assert returned == 3
    assert "killing ranks that did not end within 0.5 s: 1" in said


def test_a_killed_rank_is_128_plus_signal(tmp_path):
    code = "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    returned, said = launch(code, 2, tmp_path)
    assert returned == 137
    assert "rank 1 was ended by SIGKILL (out of memory?)" in said[0]


def test_output_of_rank_0_is_ours_and_of_the_others_is_in_files(tmp_path, capfd):
    launch("import os, sys; print('out', os.environ['RANK']); print('err', os.environ['RANK'], file=sys.stderr)", 3, tmp_path)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("out 0\n", "err 0\n")
    assert sorted((tmp_path / "logs/rank2.log").read_text().split("\n")) == ["", "err 2", "out 2"]


def test_helpers_of_a_rank_end_with_it(tmp_path):
    code = (
        "import os, subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open(sys.argv[1] + '/helper' + os.environ['RANK'], 'w').write(str(p.pid))\nos._exit(0)"
    )
    assert launch(code, 2, tmp_path)[0] == 0
    pids = [int((tmp_path / f"helper{r}").read_text()) for r in range(2)]
    wait_until(lambda: all_gone(pids))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_reaches_every_rank_once(tmp_path, number):
    launcher, pids = start_launcher(tmp_path)
    os.killpg(launcher.pid, number)  # as the terminal's Ctrl-C does: to the foreground group
    assert launcher.wait(20) == 0
    assert [(tmp_path / f"got{r}").read_text() for r in range(3)] == [f"{number.name}\n"] * 3
    assert all_gone(pids)


def test_other_signals_are_passed_on_and_do_not_stop(tmp_path):
    launcher, pids = start_launcher(tmp_path)
    launcher.send_signal(signal.SIGUSR1)
    wait_until(lambda: all((tmp_path / f"got{r}").exists() for r in range(3)))
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGHUP)
    assert launcher.wait(20) == 0
    assert (tmp_path / "got2").read_text() == "SIGUSR1\nSIGTERM\n"
    assert all_gone(pids)


def test_a_second_request_kills(tmp_path):
    stubborn = IGNORE + "import sys; open(f\"{sys.argv[1]}/ready{os.environ['RANK']}\", 'w').write(str(os.getpid())); time.sleep(60)"
    launcher, pids = start_launcher(tmp_path, stubborn)
    launcher.send_signal(signal.SIGINT)
    assert "passed on to 3 ranks" in launcher.stderr.readline()
    assert not all_gone(pids)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(20) == 137
    assert all_gone(pids)


def test_no_rank_outlives_a_killed_launcher(tmp_path):
    launcher, pids = start_launcher(tmp_path)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: all_gone(pids))


def test_only_this_starts_messages_are_shown(tmp_path):
    code = "import os, sys; print('trouble', sys.argv[2]); sys.exit(0 if os.environ['RANK'] == '0' else 2)"
    shown = [launch_local(python(code, "", word), 2, log_dir=tmp_path, say=(said := []).append) and said for word in ("first", "second")]
    assert any("trouble first" in line for line in shown[0])
    assert any("trouble second" in line for line in shown[1]) and not any("trouble first" in line for line in shown[1])


def test_signal_mask_is_as_before(tmp_path):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    launch("pass", 1, tmp_path)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_command_that_is_not_there_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        launch_local(["/no/such/program"], 2, log_dir=tmp_path)


def test_no_ranks_are_refused(tmp_path):
    with pytest.raises(LaunchError, match="num_ranks=0"):
        launch_local(["true"], 0)


def test_a_disk_of_the_logs_that_hangs_does_not_keep_the_exit_code(tmp_path_factory, monkeypatch):
    """It stops to answer while the ranks run; the one that fails says so in a log that is there no more."""
    from megavlm.testing.hung_disk import HungDisk, can_hang

    logs, signs = tmp_path_factory.mktemp("logs"), tmp_path_factory.mktemp("signs")
    if not can_hang(logs):
        pytest.skip("this process may not mount a file system of FUSE")
    monkeypatch.setattr(local, "LOG_READ_S", 0.5)
    wait_for_the_sign = f"""
import os, sys, time
end = time.monotonic() + 30
while not os.path.exists({str(signs / "hangs")!r}) and time.monotonic() < end: time.sleep(0.02)
if os.environ["RANK"] == "1": print("lost words", flush=True); sys.exit(76)
"""
    over = threading.Event()

    def hang() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, local.WATCHED)  # they are the launcher's
        wait_until((logs / "rank1.log").exists)
        with HungDisk(logs):
            (signs / "hangs").touch()
            over.wait(30)

    disk = threading.Thread(target=hang)
    disk.start()
    said: list[str] = []
    try:
        code = local.launch_local(python(wait_for_the_sign), 2, log_dir=logs, say=said.append)
    finally:
        over.set()
        disk.join()
    assert code == 76 and "(its disk does not answer)" in said[-1]
