"""Backbones in and out: loaded from anywhere, saved so that timm and transformers load them, converted, published.

Whatever the source, the weights in between have torchvision's keys, without the head `fc`. The commands are in
__main__.py.
"""

import pickle
import re
import shutil
from pathlib import Path

import huggingface_hub
import safetensors
import torch
import torchvision
from safetensors.torch import load_file, save
from torch import nn

from moco.augment import MEAN, STD
from moco.backbone.publish import public_name, push_backbone
from moco.encoder import build_encoder, feature_width, resnet_names
from moco.errors import UserError, explained
from moco.jsonfile import reading_json, write_json
from moco.run.checkpoint import complete_checkpoints, load_checkpoint

RESTORE = "fetch it again, or restore it"
FORMATS = ("torchvision", "timm", "detectron2", "moco")
# Settings of a run that say nothing about its weights. They may hold local paths, which must not be published.
NOT_PUBLISHED = {"output", "resume", "keep", "checkpoint_every", "workers", "tracker", "push_to_hub"}


# ---- load


def load_backbone(source, arch=None, encoder="query", seed=0):
    """(backbone, what is known of it): a torchvision ResNet whose `fc` is the identity, (N, 3, H, W) -> (N, width).

    source: a run folder or a folder of `save_backbone`; a .safetensors file; USER/NAME or hf-hub:USER/NAME on the Hub;
    an official MoCo .pth.tar or another file of weights that PyTorch wrote; torchvision's name of supervised weights,
    such as "ResNet50_Weights.IMAGENET1K_V1"; or "random", drawn from `seed`.
    arch: a name of `resnet_names()`; None takes what the source says, else what its shapes fit; "random" then is a
    resnet50. encoder: "query", or "key" for the momentum encoder, where the source has both.
    What is known is a dict with "arch" and, if the source says so, "image_size" in pixels, "tag", and the "settings" of
    its training.
    Raises UserError if the keys or shapes are not exactly those of the architecture.
    """
    if source == "random":
        check_single(source, encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_backbone(arch or "resnet50", "imagenet"), {"arch": arch or "resnet50"}
    weights, known = read_backbone(source, encoder)
    arch, stem = fitting_arch(weights, arch or known.get("arch"), source)
    backbone = build_backbone(arch, stem)
    counters = {key: value for key, value in backbone.state_dict().items() if key.endswith("num_batches_tracked")}
    backbone.load_state_dict(counters | weights)
    return backbone, known | {"arch": arch}


def read_backbone(source, encoder="query"):
    """({key as in torchvision: tensor} without `fc`, what is known of it) of any source but "random".

    What is known is a dict with those keys of `load_backbone` that the source tells.
    Raises UserError if the source is not there, damaged, unsafe to read, or holds no backbone.
    """
    path = Path(source)
    if path.is_dir():
        return read_folder(path, encoder)
    if path.is_file():
        weights, known = (read_safetensors(path), {}) if path.suffix == ".safetensors" else read_torch_file(path)
        return torchvision_keys(weights, source, encoder), known
    if "_Weights." in str(source):
        check_single(source, encoder)
        return read_torchvision(str(source))
    name = str(source).removeprefix("hf-hub:")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UserError(
            f"{source} is neither a folder or file here, nor USER/NAME on the Hub, nor one of torchvision's"
            " weights (ResNet50_Weights.IMAGENET1K_V1), nor 'random'"
        )
    weights, known = read_hub(name)
    return torchvision_keys(weights, source, encoder), known


def check_single(source, encoder):
    """Raise UserError if the momentum encoder is asked for, but the source holds only one encoder."""
    if encoder == "key":
        raise UserError(
            f"--encoder key asks for the second of two encoders, but {source} holds one; leave the flag out, or name a"
            " run folder or an official MoCo checkpoint"
        )


def read_folder(folder, encoder):
    """A run folder, finished or not, or a folder with model.safetensors and config.json."""
    checkpoints = complete_checkpoints(folder / "checkpoints")
    saved = next((path for path in (folder / "backbone", folder) if (path / "model.safetensors").exists()), None)
    if saved and encoder == "query":
        known = read_config(saved / "config.json") if (saved / "config.json").exists() else {}
        return torchvision_keys(read_safetensors(saved / "model.safetensors"), saved), known
    tensors = load_checkpoint(checkpoints[-1])[0] if checkpoints else {}
    if "query_encoder" not in tensors:
        raise UserError(
            f"{folder} has no {encoder} encoder: neither backbone/model.safetensors nor a complete checkpoint of"
            " train_moco.py is in it; name a run folder, or a file"
        )
    if "key_encoder" not in tensors:
        check_single(folder, encoder)
    with reading_json(folder / "args.json", RESTORE) as settings:
        known = {"arch": settings["arch"], "image_size": int(settings["image_size"]), "settings": settings}
    return torchvision_keys(tensors[f"{encoder}_encoder"], checkpoints[-1]), known


def read_safetensors(path):
    damage = (safetensors.SafetensorError, OSError)
    with explained(f"{path} is truncated or no safetensors file", "fetch it again", *damage):
        return load_file(path)


def read_torch_file(path):
    """({key: tensor}, what is known) from a file of torch.save. Only tensors and plain values are read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not read ({type(error).__name__}): it is no file of torch.save, or damaged, or holds more than"
            " tensors and plain values, which could run any code; name a file of weights"
        ) from error
    weights = content
    for name in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            weights = content[name]
    is_state = isinstance(weights, dict) and all(isinstance(value, torch.Tensor) for value in weights.values())
    if not is_state or not all(isinstance(key, str) for key in weights):
        raise UserError(f"{path} holds no state dict; it must be one, or have one under 'state_dict' or 'model'")
    arch = content.get("arch")
    return weights, {"arch": arch} if isinstance(arch, str) and arch in resnet_names() else {}


def read_torchvision(name):
    with explained(f"{name} is not one of torchvision's weights", "check the name", ValueError, KeyError):
        weights = torchvision.models.get_weight(name)
    arch = name.split("_Weights.")[0].lower()
    if arch not in resnet_names():
        raise UserError(f"{name} is no ResNet; the architectures are {', '.join(resnet_names())}")
    with explained(f"{name} cannot be downloaded", "try again", OSError, RuntimeError):
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    return torchvision_keys(state, name), {"arch": arch, "image_size": 224}


def read_hub(name):
    """({key: tensor}, what is known) of a repository on the Hub. Only safetensors are taken."""
    hub = huggingface_hub.errors
    no_repository = f"{name} is neither here nor a repository you can read on the Hub"
    login = "check the name, or if it is private or gated accept its terms there and run `hf auth login`"
    no_answer = f"{name} is neither here nor downloaded before, and the Hub cannot be reached"
    no_file = f"{name} has no config.json or no model.safetensors on the Hub"
    with (
        explained(no_repository, login, hub.HfHubHTTPError, hub.HFValidationError, OSError),
        explained(no_file, "other weights are not read", hub.EntryNotFoundError),
        explained(no_answer, "try again when it can", hub.LocalEntryNotFoundError),
    ):
        paths = [huggingface_hub.hf_hub_download(name, file) for file in ("config.json", "model.safetensors")]
    return read_safetensors(paths[1]), read_config(paths[0])


def read_config(path):
    """What a config.json of `save_backbone`, or of a timm ResNet, tells of its weights."""
    with reading_json(path, RESTORE) as config:
        settings, pretrained = config.get("moco") or {}, config.get("pretrained_cfg") or {}
        arch, size = settings.get("arch") or config.get("architecture"), pretrained.get("input_size")
        known = {"arch": arch if arch in resnet_names() else None, "image_size": size and int(size[-1])}
        known |= {"settings": dict(settings), "tag": pretrained.get("tag")}
    return {name: value for name, value in known.items() if value}


def torchvision_keys(weights, source, encoder="query"):
    """The backbone's part of a state dict under torchvision's keys, contiguous; every other key must be a known one.

    Known layouts: torchvision and timm, the official MoCo checkpoint, detectron2's, an encoder of a run here.
    Raises UserError that names keys which belong to none, or if there is no backbone.
    """
    encoders = {"query": "module.encoder_q.", "key": "module.encoder_k."}
    others = ("fc.",)
    if not any(key.startswith(encoders["key"]) for key in weights):
        check_single(source, encoder)
    if any(key.startswith(tuple(encoders.values())) for key in weights):
        prefix = encoders.pop(encoder)
        others = (f"{prefix}fc.", *encoders.values(), "module.queue", "module.queue_ptr")
        renamed = {key: key.removeprefix(prefix) for key in weights if key.startswith(prefix)}
    elif any(key.startswith("stem.") for key in weights):
        others = ("stem.fc.",)
        renamed = {key: from_detectron2(key) for key in weights}
    else:
        renamed = {key: key for key in weights}
    backbone = {
        name: weights[key].detach().clone(memory_format=torch.contiguous_format)
        for key, name in renamed.items()
        if not key.startswith(others)
    }
    if "conv1.weight" not in backbone:
        raise UserError(
            f"{source} holds no ResNet's {encoder} encoder but {few(weights)}; name weights with a backbone,"
            " not those of a head or of another kind of network"
        )
    unknown = [key for key in weights if key not in renamed and not key.startswith(others)]
    if unknown:
        raise UserError(f"{source} has unexpected keys: {few(unknown)}")
    check_weights(backbone, source)
    return backbone


def check_weights(weights, source):
    """Raise UserError for numbers that no training leaves: not finite, no fractions, negative variances."""
    counters = {key for key in weights if key.endswith("num_batches_tracked")}
    damaged = [
        key
        for key in weights.keys() - counters
        if not weights[key].is_floating_point()
        or not weights[key].isfinite().all()
        or (key.endswith("running_var") and (weights[key] < 0).any())
    ]
    if weights["conv1.weight"].dim() != 4:
        damaged = ["conv1.weight"]
    if damaged:
        raise UserError(f"{source} holds damaged weights, not finite or no fractions: {few(damaged)}; fetch it again")


def few(names):
    """The first names of many, for a message."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"


def mismatches(weights, arch, stem):
    """How weights differ from an architecture: a list of "missing KEY", "unexpected KEY" or "KEY is SHAPE".

    BatchNorm's counters of batches may be missing, as in old checkpoints; nothing here reads them.
    """
    with torch.device("meta"):
        backbone = build_encoder(arch, head="fc", stem=stem)
    shapes = {key: value.shape for key, value in backbone.state_dict().items() if not key.startswith("fc.")}
    found = [f"missing {key}" for key in shapes.keys() - weights if not key.endswith("num_batches_tracked")]
    found += [f"unexpected {key}" for key in weights.keys() - shapes.keys()]
    return found + [
        f"{key} is {'x'.join(map(str, weights[key].shape))}, not {'x'.join(map(str, shape))}"
        for key, shape in shapes.items()
        if key in weights and weights[key].shape != shape
    ]


def fitting_arch(weights, arch=None, source="weights"):
    """(architecture, stem) whose keys and shapes are exactly those of the weights. arch: the only one to try.

    Raises UserError that names the keys that do not fit.
    """
    stem = "small" if weights["conv1.weight"].shape[-1] == 3 else "imagenet"
    wrong = {name: mismatches(weights, name, stem) for name in ([arch] if arch else resnet_names())}
    best = min(wrong, key=lambda name: len(wrong[name]))
    if wrong[best]:
        nearest = f"--arch {best}" if arch else f"any --arch, {best} being the nearest"
        raise UserError(f"{source} does not fit {nearest}: {few(wrong[best])}")
    return best, stem


def build_backbone(arch, stem):
    """A ResNet of `build_encoder` whose head is the identity."""
    backbone = build_encoder(arch, head="fc", stem=stem)
    backbone.fc = nn.Identity()
    return backbone


# ---- save


def save_backbone(folder, encoder, arch, image_size, tag, settings):
    """Write folder/model.safetensors, `encoder` without its head `fc`, and folder/config.json.

    encoder: a ResNet of `build_encoder`. arch: its name. image_size: pixels it was trained at. tag: a word for the
    weights, such as "moco_v2". settings: how they were trained, kept in the config under "moco".
    The keys are torchvision's. timm and transformers load every backbone except those with the small stem, which timm
    does not have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().cpu() for key, value in encoder.state_dict().items() if not key.startswith("fc.")}
    write_tensors(folder / "model.safetensors", weights)
    settings = {name: value for name, value in settings.items() if name not in NOT_PUBLISHED}
    if "data" in settings:  # later, elsewhere, nobody can tell whether it was a local folder
        settings["data"], settings["data_on_hub"] = public_name(settings["data"])
    config = {
        "architecture": "resnet18" if arch == "resnet10" else arch,
        "num_classes": 0,
        "num_features": feature_width(weights),
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


def write_tensors(path, tensors):
    """Write a safetensors file with the mode that the umask says; the library's save_file makes it private."""
    path.write_bytes(save({key: value.contiguous() for key, value in tensors.items()}, {"format": "pt"}))


def save_loaded(folder, backbone, known):
    """`save_backbone` of what `load_backbone` gave."""
    known = {"image_size": 224, "tag": "moco", "settings": {"arch": known["arch"]}} | known
    save_backbone(folder, backbone, known["arch"], known["image_size"], known["tag"], known["settings"])


def push_loaded(run, source, backbone, known, name, license=None):
    """Publish what `load_backbone` gave for `source`, with the results measured in `run`; see `push_backbone`."""
    save_loaded(run / "backbone", backbone, known)
    if (Path(source) / "curves.png").exists():
        shutil.copy(Path(source) / "curves.png", run / "backbone")
    return push_backbone(run, name, license=license)


# ---- convert


def to_detectron2(key):
    """torchvision's key -> that of detectron2's ResNet."""
    key = key if key.startswith("layer") else f"stem.{key}"
    key = re.sub(r"layer(\d)", lambda match: f"res{int(match[1]) + 1}", key)
    key = re.sub(r"bn(\d)", r"conv\1.norm", key)
    return key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def from_detectron2(key):
    """The inverse of `to_detectron2`."""
    key = key.removeprefix("stem.").replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    key = re.sub(r"conv(\d)\.norm", r"bn\1", key)
    return re.sub(r"res(\d)", lambda match: f"layer{int(match[1]) - 1}", key)


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
    if to == "timm" and weights["conv1.weight"].shape[-1] == 3:
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
        epochs = known.get("settings", {}).get("epochs", 0)
        torch.save({"epoch": epochs, "arch": known["arch"], "state_dict": state}, target)
