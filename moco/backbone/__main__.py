"""Backbones on the command line.

python -m moco.backbone convert moco_v2_800ep_pretrain.pth.tar r50.safetensors --to torchvision
python -m moco.backbone convert RUN r50_detectron2.pth --to detectron2
python -m moco.backbone push RUN USER/NAME --private
python -m moco.backbone embed RUN --data FOLDER features.parquet --duplicates 0.98
"""

import argparse
from pathlib import Path

from moco.backbone import convert, load_backbone
from moco.backbone.convert import FORMATS
from moco.backbone.embed import embed
from moco.backbone.publish import push_backbone
from moco.errors import one_line_errors
from moco.run.flags import below_one


def parse_args():
    parser = argparse.ArgumentParser(
        prog="python -m moco.backbone",
        description="Convert a backbone, publish it, or embed images with it.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser(
        "convert", description="Write SOURCE's backbone as another program reads it, bit for bit."
    ).add_argument
    add("source", metavar="SOURCE", help="what --backbone of linear_probe.py takes")
    add("target", metavar="TARGET", help="the file or folder to write")
    add("--to", choices=FORMATS, required=True, help="the program that is to read it")
    add("--arch", help="a torchvision ResNet, resnet10 or timm/NAME [as SOURCE says]")
    add("--encoder", choices=("query", "key"), default="query", help="key: the momentum encoder [%(default)s]")
    add = commands.add_parser("push", description=push_backbone.__doc__.split("\n\n")[0]).add_argument
    add(
        "run",
        metavar="RUN",
        help="a run folder of train_moco.py, of linear_probe.py with --push-to-hub, or what convert --to timm wrote",
    )
    add("name", metavar="USER/NAME", help="the repository, created if it does not exist")
    add("--private", action="store_true", help="create a private repository")
    add("--license", metavar="NAME", help="of the weights, such as mit; the card names none without it")
    add = commands.add_parser(
        "embed", description="Write features of images to a parquet file, with a picture."
    ).add_argument
    add("source", metavar="SOURCE", help="what --backbone of linear_probe.py takes")
    add("--data", required=True, help="'shapes', a folder, or USER/NAME on the Hub")
    add("target", metavar="OUT", help="the .parquet file to write; OUT.png shows nearest neighbours")
    add("--duplicates", type=below_one, metavar="T", help="also list pairs of images above this cosine in OUT.csv")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.command == "embed":
        pairs = embed(*load_backbone(args.source), args.data, args.target, duplicates=args.duplicates)
        target = Path(args.target)
        print(f"features are in {target}, nearest neighbours in {target.with_suffix('.png')}")
        if args.duplicates is not None:
            print(f"{pairs} pairs above a cosine of {args.duplicates:g} are in {target.with_suffix('.csv')}")
    elif args.command == "convert":
        convert(args.source, args.target, args.to, args.arch, args.encoder)
        print(f"{args.target} has the backbone of {args.source}")
    else:
        print(push_backbone(args.run, args.name, args.private, args.license))


if __name__ == "__main__":
    with one_line_errors():
        main()
