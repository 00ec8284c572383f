"""Jobs, alone or in a sweep: who works in a folder, how a job ended, which jobs are left to do.

    runs/<name>/status.json     state ("running", "done", "failed", "interrupted"), reason, process, times

A process that was killed leaves "running" behind. All launchers of Hydra are served alike, because a job
tells its sweep how it ended through a file.
"""

import functools
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from svf_lightning.errors import drop_unread_output, one_line, printable
from svf_lightning.files import write_whole

log = logging.getLogger("svf")

Status = dict[str, Any]
Main = Callable[[DictConfig], float]

# What changes neither weights nor scores, so that a result is finished whatever it was.
_NOT_OF_THE_RESULT = ("skip_done", "resume", "workers", "logger")
_RECORDS = "SVF_SWEEP_RECORDS"  # the environment variable that names the folder of a sweep's records


def recorded(main: Main) -> Main:
    """Let ``train.main`` be a job: alone in its folder, and recorded there however it ends.

    With ``skip_done=true`` a finished job is not done again and an unfinished one goes on. In a sweep an
    error is printed and gives NaN, so that the next job starts; alone it is raised. Ctrl-C and signals end
    the whole sweep.
    """

    @functools.wraps(main)
    def job(cfg: DictConfig) -> float:
        from pytorch_lightning.utilities.rank_zero import rank_zero_only

        if (
            getattr(rank_zero_only, "rank", 0) > 0
        ):  # another process of a distributed run, whose first one records it
            return main(cfg)
        hydra = HydraConfig.get()
        status: Status = {
            "state": "running",
            "error": None,
            "miou": None,
            "overrides": list(hydra.overrides.task),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": _now(),
            "ended": None,
        }
        if hydra.mode is not RunMode.MULTIRUN:
            return _do(main, cfg, status)
        try:
            return _do(main, cfg, status)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and drop_unread_output():
                sys.exit(1)  # nobody reads on, as in `train.py -m ... | head`
            status.update(state="failed", error=_reason(error))
            print(_in_full(error), file=sys.stderr, flush=True)
            return math.nan
        finally:
            record = Path(os.environ[_RECORDS]) / f"{hydra.job.num}.json"
            write_whole(record, json.dumps({**status, "job": hydra.job.num, "folder": str(cfg.run_dir)}))

    return job


def _do(main: Main, cfg: DictConfig, status: Status) -> float:
    """Run ``main`` unless it is done, and keep ``status`` and its file up to date."""
    folder = Path(cfg.run_dir)
    with hold(folder):
        earlier, configuration = read_status(folder), _time_of(folder / "config.yaml")
        try:
            status["configuration"] = _digest(cfg)
            if cfg.skip_done:
                same = earlier.get("configuration") == status["configuration"]
                if earlier.get("state") == "done" and same and (earlier["miou"] is None or _tested(folder)):
                    log.info("%s is done already", folder)
                    status.update(state="skipped", miou=earlier["miou"])
                    return math.nan if earlier["miou"] is None else earlier["miou"]
                begun = (folder / "checkpoints" / "last.ckpt").is_file()
                if begun and cfg.resume is None and earlier.get("state") != "done":
                    log.info("%s is not finished: going on there", folder)
                    cfg.resume = "last"
            _write(folder, status)
            score = main(cfg)
        except Exception as error:
            status.update(state="failed", error=_reason(error), ended=_now())
            refused = earlier and _time_of(folder / "config.yaml") == configuration  # before it began
            with suppress(OSError):  # a full disk is the first error, not this one
                _write(folder, earlier if refused else status)
                _add_to_log_file(_in_full(error))
            raise
        except BaseException as end:  # Ctrl-C, and the SystemExit that follows a signal
            with suppress(OSError):
                status.update(state="interrupted", error=f"stopped ({end!r})", ended=_now())
                _write(folder, status)
            raise
        status.update(state="done", miou=None if math.isnan(score) else score, ended=_now())
        _write(folder, status)
        return score


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder. The lock of a process that died is free.

    Raises:
        ValueError: If a process holds the folder, naming it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    holder = read_status(folder)
    try:
        # A process that was killed may have left workers, which hold its lock until they notice.
        lock.acquire(timeout=30 if holder and not _alive(holder) else 0)
    except Timeout:
        holder = read_status(folder)
        known = "another process"
        if holder.get("state") == "running":
            known = f"process {holder['pid']} on {holder['host']}, since {holder['started']}"
        raise ValueError(
            f"{folder} is in use by {known}; wait until it ends, stop it, or name another folder "
            "(hydra.run.dir=FOLDER)"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _time_of(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def read_status(folder: Path) -> Status:
    """How the last run in a folder ended or how it stands; empty if none is known."""
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


class SweepTable(Callback):
    """Hydra's callback around a sweep: at its end a table of all jobs, and status 1 if one failed."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Choose the folder of the jobs' records, and forget those of a sweep that was killed."""
        sweep = hashlib.sha256("\n".join(config.hydra.overrides.task).encode()).hexdigest()[:8]
        self.records = Path(config.hydra.sweep.dir).absolute() / f".sweep-{sweep}"
        shutil.rmtree(self.records, ignore_errors=True)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Tell the job, in whatever process it runs, where its record belongs."""
        if config.hydra.mode is RunMode.MULTIRUN:
            os.environ[_RECORDS] = str(self.records)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table; end with status 1 if a job failed."""
        jobs = [json.loads(path.read_text(encoding="utf-8")) for path in self.records.glob("*.json")]
        shutil.rmtree(self.records, ignore_errors=True)
        jobs.sort(key=lambda job: job["job"])
        print_table(jobs)
        if any(job["state"] == "failed" for job in jobs):
            sys.exit(1)


def print_table(jobs: Sequence[Mapping[str, Any]]) -> None:
    """Print how the jobs of a sweep ended, and under the table why some of them failed.

    Args:
        jobs: Their statuses, each with its number ("job") and its folder ("folder").
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shared = set.intersection(*(set(job["overrides"]) for job in jobs)) if jobs else set()
    table = Table("job", "changes", "outcome", "test mIoU")
    for job in jobs:
        score = "" if job["miou"] is None else f"{100 * job['miou']:.2f}"
        table.add_row(str(job["job"]), Text(_changes(job, shared)), job["state"], score)
    Console().print(table)
    failed = [job for job in jobs if job["state"] == "failed"]
    for job in failed:
        print(printable(f"job {job['job']} ({_changes(job, shared)}) failed: {job['error']}"))
        print(printable(f"  see {Path(job['folder']) / 'train.log'}"))
    if failed:
        print(
            f"{len(failed)} of {len(jobs)} jobs failed; "
            "the same command with skip_done=true does only what is left"
        )


def _changes(job: Mapping[str, Any], shared: set[str]) -> str:
    return " ".join(word for word in job["overrides"] if word not in shared)


def _digest(cfg: DictConfig) -> str:
    """A digest of all that a result depends on, wherever the run's folder lies."""
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    kept = {key: value for key, value in config.items() if key not in _NOT_OF_THE_RESULT}
    folder = json.dumps(config["run_dir"])[1:-1]
    text = json.dumps(kept, sort_keys=True, default=str).replace(folder, "RUN")
    return hashlib.sha256(text.encode()).hexdigest()


def _tested(folder: Path) -> bool:
    return (folder / "metrics.json").is_file()


def _write(folder: Path, status: Status) -> None:
    write_whole(folder / "status.json", json.dumps(status, indent=2) + "\n")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _alive(holder: Status) -> bool:
    """Whether the process is there; one of another machine counts as such."""
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _reason(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return one_line(error) or f"{type(error).__name__}: {lines[0]}"


def _in_full(error: Exception) -> str:
    """One line where the user erred, else the traceback."""
    message = one_line(error)
    if message is None or os.environ.get("SVF_TRACEBACK") == "1":
        return "".join(traceback.format_exception(error)).rstrip()
    return printable(f"error: {message}")


def _add_to_log_file(text: str) -> None:
    """Write to train.log alone; the console shows it anyway."""
    record = logging.LogRecord("svf", logging.ERROR, __file__, 0, text, None, None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
