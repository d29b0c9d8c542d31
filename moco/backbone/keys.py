"""Which keys of a file of weights are a backbone, whatever program wrote it, and whether they fit an architecture."""

import re
from functools import lru_cache

import torch

from moco.encoder import TIMM, build_encoder, resnet_names
from moco.errors import UserError

# A stage of a ResNet as torchvision, as detectron2, and as an nn.Sequential of torchvision's layers names it.
STAGE = re.compile(r"(|.*\.)(layer\d|res\d|\d+)\.0\.conv1\.weight")
PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
# A word before the keys of the second of two encoders, in the official code and elsewhere; "schema" has none.
MOMENTUM = re.compile(r"(?<![a-z])(encoder_k|key_encoder|momentum|teacher|target|ema)(?![a-z])")


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


# ---- which keys


def find_backbone(weights, source, encoder="query", arch=None, image_size=None):
    """(prefix, {the architecture's own key: tensor}, how many keys are left over) of a state dict.

    A backbone may stand below any prefix, such as "module.encoder_q.", beside heads and queues. Where several do, the
    one is taken that an architecture fits; "query" and "key" encoders are told apart by their prefix.
    arch: the architecture if it is known; any ResNet otherwise. image_size: for a model of timm.
    Raises UserError that names what was found if that is not exactly one backbone, or its numbers are damaged.
    """
    is_timm = (arch or "").startswith(TIMM)
    found = timm_sets(weights, arch, image_size) if is_timm else resnet_sets(weights)
    chosen = {prefix: keys for prefix, keys in found.items() if bool(MOMENTUM.search(prefix)) == (encoder == "key")}
    if encoder == "query" and len(found) == 1:
        chosen = found
    if encoder == "key" and not chosen:
        check_single(source, encoder)
    if not chosen:
        kind = f"{arch}'s" if is_timm else "ResNet's"
        raise UserError(
            f"{source} holds no {kind} {encoder} encoder but {few(weights)}; name weights with a backbone, not those of"
            " a head or of another kind of network (a model of timm needs --arch timm/NAME)"
        )
    chosen = {
        prefix: {name: weights[key].detach().clone(memory_format=torch.contiguous_format) for name, key in keys.items()}
        for prefix, keys in chosen.items()
    }
    if len(chosen) > 1:
        fitting = {prefix: keys for prefix, keys in chosen.items() if fits(keys, arch, image_size)}
        if len(fitting) != 1:
            places = ", ".join(repr(prefix) for prefix in (fitting or chosen))
            raise UserError(f"{source} holds several backbones, below {places}; save the keys of one of them alone")
        chosen = fitting
    [(prefix, backbone)] = chosen.items()
    heads = tuple(f"{prefix}{head}." for head in heads_of(arch))
    used = set(found[prefix].values())
    check_weights(backbone, source)
    return prefix, backbone, sum(key not in used and not key.startswith(heads) for key in weights)


def check_single(source, encoder):
    """Raise UserError if the momentum encoder is asked for, but the source holds only one encoder."""
    if encoder == "key":
        raise UserError(
            f"--encoder key asks for the second of two encoders, but {source} holds one; leave the flag out, or name a"
            " run folder or an official MoCo checkpoint"
        )


def resnet_sets(weights):
    """{prefix: {torchvision's key: key}} of each ResNet in a state dict: what has the name of one of its layers."""
    sets = {}
    for match in filter(None, map(STAGE.fullmatch, weights)):
        prefix, stage = match.groups()
        if prefix in sets:
            continue
        names = {key.removeprefix(prefix): key for key in weights if key.startswith(prefix)}
        if stage.startswith("layer"):
            sets[prefix] = {name: key for name, key in names.items() if re.match(r"(conv1|bn1|layer\d+)\.", name)}
        elif stage.startswith("res"):
            layers = {name: key for name, key in names.items() if re.match(r"(stem|res\d)\.(?!fc\.)", name)}
            sets[prefix] = {from_detectron2(name): key for name, key in layers.items()}
        else:  # lightly's: 0 and 1 are the stem, then there are numbers without weights, then 4 to 7
            numbers = {int(name.split(".")[0]) for name in names if name.split(".")[0].isdigit()}
            parts = dict(zip(map(str, sorted(numbers)), PARTS))
            split = {name: name.split(".", 1) for name in names if "." in name}
            sets[prefix] = {f"{parts[n]}.{rest}": names[name] for name, (n, rest) in split.items() if n in parts}
    return sets


def timm_sets(weights, arch, image_size):
    """{prefix: {key of the architecture: key}} of each such model of timm in a state dict, without its classifier."""
    own = shapes_of(arch, image_size=image_size)
    first, parts = next(iter(own)), {name.split(".")[0] for name in own}
    sets = {}
    for prefix in [key.removesuffix(first) for key in weights if key == first or key.endswith(f".{first}")]:
        names = {key.removeprefix(prefix): key for key in weights if key.startswith(prefix)}
        heads = tuple(f"{head}." for head in heads_of(arch))
        sets[prefix] = {
            name: key for name, key in names.items() if name.split(".")[0] in parts and not name.startswith(heads)
        }
    return sets


def heads_of(arch):
    """The names of the layers that a backbone leaves out at its end."""
    if not (arch or "").startswith(TIMM):
        return ("fc", "stem.fc")
    import timm

    names = timm.get_pretrained_cfg(arch.removeprefix(TIMM)).classifier or ()
    return (names,) if isinstance(names, str) else tuple(names)


# ---- what they are


def fits(weights, arch, image_size):
    """Whether the weights are exactly those of an architecture: of `arch`, or if that is None of any ResNet."""
    if (arch or "").startswith(TIMM):
        return not mismatches(weights, shapes_of(arch, "imagenet", channels_of(weights, arch), image_size))
    try:
        return bool(fitting_arch(weights, arch))
    except UserError:
        return False


def channels_of(weights, arch):
    """The channels of the images that a model of timm with these weights takes."""
    import timm

    first = timm.get_pretrained_cfg(arch.removeprefix(TIMM)).first_conv
    key = f"{first}.weight"
    return weights[key].shape[1] if key in weights and weights[key].dim() == 4 else 3


@lru_cache
def shapes_of(arch, stem="imagenet", channels=3, image_size=None):
    """{key: tensor without storage} of a backbone, in its own order."""
    with torch.device("meta"):
        return build_encoder(arch, head="fc", stem=stem, channels=channels, image_size=image_size).backbone.state_dict()


def check_weights(weights, source):
    """Raise UserError for numbers that no training leaves: not finite, no fractions, negative variances."""
    damaged = [
        key
        for key, value in weights.items()
        if not key.endswith(("num_batches_tracked", "_index"))  # counts, and where swin looks up its positions
        and (
            not value.is_floating_point()
            or not value.isfinite().all()
            or (key.endswith("running_var") and (value < 0).any())
            or (key == "conv1.weight" and value.dim() != 4)
        )
    ]
    if damaged:
        raise UserError(f"{source} holds damaged weights, not finite or no fractions: {few(damaged)}; fetch it again")


def few(names):
    """The first names of many, for a message."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"


def stem_of(weights):
    """(stem, channels) of a ResNet's weights, as `build_encoder` takes them."""
    first = weights["conv1.weight"]
    return "small" if first.shape[-1] == 3 else "imagenet", first.shape[1]


def mismatches(weights, shapes):
    """How weights differ from an architecture's: a list of "missing KEY", "unexpected KEY" or "KEY is SHAPE".

    BatchNorm's counters of batches may be missing, as in old checkpoints; nothing here reads them.
    """
    found = [f"missing {key}" for key in shapes.keys() - weights if not key.endswith("num_batches_tracked")]
    found += [f"unexpected {key}" for key in weights.keys() - shapes.keys()]
    return found + [
        f"{key} is {'x'.join(map(str, weights[key].shape))}, not {'x'.join(map(str, shape.shape))}"
        for key, shape in shapes.items()
        if key in weights and weights[key].shape != shape.shape
    ]


def fitting_arch(weights, arch=None, source="weights"):
    """The ResNet whose keys and shapes are exactly those of the weights. arch: the only one to try.

    Raises UserError that names the keys that do not fit.
    """
    if "conv1.weight" not in weights:
        raise UserError(f"{source} does not fit any ResNet: missing conv1.weight")
    stem = stem_of(weights)
    wrong = {}
    for name in [arch] if arch else resnet_names():
        wrong[name] = mismatches(weights, shapes_of(name, *stem))
        if not wrong[name]:
            return name
    best = min(wrong, key=lambda name: len(wrong[name]))
    nearest = f"--arch {best}" if arch else f"any --arch, {best} being the nearest"
    raise UserError(f"{source} does not fit {nearest}: {few(wrong[best])}")
