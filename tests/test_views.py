"""Views of every kind: sizes, transforms of one's own, exact with any number of workers. pytest tests/test_views.py"""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import v2

from moco.augment import AUGMENTATIONS, MEAN, NO_COLOUR, STD, V2
from moco.data.arrays import ArrayImages
from moco.data.order import Order
from moco.data.shapes import draw_scene
from moco.data.views import FastViews, TransformViews
from moco.errors import UserError
from moco.fused import augment_fused, compiled_augmentation
from moco.run.pictures import save_views


class GlobalNoise:
    """A transform that draws from all three global generators, which is what makes a run differ when it is resumed."""

    def __call__(self, image):
        image = np.asarray(image, np.float32) / 255 + np.random.normal(0, 0.1) + random.random()
        return torch.from_numpy(image).permute(2, 0, 1) + torch.rand(3, 1, 1)


def transforms_of(version, size=16):
    floats = [v1.ToTensor()] if version is v1 else [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    colour = version.ColorJitter(0.4, 0.4, 0.4, 0.1)
    return version.Compose([version.RandomResizedCrop(size), version.RandomHorizontalFlip(), colour, *floats])


@pytest.fixture(scope="module")
def images():
    return ArrayImages([Image.fromarray(draw_scene("train", i)[0]) for i in range(10)])


def joined(views, images, workers, start, steps, rank=0, world=1):
    """All views of some steps as one flat tensor a step, on the device of one process."""
    order = Order(4, 7, rank, world, workers)
    batches = views.batches(images, order, start)
    made = [views.on_device(next(batches)[0], order, step, "cpu") for step in range(start, start + steps)]
    return [torch.cat([view.flatten(1) for view in step], dim=1) for step in made]


MULTI_CROP = FastViews([V2 | {"area": (0.14, 1.0)}] * 2 + [V2 | {"size": 0.5, "area": (0.05, 0.14)}] * 3, 32, MEAN, STD)
MAKERS = {
    "multi-crop": MULTI_CROP,
    "torchvision v1": TransformViews([transforms_of(v1), transforms_of(v1)]),
    "torchvision v2, two sizes": TransformViews([transforms_of(v2), transforms_of(v2, 8)]),
    "global generators": TransformViews([GlobalNoise(), GlobalNoise()]),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_views_depend_on_neither_workers_nor_start_nor_processes_nor_what_was_drawn_before(images, kind):
    whole = joined(MAKERS[kind], images, workers=0, start=0, steps=5)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    for workers, start in ((1, 0), (2, 0), (0, 3), (1, 4), (2, 2)):
        part = joined(MAKERS[kind], images, workers, start, 5 - start)
        assert all(map(torch.equal, part, whole[start:])), (workers, start)
    halves = [joined(MAKERS[kind], images, 0, 1, 4, rank, 2) for rank in range(2)]
    assert all(torch.cat(both).equal(step) for *both, step in zip(*halves, whole[1:], strict=True))
    first, second = MAKERS[kind].crops(images, seed=7)[[(0, 1), (1, 1)], ()][0][0]
    assert not first.equal(second)  # other epochs, other views


@pytest.mark.parametrize("kind", MAKERS)
def test_a_check_tells_what_the_workers_make_of_an_image(images, kind):
    batch, _, _ = MAKERS[kind].crops(images, seed=0)[[(0, 0)], ()]
    assert [(crop.shape, crop.dtype) for crop in MAKERS[kind].check(images)] == [(c.shape[1:], c.dtype) for c in batch]


def test_transforms_leave_the_global_generators_as_they_were(images):
    def state():
        return torch.rand(1).item(), np.random.rand(), random.random()

    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = state()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    views = MAKERS["global generators"].crops(images, seed=0)[[(0, 1), (0, 2)], ()][0]
    assert state() == expected
    assert not views[0].equal(views[1]) and not views[0][0].equal(views[0][1])  # each view is drawn apart


def test_a_view_of_half_the_size_and_a_small_area_is_one(images):
    rows = [(0, row) for row in range(10)]
    recipe = [V2 | {"area": (0.9, 1.0)}, V2 | {"size": 0.5, "area": (0.01, 0.02)}]
    (large, small), _, _ = FastViews(recipe, 32, MEAN, STD).crops(images, seed=0)[rows, ()]
    assert large.shape == (10, 32, 32, 3) and small.shape == (10, 16, 16, 3)
    assert small.float().std(dim=(1, 2)).mean() < 0.5 * large.float().std(dim=(1, 2)).mean()  # a few pixels of 48 x 48


def test_views_that_differ_in_their_recipes_get_what_they_are_given(images):
    quiet = V2 | {"jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0}
    order = Order(10, 0)
    views = FastViews([quiet | {"gray_p": 1.0}, quiet | {"solarize_p": 1.0}, quiet], 32, [0] * 3, [1] * 3)
    gray, solarized, plain = views.on_device(next(views.batches(images, order, 0))[0], order, 0, "cpu")
    assert torch.allclose(gray[:, :1], gray[:, 1:2]) and not torch.allclose(plain[:, :1], plain[:, 1:2])
    assert solarized.max() <= 0.5 < plain.max()


def test_six_channels_of_floats_and_single_channels_are_cropped_flipped_and_blurred():
    rng = np.random.default_rng(0)
    flat = np.arange(6, dtype=np.float32) * 100 - 50  # each channel has a value of its own, blurred or not
    for channels, pixels in ((6, flat), (1, flat[:1]), (1, np.array([77], np.uint8))):
        images = ArrayImages([np.broadcast_to(pixels, (20, 30, channels)) for _ in range(4)])
        views = FastViews(
            [V2 | {"jitter_p": 0.0, "gray_p": 0.0, "blur_p": 1.0}] * 2, 16, [2.0] * channels, [4.0] * channels
        )
        order = Order(4, 0)
        crops = next(views.batches(images, order, 0))[0]
        expected = pixels / 255 if pixels.dtype == np.uint8 else pixels
        for view in views.on_device(crops, order, 0, "cpu"):
            assert view.shape == (4, channels, 16, 16) and view.dtype == torch.float32
            difference = view - torch.tensor((expected - 2) / 4, dtype=torch.float32).view(-1, 1, 1)
            assert difference.abs().max() < 1e-4
    noisy = ArrayImages(list(rng.normal(5, 2, (4, 20, 30, 6)).astype(np.float32)))
    order = Order(4, 0)
    views = FastViews(AUGMENTATIONS["no-colour"], 16, [0.0] * 6, [1.0] * 6)
    crops = next(views.batches(noisy, order, 0))[0]
    whole = views.on_device(crops, order, 0, "cpu")
    for channel in range(6):  # each is what it would be alone
        alone = FastViews(AUGMENTATIONS["no-colour"], 16, [0.0], [1.0])
        single = alone.on_device([crop[..., channel : channel + 1] for crop in crops], order, 0, "cpu")
        for view, other in zip(whole, single):
            torch.testing.assert_close(view[:, channel : channel + 1], other)


class OwnGenerator:
    def __init__(self):
        self.rng = np.random.default_rng()

    def __call__(self, image):
        return v1.ToTensor()(image) + float(self.rng.random())


REFUSED = {
    "own generator": (TransformViews([OwnGenerator()]), None, "view 0 draws from a generator of its own"),
    "no tensor": (TransformViews([v1.RandomHorizontalFlip()]), None, "view 0 returns a Image, which must be"),
    "no floats": (TransformViews([v2.ToImage()]), None, "view 0 returns a 3-dimensional torch.uint8"),
    "channels": (FastViews(AUGMENTATIONS["v2"], 16, MEAN, STD), (8, 8, 6), "mean and std are of 3 channels, .* have 6"),
    "colours": (FastViews([NO_COLOUR, V2], 16, [0] * 6, [1] * 6), (8, 8, 6), "needs 3 channels, not 6"),
    "range": (FastViews(AUGMENTATIONS["v2"], 16, MEAN, STD), (8, 8, 3), "from 0 to 1, the images have values from"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_views_that_cannot_be_right_are_refused_before_a_step(images, kind):
    views, shape, message = REFUSED[kind]
    if shape:
        images = ArrayImages([np.arange(np.prod(shape), dtype=np.float32).reshape(shape)] * 4)
    with pytest.raises(UserError, match=message):
        views.check(images)


def test_views_of_several_sizes_in_one_batch_are_refused():
    images = ArrayImages([np.zeros((8 + i, 8, 3), np.uint8) for i in range(4)])
    with pytest.raises(UserError, match="has a crop of .* views must end with the same size"):
        next(TransformViews([v1.ToTensor()]).batches(images, Order(4, 0), 0))


def test_an_error_of_a_transform_is_no_undecodable_image(images):
    def broken(image):
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        TransformViews([broken]).crops(images, 0)[[(0, 0)], ()]


def test_the_picture_shows_every_view_whatever_its_size_and_range(tmp_path):
    views = [torch.rand(3, 6, 16, 16) * 500, torch.rand(3, 1, 8, 8), torch.rand(3, 3, 8, 8) - 0.5]
    save_views(tmp_path / "views.png", views)
    width, height = Image.open(tmp_path / "views.png").size
    assert height > width  # three rows of three
    red = torch.zeros(1, 3, 4, 4) + torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    save_views(tmp_path / "red.png", [(red - 0.5) / 0.25], mean=(0.5,) * 3, std=(0.25,) * 3)
    pixels = np.asarray(Image.open(tmp_path / "red.png").convert("RGB"))
    assert (pixels == [255, 0, 0]).all(axis=2).mean() > 0.3


def test_compiled_views_reach_the_gpu_and_its_workers(monkeypatch):
    """A GPU gets the compiled function, and a worker that is started afresh gets the views by pickle, even after."""
    views, given = FastViews(AUGMENTATIONS["v2"], 8, MEAN, STD, {"backend": "eager"}), []
    monkeypatch.setattr("moco.data.views.augment", lambda *arguments: given.append(arguments[-1]))
    views.on_device([torch.zeros(2, 8, 8, 3, dtype=torch.uint8)] * 2, Order(2, seed=0), 0, torch.device("cpu"))
    assert given[0].func is augment_fused and given[0] is compiled_augmentation(backend="eager")
    assert pickle.loads(pickle.dumps(views)).compiled == views.compiled
