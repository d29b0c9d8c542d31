"""Save a backbone so that timm, transformers and torchvision load it."""

import shutil
from pathlib import Path

from safetensors.torch import save

from moco.augment import MEAN, STD
from moco.backbone.keys import channels_of, stem_of
from moco.backbone.publish import public_name, push_backbone
from moco.encoder import TIMM, feature_width, timm_arguments
from moco.jsonfile import write_json

# Settings of a run that say nothing about its weights. They may hold local paths, which must not be published.
NOT_PUBLISHED = {
    "output", "cache", "cache_gb", "resume", "keep", "checkpoint_every", "workers", "tracker", "push_to_hub", "license",
    "init",
}  # fmt: skip


def save_backbone(folder, encoder, arch, image_size, tag, settings, mean=MEAN, std=STD):
    """Write folder/model.safetensors, the backbone without a head, and folder/config.json.

    encoder: of `build_encoder`, or a backbone alone, as `load_backbone` gives it. arch: its name. image_size: pixels it
    was trained at. tag: a word for the weights, such as "moco_v2". settings: how they were trained, kept in the config
    under "moco". mean, std: what the images were normalised with, a number for each channel.
    The keys are torchvision's or timm's. timm and transformers load every backbone except those with the small stem,
    which timm does not have.
    """
    backbone = getattr(encoder, "backbone", encoder)
    weights = {key: value.detach().cpu() for key, value in backbone.state_dict().items()}
    settings = {name: value for name, value in settings.items() if name not in NOT_PUBLISHED}
    if "data" in settings:  # later, elsewhere, nobody can tell whether it was a local folder
        settings["data"], settings["data_on_hub"] = public_name(settings["data"])
    if arch.startswith(TIMM):
        config, form, channels = timm_config(backbone, arch, weights, image_size)
    else:
        config, form, channels = resnet_config(arch, weights, image_size)
        settings |= {"stem": "small"} if stem_of(weights)[0] == "small" else {}
    form |= {"tag": tag, "input_size": [channels, image_size, image_size], "interpolation": "bilinear"}
    form |= {"crop_pct": 0.875, "crop_mode": "center", "mean": list(mean), "std": list(std), "num_classes": 0}
    width = feature_width(backbone, image_size, channels)
    config |= {"num_classes": 0, "num_features": width, "pretrained_cfg": form, "moco": settings | {"arch": arch}}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", weights)
    write_json(folder / "config.json", config)


def resnet_config(arch, weights, image_size):
    """(config, its "pretrained_cfg", channels of an image) of a ResNet, as timm builds it."""
    channels = stem_of(weights)[1]
    arguments = ({"layers": [1, 1, 1, 1]} if arch == "resnet10" else {}) | (
        {"in_chans": channels} if channels != 3 else {}
    )
    config = {"architecture": "resnet18" if arch == "resnet10" else arch, "global_pool": "avg"}
    form = {"pool_size": [-(-image_size // 32)] * 2, "first_conv": "conv1", "classifier": "fc"}
    return config | ({"model_args": arguments} if arguments else {}), form, channels


def timm_config(model, arch, weights, image_size):
    """The same of a model of timm."""
    channels = channels_of(weights, arch)
    pool = getattr(model, "global_pool", "avg")
    config = {"architecture": arch.removeprefix(TIMM), "global_pool": pool if isinstance(pool, str) else "avg"}
    arguments = timm_arguments(arch, image_size, channels)
    names = ("fixed_input_size", "pool_size", "first_conv", "classifier")
    form = {name: model.pretrained_cfg[name] for name in names if model.pretrained_cfg.get(name) is not None}
    return config | ({"model_args": arguments} if arguments else {}), form, channels


def write_tensors(path, tensors):
    """Write a safetensors file with the mode that the umask says; the library's save_file makes it private."""
    path.write_bytes(save({key: value.contiguous() for key, value in tensors.items()}, {"format": "pt"}))


def save_loaded(folder, backbone, known):
    """`save_backbone` of what `load_backbone` gave."""
    known = {"image_size": 224, "tag": "moco", "settings": {"arch": known["arch"]}, "mean": MEAN, "std": STD} | known
    save_backbone(folder, backbone, *(known[name] for name in ("arch", "image_size", "tag", "settings", "mean", "std")))


def push_loaded(run, source, backbone, known, name, license=None):
    """Publish what `load_backbone` gave for `source`, with the results measured in `run`; see `push_backbone`."""
    save_loaded(run / "backbone", backbone, known)
    if (Path(source) / "curves.png").exists():
        shutil.copy(Path(source) / "curves.png", run / "backbone")
    return push_backbone(run, name, license=license)
