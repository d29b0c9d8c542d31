"""A trained backbone as a folder that timm and transformers load: safetensors and a config."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moco.augment import MEAN, STD
from moco.checkpoint import write_json
from moco.encoder import build_encoder
from moco.errors import UserError


def save_backbone(folder, encoder, arch, image_size, tag, settings):
    """Write folder/model.safetensors, `encoder` without its head `fc`, and folder/config.json.

    encoder: a ResNet of `build_encoder`. arch: its name. image_size: pixels it was trained at. tag: a word for the
    weights, such as "moco_v2". settings: how they were trained, kept in the config under "moco".
    The keys are torchvision's. timm and transformers load every backbone but those with the small stem, which timm
    has no counterpart for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().cpu() for key, value in encoder.state_dict().items() if not key.startswith("fc.")}
    save_file(
        {key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    features = weights[[key for key in weights if key.startswith("layer4.") and "downsample.0" in key][0]].shape[0]
    config = {
        "architecture": "resnet18" if arch == "resnet10" else arch,
        "num_classes": 0,
        "num_features": features,
        "global_pool": "avg",
        "pretrained_cfg": {
            "tag": tag,
            "input_size": [3, image_size, image_size],
            "interpolation": "bilinear",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": MEAN,
            "std": STD,
            "num_classes": 0,
            "pool_size": [-(-image_size // 32)] * 2,
            "first_conv": "conv1",
            "classifier": "fc",
        },
        "moco": settings,
    }
    if arch == "resnet10":
        config["model_args"] = {"layers": [1, 1, 1, 1]}
    write_json(folder / "config.json", config)


def load_backbone(source, arch=None, seed=0):
    """The backbone that `source` names, a torchvision ResNet whose `fc` is the identity.

    source: a run folder, a .safetensors file, or "random", which needs `arch` and is drawn from `seed`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if source == "random":
            backbone = build_encoder(arch or "resnet50", head="fc")
            backbone.fc = nn.Identity()
            return backbone
        path = Path(source)
        file = path if path.is_file() else path / "backbone" / "model.safetensors"
        if not file.exists():
            raise UserError(f"--backbone {source} is neither a run folder, nor a .safetensors file, nor 'random'")
        if arch is None and path.is_dir():
            arch = json.loads((path / "args.json").read_text())["arch"]
        backbone = build_encoder(arch or "resnet50", head="fc")
        backbone.fc = nn.Identity()
        try:
            weights = load_file(file)
            backbone.load_state_dict(weights)
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"--backbone {source} does not hold the weights of a {arch or 'resnet50'}: {reason}"
            ) from error
        return backbone
