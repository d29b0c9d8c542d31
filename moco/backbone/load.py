"""Load a backbone from anywhere: a run, a file of weights, the Hub, torchvision."""

import os
import re
from pathlib import Path

import huggingface_hub
import safetensors
import torch
import torchvision
from safetensors.torch import load_file

from moco.backbone.keys import channels_of, check_single, few, find_backbone, fitting_arch, mismatches, stem_of
from moco.encoder import TIMM, build_encoder, resnet_names
from moco.errors import UserError, explained
from moco.jsonfile import reading_json
from moco.run.checkpoint import complete_checkpoints, load_checkpoint

RESTORE = "fetch it again, or restore it"


def load_backbone(source, arch=None, encoder="query", seed=0, image_size=None, channels=3):
    """(backbone, what is known of it). The backbone turns images (N, channels, S, S) into features (N, width).

    It is a torchvision ResNet whose `fc` is the identity, or a model of timm without its classifier.

    source: a run folder or a folder of `save_backbone`; a .safetensors file; USER/NAME or hf-hub:USER/NAME on the Hub;
    an official MoCo .pth.tar or another file of weights that PyTorch wrote; torchvision's name of supervised weights,
    such as "ResNet50_Weights.IMAGENET1K_V1"; or "random", drawn from `seed`.
    arch: a name that `build_encoder` knows; None takes what the source says, else the ResNet that its shapes fit;
    "random" then is a resnet50. encoder: "query", or "key" for the momentum encoder, where the source has both.
    image_size: for a model of timm that is built for one size, where the source does not say it. channels: of images,
    for "random".
    What is known is a dict with "arch" and "channels" and, if the source says so, "image_size" in pixels, "mean" and
    "std" of the images, "tag", and the "settings" of its training; of a checkpoint also the "epochs" that it had.
    Raises UserError if the keys or shapes are not exactly those of the architecture.
    """
    if source == "random":
        check_single(source, encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built = build_encoder(arch or "resnet50", head="fc", image_size=image_size, channels=channels)
        known = {"arch": built.arch, "channels": built.channels}
        return built.backbone, known | ({"image_size": built.image_size} if built.image_size else {})
    weights, known = read_backbone(source, encoder, arch, image_size)
    arch = arch or known.get("arch")
    if (arch or "").startswith(TIMM):
        stem, channels = "imagenet", channels_of(weights, arch)
        image_size = known.get("image_size") or image_size
    else:
        arch, (stem, channels) = fitting_arch(weights, arch, source), stem_of(weights)
    built = build_encoder(arch, head="fc", stem=stem, image_size=image_size, channels=channels)
    backbone, own = built.backbone, built.backbone.state_dict()
    if wrong := mismatches(weights, own):
        raise UserError(f"{source} does not fit --arch {arch}: {few(wrong)}")
    backbone.load_state_dict({key: value for key, value in own.items() if key not in weights} | weights)
    known = ({"image_size": built.image_size} if built.image_size else {}) | known
    return backbone, known | {"arch": arch, "channels": channels}


def read_backbone(source, encoder="query", arch=None, image_size=None):
    """({key: tensor} without a head, what is known of it) of any source but "random".

    The keys are torchvision's, or those of `arch` if that is a model of timm. What is known is a dict with those keys
    of `load_backbone` that the source tells. If the file holds more than a backbone, what was found is printed.
    Raises UserError if the source is not there, damaged, unsafe to read, or holds not exactly one such backbone.
    """
    path = Path(source)
    if path.is_dir():
        weights, known = read_folder(path, encoder)
        encoder = "query"  # the one that was asked for has been read
    elif path.is_file():
        weights, known = read_file(path)
    elif "_Weights." in str(source):
        check_single(source, encoder)
        weights, known = read_torchvision(str(source))
    else:
        name = str(source).removeprefix("hf-hub:")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
            raise UserError(
                f"{source} is neither a folder or file here, nor USER/NAME on the Hub, nor one of torchvision's"
                " weights (ResNet50_Weights.IMAGENET1K_V1), nor 'random'"
            )
        weights, known = read_hub(name)
    size = known.get("image_size") or image_size
    prefix, backbone, left = find_backbone(weights, source, encoder, arch or known.get("arch"), size)
    if (prefix or left) and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"found   {len(backbone)} keys of a backbone below {prefix!r} in {source}; {left} others are left out")
    return backbone, known


def read_folder(folder, encoder):
    """A run folder, finished or not, or a folder with model.safetensors and config.json."""
    checkpoints = complete_checkpoints(folder / "checkpoints")
    saved = next((path for path in (folder / "backbone", folder) if (path / "model.safetensors").exists()), None)
    if saved and encoder == "query":
        known = read_config(saved / "config.json") if (saved / "config.json").exists() else {}
        return read_safetensors(saved / "model.safetensors"), known
    tensors, state = load_checkpoint(checkpoints[-1]) if checkpoints else ({}, {})
    if "query_encoder" not in tensors:
        raise UserError(
            f"{folder} has no {encoder} encoder: neither backbone/model.safetensors nor a complete checkpoint of"
            " train_moco.py is in it; name a run folder, or a file"
        )
    if "key_encoder" not in tensors:
        check_single(folder, encoder)
    with reading_json(folder / "args.json", RESTORE) as settings:
        known = {"arch": settings["arch"], "image_size": int(settings["image_size"]), "settings": settings}
        known |= {name: settings[name] for name in ("mean", "std") if settings.get(name)}
        if "data" in settings and not settings.get("data_commit"):  # the path is private, and may not lead there here
            settings["data"] = Path(settings["data"]).name
        if "images" in state and {"batch_size", "epochs"} <= settings.keys():  # args.json says what was planned
            epoch = max(1, int(state["images"]) // int(settings["batch_size"]))
            total, known["epochs"] = epoch * int(settings["epochs"]), int(state["step"]) // epoch
            settings["taken_from"] = f"the {encoder} encoder after step {state['step']} of {total}"
    weights = tensors[f"{encoder}_encoder"]
    parts = {key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")}
    return parts or weights, known  # before an encoder had two parts it was a ResNet with the head as its `fc`


def read_head(source, arch=None):
    """{key: tensor} of the projection head of a run, or of what a file of weights has as the backbone's `fc`.

    Of the query encoder; the keys are those of `Encoder.head`. arch: of the backbone. Raises UserError if the source
    has no head, as a saved backbone has none.
    """
    path = Path(source)
    checkpoints = complete_checkpoints(path / "checkpoints")
    if checkpoints:
        weights, prefixes = load_checkpoint(checkpoints[-1])[0].get("query_encoder", {}), ("head.", "fc.")
    elif path.is_file():
        weights, _ = read_file(path)
        prefixes = (f"{find_backbone(weights, source, arch=arch)[0]}fc.",)
    else:
        weights, prefixes = {}, ()
    for prefix in prefixes:
        if head := {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}:
            return head
    raise UserError(f"--init-head: {source} has no head beside its backbone, as runs and official checkpoints have")


def read_file(path):
    """({key: tensor}, what is known) of a file of weights, all encoders and heads that are in it."""
    return (read_safetensors(path), {}) if path.suffix == ".safetensors" else read_torch_file(path)


def read_safetensors(path):
    damage = (safetensors.SafetensorError, OSError)
    with explained(f"{path} is truncated or no safetensors file", "fetch it again", *damage):
        return load_file(path)


def read_torch_file(path):
    """({key: tensor}, what is known) from a file of torch.save. Only tensors and plain values are read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, as any bytes may be taken for a pickle
        raise UserError(
            f"{path} is not read ({type(error).__name__}): it is not a file of torch.save, is damaged, or holds more"
            " than tensors and plain values, which could run any code; name a file of weights"
        ) from error
    whole = content if isinstance(content, dict) else {}
    parts = [whole[name] for name in ("state_dict", "model") if isinstance(whole.get(name), dict)]
    weights = dict(tensors_of(parts[-1] if parts else whole))
    if not weights:
        raise UserError(f"{path} holds no state dict; it must be one, or have one in it")
    arch = content.get("arch")
    return weights, {"arch": arch} if isinstance(arch, str) and arch in resnet_names() else {}


def tensors_of(nested, prefix=""):
    """(key, tensor) of each tensor in dicts of dicts; the key has the names on the way to it."""
    for key, value in nested.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from tensors_of(value, f"{prefix}{key}.")


def read_torchvision(name):
    with explained(f"{name} is not one of torchvision's weights", "check the name", ValueError, KeyError):
        weights = torchvision.models.get_weight(name)
    arch = name.split("_Weights.")[0].lower()
    if arch not in resnet_names():
        raise UserError(f"{name} is not a ResNet; the architectures are {', '.join(resnet_names())}")
    with explained(f"{name} cannot be downloaded", "try again", OSError, RuntimeError):
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    return state, {"arch": arch, "image_size": 224}


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
    """What a config.json of `save_backbone`, or of any model of timm, tells of its weights."""
    with reading_json(path, RESTORE) as config:
        settings, pretrained = config.get("moco") or {}, config.get("pretrained_cfg") or {}
        arch, built, size = settings.get("arch"), config.get("architecture"), pretrained.get("input_size")
        if arch not in resnet_names() and not str(arch).startswith(TIMM):  # such as the name of somebody's own
            arch = built if built in resnet_names() else built and f"{TIMM}{built}"
        known = {"arch": arch, "image_size": size and int(size[-1])}
        known |= {name: pretrained.get(name) for name in ("mean", "std", "tag")} | {"settings": dict(settings)}
    return {name: value for name, value in known.items() if value}


# ---- what is published


def check_loads_back(folder):
    """Load what is to be published from its folder, by timm if the card README.md there names timm.

    Raises UserError if it does not load, or if timm's features of random images are not those of `load_backbone`.
    """
    remedy = "nothing was sent; make it again by train_moco.py or `python -m moco.backbone convert --to timm`"
    backbone, known = load_backbone(folder)
    with reading_json(folder / "config.json", RESTORE) as config:
        size, width = config["pretrained_cfg"]["input_size"], config["num_features"]
        images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with explained(f"{folder} is not a backbone for images of {size}", remedy), torch.no_grad():
        expected = backbone.eval()(images)
    if expected.shape != (2, width) or not expected.isfinite().all():
        raise UserError(
            f"{folder} gives features {list(expected.shape)}, not of width {width}, or not finite; {remedy}"
        )
    if "timm.create_model" not in (folder / "README.md").read_text():
        return
    try:
        import timm
    except ImportError:
        print(f"check   {folder} loads back by load_backbone; timm, which its card names, is not installed to try")
        return
    with explained(f"timm does not load {folder}", remedy), torch.no_grad():
        features = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
    if features.shape != expected.shape or (features - expected).abs().max() > 1e-4 * expected.abs().max():
        raise UserError(f"timm loads {folder}, but its features of the same images differ; {remedy}")
