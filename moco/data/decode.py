"""One encoded image becomes pixels or crops; what cannot be decoded is replaced, named once, and counted."""

import contextlib
import functools
import io
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import simplejpeg
from accelerate.utils import gather_object
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from tqdm import tqdm

from moco.augment import cut_crops
from moco.errors import UserError, first_line

# The formats that Pillow may read. It knows many more, some by programs that an image could give orders to: it hands
# EPS to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
JPEG, JPEG_SCAN, JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"  # its first bytes, a marker inside, the last bytes
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # 179 million, above which Pillow refuses: headers of small files claim more
MAX_ASPECT = 1000  # sides of an image beyond which it is none: resized, it would take gigabytes
MAX_UNDECODABLE = 0.05  # share of the images of an epoch above which the data is at fault, not some files
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB: colour profiles and texts are above 1 MB
UNDECODABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for damaged files
# Its plugins raise these, too.
PLUGINS_RAISE = (RuntimeError, EOFError, struct.error, IndexError, KeyError, TypeError, OverflowError)


def decode_image(record):
    """An encoded image, {"bytes", "path"}, of which one may be None -> (H, W, 3) uint8 array; an array stays as it is.

    JPEGs are decoded by simplejpeg, bit for bit as by Pillow and faster; what it refuses (CMYK, damage) and every other
    format by Pillow. Gray, palette and 16-bit images become RGB of 8 bits; of 16 bits these are the highest, or those
    below record["bits"] if it is there. What is transparent shows white, as in a browser. Raises one of UNDECODABLE,
    also for a row without an image, or one that is such an error already.
    """
    if isinstance(record, np.ndarray):
        return record
    data = encoded_bytes(record)
    if data[:2] == JPEG:
        try:
            jpeg_size(data)
            return decode_jpeg(data)
        except ValueError:
            pass
    try:
        with open_image(data) as image:
            check_size(image.height, image.width)
            return rgb_of(image, record.get("bits"))
    except PLUGINS_RAISE as error:
        raise OSError(first_line(error)) from error


def rgb_of(image, bits=None):
    """A Pillow image of any mode -> (H, W, 3) uint8 array. bits: of gray pixels that are stored in 16, if known."""
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers, of unknown range")
    if image.mode.startswith("I"):  # 16-bit gray, which convert() would clip at 255; "I" may be less
        gray = np.asarray(image)
        gray = gray >> ((bits or (16 if image.mode != "I" or gray.max() > 255 else 8)) - 8)
        return np.repeat(gray.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return np.array(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def encoded_bytes(record):
    if isinstance(record, Exception):
        raise record
    if record is None or (record["bytes"] is None and record["path"] is None):
        raise ValueError("the row has no image")
    return record["bytes"] if record["bytes"] is not None else Path(record["path"]).read_bytes()


def open_image(data):
    """Pillow's image of encoded bytes, its header read and no more. Raises one of UNDECODABLE."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # above half of MAX_PIXELS
            return Image.open(io.BytesIO(data), formats=known_formats())
    except UnidentifiedImageError as error:
        raise OSError(f"no image in a format that is read here ({', '.join(FORMATS)})") from error


def traits(record):
    """What is uncommon in an encoded image, (is_transparent, lacks_end, largest).

    is_transparent: as far as its header says. lacks_end: it is a JPEG without an end marker. largest: its largest value
    if it is gray of 16 bits, otherwise None.
    """
    try:
        data = encoded_bytes(record)
        image = open_image(data)
        lacks_end = data[:2] == JPEG and data.rfind(JPEG_END) < data.rfind(JPEG_SCAN)
        is_gray = image.mode.startswith("I") and image.width * image.height <= MAX_PIXELS
        return bool(image.has_transparency_data), lacks_end, int(np.asarray(image).max()) if is_gray else None
    except (*UNDECODABLE, *PLUGINS_RAISE):
        return False, False, None


@functools.cache
def known_formats():
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def decode_jpeg(data, **scale):
    """simplejpeg's decode_jpeg, also of a file that lacks nothing but its end marker. Raises ValueError for damage."""
    try:
        return simplejpeg.decode_jpeg(data, **scale)
    except ValueError:
        return simplejpeg.decode_jpeg(data + JPEG_END, **scale)


def jpeg_size(data):
    """(height, width) from a JPEG's header. Raises ValueError if it is damaged or too large to decode."""
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    check_size(height, width)
    return height, width


def check_size(height, width):
    """Raise ValueError for a size that no image has, and that would take too much memory."""
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")


def decode_crops(record, draw_boxes, sizes):
    """Crops of an image that `decode_image` takes: a list of (size, size, C) tensors; raises as that does.

    draw_boxes: (height, width) -> boxes, (views, 4) int. sizes: the side of each crop, or one for all. A JPEG is
    decoded at a half, a quarter or an eighth of its sides if every crop still has its size in pixels: in 60 % of the
    time for 1600 x 1200 pixels. Crops then begin at the nearest of fewer pixels, and differ by about a level from those
    of the whole image.
    """
    if isinstance(record, np.ndarray):
        return cut_crops(record, draw_boxes(*record.shape[:2]), sizes)
    data = encoded_bytes(record)
    if data[:2] == JPEG:
        with contextlib.suppress(ValueError):
            height, width = jpeg_size(data)
            boxes = draw_boxes(height, width)
            room = (boxes[:, 2:].min(axis=1) / sizes).min()
            factor = next((factor for factor in (8, 4, 2) if room >= factor), 1)
            if factor == 1:
                return cut_crops(decode_jpeg(data), boxes, sizes)
            least = {"min_height": -(-height // factor), "min_width": -(-width // factor), "min_factor": factor}
            image = decode_jpeg(data, **least)
            ends = (boxes[:, :2] + boxes[:, 2:]) / factor
            starts, ends = np.rint(boxes[:, :2] / factor).astype(int), np.rint(ends).astype(int)
            boxes = np.concatenate([starts, np.minimum(ends, image.shape[:2]) - starts], axis=1)
            return cut_crops(image, boxes, sizes)
    image = decode_image(record | {"bytes": data})
    return cut_crops(image, draw_boxes(*image.shape[:2]), sizes)


# ---- what cannot be decoded


def read_image(rows, index, decode=decode_image):
    """Row `index` decoded, or the nearest row after it that can be.

    rows: a sequence of {"image": encoded}. Returns (what `decode` makes of the encoded image, all of its row, [(name,
    reason)] if it is not the row asked for). Of several undecodable ones side by side each counts once, when it is
    asked for itself.
    """
    failed = []
    for row in range(index, index + len(rows)):
        row %= len(rows)
        values = rows[row]
        try:
            return decode(values["image"]), values, failed
        except UNDECODABLE as error:
            failed = failed or [(name_of(values, row), first_line(error))]
    raise UserError(f"none of the {len(rows)} images can be decoded; the first: {': '.join(failed[0])}")


def name_of(values, row):
    """What to call a row in messages: its name, else its file, else its number."""
    path = values["image"].get("path") if isinstance(values["image"], dict) else None
    return values.get("name") or path or f"row {row}"


def check_undecodable(undecodable, images, data):
    """Raise UserError where of so many images, of an epoch or an evaluation, too many could not be decoded."""
    if undecodable > MAX_UNDECODABLE * images:
        raise UserError(
            f"{undecodable} of {images} images of --data {data} cannot be decoded, more than {MAX_UNDECODABLE:.0%};"
            " repair or remove them"
        )


def name_undecodable(failed, named, accelerator, instead="its neighbour takes its place"):
    """Print each undecodable image once, on the main process; returns how many all processes have, which call together.

    failed: this process's [(name, reason), ...]. named: the set of names printed before, which grows. instead: what
    becomes of it.
    """
    everyone = gather_object(failed)
    for name, reason in everyone:
        if name not in named:
            named.add(name)
            if accelerator.is_main_process:
                tqdm.write(f"cannot decode {name} ({reason}): {instead}", file=sys.stderr)
    return len(everyone)
