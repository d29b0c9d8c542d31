"""Backbones in and out: loaded from anywhere, saved, converted, published. The commands are in __main__.py."""

from moco.backbone.convert import convert
from moco.backbone.load import load_backbone
from moco.backbone.publish import push_backbone as push
from moco.backbone.save import save_backbone

__all__ = ["convert", "load_backbone", "push", "save_backbone"]
