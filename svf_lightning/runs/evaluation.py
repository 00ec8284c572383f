"""Test a finished run again: more episodes, other seeds, other shots, or episodes from a list."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from svf_lightning.data import episode_list as episode_lists
from svf_lightning.data.protocol import episode_rows
from svf_lightning.files import write_whole
from svf_lightning.runs.configuration import check_values
from svf_lightning.runs.folder import keep_earlier
from svf_lightning.runs.results import environment, test_scores
from svf_lightning.runs.run import build_data, build_trainer, load_run, silence_warnings
from svf_lightning.schema import checked

log = logging.getLogger("svf")


def evaluate(
    folder: Path,
    shot: int | None = None,
    episodes: int | None = None,
    seeds: Sequence[int] | None = None,
    episode_list: str | None = None,
    save_episodes: str | None = None,
    root: str | None = None,
    trust: str | Sequence[str] = (),
    batch_size: int | None = None,
    workers: int = 0,
    feature_memory: int = 2048,
) -> float:
    """Test a finished run again and write ``evaluation.json`` into its folder.

    An earlier ``evaluation.json`` is kept, as ``evaluation-1.json`` and so on.

    Args:
        folder: The run's folder.
        shot: Supports per episode; None is the run's own.
        episodes: Test episodes per seed; None is the run's own number.
        seeds: Seeds of the test episodes; None is the run's own.
        episode_list: A file of test episodes to take; see :mod:`svf_lightning.data.episode_list`. Without
            ``seeds``, all that are in it.
        save_episodes: Write the episodes that were tested into such a file.
        root: The data set's folder; None is the run's own.
        trust: Modules that the run's configuration may call, beside those of this package.
        batch_size: Episodes tested at once; it changes no result.
        workers: Processes that read images.
        feature_memory: Megabytes of features to keep, so that images met again are not computed again.

    Returns:
        The mean over seeds of the test mIoU, in [0, 1].

    Raises:
        FileNotFoundError: If there is no such run or list.
        ValueError: If a value is not possible, or the list fits another test.
    """
    from svf_lightning.analysis import tables
    from svf_lightning.training.callbacks import EpisodeProgress, RememberFeatures

    silence_warnings()
    if episode_list is not None and episodes is not None:
        raise ValueError(f"episodes={episodes} cannot be had from {episode_list}, which has its own number")
    config, segmenter = load_run(folder, root=root, trust=trust)
    changes = {
        **{"shot": shot, "test_episodes": episodes, "episode_list": episode_list},
        **{"test_batch_size": batch_size, "workers": workers},
    }
    config["data"].update({key: value for key, value in changes.items() if value is not None})
    check_values({**config, "shot": config["data"]["shot"]})
    if not seeds:
        own = config["data"].get("episode_seed", config["seed"])  # older runs had one seed for both
        seeds = [own] if episode_list is None else episode_lists.seeds_of(episode_list)
    rows, protocols, tested = [], [], {}
    for seed in seeds:
        config["data"]["episode_seed"] = seed
        data = build_data(config)
        callbacks = [RememberFeatures(feature_memory), EpisodeProgress()]
        trainer = build_trainer(config, callbacks)
        started = time.monotonic()
        trainer.test(segmenter, datamodule=data, verbose=False)
        seconds = time.monotonic() - started
        rows.append(
            {"seed": seed, **test_scores(trainer.callback_metrics, data), "seconds": round(seconds, 1)}
        )
        protocols.append(data.protocol())
        if save_episodes is not None:
            tested[seed] = episode_rows(data.test_set)
    protocol = replace(protocols[0], seeds=tuple(seeds), digests=tuple(p.digests[0] for p in protocols))
    mious = torch.tensor([row["miou"] for row in rows], dtype=torch.float64)
    result = {
        "miou_mean": mious.mean().item(),
        "miou_std": mious.std(correction=0).item(),
        "protocol": protocol.as_dict(),
        "seeds": rows,
        **environment(),
    }
    if any("partial" in row for row in rows):
        result["partial"] = True
    path = folder / "evaluation.json"
    text = json.dumps(checked(result, "evaluation", path), indent=2) + "\n"
    keep_earlier(path)
    write_whole(path, text)
    if save_episodes is not None:
        episode_lists.write_list(save_episodes, protocol, tested)
        log.info("wrote the episodes to %s", save_episodes)
    tables.print_evaluation(result)
    return float(result["miou_mean"])
