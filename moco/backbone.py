"""A trained backbone as a folder that timm and transformers load: safetensors and a config."""

from safetensors.torch import save_file

from moco.augment import MEAN, STD
from moco.checkpoint import write_json


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
