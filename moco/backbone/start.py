"""What pre-training starts from: the weights that --init names."""

from pathlib import Path

import huggingface_hub
import yaml
from huggingface_hub import ModelCard

from moco.backbone.keys import few, mismatches, stem_of
from moco.backbone.load import load_backbone, read_head
from moco.encoder import TIMM
from moco.errors import UserError
from moco.run.checkpoint import weights_digest


def read_start(args, accelerator):
    """{key: tensor} of an `Encoder`, of its backbone and with --init-head of its head, as --init has them.

    None without --init, and on resume, where the checkpoint has them. Sets in args what follows from the source: arch,
    stem, mean and std (these two unless one is given or neither is known), and init_from, what args.json and the card
    say. One process per machine reads first, because it may have to download. Raises UserError as `load_backbone` does.
    """
    if args.init_head and not args.init:
        raise UserError("--init-head takes the head of --init SOURCE, which is missing: add it, or leave this out")
    if args.resume or not args.init:
        return None
    with accelerator.local_main_process_first():
        backbone, known = load_backbone(args.init, args.arch, image_size=args.image_size)
        head = read_head(args.init, known["arch"]) if args.init_head else {}
        license = license_of(args.init)
    weights = backbone.state_dict()
    stem = "imagenet" if known["arch"].startswith(TIMM) else stem_of(weights)[0]
    if args.stem not in (None, stem):
        raise UserError(f"--stem {args.stem} is not that of --init {args.init}, {stem}; leave the flag out")
    args.arch, args.stem = known["arch"], stem
    if args.mean is None and args.std is None:
        args.mean, args.std = known.get("mean"), known.get("std")
    here = Path(args.init).exists()
    args.init_from = {
        "name": Path(args.init).resolve().name if here else args.init.removeprefix("hf-hub:"),  # the path is private
        "on_hub": not here and "/" in args.init, "license": license, "backbone_sha256": weights_digest(weights),
        "head": bool(head),
    }  # fmt: skip
    parts = {"backbone": weights, "head": head}
    return {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}


def load_start(encoder, start, args):
    """Give an `Encoder` the weights of `read_start`. Raises UserError if they do not fit; then it is as it was."""
    own, parts = encoder.state_dict(), ("backbone.", "head.") if args.init_head else ("backbone.",)
    if wrong := mismatches(start, {key: value for key, value in own.items() if key.startswith(parts)}):
        head = f", --head {args.head} and --dim {args.dim}" if args.init_head else ""
        raise UserError(
            f"--init {args.init} does not fit images of {encoder.channels} channels at --image-size {args.image_size}"
            f"{head}: {few(wrong)}; change these, or take another source"
        )
    encoder.load_state_dict(own | start)


def license_of(source):
    """The license that the card of a run folder or a repository on the Hub names; None if there is none to be read."""
    path = Path(source)
    cards = [card for card in (path / "backbone" / "README.md", path / "README.md") if card.exists()]
    if not cards and (path.exists() or "/" not in str(source)):
        return None
    try:
        return ModelCard.load(cards[0] if cards else str(source).removeprefix("hf-hub:")).data.license
    except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError, yaml.YAMLError):
        return None


def start_in_words(init_from):
    """What a run started from, for its settings and the card."""
    license = f"license {init_from['license'] or 'unknown'}"
    head = "its head, too" if init_from["head"] else "the head is drawn anew"
    return f"{init_from['name']} ({license}; backbone {init_from['backbone_sha256'][:16]}; {head})"
