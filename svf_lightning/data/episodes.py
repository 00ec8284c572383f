"""Episodes: draw a class, its query and its supports, and turn them into tensors.

The rules are those of the PASCAL-5i and COCO-20i protocol as BAM and SVF run it:

1. In training, an image that shows even one pixel of a class outside the base classes is left out
   (``novel_images="drop"``); its novel objects would be learned as background.
2. An image stands in the list of a class if it shows at least ``min_pixels`` of it, at original resolution.
3. Every image that stands in some list is a query, in the order of the data set's own list. The episode's
   class is uniform over the wanted classes the query shows, *however few* pixels: rule 2 is not asked again.
4. The supports are distinct images of that class's list, uniform, and never the query.

Every draw has a generator of its own, made from (seed, epoch, episode, role). So neither the number of
workers nor the batch size nor the order of episodes can change one.

Source:
    BAM (Lang et al., CVPR 2022) and SVF (Sun et al., NeurIPS 2022), which took the rules from PFENet (Tian et
    al., TPAMI 2020) and added the first. Known difference: they draw from Python's global generator, so their
    fixed test episodes change with the number of workers; ours cannot reproduce theirs draw by draw.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from svf_lightning.data.source import ImageIndex
from svf_lightning.data.transforms import binary_mask
from svf_lightning.episode import Episode

NovelImages = Literal["drop", "background"]
Transform = Callable[[Tensor, Tensor, np.random.Generator], tuple[Tensor, Tensor]]

# Roles keep the generators of one episode apart. They count from 1: numpy reads seeds that differ in
# trailing zeros only as the same seed.
_DRAW, _QUERY, _ORDER, _SUPPORT = 1, 2, 3, 4  # support k has the role _SUPPORT + k


class Draw(NamedTuple):
    """What an episode is made of: positions in the index, and the class."""

    query: int
    class_id: int
    supports: tuple[int, ...]  # (K,)


def class_lists(
    pixels: np.ndarray,
    classes: Sequence[int],
    *,
    min_pixels: int,
    novel_images: NovelImages,
    hidden: Sequence[int] = (),
) -> np.ndarray:
    """Which image stands in the list of which class: rules 1 and 2.

    The queries are the rows with a True; the supports of a class are the True of its column.

    Args:
        pixels: Pixels of each class in each image, shape ``(images, N + 1)``; column 0 is background.
        classes: The wanted class ids, each in 1..N. Any other class is novel to them.
        min_pixels: Pixels of a class that an image must show to stand in its list.
        novel_images: ``"drop"`` leaves out images that show a class which is not wanted, be it one pixel;
            ``"background"`` keeps them, and those objects become background. Test episodes always keep them.
        hidden: Classes whose images are left out in any case, such as base classes kept for validation.

    Returns:
        Boolean array of shape ``(images, len(classes))``.

    Raises:
        ValueError: If ``novel_images`` is neither of the two.

    Example:
        >>> pixels = np.array([[50, 30, 20], [99, 1, 0], [70, 30, 0]])
        >>> class_lists(pixels, [1], min_pixels=10, novel_images="drop").ravel()
        array([False, False,  True])
        >>> class_lists(pixels, [1], min_pixels=10, novel_images="background").ravel()
        array([ True, False,  True])
    """
    if novel_images not in get_args(NovelImages):
        raise ValueError(f"novel_images={novel_images!r} is unknown; use 'drop' or 'background'")
    listed: np.ndarray = pixels[:, np.asarray(classes)] >= min_pixels
    unwanted = np.asarray(hidden, int)
    if novel_images == "drop":
        unwanted = np.setdiff1d(np.arange(1, pixels.shape[1]), classes)
    return listed & ~pixels[:, unwanted].any(axis=1, keepdims=True)


class EpisodeDataset(Dataset[Episode | tuple[Episode, Tensor]]):
    """Episodes over an index: one per query image and epoch in training, or a fixed sequence for evaluation.

    ``dataset[epoch, i]`` is an :class:`Episode` of single tensors, whose masks are long. ``dataset[i]`` is
    the same at epoch 0. With ``fixed=True`` the epoch changes nothing, and the item is a pair: the episode,
    and the query's own mask ``(H0, W0)`` at original resolution, uint8, which :func:`collate` lists.

    Args:
        index: The images.
        classes: Class ids that episodes may have: the base classes in training, the novel ones in test.
        shot: Support images per episode, at least 1.
        transform: `Augment` or `Letterbox`; called on every image and binary mask, each time with a
            generator of its own.
        seed: Everything drawn follows from it, at least 0.
        min_pixels: Pixels of a class that an image must show to stand in its list, at original resolution.
        novel_images: What happens to images that show other classes than ``classes``; see `class_lists`.
        hidden: Classes whose images are left out; see `class_lists`.
        fixed: Episode ``i`` has query ``i % queries`` in list order, and its draws depend on (seed, i) alone.
            So a longer test begins with the same episodes as a shorter one.
        length: Number of episodes; None takes one per query.
        draws: The episodes themselves, instead of drawing any: those of an `episode_list`. With ``fixed``.

    Raises:
        ValueError: If a value is out of range, no image is a query, or a class has too few images.
    """

    def __init__(
        self,
        index: ImageIndex,
        classes: Sequence[int],
        shot: int,
        transform: Transform,
        *,
        seed: int,
        min_pixels: int,
        novel_images: NovelImages = "background",
        hidden: Sequence[int] = (),
        fixed: bool = False,
        length: int | None = None,
        draws: Sequence[Draw] | None = None,
    ) -> None:
        if shot < 1:
            raise ValueError(f"shot={shot} leaves an episode without support images; use 1 or more")
        if seed < 0:
            raise ValueError(f"seed={seed} is negative; use 0 or more")
        if length is not None and length < 1:
            raise ValueError(f"{length} episodes are too few to measure or learn anything; use 1 or more")
        listed = class_lists(
            index.pixels, classes, min_pixels=min_pixels, novel_images=novel_images, hidden=hidden
        )
        self.index, self.transform = index, transform
        self.shot, self.seed, self.fixed = shot, seed, fixed
        self.classes = np.asarray(classes)
        self.queries = np.flatnonzero(listed.any(axis=1))
        self.members = {int(c): np.flatnonzero(column) for c, column in zip(classes, listed.T, strict=True)}
        self.draws = draws
        self.length = len(draws) if draws is not None else len(self.queries) if length is None else length
        _check_supply(self, min_pixels, novel_images)

    def __len__(self) -> int:
        return self.length

    def draw(self, epoch: int, i: int) -> Draw:
        """The images and the class of an episode: rules 3 and 4. Reads no file."""
        if self.draws is not None:
            return self.draws[i]
        generator = self._generator(epoch, i, _DRAW)
        query = int(self.queries[i % len(self.queries)])
        class_id = int(generator.choice(self.classes[self.index.pixels[query, self.classes] > 0]))
        members = self.members[class_id]
        supports = generator.choice(members[members != query], self.shot, replace=False)
        return Draw(query, class_id, tuple(int(support) for support in supports))

    def __getitem__(self, key: int | tuple[int, int]) -> Episode | tuple[Episode, Tensor]:
        epoch, i = key if isinstance(key, tuple) else (0, key)
        if not 0 <= i < self.length:
            raise IndexError(f"episode {i} of {self.length}")  # also what ends a loop over the data set
        query, class_id, supports = self.draw(epoch, i)

        def view(position: int, role: int) -> tuple[Tensor, Tensor, Tensor]:
            image, label = self.index.read(position)
            original = binary_mask(label, class_id)
            image, mask = self.transform(image, original, self._generator(epoch, i, role))
            return image, mask.long(), original

        query_image, query_mask, original = view(query, _QUERY)
        shots = [view(position, _SUPPORT + k) for k, position in enumerate(supports)]
        episode = Episode(
            query_image=query_image,
            query_mask=query_mask,
            support_images=torch.stack([image for image, _, _ in shots]),
            support_masks=torch.stack([mask for _, mask, _ in shots]),
            class_id=torch.tensor(class_id),
            query_id=torch.tensor(query),
            support_ids=torch.tensor(supports),
        )
        return (episode, original) if self.fixed else episode

    def _generator(self, epoch: int, i: int, role: int) -> np.random.Generator:
        # Fixed episodes stand at epoch 0, before the first of training: same seed, other draws.
        return np.random.default_rng([self.seed, 0 if self.fixed else epoch + 1, i, role])


def _check_supply(dataset: EpisodeDataset, min_pixels: int, novel_images: str) -> None:
    index, shot = dataset.index, dataset.shot
    rule = f"at least {min_pixels} pixels of it" + (" and no novel class" if novel_images == "drop" else "")
    if not len(dataset.queries):
        raise ValueError(
            f"{index.name}: none of {len(index)} images can be a query of the classes "
            f"{dataset.classes.tolist()}: each needs {rule.replace('it', 'one of them', 1)}"
        )
    for class_id, members in dataset.members.items():
        if len(members) <= shot:
            raise ValueError(
                f"{index.name}: class {class_id} ({index.class_names[class_id - 1]}) has {len(members)} "
                f"images with {rule}, but shot={shot} needs {shot + 1}, a query and its supports; "
                "lower shot or add images"
            )


def collate(samples: Sequence[tuple[Episode, Tensor]]) -> tuple[Episode, list[Tensor]]:
    """Batch fixed episodes; the masks at original resolution stay a list, their sizes differ.

    Returns:
        Episode with a leading ``B``, and B masks ``(H0, W0)``, uint8.
    """
    return default_collate([episode for episode, _ in samples]), [original for _, original in samples]


class EpochSampler(Sampler[tuple[int, int]]):
    """The order of episodes: (epoch, i) pairs, the same on every run, dealt out to the ranks of a job.

    Shuffled, for training: the episodes are an endless row of passes, each a permutation of 0..length-1 from
    (seed, pass), and an epoch is the next ``episodes`` of them. A pair's first number is the pass, so an
    image comes as often as any other and never with the same draws, whatever ``episodes`` is. When it equals
    ``length``, pass and epoch are one. Ranks get equally many, since one with a batch more would wait for the
    others forever; up to ranks - 1 episodes are left out.

    In order, for evaluation: 0..length-1; rank r of n takes r, r + n, ... and each episode runs once.

    Lightning calls :meth:`set_epoch`. Build the Trainer with ``use_distributed_sampler=False``: it would deal
    out the ranks' shares a second time.

    Args:
        length: Number of episodes in a pass.
        seed: Of the order.
        shuffle: Training (True) or evaluation (False).
        episodes: Episodes in an epoch, over all ranks; None takes ``length``.
        rank: Of this process; None asks torch.distributed when the iteration begins.
        num_replicas: Number of processes; None likewise.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        *,
        shuffle: bool = True,
        episodes: int | None = None,
        rank: int | None = None,
        num_replicas: int | None = None,
    ) -> None:
        if episodes is not None and episodes < 1:
            raise ValueError(f"episodes={episodes} is an empty epoch; use 1 or more, or None for all")
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.episodes = length if episodes is None else episodes
        self.epoch = 0
        self.skip = 0  # episodes of this rank to leave out at the next beginning: those that are done already
        self._rank, self._num_replicas = rank, num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start = self.epoch * self.episodes
        order: np.ndarray = np.arange(self.length)
        drawn = None
        for position in self._share()[self.skip :]:
            epoch, i = divmod(start + position, self.length)
            if self.shuffle and epoch != drawn:
                order, drawn = self._permutation(epoch), epoch
            yield epoch, int(order[i])

    def __len__(self) -> int:
        return len(self._share())

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch + 1, 0, _ORDER]).permutation(self.length)

    def _share(self) -> range:
        """This rank's positions within the epoch."""
        rank, ranks = self._rank, self._num_replicas
        if distributed.is_available() and distributed.is_initialized():
            rank = distributed.get_rank() if rank is None else rank
            ranks = distributed.get_world_size() if ranks is None else ranks
        rank, ranks = rank or 0, ranks or 1
        end = self.episodes // ranks * ranks if self.shuffle else self.episodes
        return range(rank, end, ranks)


class EpochLoader(DataLoader):
    """A DataLoader over an `EpochSampler` that goes on where a resumed training stopped.

    It asks for epoch and batch when the first batch is wanted, and not before. A plain one hands its worker
    processes their first batches when an iteration begins, and Lightning begins the first one before it has
    restored anything: a resumed run would draw the episodes of epoch 0 again.

    Args:
        done: Says how many batches of the epoch are done; None is a loader that always begins at the first.
    """

    def __init__(self, *args: Any, done: Callable[[], int] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.done = done

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.done is not None:
            assert isinstance(self.sampler, EpochSampler)
            assert self.batch_size is not None
            self.sampler.skip = self.done() * self.batch_size
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing; having it tells Lightning that an epoch can be resumed in its middle."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do: the Trainer knows what is done."""


def batches_done(data: Any) -> int:
    """How many batches of the present epoch the Trainer of a data module has trained on."""
    trainer: Any = data.trainer
    return 0 if trainer is None else trainer.fit_loop.epoch_loop.batch_progress.current.ready
