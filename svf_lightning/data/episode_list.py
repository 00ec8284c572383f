"""Episode lists: test episodes written down by name, so that two people test on exactly the same ones.

A file of JSON lines. The first says what the episodes are of, every other line is one episode::

    {"episode_list": 1, "data": "pascal", "edition": "contiguous folds", "fold": 0, "shot": 1}
    {"seed": 0, "class": "boat", "query": "2007_000068", "supports": ["2009_003251"]}

Images go by their names, not by their positions, so a list still fits a data set that has grown.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svf_lightning.data.episodes import Draw
from svf_lightning.data.protocol import Protocol
from svf_lightning.data.source import ImageIndex
from svf_lightning.files import replace_file

VERSION = 1
_OF_THE_LIST = ("data", "edition", "fold", "shot")  # what the reader must share with the writer

Row = tuple[str, str, tuple[str, ...]]  # class, query, supports


def write_list(path: str | Path, protocol: Protocol, episodes: Mapping[int, Sequence[Row]]) -> None:
    """Write test episodes, whole or not at all.

    Args:
        path: The file.
        protocol: What they are of.
        episodes: By seed, the rows of :func:`svf_lightning.data.protocol.episode_rows`.
    """
    header = {
        "episode_list": VERSION,
        **{name: value for name, value in protocol.as_dict().items() if name in _OF_THE_LIST},
    }
    lines = [json.dumps(header, ensure_ascii=False)]
    for seed, rows in episodes.items():
        for class_name, query, supports in rows:
            row = {"seed": seed, "class": class_name, "query": query, "supports": supports}
            lines.append(json.dumps(row, ensure_ascii=False))

    def write(part: Path) -> None:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")

    replace_file(Path(path), write)


def seeds_of(path: str | Path) -> list[int]:
    """The seeds whose episodes a file holds, in its order.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no episode list, or an empty one.
    """
    seeds = list(dict.fromkeys(row["seed"] for row in _read(path)[1]))
    if not seeds:
        raise ValueError(f"{path} lists no episodes; write it again with save_episodes=FILE")
    return seeds


def read_episode_list(
    path: str | Path,
    index: ImageIndex,
    novel: Sequence[int],
    *,
    seed: int,
    edition: str,
    fold: int,
    shot: int,
) -> list[Draw]:
    """Read the test episodes of one seed.

    Args:
        path: The file.
        index: The images that may be tested.
        novel: Ids of the classes under test.
        seed: Which of the file's lists.
        edition: Of the data set.
        fold: Of the run.
        shot: Supports per episode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no episode list, one of something else, or names an image or class that is not
            there. The line is named.
    """
    header, rows = _read(path)
    ours = {"data": index.name, "edition": edition, "fold": fold, "shot": shot}
    for name, value in ours.items():
        if header.get(name) != value:
            raise ValueError(
                f"{path} lists episodes of {name}={header.get(name)}, this test has {name}={value}; "
                "test with the list's settings, or write a list of your own with save_episodes=FILE"
            )
    positions = {image_id: i for i, image_id in enumerate(index.ids)}
    class_ids = {index.class_names[c - 1]: c for c in novel}
    draws = []
    for number, row in enumerate(rows, start=2):
        if row["seed"] != seed:
            continue
        if row["class"] not in class_ids:
            raise ValueError(f"{path}, line {number}: {row['class']!r} is no class under test in fold {fold}")
        images = [row["query"], *row["supports"]]
        unknown = [name for name in images if name not in positions]
        if unknown:
            raise ValueError(f"{path}, line {number}: {index.name} has no test image {unknown[0]!r}")
        if len(images) != shot + 1 or len(set(images)) != len(images):
            raise ValueError(
                f"{path}, line {number}: an episode is a query and {shot} other image(s), all distinct; "
                f"this one has {', '.join(images)}"
            )
        class_id = class_ids[row["class"]]
        query, *supports = (positions[name] for name in images)
        blank = [name for name in images if not index.pixels[positions[name], class_id]]
        if blank:
            raise ValueError(f"{path}, line {number}: {blank[0]!r} shows no {row['class']}")
        draws.append(Draw(query, class_id, tuple(supports)))
    if not draws:
        raise ValueError(f"{path} has no episodes of seed {seed}; it has those of {seeds_of(path)}")
    return draws


def _read(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no episode list at {path}; `python evaluate.py run=RUN save_episodes=FILE` writes one"
        )
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            if number == 1:
                if row["episode_list"] != VERSION:
                    raise ValueError
            else:
                seed, name, query, supports = row["seed"], row["class"], row["query"], row["supports"]
                if not (
                    isinstance(seed, int)
                    and isinstance(supports, list)
                    and all(isinstance(text, str) for text in (name, query, *supports))
                ):
                    raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}, line {number}, is not part of an episode list (version {VERSION}); "
                "is the file whole?"
            ) from None
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty; write it again with save_episodes=FILE")
    return rows[0], rows[1:]
