"""What do the features of backbones that were trained on the built-in data hold: the pattern, the palette, or both?

python benchmarks/features.py RUN ...                  run folders; "random" is a ResNet-10 that was not trained

A class is a pattern in a palette. Each of the three is read from the features in two ways: by the kNN classifier, which
sees what makes features similar, and by a linear classifier, which also finds what lies in small directions.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent.parent))
from moco.augment import MEAN, STD
from moco.backbone import load_backbone
from moco.backbone.features import Features
from moco.data import shapes
from moco.data.load import load_splits
from moco.errors import one_line_errors
from moco.knn import default_k, knn_predict

PALETTES = len(shapes.PALETTES)  # labels count palettes within patterns
TARGETS = {
    "class": (lambda label: label, len(shapes.CLASSES)),
    "pattern": (lambda label: label // PALETTES, len(shapes.PATTERNS)),
    "palette": (lambda label: label % PALETTES, PALETTES),
}
DECAY = 1e-4  # of the linear classifier's weights, which without it would grow for as long as classes can be separated


def linear_predict(features, bank, bank_labels, classes):
    """Scores (N, classes) of features (N, D) by logistic regression on a bank (M, D), at its optimum: no learning rate.

    Directions are brought to one scale first, so that small ones count as well.
    """
    mean, std = bank.mean(dim=0), bank.std(dim=0).clamp_min(1e-6)
    features, bank = (features - mean) / std, (bank - mean) / std
    weight = torch.zeros(bank.shape[1], classes, device=bank.device, requires_grad=True)
    bias = torch.zeros(classes, device=bank.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(bank @ weight + bias, bank_labels) + DECAY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (features @ weight + bias).detach()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("backbones", nargs="+", metavar="RUN", help="run folder, or 'random'")
    parser.add_argument("--seed", type=int, default=0, help="of 'random'")
    args = parser.parse_args()
    accelerator = Accelerator()
    splits = load_splits("shapes")
    print(f"| backbone | {' | '.join(f'{name}, kNN | {name}, linear' for name in TARGETS)} |")
    print("|---" * (1 + 2 * len(TARGETS)) + "|")
    for source in args.backbones:
        backbone, known = load_backbone(source, "resnet10" if source == "random" else None, seed=args.seed)
        shapes.check_version(known.get("settings", {}), "shapes")
        backbone, size = backbone.eval().to(accelerator.device), known.get("image_size", 32)
        (bank, bank_labels, _), (features, labels, _) = (
            Features(backbone, size, MEAN, STD, 1, accelerator).all(split, range(len(split))) for split in splits
        )
        row = []
        for target, classes in TARGETS.values():
            for scores in (
                knn_predict(features, bank, target(bank_labels), classes, default_k(len(bank))),
                linear_predict(features, bank, target(bank_labels), classes),
            ):
                row.append(100 * (scores.argmax(dim=1) == target(labels)).double().mean().item())
        print(f"| {Path(source).name} | {' | '.join(f'{value:.1f}' for value in row)} |", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
