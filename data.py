"""Data sets as batches on the training device: data = load("cifar100", "data"); for x, y in data.train(...): ...

    shapes            ten kinds of coloured shapes, drawn at --image-size in seconds: a smoke test, needs no download
    cifar10, cifar100 downloaded and verified by torchvision
    folder            an image tree  train/<class>/*.png|jpg|webp,  val|test/<class>/*  at --image-size
    imagenet          the same layout under <data-dir>/imagenet, random resized crops at 224
    cifar10-dvs       event camera recordings, the ten class folders or zip files under <data-dir>/cifar10-dvs, as frames of 48x48
    nmnist            event camera recordings  Train|Test/<digit>/*.bin  under <data-dir>/nmnist, as frames of 34x34
    shapes-dvs        the shapes in motion, written as event camera recordings and read back: needs no download

Small sets end as plain arrays, <data-dir>/<name>/{train,test}_{images,labels}.npy (uint8 [N, H, W, C] and [N]; frames of
events [N, T, 2, H, W] in files whose name carries T, slicing, size and split), and live on the device as uint8
(`Resident`): cropping, flipping and normalising happen there a batch at a time, so that the input pipeline is never
what waits. Large images are decoded by worker processes (`Streamed`).

Every random draw is a function of (seed, epoch, batch) alone, never of what was drawn before: an interrupted run
continues exactly, and N processes that share a batch see what one process would see.
"""
import atexit
import ctypes
import functools
import http.client
import multiprocessing.util        # registers for the exit first
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import time
import zipfile
import zlib

import numpy as np
import torch
import torchvision
from PIL.Image import DecompressionBombError
from torchvision import transforms
from torchvision.transforms import v2

try:
    import fcntl
except ImportError:                                              # Windows has no such locks, and goes without
    fcntl = None

# Per-channel mean and standard deviation of the training images in 0..1, and the number of classes.
STATISTICS = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 10),
              "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762), 100),
              "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 10),
              "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), None)}
DATASETS = ("cifar10", "cifar100", "shapes", "folder", "imagenet", "cifar10-dvs", "nmnist", "shapes-dvs")
RESIDENT_UP_TO = 96                                              # folders of images up to this size live on the device


class UserError(Exception):
    """Something the user can mend: bad input, a missing file, a full disk. Programs print its one line and exit with 2."""


def write_atomically(path, write):
    """write(file) into a temporary file beside path, then rename: whoever reads path sees the old or the new, whole."""
    path = pathlib.Path(path)
    temporary = None
    if path.exists() and not path.is_file():                     # /dev/null, say, would become an ordinary file
        raise UserError(f"cannot write {path}: it is no ordinary file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            os.chmod(temporary, 0o644)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, (OSError, RuntimeError)):           # torch.save reports a full disk as RuntimeError
            raise UserError(f"cannot write {path}: {first_line(error)}") from error
        raise


def lock(folder, wait):
    """Hold folder/.lock until the file returned is closed or this process ends. Where another holds it: wait, or UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise UserError(f"another process is writing into {folder}: wait for it, or choose another folder") from error
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    return file


def first_line(error):
    """What an error says in one line: its first, and the second where the first is but a heading."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[:2 if lines[0].endswith(":") else 1])


def memory_format(device):
    """channels_last is fastest on GPUs. Not so on CPUs: there oneDNN's backward pass of a 1x1 convolution with stride 2
    and few channels writes past its memory in that format (torch 2.14: 8 to 16 channels at 112x112 end in a crash)."""
    return torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format


def use_device(name):
    """The torch.device of that name, as the one this process computes on. UserError where it cannot be used.

    On a CPU under Linux the process then keeps the memory of freed tensors for the next ones. The C library would give
    large blocks back to the system at once and get them anew page by page: a tenth to a half of a training step.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, ImportError) as error:                             # the last two: not in this PyTorch
        raise UserError(f"--device {name} cannot be used here: {first_line(error)}") from error
    mallopt = sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None)        # glibc has it
    if mallopt and device.type == "cpu":
        mallopt(-1, -1)                                          # M_TRIM_THRESHOLD: give nothing back
        mallopt(-4, 0)                                           # M_MMAP_MAX: no block is a mapping of its own
    return device


def draws(device, *key):
    """A random generator on the device whose state depends on key (whole numbers) alone."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))


def trivial_augment(x, batch_size, rank, world, key):
    """torchvision's TrivialAugmentWide (Mueller 2021) on a process's images of a batch, uint8 [B, H, W, 3]: one random operation
    of random strength for each sixteenth of the (shuffled) whole batch, since an image at a time would keep a GPU waiting."""
    group = (rank + world * np.arange(len(x))) * 16 // batch_size
    parts = x.permute(0, 3, 1, 2).split(np.bincount(group, minlength=16).tolist())
    augment = v2.TrivialAugmentWide()
    with torch.random.fork_rng(devices=[]):                      # torchvision draws from the CPU's global generator
        for g, part in enumerate(parts):
            if len(part):
                torch.set_rng_state(draws("cpu", *key, g).get_state())
                part.copy_(augment(part))
    return x


def first_classes(dataset, n):
    if n > len(dataset.classes):
        raise UserError(f"--classes {n} is more than the {len(dataset.classes)} classes of {dataset.name}")
    return dataset.classes[:n]


class Resident:
    """A data set that lives on the device as uint8. Images [N, H, W, C], or event frames [N, T, 2, H, W].

    pad: random shifts by up to so many pixels (default: an eighth of the side), zeros moving in; flip: random horizontal
    flips; cutout: side of a square set to the mean, 0 for none; augment: TrivialAugment (see trivial_augment).
    """

    def __init__(self, name, train, test, classes, mean, std, pad=None, flip=True, split=None):
        self.name, self.classes, self.mean, self.std, self.split = name, classes, tuple(mean), tuple(std), split
        self.flip, self.cutout, self.augment = flip, 0, False
        self.sets = {}
        for split, (images, labels) in {"train": train, "test": test}.items():
            images = torch.from_numpy(np.ascontiguousarray(images))
            self.frames = images.shape[1] if images.dim() == 5 else None
            if self.frames:                                      # pixels first here too: [N, H, W, T*2]
                images = images.flatten(1, 2).permute(0, 2, 3, 1).contiguous()
            self.sets[split] = images, torch.from_numpy(labels.astype(np.int64))
        self.channels = 2 if self.frames else images.shape[3]
        self.size = tuple(images.shape[1:3])
        self.pad = self.size[0] // 8 if pad is None else pad
        self.to("cpu")

    def __len__(self):
        return len(self.sets["train"][1])

    def limit(self, n):
        """Keep n training images, always the same, drawn from all classes."""
        images, labels = self.sets["train"]
        keep = torch.randperm(len(labels), generator=draws("cpu", 0))[:n]
        self.sets["train"] = images[keep], labels[keep]

    def keep_classes(self, n):
        """Keep the images, training and test, of the first n classes: a smaller task."""
        self.classes = first_classes(self, n)
        self.sets = {split: (images[labels < n], labels[labels < n]) for split, (images, labels) in self.sets.items()}
        if not all(len(labels) for _, labels in self.sets.values()):
            raise UserError(f"--classes {n} leaves no training or no test image of {self.name}: take more")

    def to(self, device):
        self.sets = {split: (images.to(device), labels.to(device)) for split, (images, labels) in self.sets.items()}
        # On the device once: making them a batch at a time would wait for the device every time.
        self.scale = [torch.tensor(v * (self.frames or 1), device=device) * 255 for v in (self.mean, self.std)]
        return self

    def _normalise(self, x):
        """uint8 [B, H, W, M] -> float32 [B, C, H, W] or [B, T, 2, H, W], each channel of mean 0 and deviation 1."""
        mean, std = self.scale
        x = ((x.float() - mean) / std).permute(0, 3, 1, 2).contiguous(memory_format=memory_format(x.device))
        return x.unflatten(1, (self.frames, 2)) if self.frames else x

    def train(self, batch_size, seed, epoch, start=0, rank=0, world=1):
        """Shuffled, augmented full batches from the start-th on; process rank of world gets its part of each."""
        images, labels = self.sets["train"]
        device, (H, W) = images.device, self.size
        order = torch.randperm(len(labels), generator=draws("cpu", seed, epoch)).to(device)
        rows, columns = torch.arange(H, device=device), torch.arange(W, device=device)
        for step in range(start, len(labels) // batch_size):
            # Drawn for the whole batch, then cut to this process's part: the same images whatever world is.
            generator, part = draws(device, seed, epoch, step), slice(rank, None, world)
            shift = torch.randint(-self.pad, self.pad + 1, (batch_size, 2), generator=generator, device=device)[part]
            mirror = (torch.rand(batch_size, generator=generator, device=device) < 0.5)[part] & self.flip
            centre = torch.rand(batch_size, 2, generator=generator, device=device)[part]
            chosen = order[step * batch_size:(step + 1) * batch_size][part]
            r = rows + shift[:, :1]                              # [B, H]: the row each output row is taken from
            c = torch.where(mirror[:, None], columns.flip(0), columns) + shift[:, 1:]
            inside = ((r >= 0) & (r < H))[:, :, None] & ((c >= 0) & (c < W))[:, None, :]
            x = images[chosen[:, None, None], r.clamp(0, H - 1)[:, :, None], c.clamp(0, W - 1)[:, None, :]]
            x = x * inside[..., None]
            x = self._normalise(trivial_augment(x, batch_size, rank, world, (seed, epoch, step)) if self.augment else x)
            if self.cutout:
                far = [(axis + 0.5 - centre[:, i:i + 1] * len(axis)).abs() > self.cutout / 2
                       for i, axis in enumerate((rows, columns))]
                mask = far[0][:, :, None] | far[1][:, None, :]   # [B, H, W]
                x = x * mask.view(-1, *[1] * (x.dim() - 3), H, W)
            yield x, labels[chosen]

    def test(self, batch_size, rank=0, world=1):
        """All test images in order; rank of world gets every world-th. All batches are full: padding has label -1."""
        images, labels = self.sets["test"]
        for first in range(0, len(labels), batch_size * world):
            index = first + rank + world * torch.arange(batch_size, device=labels.device)
            inside, index = index < len(labels), index.clamp(max=len(labels) - 1)
            yield self._normalise(images[index]), torch.where(inside, labels[index], -1)


class Streamed:
    """An image tree decoded by worker processes. Batches as Resident's; to(device) says where they go."""

    def __init__(self, name, root, image_size, mean, std, workers=2):
        self.name, self.size, self.mean, self.std, self.workers = name, (image_size, image_size), mean, std, workers
        self.channels, self.frames, self.split, self.device = 3, None, None, torch.device("cpu")
        self.folders = same_classes(root)
        self.classes = self.folders["train"].classes
        self.indices = list(range(len(self.folders["train"])))
        self.augment = False

    def __len__(self):
        return len(self.indices)

    def limit(self, n):
        self.indices = torch.randperm(len(self), generator=draws("cpu", 0))[:n].tolist()

    def keep_classes(self, n):
        self.classes = first_classes(self, n)
        for folder in self.folders.values():
            folder.samples = [(path, label) for path, label in folder.samples if label < n]
        self.indices = list(range(len(self.folders["train"])))

    def to(self, device):
        self.device = torch.device(device)
        return self

    def _batches(self, split, batches):
        """batches: lists of (index, seed of its draws). Decoded, cropped, moved and normalised."""
        size = self.size[0]
        transform = fixed_crop(size, round(size * 256 / 224)) if split == "test" else transforms.Compose([
            transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(),
            *[transforms.TrivialAugmentWide()] * self.augment, transforms.PILToTensor()])
        mean, std = (255 * torch.tensor(v, device=self.device).view(3, 1, 1) for v in (self.mean, self.std))
        for x, y in image_loader(self.folders[split], transform, batches, self.workers, self.device):
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            yield x.float().sub_(mean).div_(std).contiguous(memory_format=memory_format(self.device)), y

    def train(self, batch_size, seed, epoch, start=0, rank=0, world=1):
        order = torch.randperm(len(self), generator=draws("cpu", seed, epoch)).tolist()
        return self._batches("train", [
            [(self.indices[order[i]], zlib.crc32(repr((seed, epoch, i)).encode()))
             for i in range(step * batch_size + rank, (step + 1) * batch_size, world)]
            for step in range(start, len(self) // batch_size)])

    def test(self, batch_size, rank=0, world=1):
        n = len(self.folders["test"])
        batches = [list(range(first + rank, first + batch_size * world, world)) for first in range(0, n, batch_size * world)]
        lists = [[(min(i, n - 1), 0) for i in batch] for batch in batches]
        for (x, y), batch in zip(self._batches("test", lists), batches):
            yield x, torch.where(torch.tensor(batch, device=y.device) < n, y, -1)


def fixed_crop(size, resize=None):
    return transforms.Compose([transforms.Resize(resize or size), transforms.CenterCrop(size), transforms.PILToTensor()])


def image_folder(root, split):
    """torchvision's ImageFolder of root/train, or of root/test or root/val."""
    names = ("train",) if split == "train" else ("test", "val")
    path = next((p for p in (pathlib.Path(root) / name for name in names) if p.is_dir()), None)
    if path is None:
        raise UserError(f"{root}: no folder {' or '.join(names)}; expected train/<class>/*.png|jpg|webp and test/<class>/* or val/<class>/*")
    try:
        return torchvision.datasets.ImageFolder(path)
    except OSError as error:                                     # no classes, or one without images
        raise UserError(f"{path}: {first_line(error)}") from error


def same_classes(root):
    """{"train": ImageFolder, "test": ImageFolder} of a tree whose two parts have the same classes."""
    folders = {split: image_folder(root, split) for split in ("train", "test")}
    if odd := set(folders["train"].classes) ^ set(folders["test"].classes):
        raise UserError(f"{root}: the class folders of training and test differ: {', '.join(sorted(odd)[:5])}")
    return folders


class _Decoded(torch.utils.data.Dataset):
    """(index, seed) -> (uint8 image [3, H, W], label), with the transform's draws taken from the seed."""

    def __init__(self, folder, transform):
        self.folder, self.transform = folder, transform

    def __getitem__(self, key):
        index, seed = key
        path, label = self.folder.samples[index]
        torch.default_generator.manual_seed(seed)                # torch.manual_seed visits every kind of device: slow
        try:
            return self.transform(self.folder.loader(path)), label
        except (OSError, ValueError, SyntaxError, DecompressionBombError) as error:           # what Pillow raises for bad files
            raise UserError(f"{path}: not a readable image: {first_line(error)}") from error


def image_loader(folder, transform, batches, workers, device=torch.device("cpu")):
    """torch's DataLoader over lists of (index, seed); a bad image gives UserError, from a worker process too."""
    loader = torch.utils.data.DataLoader(_Decoded(folder, transform), batch_sampler=batches, num_workers=workers,
                                         pin_memory=device.type == "cuda", prefetch_factor=4 if workers else None,
                                         worker_init_fn=leave_signals)
    yield from every(loader)


def leave_signals(_):
    """Ctrl-C and a batch system's SIGTERM reach worker processes too: they go on, so that the training process can finish
    its step and save."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers():
    """Before multiprocessing, at exit, sends what workers are left a SIGTERM, which they ignore, and waits for them."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def every(loader):
    try:
        yield from loader
    except UserError as error:
        error.__traceback__ = None                               # it holds the loader, whose workers end with it
        message = str(error).strip().splitlines()[-1]            # the loader prepends the worker's traceback
        raise UserError(message.removeprefix("data.UserError: ")) from None


def load(name, data_dir="data", image_size=32, workers=2, timesteps=4, dvs_split="first100", bin_by="count"):
    """Read, download or draw a data set. Raises UserError with what to do where that is not possible.

    timesteps, bin_by: frames a recording of events is cut into, and how (bin_events). dvs_split: the test set is
    "first100", the recordings 0-99 of each class (of shapes-dvs 0-19), or "random", a tenth of each, always the same.
    """
    root = pathlib.Path(data_dir)
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    if name == "folder":
        if image_size > RESIDENT_UP_TO:
            return Streamed(name, root, image_size, *STATISTICS["imagenet"][:2], workers)
        train, test = same_classes(root).values()
        arrays = [decode(folder, image_size, workers) for folder in (train, test)]
        # From the histogram of each channel: np.std would make a copy of 8 times the size.
        counts = sum(np.stack([np.bincount(c, minlength=256) for c in image.reshape(-1, 3).T]) for image in arrays[0][0])
        share, values = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
        mean = share @ values
        std = (share @ values ** 2 - mean ** 2).clip(1e-6) ** 0.5
        return Resident(name, *arrays, train.classes, mean.tolist(), std.tolist())
    if name == "imagenet":
        return Streamed(name, root / name, image_size, *STATISTICS[name][:2], workers)
    if name in SENSORS:
        return load_events(name, root / name, workers, timesteps, dvs_split, bin_by)
    mean, std, classes = STATISTICS[name]
    if name == "shapes":
        if image_size > RESIDENT_UP_TO:
            raise UserError(f"shapes are drawn at --image-size up to {RESIDENT_UP_TO}, not {image_size}")
        train, test = (draw_shapes(n, seed, image_size) for n, seed in ((8000, 1), (1000, 2)))
        return Resident(name, train, test, SHAPES, mean, std)
    folder = root / name
    download_cifar(name, root)
    train, test = (read_arrays(folder, split, (32, 32, 3), classes) for split in ("train", "test"))
    return Resident(name, train, test, [str(c) for c in range(classes)], mean, std)


def read_array(path, mmap_mode=None):
    try:
        return np.load(path, mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is no readable .npy array ({first_line(error)}): delete it to have it made again") from error


def read_arrays(folder, split, shape, classes, suffix=""):
    """The prepared images uint8 [N, *shape] and labels [N] of one split, checked."""
    paths = [folder / f"{split}_{kind}{suffix}.npy" for kind in ("images", "labels")]
    images, labels = map(read_array, paths)
    if images.dtype != np.uint8 or images.shape[1:] != shape or len(images) == 0:
        raise UserError(f"{paths[0]} must be uint8 [N, {', '.join(map(str, shape))}] with N > 0, not {images.dtype} {list(images.shape)}")
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise UserError(f"{paths[1]} must hold {len(images)} whole numbers, one an image, not {labels.dtype} {list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{paths[1]} holds labels from {labels.min()} to {labels.max()}, not from 0 to {classes - 1}")
    return images, labels


def prepared(folder, suffix=""):
    """Whether all that read_arrays reads of both splits is there."""
    return all((folder / f"{split}_{kind}{suffix}.npy").exists() for split in ("train", "test") for kind in ("images", "labels"))


def write_arrays(folder, split, images, labels, suffix=""):
    for kind, array in (("images", images), ("labels", labels)):
        write_atomically(folder / f"{split}_{kind}{suffix}.npy", lambda file, a=array: np.save(file, a, allow_pickle=False))


def download_cifar(name, root):
    """Unless the prepared arrays are there, let torchvision download and verify the original into root, and write them."""
    original, unpacked = ((torchvision.datasets.CIFAR10, "cifar-10-batches-py") if name == "cifar10" else
                          (torchvision.datasets.CIFAR100, "cifar-100-python"))
    if prepared(root / name):                                    # a folder that can only be read will do
        return
    with lock(root / name, wait=True):                           # of several processes one downloads
        if prepared(root / name):
            return
        try:
            for split in ("train", "test"):
                part = original(root, train=split == "train", download=True)
                write_arrays(root / name, split, part.data, np.array(part.targets, np.uint8))
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise UserError(
                f"{name} is not in {root} and cannot be downloaded ({first_line(error)}). Put {original.filename} (from "
                f"{original.url}) or its folder {unpacked} into {root}, or prepared arrays "
                f"{{train,test}}_{{images,labels}}.npy into {root / name}") from error


def decode(folder, size, workers):
    """All images of an ImageFolder as one array, uint8 [N, size, size, 3], and their labels."""
    keys = [[(i, 0) for i in range(first, min(first + 64, len(folder)))] for first in range(0, len(folder), 64)]
    images, labels = zip(*image_loader(folder, fixed_crop(size), keys, workers))
    return torch.cat(images).permute(0, 2, 3, 1).numpy(), torch.cat(labels).numpy()


SHAPES = ["disc", "ring", "square", "frame", "triangle", "plus", "cross", "rows", "columns", "checkers"]


def draw_shapes(n, seed, size=32):
    """n images of the ten SHAPES at random places, sizes and colours on noisy ground: uint8 [n, size, size, 3], labels.

    Colours of shape and ground are drawn alike, so no single pixel tells anything: a linear classifier stays near
    chance, a small convolutional network learns it in an epoch or two. A smoke test, no benchmark."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % 10).astype(np.uint8)
    rng.shuffle(labels)
    radius = rng.uniform(0.25, 0.45, (n, 1, 1)) * size
    centre = radius + rng.uniform(0, 1, (2, n, 1, 1)) * (size - 2 * radius)
    phase, mask = rng.uniform(0, 1, (2, n, 1, 1)), np.zeros((n, size, size), bool)
    for label in range(10):
        own = labels == label
        mask[own] = shape_masks(size, centre[:, own], radius[own], phase[:, own], label)
    ground = rng.uniform(40, 215, (n, 1, 1, 3))
    paint = (ground + rng.choice([-1, 1], (n, 1, 1, 3)) * rng.uniform(60, 110, (n, 1, 1, 3))) % 256
    image = rng.normal(0, 12, (n, size, size, 3))
    for c in range(3):                                           # numpy is slow where the last axis is as short as three
        image[..., c] += np.where(mask, paint[..., c], ground[..., c])
    return image.clip(0, 255, out=image).astype(np.uint8), labels


def shape_masks(size, centre, radius, phase, label):
    """The pixels, bool [n, size, size], that a shape covers: centre and phase [2, n, 1, 1], radius [n, 1, 1]."""
    y, x = ((np.arange(size).reshape(shape) + 0.5 - c) / radius                      # the shape reaches from -1 to 1
            for shape, c in (((1, size, 1), centre[0]), ((1, 1, size), centre[1])))
    box, distance = np.maximum(abs(x), abs(y)), np.hypot(x, y)
    bands = [np.floor(2 * axis + p) % 2 == 0 for axis, p in ((y, phase[0]), (x, phase[1]))]
    return [lambda: distance < 1, lambda: (distance < 1) & (distance > 0.6), lambda: box < 0.85,
            lambda: (box < 0.9) & (box > 0.55), lambda: (y < 0.8) & (y > 2 * abs(x) - 0.9),
            lambda: (box < 1) & (np.minimum(abs(x), abs(y)) < 0.25), lambda: (box < 0.9) & (abs(abs(x) - abs(y)) < 0.3),
            lambda: bands[0] & (box < 1), lambda: bands[1] & (box < 1), lambda: (bands[0] ^ bands[1]) & (box < 1)][label]()


# ---- events
# Pixels of the sensor, side of the frames, and the value that stands for one event per pixel. A mean over an area is a
# fraction: in sixteenths it stays exact enough, and uint8 still holds 15.9 events per pixel and frame; more count as that.
SENSORS = {"cifar10-dvs": (128, 48, 16), "nmnist": (34, 34, 1), "shapes-dvs": (128, 32, 16)}
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@functools.lru_cache(16)
def archive(path, pid):
    """An open zip archive. pid: each process its own, as forked ones would move one another's place in the file."""
    return zipfile.ZipFile(path)


def read_events(path, event_bytes, look=False):
    """The bytes of all events in a file, or in a member of an archive (some.zip/member), uint8 [N * event_bytes].

    look: check all that is known without reading on, and return a mark of the file's version instead.
    """
    packed, dot_zip, member = str(path).rpartition(".zip/")
    try:
        if dot_zip and os.path.isfile(packed + ".zip"):
            info = archive(packed + ".zip", os.getpid()).getinfo(member)
            file, size, version = archive(packed + ".zip", os.getpid()).open(info), info.file_size, info.CRC
        else:
            file = open(path, "rb")
            size, version = os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_mtime_ns
        with file:
            beginning = bytes(file.peek(16)[:16])
            while event_bytes == 8 and file.peek(1)[:1] == b"#":                     # AEDAT's header: the lines with '#'
                file.readline(2 ** 20)
            n = size - file.tell()
            fault = ("is empty" if size == 0 else "is a zip archive in the place of a recording" if beginning[:2] == b"PK" else
                     "is no AEDAT 2.0 recording" if event_bytes == 8 and not re.match(b"#!AER-DAT2|#(?!!AER-DAT)", beginning) else
                     "holds no events" if n == 0 else "ends in the middle of an event" if n % event_bytes else
                     f"claims {n // event_bytes:,d} events, more than 2^31" if n // event_bytes > 2 ** 31 else None)
            if fault:
                raise UserError(f"{path} {fault}: replace it by the original")
            if look:
                return version
            raw = np.empty(n, np.uint8)
            if file.readinto(raw) != n:
                raise EOFError("shorter than it claims to be")
            return raw
    # RuntimeError: an encrypted member, or a compression that zipfile does not know
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read, replace it by the original: {first_line(error)}") from error


def read_words(path):
    """The events of an AEDAT 2.0 recording of a DVS128 as they stand in it: addresses int64 [N], timestamps big-endian uint32 [N]."""
    words = read_events(path, 8).view(">u4")
    address = words[0::2].astype(np.int64)
    if address.max() > 0x7FFF:
        raise UserError(f"{path} holds the address {address.max():#x}, beyond the 128x128 pixels of a DVS128: replace it by the original")
    return address, words[1::2]


def unwrapped(clock):
    """Timestamps modulo 2^32 as int64 that go on where the clock wraps: of the possible differences the one nearest to 0."""
    t = clock.astype(np.int64)
    if (t[1:] < t[:-1]).any():
        t[1:] = t[0] + np.cumsum(np.diff(t).astype(np.int32), dtype=np.int64)
    return t


def read_aedat(path):
    """The events of an AEDAT 2.0 recording of a DVS128, in file order: t int64 [N] in microseconds; x, y, p int16 [N].

    x column and y row, 0..127, in the orientation everyone's frames have; p polarity, 1 = ON. A 32-bit clock that wraps goes
    on. path may lead into a zip archive (some.zip/member). UserError for a file that is anything else.
    """
    address, clock = read_words(path)
    place = address.astype(np.int16) ^ 0x7FFF                    # 127 - x, 127 - y and 1 - p at once
    return unwrapped(clock), place >> 8, place >> 1 & 127, place & 1


def aedat_frames(path, frames, by="count"):
    """bin_events(*read_aedat(path), frames, 128, 128, by), faster: addresses are counted as they are, and the counts, not the
    events, put into their places."""
    address, clock = read_words(path)
    counts = count_slices(unwrapped(clock) if by == "time" else None, address, frames, 2 ** 15, by)
    return np.ascontiguousarray(counts.reshape(frames, 128, 128, 2)[:, ::-1, ::-1, ::-1].transpose(0, 3, 2, 1))


def read_nmnist(path):
    """The events of an N-MNIST recording (x 8 bits, y 8, polarity 1, microseconds 23), as read_aedat's; x and y 0..33."""
    b = read_events(path, 5).reshape(-1, 5).astype(np.int64).T
    if b[:2].max() > 33:
        raise UserError(f"{path} holds an address x {b[0].max()}, y {b[1].max()}, beyond 34x34 pixels: replace it by the original")
    return (b[2] & 127) << 16 | b[3] << 8 | b[4], *(v.astype(np.int16) for v in (b[0], b[1], b[2] >> 7))


def bin_events(t, x, y, p, frames, height, width, by="count"):
    """Events [N] counted into frames uint16 [frames, 2, height, width]: frame[p, y, x], at most 65,535.

    by "count": N // frames events in file order each, the rest in the last. by "time": (last - first time) // frames
    microseconds each, at least 1, the rest in the last; a slice may be empty. ValueError for what lies outside.
    """
    if len(t) and not all(0 <= v.min() and v.max() < end for v, end in ((x, width), (y, height), (p, 2))):
        raise ValueError(f"events outside of 2 x {height} x {width}")
    place = (p.astype(np.intp) * height + y) * width + x
    return count_slices(t, place, frames, 2 * height * width, by).reshape(frames, 2, height, width)


def count_slices(t, place, frames, places, by):
    """How many events each place 0 ... places - 1 has in each slice (see bin_events), uint16 [frames, places]."""
    if by not in ("count", "time") or frames < 1:
        raise ValueError(f"by must be 'count' or 'time' and frames at least 1, not {by!r} and {frames}")
    edges = len(place) // frames * np.arange(frames + 1)
    if by == "time" and len(place):
        if (t[1:] < t[:-1]).any():
            order = np.argsort(t, kind="stable")
            t, place = t[order], place[order]
        edges = np.searchsorted(t, t[0] + max((t[-1] - t[0]) // frames, 1) * np.arange(frames + 1))
    edges[-1] = len(place)
    counts = np.empty((frames, places), np.uint16)
    for frame, a, b in zip(counts, edges, edges[1:]):            # a slice at a time: it stays in the cache
        count = np.bincount(place[a:b], minlength=places)
        frame[:] = np.minimum(count, 65535) if b - a > 65535 else count
    return counts


def area_mean(frames, size):
    """[..., n, n] -> float32 [..., size, size]: means over areas of n/size x n/size pixels, cut ones counting in part."""
    n = frames.shape[-1]
    low, pixel = np.arange(size)[:, None] * n / size, np.arange(n)
    part = (np.minimum(low + n / size, pixel + 1) - np.maximum(low, pixel)).clip(0).astype(np.float32) * np.float32(size / n)
    # torch's product, since it keeps to one thread in a worker process, which numpy's does not.
    part, frames = torch.from_numpy(part), torch.from_numpy(frames.astype(np.float32))
    return (part @ frames @ part.T).numpy()


def write_part(recordings, name, timesteps, by, folder):
    """Frames uint8 [n, T, 2, size, size] of some recordings, in a file named after them and their versions; its path."""
    path = folder / f"{zlib.crc32(repr(recordings).encode()):08x}.npy"
    pixels, size, scale = SENSORS[name]
    if not path.exists():
        made = []
        for _, _, recording, _ in recordings:
            frames = (bin_events(*read_nmnist(recording), timesteps, pixels, pixels, by) if name == "nmnist" else
                      aedat_frames(recording, timesteps, by))
            frames = frames if size == pixels else area_mean(frames, size)
            made.append(np.rint(np.minimum(frames * float(scale), 255)).astype(np.uint8))
        write_atomically(path, lambda file: np.save(file, np.stack(made), allow_pickle=False))
    return path


def find_recordings(name, folder, classes):
    """All recordings as sorted (label, number, path, version), checked as far as size and beginning tell."""
    found = []
    for label, c in enumerate(classes):
        before, packed = len(found), folder / f"{c}.zip"
        if name == "nmnist":
            paths = [p.as_posix() for part in ("Train", "Test") for p in (folder / part / c).glob("*.bin")]
        elif (folder / c).is_dir() or not packed.exists():
            paths = [p.as_posix() for p in (folder / c).glob("*.aedat")]
        else:
            try:
                paths = [f"{packed}/{member}" for member in archive(str(packed), os.getpid()).namelist()]
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise UserError(f"{packed} is no readable zip archive ({first_line(error)}): download it again") from error
        for path in paths:
            if number := re.search(r"/[^./]*?(\d+)\.(?:aedat|bin)$", path):           # an archive may hold other things
                found.append((label, int(number[1]), path, read_events(path, 5 if name == "nmnist" else 8, look=True)))
        if len(found) == before:
            raise UserError(f"{folder} has no recordings of class {c}: " + (
                "unpack Train.zip and Test.zip of N-MNIST (Orchard 2015, garrickorchard.com/datasets/n-mnist or "
                "data.mendeley.com/datasets/468j46mzdv) there" if name == "nmnist" else
                "put the ten zip files of CIFAR10-DVS (Li 2017, figshare.com/articles/dataset/CIFAR10-DVS_New/4724671) there, packed or unpacked"))
    return sorted(found)


def test_part(recordings, split):
    """bool [N]: which recordings are the test set; see load."""
    if split == "official":
        return np.array([pathlib.Path(path).parts[-3] == "Test" for _, _, path, _ in recordings])
    if split in ("first100", "first20"):
        return np.array([number < int(split[5:]) for _, number, _, _ in recordings])
    if split != "random":
        raise UserError(f"unknown split {split!r} of event recordings: choose first100 or random")
    labels = np.array([recording[0] for recording in recordings])
    chosen = [np.random.default_rng(c).permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    return np.isin(np.arange(len(labels)), np.concatenate([own[:max(1, len(own) // 10)] for own in chosen]))


def load_events(name, folder, workers, timesteps, split, by):
    """A data set of recordings from its prepared frames. Where they are missing, `workers` processes make them in parts,
    which survive an interruption."""
    _, size, scale = SENSORS[name]
    classes = {"nmnist": list("0123456789"), "shapes-dvs": SHAPES, "cifar10-dvs": CIFAR10}[name]
    split = "official" if name == "nmnist" else "first20" if (name, split) == ("shapes-dvs", "first100") else split
    made = f"_T{timesteps}_{by}_{size}"
    parts, suffix = folder / f".parts{made}", f"{made}_{split}"
    if not prepared(folder, suffix):
        if name == "shapes-dvs":
            draw_recordings(folder)
        recordings = find_recordings(name, folder, classes)
        test = test_part(recordings, split)
        if test.all() or not test.any():
            raise UserError(f"{folder}: split {split} makes {test.sum()} of {len(recordings)} recordings the test set; "
                            "training and test need some each: add recordings or choose another --dvs-split")
        with lock(folder, wait=True):                            # others wait here and find the work done
            for left in folder.glob(f".*{suffix}.npy.*"):        # by a process killed while it wrote
                left.unlink()
            if not prepared(folder, suffix):
                frames = make_frames(recordings, workers, name=name, timesteps=timesteps, by=by, folder=parts)
                labels = np.array([recording[0] for recording in recordings], np.uint8)
                for part, chosen in (("train", ~test), ("test", test)):
                    write_arrays(folder, part, frames[chosen], labels[chosen], suffix)
                shutil.rmtree(parts)
    arrays = [read_arrays(folder, part, (timesteps, 2, size, size), len(classes), suffix) for part in ("train", "test")]
    # This deviation undoes the scale: the network sees events per pixel.
    return Resident(name, *arrays, classes, (0.0, 0.0), (scale / 255,) * 2, pad=min(5, size // 6), flip=name != "nmnist", split=split)


def make_frames(recordings, workers, **how):
    """uint8 [N, T, 2, size, size]; how: see write_part."""
    n, start = len(recordings), time.perf_counter()
    chunks = [recordings[i:i + 25] for i in range(0, n, 25)]
    loader = torch.utils.data.DataLoader(chunks, batch_size=None, num_workers=workers, collate_fn=functools.partial(write_part, **how))
    paths, printed = [], start
    for path in every(loader):
        paths.append(path)
        if (now := time.perf_counter()) > printed + 5:
            printed, part = now, len(paths) / len(chunks)
            print(f"  frames of {part * n:,.0f} of {n:,d} recordings, {part * n / (now - start):.0f}/s, "
                  f"{(now - start) * (1 / part - 1):.0f} s left", flush=True)
    parts = [read_array(path, "r") for path in paths]            # mapped, not read: copied once, straight into place
    return np.concatenate(parts)


def write_aedat(path, t, x, y, p):
    """Events, as read_aedat gives them, as an AEDAT 2.0 recording."""
    events = np.stack([127 - x << 8 | 127 - y << 1 | 1 - p, t], 1).astype(">u4")
    write_atomically(path, lambda file: file.write(b"#!AER-DAT2.0\r\n# drawn, not recorded\r\n" + events.tobytes()))


def draw_recordings(folder, per_class=80, size=128, steps=16):
    """The SHAPES going round in a small circle before a camera of events: <shape>/drawn_<shape>_<i>.aedat. A pixel that
    becomes covered or uncovered gives an event; a tenth more come from nowhere. Recordings that exist stay."""
    for label, i in np.ndindex(len(SHAPES), per_class):
        path = folder / SHAPES[label] / f"drawn_{SHAPES[label]}_{i}.aedat"
        if path.exists():
            continue
        rng = np.random.default_rng((label, i))
        radius = rng.uniform(0.25, 0.4) * size
        angle = np.linspace(0, 2 * np.pi, steps + 1) * rng.choice([-1, 1]) + rng.uniform(0, 2 * np.pi)
        centre = size / 2 + rng.uniform(-1, 1, (2, 1)) * (size / 2 - radius - 8) + 8 * np.stack([np.sin(angle), np.cos(angle)])
        covered = shape_masks(size, centre[..., None, None], radius, rng.uniform(0, 1, (2, 1, 1, 1)), label)
        step, y, x = (covered[1:] != covered[:-1]).nonzero()
        p = covered[step + 1, y, x] ^ rng.integers(2)            # shapes brighter or darker than the ground
        noise = rng.integers(0, [[steps], [size], [size], [2]], (4, len(step) // 10))
        step, y, x, p = np.concatenate([[step, y, x, p], noise], axis=1)
        t = (10000 * (step + rng.uniform(0, 1, len(step)))).astype(np.int64)
        write_aedat(path, *np.stack([t, x, y, p])[:, np.argsort(t)])
