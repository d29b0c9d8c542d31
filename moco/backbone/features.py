"""Features of images under a frozen backbone: for kNN during and after training, and to be cached."""

import shutil

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from tqdm import tqdm

from moco.augment import MEAN, STD, normalize, to_float
from moco.data.batches import center_crops, loader, ordered_rows
from moco.encoder import feature_width, in_eval_mode
from moco.errors import UserError
from moco.jsonfile import reading_json, write_json
from moco.run.launch import stoppable

FEATURE_BATCH = 256  # images in a forward pass without gradients
CPU_PIXELS = 2**20  # in such a pass on a CPU, so that a signal is heard within seconds


class Features:
    """Features of images under a frozen backbone, of which each process makes its share.

    backbone: put in eval mode for each batch, as one that is trained may not be. size: of the fixed crop of an image.
    mean, std: of each channel, which it is normalised with. workers: of a process.
    Beside features there are labels, and the undecodable images of this process's share as (name, reason).
    """

    def __init__(self, backbone, size, mean, std, workers, accelerator):
        self.backbone, self.size, self.workers, self.accelerator = backbone, size, workers, accelerator
        self.mean, self.std = mean, std
        self.width, self.device = feature_width(backbone, size, len(mean)), accelerator.device
        self.batch = FEATURE_BATCH  # images in a forward pass
        if self.device.type == "cpu":
            self.batch = min(FEATURE_BATCH, max(1, CPU_PIXELS // size**2))

    def share(self, dataset, rows):
        """(position of the first, rows) that this process reads of `rows`, a sequence of int."""
        return dataset.split(rows, self.accelerator.num_processes)[self.accelerator.process_index]

    @torch.no_grad()
    def batches(self, dataset, rows, crops=None):
        """Features of `rows`, this process's own, a batch at a time.

        crops: a Crops of the dataset, None for those of evaluations.
        Yields the position in `rows` of a batch's first row (batches come in the order in which workers read them),
        features (n, width) float32, labels (n,) and the undecodable images.
        """
        order = ordered_rows(dataset, rows, self.batch, self.workers)
        items = [([(0, row) for row in batch], groups) for _, batch, groups in order]
        batches = loader(crops or center_crops(dataset, self.size), items, self.workers)
        progress = tqdm(batches, "features", leave=False, disable=not self.accelerator.is_main_process)
        # Asked first, so that a process with fewer batches keeps in step with the others to the end.
        heard = stoppable(progress, self.accelerator)
        for (crops, labels, failed), (first, batch, _) in zip(heard, order):
            if len(batch):
                images = to_float(crops[0].to(self.device, non_blocking=True))
                with in_eval_mode(self.backbone), self.accelerator.autocast():
                    pooled = self.backbone(normalize(images, self.mean, self.std))
                yield first, pooled.float(), labels.to(self.device, non_blocking=True), failed

    def fill(self, out, dataset, rows, crops=None):
        """Write features and labels of `rows` over the first rows of two tensors or arrays; returns the undecodable."""
        undecodable = []
        for first, features, labels, failed in self.batches(dataset, rows, crops):
            for whole, values in zip(out, (features, labels)):
                whole[first : first + len(labels)] = values if torch.is_tensor(whole) else values.cpu().numpy()
            undecodable += failed
        return undecodable

    def all(self, dataset, rows, crops=None):
        """On every process features (len(rows), width) float32 and labels (len(rows),); and the undecodable."""
        first, mine = self.share(dataset, rows)
        features = torch.zeros(len(rows), self.width, device=self.device)
        labels = torch.zeros(len(rows), dtype=torch.long, device=self.device)
        undecodable = self.fill((features[first:], labels[first:]), dataset, mine, crops)
        # Shares differ in length, and the rows of other processes are zero here, so a sum joins them.
        return self.accelerator.reduce(features, "sum"), self.accelerator.reduce(labels, "sum"), undecodable

    def bank(self, dataset, rows):
        """This process's share of the features, (m, width) float32 and L2-normalised, its labels, and the undecodable.

        Written batch by batch into one tensor, because collecting them first would hold them twice.
        """
        _, mine = self.share(dataset, rows)
        bank = torch.empty(len(mine), self.width, device=self.device)
        labels = torch.empty(len(mine), dtype=torch.long, device=self.device)
        undecodable = self.fill((bank, labels), dataset, mine)
        return F.normalize(bank, dim=1, out=bank), labels, undecodable

    def cache(self, folder, digest, dataset, data, settings):
        """Write features of one fixed crop of each image, float16, and labels to folder/*.npy, for `CachedFeatures`.

        Each process writes its part of the same files. A finished cache is recognised by digest, of the backbone, by
        data, the fingerprint of the dataset, and by settings, the flags that its rows and labels depend on.
        Returns the undecodable images, and the number of all processes'; for a finished cache, only that.
        Raises UserError if the disk is too full.
        """
        made_of = {"backbone_sha256": digest, "images": len(dataset), "image_size": self.size}
        made_of |= {"data": data, "settings": settings}
        if (tuple(self.mean), tuple(self.std)) != (MEAN, STD):
            made_of |= {"mean": list(self.mean), "std": list(self.std)}
        paths, done = [folder / "features.npy", folder / "labels.npy"], folder / "cache.json"
        if done.exists():
            with reading_json(done, "remove it, and the features are made again") as known:
                if made_of.items() <= known.items():
                    return [], int(known["undecodable"])
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            for path in (done, *paths):
                path.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        needed, free = len(dataset) * (2 * self.width + 8), shutil.disk_usage(folder).free
        if needed > free:  # otherwise a bus error would end the run: files are mapped now and filled later
            raise UserError(
                f"{folder} needs {needed / 1e9:.1f} GB for features, {free / 1e9:.1f} GB are free; make room"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            np.lib.format.open_memmap(paths[0], "w+", np.float16, (len(dataset), self.width))
            np.lib.format.open_memmap(paths[1], "w+", np.int64, (len(dataset),))
        self.accelerator.wait_for_everyone()
        files = [np.load(path, mmap_mode="r+") for path in paths]
        first, mine = self.share(dataset, range(len(dataset)))
        undecodable = self.fill([file[first:] for file in files], dataset, mine)
        for file in files:
            file.flush()
        count = len(gather_object(undecodable))  # by then every process has written its part
        if self.accelerator.is_main_process:
            write_json(done, made_of | {"undecodable": count})
        return undecodable, count
