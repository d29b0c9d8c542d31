"""How many images go through an encoder at once: as many as the memory of the device holds activations of."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call


def micro_batch(given, encoder, channels, image_size, accelerator):
    """(images of one pass, why so many in words): --micro-batch as given, or by default what the device holds.

    On a CPU a million pixels. On a GPU 0.7 of the memory that is free, the same on all processes; the rest is for
    gradients, the optimizer, and what convolutions need for themselves. encoder: as Accelerate prepared it.
    """
    if given is not None or accelerator.device.type == "cpu":
        return given or max(1, 2**20 // image_size**2), ""
    encoder = accelerator.unwrap_model(encoder, keep_torch_compile=False)
    each = activation_bytes(encoder, channels, image_size)
    free = torch.tensor([torch.cuda.mem_get_info()[0]], device=next(encoder.parameters()).device)
    free = int(accelerator.gather(free).min())
    fit = max(1, int(0.7 * free / each))
    return fit, f"; {fit} images fit in 0.7 of {free / 1e9:.1f} GB of free memory, at {each / 1e6:.1f} MB an image"


def activation_bytes(encoder, channels, image_size):
    """Bytes that each image of a forward pass keeps for the backward pass: computed, nothing is allocated.

    In the precision in which the encoder runs, for example under autocast. It is the difference between passes of three
    images and of two, so that what a pass keeps once, such as weights in half precision, does not count.
    """
    fake = FakeTensorMode()
    state = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
    state = {name: fake.from_tensor(tensor) for name, tensor in state.items()}  # copies, so that no statistic moves
    device = next(encoder.parameters()).device
    with fake:
        passes = [torch.empty(n, channels, image_size, image_size, device=device) for n in (2, 3)]
        fewer, more = (kept_bytes(lambda images: functional_call(encoder, state, images), each) for each in passes)
    return more - fewer


def kept_bytes(forward, images):
    """Bytes of the tensors that forward(images) keeps for its backward pass, each storage once."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held, so that no other gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(images)
    return sum(storage.nbytes() for storage in storages.values())
