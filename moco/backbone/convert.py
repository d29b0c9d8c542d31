"""Write a backbone as other programs read it."""

from pathlib import Path

import torch

from moco.backbone.keys import to_detectron2
from moco.backbone.load import load_backbone
from moco.backbone.save import save_loaded, write_tensors
from moco.encoder import TIMM
from moco.errors import UserError, explained

FORMATS = ("torchvision", "timm", "detectron2", "moco")


def convert(source, target, to, arch=None, encoder="query"):
    """Write the backbone of `source`, whatever `load_backbone` takes, as other programs read it, bit for bit.

    to: "torchvision", a .safetensors file of torchvision's keys; "timm", a folder that timm and transformers load;
    "detectron2", a .pth file for cfg.MODEL.WEIGHTS; "moco", a .pth.tar file as the official code writes, of the query
    encoder without its head. Each is read back by `load_backbone`. Raises UserError as that does.
    """
    target = Path(target)
    suffix = {"torchvision": ".safetensors", "detectron2": ".pth", "moco": ".pth.tar"}.get(to)
    if suffix and not target.name.endswith(suffix):
        raise UserError(f"TARGET {target} must end with {suffix} for --to {to}")
    if target.exists():
        raise UserError(f"TARGET {target} is there already; name another, or remove it")
    backbone, known = load_backbone(source, arch, encoder)
    weights = backbone.state_dict()
    if known["arch"].startswith(TIMM) and to != "timm":
        raise UserError(f"--to {to} is for ResNets of torchvision, {source} is a {known['arch']}; use --to timm")
    if to == "timm" and not known["arch"].startswith(TIMM) and weights["conv1.weight"].shape[-1] == 3:
        raise UserError(f"{source} has the small stem, which timm and transformers do not know; use --to torchvision")
    with explained(f"TARGET {target} cannot be written", "name another", OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
    if to == "torchvision":
        write_tensors(target, weights)
    elif to == "timm":
        save_loaded(target, backbone, known)
    elif to == "detectron2":
        model = {to_detectron2(key): value for key, value in weights.items()}
        torch.save({"model": model, "__author__": "MOCO", "matching_heuristics": True}, target)
    else:
        state = {f"module.encoder_q.{key}": value for key, value in weights.items()}
        epochs = known.get("epochs", known.get("settings", {}).get("epochs", 0))
        torch.save({"epoch": epochs, "arch": known["arch"], "state_dict": state}, target)
