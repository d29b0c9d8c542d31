"""The supervised row of the comparison: the same encoder trained with labels, then to be probed.

python benchmarks/supervised.py --data shapes --output runs/supervised-shapes
python linear_probe.py --data shapes --backbone runs/supervised-shapes
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from moco.augment import MEAN, STD, normalize, to_float
from moco.backbone import save_backbone
from moco.data import shapes
from moco.data.batches import labelled_crops, loader
from moco.data.labels import count_classes
from moco.data.load import load_splits
from moco.data.order import Order
from moco.encoder import build_encoder
from moco.schedule import learning_rate


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="run folder")
    parser.add_argument("--data", default="shapes", help="what train_moco.py takes [%(default)s]")
    parser.add_argument("--arch", default="resnet10")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    accelerator = Accelerator()
    device, size = accelerator.device, 32
    train_set, test_set = load_splits(args.data)
    classes = count_classes(train_set, test_set, args.data)
    torch.manual_seed(args.seed)
    encoder = build_encoder(args.arch, dim=classes, head="fc").to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(encoder.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    encoder, optimizer = accelerator.prepare(encoder, optimizer)
    rows = train_set.training_rows(Order(args.batch_size, args.seed, workers=args.workers, window=20_000), 0)
    batches = iter(loader(labelled_crops(train_set, size, args.seed), rows, args.workers))
    steps_per_epoch = len(train_set) // args.batch_size
    bar = tqdm(range(args.epochs * steps_per_epoch), unit="step")
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(args.lr, step // steps_per_epoch, args.epochs, "cosine", ())
        (crops,), labels, _ = next(batches)
        logits = encoder(normalize(to_float(crops.to(device, non_blocking=True)), MEAN, STD))
        loss = F.cross_entropy(logits, labels.to(device, non_blocking=True))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {loss.item():.2f}")
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    settings |= {"data_version": shapes.VERSION} if args.data == "shapes" else {}
    encoder = accelerator.unwrap_model(encoder, keep_torch_compile=False)
    save_backbone(args.output / "backbone", encoder, args.arch, size, "supervised", settings)


if __name__ == "__main__":
    main()
