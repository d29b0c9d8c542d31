"""Which images each process trains on in which step: a function of the seed and the step.

What can be read one by one is shuffled as a whole, by `batch_rows`. Parquet files, on disk or on the Hub, are read by
`stream_rows`: a permutation of all row groups, cut at exact row counts into one part for each worker of each process,
and each part into windows of some hundred rows that are shuffled. So every process takes the same number of steps and
reads only its share, no image comes twice in an epoch, and a run resumes at any step by skipping windows without
reading them. The streams of `datasets` do none of this if the number of files is not divisible by the number of
processes.
"""

import itertools
from typing import NamedTuple

import numpy as np


class Order(NamedTuple):
    """What the order of the training images depends on, besides their number and their row groups.

    batch_size: over all processes. rank: of `world` processes. The rest is for streams alone. workers: of a process.
    window: rows that are shuffled at a time, None for as many as `ParquetImages.window` finds right.
    """

    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1
    workers: int = 0
    window: int | None = None

    @property
    def share(self):
        """Images of a process in a step."""
        return self.batch_size // self.world

    @property
    def own_rows(self):
        """Which images of a step's batch are those of this process: a slice."""
        return slice(self.rank * self.share, (self.rank + 1) * self.share)


class GroupedImages:
    """A sequence of rows that lie in groups, each of which is read at once.

    rows_in_group: how many rows each has. A subclass has `select_rows`, which makes a sequence of some rows alone.
    commit: USER/NAME@COMMIT of a dataset on the Hub, otherwise None. bits: of gray pixels that are stored in 16 bits,
    if they have fewer, otherwise None. name: what is published of images that --data does not name, otherwise None.
    """

    channels, dtype = 3, np.dtype(np.uint8)  # of a decoded image
    commit = bits = name = None

    def __init__(self, rows_in_group):
        self.rows_in_group = np.asarray(rows_in_group, dtype=np.int64)
        self.first_row = np.concatenate([[0], self.rows_in_group.cumsum()])

    def __len__(self):
        return int(self.first_row[-1])

    def groups_of(self, rows):
        """The group that each of `rows` is in."""
        return np.searchsorted(self.first_row, rows, "right") - 1

    def sample(self, n, held_out=0):
        """A fixed sample of n rows, or all if there are fewer: those of random groups.

        held_out: how many of the first rows are to be held out of the others.
        """
        rows = []
        for group in np.random.default_rng([*b"sample"]).permutation(len(self.rows_in_group)):
            if len(rows) >= n:
                break
            rows += range(self.first_row[group], self.first_row[group + 1])
        return rows[:n]

    def split(self, rows, parts):
        """A sequence of rows in contiguous parts, [(position of its first row, rows), ...]; some may be empty.

        Cut between groups, so that each is read for one part alone.
        """
        starts = np.flatnonzero(np.diff(self.groups_of(rows), prepend=-1, append=-2))
        cuts = starts[np.searchsorted(starts, np.arange(parts + 1) * len(rows) // parts)].tolist()
        return [(low, rows[low:high]) for low, high in zip(cuts, cuts[1:])]

    def choose(self, n, rng):
        """n rows to hold out of the others: any."""
        return rng.permutation(len(self))[:n]

    def hold_out(self, images, purpose, seed):
        """(the rest, `images` rows), each a sequence of its own. purpose: bytes that tell this choice from others."""
        held_out = np.sort(self.choose(images, np.random.default_rng([*purpose, seed])))
        return self.select_rows(np.delete(np.arange(len(self)), held_out)), self.select_rows(held_out)

    def print_order(self, order):
        """Print how well the order mixes: rows that can be read one by one are shuffled as a whole."""


def even_rows(rows, n, rng):
    """n of so many rows, in order: a random one of each of n parts of equal length."""
    starts = np.arange(n + 1) * rows // n if n else np.zeros(1, int)
    return starts[:-1] + rng.integers(0, np.diff(starts))


# ---- as a whole, for rows that can be read one by one


def batch_rows(images, order, start):
    """Endless [(epoch, index), ...] of one process, from step `start` on.

    Each epoch is a fresh permutation of all images. What is left over below a batch is dropped, other images each time.
    """
    steps_per_epoch, permuted = images // order.batch_size, None
    for step in itertools.count(start):
        epoch, position = divmod(step, steps_per_epoch)
        if permuted is None or position == 0:
            permuted = np.random.default_rng([*b"order", order.seed, epoch]).permutation(images)
        first = position * order.batch_size + order.rank * order.share
        yield [(epoch, index) for index in permuted[first : first + order.share].tolist()]


# ---- in windows of row groups


def part_windows(rows_in_group, order, epoch, worker, low, high):
    """Rows [low, high) of an epoch's order of row groups, as [(shuffled rows, row groups), ...].

    A window ends with the row group that reaches its size. worker: whose part this is, the source of its shuffle.
    Yields arrays of row numbers and lists of row group numbers.
    """
    groups = np.random.default_rng([*b"groups", order.seed, epoch]).permutation(len(rows_in_group))
    ends = rows_in_group[groups].cumsum()
    starts = ends - rows_in_group[groups]
    # The number of a row is its position in this order and the shift of its row group.
    shift = rows_in_group.cumsum()[groups] - ends
    rng = np.random.default_rng([*b"windows", order.seed, epoch, order.rank, worker])
    while low < high:
        first, last = np.searchsorted(ends, low, "right"), np.searchsorted(ends, min(low + order.window, high), "left")
        stop = min(int(ends[last]), high)
        rows_of_each = np.minimum(ends[first : last + 1], stop) - np.maximum(starts[first : last + 1], low)
        rows = np.arange(low, stop) + np.repeat(shift[first : last + 1], rows_of_each)
        rng.shuffle(rows)
        yield rows, groups[first : last + 1].tolist()
        low = stop


def worker_windows(rows_in_group, order, start, worker):
    """Endless (epoch, rows, row groups) of one worker of one process, from the window that step `start` is in.

    The first window comes without the rows of the steps before `start`. Steps go to workers in turn.
    """
    steps_per_epoch, workers = int(rows_in_group.sum()) // order.batch_size, max(1, order.workers)

    def steps_before(step, worker):
        return (step - worker + workers - 1) // workers

    for epoch in itertools.count(start // steps_per_epoch):
        first, last = epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch
        rows = [(steps_before(last, w) - steps_before(first, w)) * order.share for w in range(workers)]
        low = order.rank * steps_per_epoch * order.share + sum(rows[:worker])
        skip = max(0, steps_before(start, worker) - steps_before(first, worker)) * order.share
        for shuffled, groups in part_windows(rows_in_group, order, epoch, worker, low, low + rows[worker]):
            if skip < len(shuffled):
                yield epoch, shuffled[skip:], groups
            skip = max(0, skip - len(shuffled))


def worker_batches(windows, n):
    """Endless ([(epoch, row), ...] of n rows, row groups to have: of these rows, then of the next window)."""
    (epoch, rows, groups), ahead = next(windows), next(windows)
    while True:
        used = groups
        while len(rows) < n:  # a part of an epoch is whole batches, so these are of the same epoch
            rows, groups = np.concatenate([rows, ahead[1]]), ahead[2]
            used, ahead = used + groups, next(windows)
        yield [(epoch, row) for row in rows[:n].tolist()], used + ahead[2]
        rows = rows[n:]
        if len(rows) == 0:
            (epoch, rows, groups), ahead = ahead, next(windows)


def stream_rows(rows_in_group, order, start):
    """Endless batches of one process from step `start` on, as `worker_batches` has them.

    Worker step % workers reads the batch of a step, which is how a DataLoader hands batches out.
    """
    workers = range(max(1, order.workers))
    batches = [worker_batches(worker_windows(rows_in_group, order, start, worker), order.share) for worker in workers]
    for step in itertools.count(start):
        yield next(batches[step % len(batches)])
