"""Images, JSON files and weights that are not what they seem: refused in a known way, at no cost, and nothing is run.

pytest tests/test_hostile.py
"""

import io
import json
import os
import random
import resource
import stat
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save

from moco.augment import AUGMENTATIONS, MEAN, STD
from moco.backbone.load import read_backbone, read_config
from moco.backbone.publish import read_results
from moco.data.batches import center_crop
from moco.data.decode import FORMATS, UNDECODABLE, decode_crops, decode_image, traits
from moco.data.load import load_splits
from moco.data.views import FastViews
from moco.detection.records import image_size
from moco.encoder import build_encoder
from moco.errors import UserError
from moco.run.checkpoint import load_checkpoint, read_metrics, save_checkpoint

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n(/tmp/written) (w) file closefile\nshowpage\n%%EOF\n"


def record(data):
    return {"bytes": data, "path": None}


def crops_of(data):
    return torch.stack(decode_crops(record(data), lambda h, w: np.array([[0, 0, h, w]] * 2), 16))


# ---- programs and memory


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program called gs, first on the path, that leaves a file behind if it is ever run."""
    for name in ("gs", "gswin64c"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # not looked for yet
    return tmp_path / "ran"


def test_postscript_is_not_run_from_a_file_or_a_row(ghostscript, tmp_path, capsys):
    for decode in (decode_image, lambda r: crops_of(r["bytes"]), lambda r: any(traits(r)) or decode_image(r)):
        with pytest.raises(UNDECODABLE, match="no image in a format that is read here"):
            decode(record(EPS))
    assert image_size(record(EPS), {"images whose size cannot be read": 0}) == (1, 1)
    (tmp_path / "images").mkdir()
    for name, data in (("0.jpg", EPS), ("1.jpg", encode(picture(), "JPEG"))):
        (tmp_path / "images" / name).write_bytes(data)
    rows = datasets.Dataset.from_dict({"image": [EPS, encode(picture(), "JPEG")]})
    rows.cast_column("image", datasets.Image(decode=False)).to_parquet(tmp_path / "rows" / "train.parquet")
    for folder in ("images", "rows"):
        images, _ = load_splits(str(tmp_path / folder))
        *_, undecodable = FastViews(AUGMENTATIONS["v2"], 16, MEAN, STD).crops(images, seed=0)[[(0, 0), (0, 1)], ()]
        assert len(undecodable) == 1
    assert not ghostscript.exists()
    with pytest.raises(OSError):  # what this test protects from: Pillow by itself runs it
        Image.open(io.BytesIO(EPS)).load()
    assert ghostscript.exists()


def test_a_small_file_that_claims_billions_of_pixels_costs_nothing():
    jpeg = bytearray(encode(picture(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    png = bytearray(encode(picture(), "PNG"))
    png[16:24] = struct.pack(">II", 65000, 65000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in (bytes(jpeg), bytes(png)):
        for decode in (decode_image, lambda r: crops_of(r["bytes"])):
            with pytest.raises(UNDECODABLE):
                decode(record(data))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_thin_image_costs_what_its_crop_does():
    """Resized as a whole, 20,000 pixels by 20 would take 170 MB, and by 1 above 3 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ramp = np.repeat(np.arange(20_000, dtype=np.uint32)[:, None, None] * 255 // 20_000, 20, axis=1).repeat(3, axis=2)
    for image in (ramp.astype(np.uint8), ramp.astype(np.uint8).swapaxes(0, 1)):
        crop = center_crop(image, 224)
        assert crop.shape == (224, 224, 3) and crop.float().mean().item() == pytest.approx(127, abs=1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kB
    for size in ((1, 20_000), (2001, 2)):
        for format in ("PNG", "JPEG"):
            data = encode(Image.new("RGB", size), format)
            for decode in (decode_image, lambda r: crops_of(r["bytes"])):
                with pytest.raises(UNDECODABLE, match="one side is more than 1000 times the other"):
                    decode(record(data))


def test_the_middle_of_a_thin_image_is_cut_where_the_whole_one_would_be():
    """Torchvision resizes the whole. Noise, because it shows any shift: here both begin at a whole pixel.

    Elsewhere the middle may begin between two pixels, and then the crops are up to half a pixel apart.
    """
    times = 34  # as long as wide
    image = np.random.default_rng(0).integers(256, size=(48, 48 * times, 3), dtype=np.uint8)
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    whole = torch.nn.functional.interpolate(pixels, (37, 37 * times), mode="bilinear", antialias=True)[0]
    left = round((37 * times - 32) / 2)
    expected = whole[:, 2:34, left : left + 32].permute(1, 2, 0)
    for found in (center_crop(image, 32), center_crop(image.swapaxes(0, 1), 32).permute(1, 0, 2)):
        assert (found.int() - expected.int()).abs().max() <= 1


def test_a_jpeg_that_lacks_its_end_marker_is_decoded_as_it_is():
    for options in ({}, {"progressive": True}, {"quality": 30}):
        whole = encode(picture(size=(200, 150)), "JPEG", **options)
        assert whole.endswith(b"\xff\xd9") and traits(record(whole)) == (False, False, None)
        assert (decode_image(record(whole[:-2])) == decode_image(record(whole))).all()
        assert crops_of(whole[:-2]).equal(crops_of(whole)) and traits(record(whole[:-2])) == (False, True, None)
        with pytest.raises(UNDECODABLE):
            decode_image(record(whole[: len(whole) // 2]))


def test_a_png_with_two_megabytes_of_text_or_profile_is_decoded():
    text = PngInfo()
    text.add_text("comment", "x" * 2_000_000, zip=True)
    for options in ({"pnginfo": text}, {"icc_profile": bytes(2_000_000)}):
        assert (decode_image(record(encode(picture(), "PNG", **options))) == np.asarray(picture())).all()


# ---- what is transparent


def picture(mode="RGB", size=(40, 30)):
    image = Image.new("RGB", size, (200, 30, 30))
    ImageDraw.Draw(image).ellipse((5, 5, 30, 25), fill=(20, 60, 220))
    return image.convert(mode)


def encode(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "palette with alphas", "one colour", "WEBP", "GIF"])
def test_what_is_transparent_shows_white(kind):
    mask = Image.new("L", (40, 30), 255)
    ImageDraw.Draw(mask).rectangle((0, 0, 19, 29), fill=0)
    image = picture()
    image.putalpha(mask)
    if kind in ("RGBA", "WEBP", "GIF"):
        data = encode(image, "PNG" if kind == "RGBA" else kind, **({"lossless": True} if kind == "WEBP" else {}))
    elif kind == "LA":
        data = encode(image.convert("LA"), "PNG")
    elif kind == "one colour":
        data = encode(picture(), "PNG", transparency=(200, 30, 30))
    else:
        palette = picture().quantize(8)
        index = palette.getpixel((0, 0))
        alphas = bytes(0 if i == index else 255 for i in range(8)) if kind == "palette with alphas" else index
        data = encode(palette, "PNG", transparency=alphas)
    assert traits(record(data))[0]
    pixels = decode_image(record(data))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert (
        abs(
            pixels[15, 25].astype(int) - np.asarray(picture("L" if kind == "LA" else "RGB").convert("RGB"))[15, 25]
        ).max()
        < 40
    )
    assert traits(record(encode(picture(), "PNG"))) == (False, False, None)


# ---- fuzz: damaged files of each kind give known refusals and nothing else


def damage(data, rng):
    """Bytes with something wrong: cut, bits flipped, a part repeated, removed or made noise."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data)), rng.randint(1, 40)
        kind = rng.randrange(5)
        if kind == 0:
            del data[max(4, at) :]
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at:at] = data[at : at + length]
        elif kind == 3 and len(data) > length + 8:
            del data[at : at + length]
        else:
            data[at : at + length] = rng.randbytes(length)
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it puts right by itself
def test_2000_damaged_images_are_decoded_or_refused_as_undecodable():
    rng = random.Random(0)
    modes = {
        "JPEG": ["RGB", "L", "CMYK"], "PNG": ["RGB", "RGBA", "P", "LA", "I;16", "1"], "WEBP": ["RGB", "RGBA"],
        "TIFF": ["RGB", "CMYK", "I;16", "F"], "GIF": ["P"], "BMP": ["RGB", "P"], "PPM": ["RGB", "L"], "AVIF": ["RGB"],
    }  # fmt: skip
    assert modes.keys() == set(FORMATS)
    originals = [encode(picture(mode), format) for format in FORMATS for mode in modes[format]]
    refused = 0
    for i in range(2000):
        data = damage(originals[i % len(originals)], rng)
        try:
            pixels = decode_image(record(data))
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        except UNDECODABLE as error:
            refused += 1
            assert "BytesIO" not in str(error)
        try:
            assert crops_of(data).shape == (2, 16, 16, 3)
        except UNDECODABLE:
            pass
    assert 400 < refused < 1900


def strange_json(content, rng):
    """JSON with something wrong in its bytes, or a value of another kind in it."""
    if rng.random() < 0.5:
        return damage(json.dumps(content).encode(), rng)
    values = [None, -1, 1e400, 2**80, "", "x" * 9, [], {}, [[]], {"a": {}}, True, float("nan"), 0.5]
    places, value = [content], rng.choice(values)
    for place in places:
        children = place.values() if isinstance(place, dict) else place
        places += [child for child in children if isinstance(child, (dict, list))]
    place = rng.choice([place for place in places if place])
    key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    if isinstance(place, dict) and rng.random() < 0.3:
        del place[key]
    else:
        place[key] = value
    return json.dumps(content if rng.random() < 0.95 else value).encode()


RESULTS = {
    "backbone_sha256": "a", "data": "d", "data_on_hub": True, "classes": 3, "validation_images": 4,
    "held_out_images": 0, "lr": 30.0, "top1": 50.0, "top5": 70.0, "classifiers": [{"lr": 30.0}],
    "knn": {"200": {"top1": 1.0, "top5": 2.0}},
}  # fmt: skip
CONFIG = {"architecture": "resnet18", "moco": {"arch": "resnet10"}, "pretrained_cfg": {"input_size": [3, 32, 32]}}


def test_400_damaged_json_files_are_read_or_refused_in_one_line(tmp_path):
    rng = random.Random(1)
    save_checkpoint(tmp_path / "checkpoints", 3, {"a": {"w": torch.ones(2)}}, {"images": 5, "undecodable": 0}, keep=1)
    checkpoint = tmp_path / "checkpoints" / "step_3"
    state = json.loads((checkpoint / "state.json").read_text()) | {"sums": {"loss": [1.0, 2.0]}, "summed": 2}
    line = {"step": 3, "epoch": 0.5, "loss": [1.0, 2.0], "lr": 0.1}
    readers = {
        "state.json": (state, lambda path: load_checkpoint(checkpoint)),
        "results.json": (RESULTS, read_results),
        "metrics.jsonl": (line, read_metrics),
        "config.json": (CONFIG, read_config),
    }
    refused = 0
    for i in range(400):
        name = list(readers)[i % len(readers)]
        content, read = readers[name]
        path = checkpoint / name if name == "state.json" else tmp_path / name
        path.write_bytes(strange_json(json.loads(json.dumps(content)), rng))
        try:
            read(path)
        except UserError as error:
            refused += 1
            assert str(tmp_path) in str(error) and len(str(error).splitlines()) == 1
            assert any(word in str(error) for word in ("remove", "restore", "empty file", "again"))
    assert 100 < refused < 390


def test_100_damaged_weights_are_read_or_refused_in_one_line(tmp_path):
    rng = random.Random(2)
    path, weights = tmp_path / "w.safetensors", build_encoder("resnet10").backbone.state_dict()
    strange = [torch.tensor(1.0), torch.ones(3, dtype=torch.int64), torch.full((2, 2), torch.nan), torch.ones(0)]
    whole = save(weights)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for i in range(100):
        if i % 2:
            path.write_bytes(damage(whole[:header], rng) + whole[header:])
        else:
            path.write_bytes(save(weights | {rng.choice(list(weights)): rng.choice(strange)}))
        try:
            read_backbone(path)
        except UserError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert refused > 60


@pytest.mark.parametrize(
    "key, value", [("conv1.weight", torch.inf), ("bn1.running_var", -1.0), ("bn1.bias", torch.nan)]
)
def test_weights_that_no_training_leaves_are_damaged(tmp_path, key, value):
    weights = {name: v.clone() for name, v in build_encoder("resnet10").backbone.state_dict().items()}
    weights[key].view(-1)[0] = value
    (tmp_path / "w.safetensors").write_bytes(save(weights))
    with pytest.raises(UserError, match=f"w.safetensors holds damaged weights, .*: {key}"):
        read_backbone(tmp_path / "w.safetensors")
