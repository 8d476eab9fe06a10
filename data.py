"""Data sets as batches on the training device:

    dataset = data.load("cifar100").to("cuda")
    for x, y in dataset.train(batch_size=64, seed=0, epoch=0): ...

    shapes            ten kinds of drawn shapes: a smoke test that needs no download
    cifar10, cifar100 downloaded and verified by torchvision
    folder            your images: train/<class>/*.png|jpg|webp and val/<class>/* or test/<class>/*
    imagenet          the same layout in <data-dir>/imagenet, random resized crops of 224 pixels
    cifar10-dvs       event recordings in <data-dir>/cifar10-dvs, ten class folders or zip files
    nmnist            event recordings in <data-dir>/nmnist, Train/<digit>/*.bin, Test/<digit>/*.bin
    shapes-dvs        the shapes in motion, drawn as event recordings

Small sets live on the device as uint8 (`Resident`) and are cropped, mirrored and normalised there,
one batch at a time. Large images are decoded by worker processes (`Streamed`).

Every random draw depends on the seed, the epoch and the place in the epoch alone, never on earlier
draws. So a resumed run sees the batches of an unbroken one, and N processes those of a single one.
This file imports no other file of the project.
"""
import atexit
import dataclasses
import glob
import os
import pathlib
import re
import signal
import tempfile
import time
import typing
import zipfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS

DATASETS = ("cifar10", "cifar100", "shapes", "folder", "imagenet",
            "cifar10-dvs", "nmnist", "shapes-dvs")
# Mean and standard deviation of each channel of the training images, with pixels in 0..1.
STATISTICS = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
              "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
              "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
              "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
# Image folders are kept on the device up to this image size. Larger images are streamed.
RESIDENT_UP_TO = 96


class UserError(Exception):
    """Something the user can fix: bad input, a missing file, a full disk. Programs print its one
    line and exit with code 2."""


def first_line(error):
    """What an error says, in one line."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    # Where the first line is only a heading ("Error(s) in ...:"), the next one says what happened.
    shown = 2 if lines[0].endswith(":") else 1
    return " ".join(line.strip() for line in lines[:shown])


def seed_from(*key):
    """A seed that depends on the key (whole numbers) alone."""
    return zlib.crc32(repr(key).encode())


def random_generator(*key):
    """A random generator on the CPU. What it draws depends on the key alone."""
    return torch.Generator().manual_seed(seed_from(*key))


def memory_format(device):
    """The fastest memory format of images and convolutions on a device."""
    # On CPUs channels_last is unsafe: oneDNN's backward pass of a 1x1 convolution with stride 2 and
    # few channels writes past its memory in that format (torch 2.14).
    cuda = torch.device(device).type == "cuda"
    return torch.channels_last if cuda else torch.contiguous_format


def check_at_most(flag, n, total, what):
    if n > total:
        raise UserError(f"{flag} {n} is more than the {total} {what}")


def draw_some(flag, n, total, what):
    """n of the numbers below total, the same in every run. Drawn, because the first n images of a
    set might all be of one class."""
    check_at_most(flag, n, total, what)
    return torch.randperm(total, generator=random_generator(0))[:n]


# ---- Progress -----------------------------------------------------------------------------------

def duration(seconds):
    """Seconds as text: "1.6 h" or "12 min 05 s"."""
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s"


class Pace:
    """The speed of a long job and the time it has left. After each batch call count(its size), and
    where due() is true, print the Pace."""

    def __init__(self, total, items):
        self.total, self.items, self.done = total, items, 0
        self.start = self.printed = time.perf_counter()

    def count(self, n):
        if self.done == 0:
            # The first batch may start worker processes or compile something. It is not timed.
            self.first, self.after_first = n, time.perf_counter()
        self.done += n

    def rate(self):
        """Items a second. Call count() first."""
        now = time.perf_counter()
        # After a single batch there is nothing else to go by.
        if self.done == self.first:
            return self.done / (now - self.start)
        return (self.done - self.first) / (now - self.after_first)

    def due(self):
        """Whether it is time to print: true once every ten seconds."""
        now = time.perf_counter()
        if now < self.printed + 10:
            return False
        self.printed = now
        return True

    def __str__(self):
        left = duration((self.total - self.done) / self.rate())
        return (f"  {self.done:,d} of {self.total:,d} {self.items}, "
                f"{self.rate():.1f} {self.items}/s, {left} left")


# ---- Files --------------------------------------------------------------------------------------

def write_atomically(path, write):
    """Call write(file) and rename the finished file to path: readers see the old file or the new
    one, never a part. UserError where that fails, which leaves the old file as it was."""
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The file is made in a temporary folder, because a temporary file would be readable by its
        # owner alone. The folder lies beside path: between two disks a rename would be a copy.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
            with open(os.path.join(folder, path.name), "wb") as file:
                write(file)
                file.flush()
                # On the disk before it is renamed, so that a power failure leaves no empty file.
                os.fsync(file.fileno())
            os.replace(file.name, path)
    # torch.save reports a full disk as a RuntimeError.
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {first_line(error)}") from error


def array_paths(folder, suffix=""):
    """The files of a prepared data set: images and labels of training, then of test."""
    return [folder / f"{part}_{kind}{suffix}.npy"
            for part in ("train", "test") for kind in ("images", "labels")]


def read_arrays(paths, shape, num_classes):
    """Prepared arrays, checked: (images uint8 [N, *shape], labels [N]) of training and of test."""
    arrays = []
    for path in paths:
        try:
            arrays.append(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is no readable .npy array ({first_line(error)}): delete it to "
                            "have it made again") from error
    for i in (0, 2):
        images, labels = arrays[i:i + 2]
        if images.dtype != np.uint8 or images.shape[1:] != shape or len(images) == 0:
            raise UserError(f"{paths[i]} must be uint8 [N, {', '.join(map(str, shape))}] with "
                            f"N > 0, not {images.dtype} {list(images.shape)}")
        whole = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
        if not whole or labels.min() < 0 or labels.max() >= num_classes:
            raise UserError(f"{paths[i + 1]} must hold {len(images)} whole numbers from 0 to "
                            f"{num_classes - 1}, one for each image")
    return arrays[:2], arrays[2:]


# ---- Small sets, on the device ------------------------------------------------------------------

class Resident:
    """A data set that lives on the device as uint8, in batches.

    train, test  images [N, H, W, C] or event frames [N, T, 2, H, W], uint8, and their labels [N]
    classes      names, in the order of their labels
    mean, std    of each channel, with pixels in 0..1
    pad          random shifts by up to so many pixels (default: an eighth of the side)
    flip         whether to mirror at random
    split        how a set of recordings was divided, for the log

    Set `fused` to compile the cropping and normalising: two launches instead of a dozen.
    """

    def __init__(self, name, train, test, classes, mean, std, pad=None, flip=True, split=None):
        self.name, self.classes, self.split = name, classes, split
        self.mean, self.std = tuple(mean), tuple(std)
        shape = train[0].shape
        self.frames = shape[1] if len(shape) == 5 else None
        self.channels = 2 if self.frames else shape[3]
        self.size = tuple(shape[3:] if self.frames else shape[1:3])
        self.pad = self.size[0] // 8 if pad is None else pad
        self.flip, self.fused = flip, False
        self.sets = {}
        for part, (images, labels) in {"train": train, "test": test}.items():
            images = torch.from_numpy(np.ascontiguousarray(images))
            if self.frames:
                # The frames of a recording become channels of one image, [N, H, W, T*2].
                images = images.flatten(1, 2).permute(0, 2, 3, 1).contiguous()
            self.sets[part] = images, torch.from_numpy(labels.astype(np.int64))
        self.to("cpu")

    def __len__(self):
        return len(self.sets["train"][1])

    def test_size(self):
        """The number of test images. len() is that of the training images."""
        return len(self.sets["test"][1])

    def limit(self, part, n, flag):
        """Keep n images of a part, "train" or "test", drawn from all classes. flag: who asks."""
        images, labels = self.sets[part]
        keep = draw_some(flag, n, len(labels), f"{part} images of {self.name}")
        self.sets[part] = images[keep], labels[keep]

    def keep_classes(self, n):
        """Keep the training and test images of the first n classes: a smaller task."""
        check_at_most("--classes", n, len(self.classes), "classes of " + self.name)
        self.classes = self.classes[:n]
        for part, (images, labels) in self.sets.items():
            self.sets[part] = images[labels < n], labels[labels < n]

    def to(self, device):
        """Move the images to the device. Returns the data set."""
        for part, (images, labels) in self.sets.items():
            self.sets[part] = images.to(device), labels.to(device)
        # Mean and deviation move once, because a transfer in every batch would wait for the device.
        # All frames of a recording share them.
        self.scale = [255 * torch.tensor(value, device=device).repeat(self.frames or 1)
                      for value in (self.mean, self.std)]
        return self

    def crop(self, images, chosen, shift, mirror):
        """The chosen images, uint8 [B, H, W, C], each shifted [B, 2] and mirrored [B]."""
        (H, W), pad = self.size, self.pad
        rows, columns = (torch.arange(n, device=images.device) for n in (H, W))
        # The row and column that each pixel comes from, [B, H] and [B, W], in the padded image.
        r = rows + shift[:, :1] + pad
        c = torch.where(mirror[:, None], columns.flip(0), columns) + shift[:, 1:] + pad
        padded = F.pad(images[chosen], (0, 0, pad, pad, pad, pad))
        image = torch.arange(len(chosen), device=images.device)[:, None, None]
        return padded[image, r[:, :, None], c[:, None, :]]

    def normalise(self, x):
        """uint8 [B, H, W, C] -> float32 [B, C, H, W], of events [B, T, 2, H, W]."""
        mean, std = self.scale
        x = ((x.float() - mean) / std).permute(0, 3, 1, 2)
        x = x.contiguous(memory_format=memory_format(x.device))
        return x.unflatten(1, (self.frames, 2)) if self.frames else x

    def train(self, batch_size, seed, epoch, start=0, rank=0, world=1):
        """Full batches (x, y) of an epoch, shuffled, shifted and mirrored, from the start-th on. A
        process (rank) gets every world-th image of each batch."""
        images, labels = self.sets["train"]
        n, device = len(self), images.device
        crop, normalise = self.crop, self.normalise
        if self.fused:
            crop, normalise = torch.compile(crop), torch.compile(normalise)
        # Drawn for the whole epoch, so that an image is treated alike however many processes there
        # are and wherever a run goes on. Drawn on the CPU, so that every device sees the same.
        generator = random_generator(seed, epoch)
        order = torch.randperm(n, generator=generator).to(device)
        shift = torch.randint(-self.pad, self.pad + 1, (n, 2), generator=generator).to(device)
        mirror = (torch.rand(n, generator=generator) < 0.5).to(device) & self.flip
        for step in range(start, n // batch_size):
            part = slice(step * batch_size + rank, (step + 1) * batch_size, world)
            chosen = order[part]
            yield normalise(crop(images, chosen, shift[part], mirror[part])), labels[chosen]

    def test(self, batch_size, rank=0, world=1):
        """All test images in order, a process's part of each batch. Every batch is full: images
        that only fill up the last one have the label -1 and do not count."""
        images, labels = self.sets["test"]
        for first in range(0, len(labels), batch_size * world):
            index = first + rank + world * torch.arange(batch_size, device=labels.device)
            inside, index = index < len(labels), index.clamp(max=len(labels) - 1)
            yield self.normalise(images[index]), torch.where(inside, labels[index], -1)


# ---- Worker processes ---------------------------------------------------------------------------

def ignore_signals(_):
    # Ctrl-C and a batch system's SIGTERM reach the workers as well. They go on, so that the
    # training process can finish its step and save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def worker_batches(dataset, batches, workers, device="cpu"):
    """Batches (lists of keys) of a torch data set, read by so many worker processes."""
    loader = iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_signals,
        pin_memory=torch.device(device).type == "cuda"))
    # At exit Python sends its children a SIGTERM, which these ignore, and waits for them forever.
    # So torch has to end them first.
    end_workers = loader._shutdown_workers if workers else lambda: None
    atexit.register(end_workers)
    try:
        yield from loader
    except UserError as error:
        # The text is the worker's traceback, whose last line has the message.
        message = str(error).strip().splitlines()[-1]
        raise UserError(message.partition("UserError: ")[2] or message) from None
    finally:
        end_workers()
        atexit.unregister(end_workers)


def read_all(dataset, keys, workers, items):
    """All items of a torch data set at once: arrays uint8 [N, ...] and labels [N]."""
    arrays, labels, pace = None, [], Pace(len(keys), items)
    batches = [keys[first:first + 25] for first in range(0, len(keys), 25)]
    for x, y in worker_batches(dataset, batches, workers):
        if arrays is None:
            arrays = np.empty((len(keys), *x.shape[1:]), np.uint8)
        # Copied at once, because each batch from a worker holds shared memory and open files.
        arrays[pace.done:pace.done + len(x)] = x
        labels += y.tolist()
        pace.count(len(x))
        if pace.due():
            print(pace, flush=True)
    return arrays, np.array(labels)


# ---- Image folders ------------------------------------------------------------------------------

def read_image(path):
    """An image file as 8-bit RGB. UserError for any other file."""
    try:
        with Image.open(path) as image:
            # Pillow would clip the values of these modes at 255 without a warning.
            if image.mode[0] in "IF":
                raise ValueError("more than 8 bits a channel, convert it to 8")
            return image.convert("RGB")
    # Pillow raises many kinds of errors for damaged files.
    except Exception as error:
        raise UserError(f"{path}: not a readable image: {first_line(error)}") from error


def class_folders(folder):
    """The names of the folders in a folder, sorted, without hidden ones."""
    return sorted(os.path.dirname(name) for name in glob.glob("*/", root_dir=folder))


class ImageTree(torchvision.datasets.ImageFolder):
    """The images <class>/** in a folder, without hidden files and folders, as a torch data set:
    item (index, seed) is an image, uint8 [3, H, W], and its label."""

    def __init__(self, folder):
        def is_image(path):
            # ._0.png is no image, nor is anything in .ipynb_checkpoints.
            hidden = f"{os.sep}." in path.removeprefix(str(folder))
            return path.lower().endswith(IMG_EXTENSIONS) and not hidden

        try:
            super().__init__(folder, loader=read_image, is_valid_file=is_image)
        # Its message names the classes without an image.
        except FileNotFoundError as error:
            raise UserError(f"{folder}: {first_line(error)}") from error

    def find_classes(self, folder):
        classes = class_folders(folder)
        return classes, {name: label for label, name in enumerate(classes)}

    def __getitem__(self, key):
        index, seed = key
        # Random crops draw from the global generator, whose state comes back afterwards.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            image, label = super().__getitem__(index)
        # The index -1 stands for an image that only fills up a batch.
        return image, label if index >= 0 else -1


def image_trees(root):
    """The training and the test images below root, of the same classes."""
    train, val, test = (class_folders(root / name) for name in ("train", "val", "test"))
    if not train:
        raise UserError(f"{root}: no folder train with class folders, train/<class>/*.png|jpg|webp")
    # The best network is chosen by this accuracy, so val comes first.
    for name, classes in (("val", val), ("test", test)):
        if classes == train:
            return ImageTree(root / "train"), ImageTree(root / name)
    differing = sorted(set(train) ^ set(val or test))[:5]
    raise UserError(f"{root}: no folder test or val with the classes of train: {differing} differ")


def fixed_crop(size, resize):
    return transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size),
                               transforms.PILToTensor()])


def load_folder(root, size, workers):
    """Image folders small enough to live on the device, decoded once."""
    trees, sets = image_trees(root), []
    for tree in trees:
        tree.transform = fixed_crop(size, size)
        # Nothing is drawn here, so every seed is 0.
        images, labels = read_all(tree, [(i, 0) for i in range(len(tree))], workers, "images")
        sets.append((images.transpose(0, 2, 3, 1), labels))
    return Resident("folder", *sets, trees[0].classes, *STATISTICS["imagenet"])


class Streamed:
    """Image folders decoded by worker processes. Used like Resident."""

    def __init__(self, name, root, image_size, workers):
        self.name, self.size, self.workers = name, (image_size, image_size), workers
        (self.mean, self.std), self.device = STATISTICS["imagenet"], torch.device("cpu")
        self.channels, self.frames, self.split = 3, None, None
        train, test = image_trees(root)
        self.trees = {"train": train, "test": test}
        self.classes = train.classes
        train.transform = transforms.Compose([
            transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip(),
            transforms.PILToTensor()])
        # ImageNet's images are usually resized to 256 pixels and cut to 224. Others in proportion.
        test.transform = fixed_crop(image_size, round(image_size * 256 / 224))

    def __len__(self):
        return len(self.trees["train"].samples)

    def test_size(self):
        return len(self.trees["test"].samples)

    def limit(self, part, n, flag):
        tree = self.trees[part]
        keep = draw_some(flag, n, len(tree.samples), f"{part} images of {self.name}")
        tree.samples = [tree.samples[i] for i in keep]

    def keep_classes(self, n):
        check_at_most("--classes", n, len(self.classes), "classes of " + self.name)
        self.classes = self.classes[:n]
        for tree in self.trees.values():
            tree.samples = [(path, label) for path, label in tree.samples if label < n]

    def to(self, device):
        self.device = torch.device(device)
        return self

    def normalised(self, part, batches):
        """Batches of keys as images [B, 3, H, W] on the device, normalised, and labels [B]."""
        mean, std = (255 * torch.tensor(value, device=self.device).view(3, 1, 1)
                     for value in (self.mean, self.std))
        for x, y in worker_batches(self.trees[part], batches, self.workers, self.device):
            # The images move as uint8, a quarter of the size, while the device still computes.
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            x = x.float().sub_(mean).div_(std)
            yield x.contiguous(memory_format=memory_format(self.device)), y

    def train(self, batch_size, seed, epoch, start=0, rank=0, world=1):
        order = torch.randperm(len(self), generator=random_generator(seed, epoch)).tolist()
        # Each place in an epoch has a seed of its own.
        keys = [(chosen, seed_from(seed, epoch, place)) for place, chosen in enumerate(order)]
        batches = [keys[step * batch_size:(step + 1) * batch_size][rank::world]
                   for step in range(start, len(self) // batch_size)]
        return self.normalised("train", batches)

    def test(self, batch_size, rank=0, world=1):
        n, whole = self.test_size(), batch_size * world
        keys = [(i, 0) for i in range(n)] + [(-1, 0)] * (-n % whole)
        batches = [keys[first:first + whole][rank::world] for first in range(0, n, whole)]
        return self.normalised("test", batches)


# ---- Drawn shapes -------------------------------------------------------------------------------

SHAPES = ["disc", "ring", "square", "frame", "triangle", "plus", "cross", "rows", "columns",
          "checkers"]


def draw_shapes(n, seed, size=32):
    """n images of the ten SHAPES at random places, sizes and colours on a noisy background: uint8
    [n, size, size, 3] and labels [n].

    A smoke test, no benchmark: a linear classifier stays near chance, a small convolutional network
    learns it in an epoch or two.
    """
    rng = np.random.default_rng(seed)
    # As many of each shape, in random order.
    labels = (np.arange(n) % 10).astype(np.uint8)
    rng.shuffle(labels)
    radius = rng.uniform(0.25, 0.45, (n, 1, 1)) * size
    centre = radius + rng.uniform(0, 1, (2, n, 1, 1)) * (size - 2 * radius)
    phase = rng.uniform(0, 1, (2, n, 1, 1))
    mask = np.zeros((n, size, size), bool)
    for label in range(10):
        at = labels == label
        mask[at] = shape_masks(size, centre[:, at], radius[at], phase[:, at], label)
    # Shape and background have the same range of colours, so that a single pixel tells nothing.
    ground = rng.uniform(40, 215, (n, 1, 1, 3))
    contrast = rng.choice([-1, 1], (n, 1, 1, 3)) * rng.uniform(60, 110, (n, 1, 1, 3))
    paint = (ground + contrast) % 256
    image = rng.normal(0, 12, (n, size, size, 3))
    # One channel at a time, because numpy is slow where the last axis is as short as three.
    for c in range(3):
        image[..., c] += np.where(mask, paint[..., c], ground[..., c])
    return image.clip(0, 255, out=image).astype(np.uint8), labels


def shape_masks(size, centre, radius, phase, label):
    """The pixels of a shape, bool [n, size, size]: centre, phase [2, n, 1, 1]; radius [n, 1, 1]."""
    # Coordinates in which the shape reaches from -1 to 1.
    pixel = np.arange(size) + 0.5
    y, x = (pixel[:, None] - centre[0]) / radius, (pixel - centre[1]) / radius
    box, distance = np.maximum(abs(x), abs(y)), np.hypot(x, y)
    rows, columns = np.floor(2 * y + phase[0]) % 2 == 0, np.floor(2 * x + phase[1]) % 2 == 0
    # These are functions, so that only one of them is computed.
    masks = {
        "disc": lambda: distance < 1,
        "ring": lambda: (distance < 1) & (distance > 0.6),
        "square": lambda: box < 0.85,
        "frame": lambda: (box < 0.9) & (box > 0.55),
        "triangle": lambda: (y < 0.8) & (y > 2 * abs(x) - 0.9),
        "plus": lambda: (box < 1) & (np.minimum(abs(x), abs(y)) < 0.25),
        "cross": lambda: (box < 0.9) & (abs(abs(x) - abs(y)) < 0.3),
        "rows": lambda: rows & (box < 1),
        "columns": lambda: columns & (box < 1),
        "checkers": lambda: (rows ^ columns) & (box < 1),
    }
    return masks[SHAPES[label]]()


# ---- Event recordings ---------------------------------------------------------------------------

# The classes of CIFAR10-DVS in the order of their labels.
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def read_events(path, event_bytes):
    """The events of a recording as raw bytes, uint8 [N, event_bytes]: 8 in AEDAT 2.0, 5 in N-MNIST,
    which has no header."""
    raw, begin = pathlib.Path(path).read_bytes(), 0
    if event_bytes == 8:
        if not raw.startswith(b"#!AER-DAT2"):
            raise ValueError("no AEDAT 2.0 recording")
        # The header is the lines that begin with '#'. Events follow, whatever they look like.
        begin = re.match(rb"(#[^\n]*\n?)*", raw).end()
    if begin == len(raw) or (len(raw) - begin) % event_bytes:
        raise ValueError("no events, or ends in the middle of one")
    return np.frombuffer(raw, np.uint8, offset=begin).reshape(-1, event_bytes)


def read_aedat(path):
    """The events of an AEDAT 2.0 recording of a DVS128, in file order: t int64 [N] in microseconds;
    x, y, p int16 [N]. ValueError for any other file.

    x is the column and y the row, 0..127, p the polarity, 1 = ON, in the orientation that all
    readers of CIFAR10-DVS use; for a DVS128 held upright it is the mirror image. Where the 32-bit
    clock wraps, t goes on. External triggers are left out.
    """
    # An event is an address of 32 bits and a time of 32 bits, the highest byte first.
    words = read_events(path, 8).view(">u4")
    address, t = words[:, 0].astype(np.uint32), words[:, 1].astype(np.int64)
    # Where the clock wraps, the difference modulo 2^32 nearest to 0 is the true one.
    t[1:] = t[0] + np.cumsum(np.diff(t).astype(np.int32), dtype=np.int64)
    if (address & 0x7FFF0000).any():
        raise ValueError(f"address {address.max():#x} is beyond the 128x128 pixels of a DVS128")
    # Bits 15 and 31 mark external triggers, which are no events of a pixel.
    event = address <= 0x7FFF
    # Bits 8-14 are 127 - x, bits 1-7 are 127 - y, bit 0 is 1 - p.
    place = address[event].astype(np.int16) ^ 0x7FFF
    return t[event], place >> 8, place >> 1 & 127, place & 1


def write_aedat(path, t, x, y, p):
    """Write events as an AEDAT 2.0 recording, from which read_aedat gives them back."""
    events = np.stack([127 - x << 8 | 127 - y << 1 | 1 - p, t], 1).astype(">u4")
    header = b"#!AER-DAT2.0\r\n# drawn, not recorded\r\n"
    write_atomically(path, lambda file: file.write(header + events.tobytes()))


def read_nmnist(path):
    """The events of an N-MNIST recording, as read_aedat's, but all int64; x and y 0..33."""
    # An event is x (8 bits), y (8), the polarity (1) and the time (23).
    x, y, high, middle, low = read_events(path, 5).astype(np.int64).T
    t, p = (high & 127) << 16 | middle << 8 | low, high >> 7
    # y = 240 is no event. It says that the clock has run over, after 2^13 microseconds.
    event = y != 240
    t = t + (np.cumsum(~event) << 13)
    return t[event], x[event], y[event], p[event]


def bin_events(t, x, y, p, frames, height, width, by="count"):
    """Events [N] counted into frames uint16 [frames, 2, height, width]: frame[p, y, x], at most
    65,535.

    by "count": N // frames events in file order each, the rest in the last. by "time": (last -
    first time) // frames microseconds each, at least 1, the rest in the last; a slice may be empty.
    ValueError for events outside of the frame.
    """
    if by not in ("count", "time") or frames < 1:
        raise ValueError(f"by must be 'count' or 'time', frames at least 1, not {by!r}, {frames}")
    n = len(x)
    for value, end in ((x, width), (y, height), (p, 2)):
        if n and not (0 <= value.min() and value.max() < end):
            raise ValueError(f"events outside of 2 x {height} x {width}")
    # The number of each event's pixel in a flattened frame.
    place = (p.astype(np.int64) * height + y) * width + x
    # Frame i has the events from edges[i] up to edges[i + 1].
    edges = n // frames * np.arange(frames + 1)
    if by == "time" and n:
        # Where a clock was set back, times are out of order.
        order = np.argsort(t, kind="stable")
        t, place = t[order], place[order]
        edges = np.searchsorted(t, t[0] + max((t[-1] - t[0]) // frames, 1) * np.arange(frames + 1))
    edges[-1] = n
    counts = np.empty((frames, 2 * height * width), np.uint16)
    for frame, a, b in zip(counts, edges, edges[1:]):
        frame[:] = np.minimum(np.bincount(place[a:b], minlength=len(frame)), 65535)
    return counts.reshape(frames, 2, height, width)


def area_mean(frames, size):
    """[..., n, n] -> float32 [..., size, size]: means over areas of n/size x n/size pixels. A pixel
    on the border of two areas counts in part in each."""
    n = frames.shape[-1]
    low, pixel = np.arange(size)[:, None] * n / size, np.arange(n)
    # The part of each pixel that lies in each area, along one axis: [size, n].
    part = (np.minimum(low + n / size, pixel + 1) - np.maximum(low, pixel)).clip(0)
    # In a worker process torch keeps to one thread, numpy does not.
    part = torch.from_numpy(part.astype(np.float32) * np.float32(size / n))
    return (part @ torch.from_numpy(frames.astype(np.float32)) @ part.T).numpy()


@dataclasses.dataclass
class EventSet:
    """What distinguishes a set of recordings."""

    # The classes in the order of their labels.
    classes: list
    # Reads a recording: (t, x, y, p).
    read: typing.Callable
    # What the names of its files end in, behind the number of the recording.
    ending: str
    # The side of the sensor, and that of the frames.
    pixels: int
    size: int
    # The value in a frame for one event per pixel. Frames smaller than the sensor hold means, for
    # which sixteenths are exact enough: then uint8 goes up to 15.9 events per pixel.
    scale: int
    # Whether training may mirror the frames. A mirrored digit is no digit.
    flip: bool
    # The split into training and test set that the set comes with.
    split: str | None = None


EVENT_SETS = {
    "cifar10-dvs": EventSet(CIFAR10, read_aedat, ".aedat", 128, size=48, scale=16, flip=True),
    "shapes-dvs": EventSet(SHAPES, read_aedat, ".aedat", 128, size=32, scale=16, flip=True),
    "nmnist": EventSet(list("0123456789"), read_nmnist, ".bin", 34, size=34, scale=1, flip=False,
                       split="official"),
}


class Recordings:
    """Recordings as a torch data set: item i is frames, uint8 [T, 2, size, size], and a label."""

    def __init__(self, event_set, paths, labels, timesteps, by):
        self.event_set, self.paths, self.labels = event_set, paths, labels
        self.timesteps, self.by = timesteps, by

    def __getitem__(self, i):
        path, pixels, size = self.paths[i], self.event_set.pixels, self.event_set.size
        try:
            t, x, y, p = self.event_set.read(path)
            if len(t) == 0:
                raise ValueError("no events")
            frames = bin_events(t, x, y, p, self.timesteps, pixels, pixels, self.by)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {first_line(error)}: replace it by the original") from error
        # Where the sizes are equal there is nothing to average.
        frames = frames if size == pixels else area_mean(frames, size)
        frames = np.rint(np.minimum(frames * float(self.event_set.scale), 255)).astype(np.uint8)
        return frames, self.labels[i]


def unpack(packed, ending):
    """Unpack the recordings of a zip file into a folder of its name, unless that is there."""
    folder = packed.with_suffix("")
    try:
        with zipfile.ZipFile(packed) as archive:
            inside = [name for name in archive.namelist() if name.endswith(ending)
                      and not os.path.basename(name).startswith(".")]
            if not inside:
                return
            if not folder.exists():
                # Unpacked into a hidden folder and renamed when all is there, so that a killed
                # process leaves nothing that looks complete.
                with tempfile.TemporaryDirectory(dir=packed.parent, prefix=".") as temporary:
                    archive.extractall(f"{temporary}/all", inside)
                    os.rename(f"{temporary}/all", folder)
    # zipfile raises many kinds of errors for damaged archives.
    except Exception as error:
        raise UserError(f"{packed} cannot be unpacked: {first_line(error)}") from error
    there = len(glob.glob(f"**/*{ending}", root_dir=folder, recursive=True))
    if there != len(inside):
        raise UserError(f"{folder} holds {there} recordings, {packed} {len(inside)}: delete the "
                        "folder and it will be unpacked again")


def find_recordings(folder, event_set):
    """All recordings of a set, sorted [(label, number, path, size, time)], and their checksum."""
    found = []
    # glob leaves out hidden files and folders, which are no part of the set.
    for path in glob.glob(f"**/*{event_set.ending}", root_dir=folder, recursive=True):
        # The recordings of a class lie below a folder of its name, wherever that is in the tree.
        inside = [part for part in path.split(os.sep)[:-1] if part in event_set.classes]
        number = re.search(r"(\d+)\.\w+$", path)
        # What has no class or no number is no recording.
        if inside and number:
            # lstat, because a link that leads nowhere is reported later, when it is read.
            stat = os.lstat(folder / path)
            label = event_set.classes.index(inside[-1])
            found.append((label, int(number[1]), path, stat.st_size, stat.st_mtime_ns))
    found.sort()
    return found, f"{zlib.crc32(repr(found).encode()):08x}"


def in_test_folder(path):
    """Whether the innermost folder named train or test (in any case) is one of test."""
    parts = [part for part in path.lower().split(os.sep)[:-1] if part in ("train", "test")]
    if not parts:
        raise UserError(f"{path} lies in no folder named Train or Test")
    return parts[-1] == "test"


def test_part(recordings, split):
    """bool [N]: which recordings are the test set. load explains the splits."""
    labels, numbers, paths, *_ = map(np.array, zip(*recordings))
    if split == "official":
        return np.array([in_test_folder(path) for path in paths])
    if split == "first100":
        return numbers < 100
    if split != "random":
        raise UserError(f"unknown split {split!r} of event recordings: choose first100 or random")
    test = np.zeros(len(labels), bool)
    # A tenth of the numbers of each class, the same in every process and on every machine. Copies
    # of a recording have the same number, so that no copy of a test recording is trained on.
    for c in np.unique(labels):
        shuffled = np.random.default_rng(c).permutation(np.unique(numbers[labels == c]))
        drawn = shuffled[:max(1, len(shuffled) // 10)]
        test |= (labels == c) & np.isin(numbers, drawn)
    return test


def make_frames(event_set, folder, recordings, split, timesteps, by, workers):
    """Frames and labels of the recordings in a folder: (training, test)."""
    labels, _, paths, *_ = zip(*recordings) if recordings else ((), (), ())
    for label, name in enumerate(event_set.classes):
        if label not in labels:
            raise UserError(
                f"{folder} has no recordings of class {name}: put there Train.zip and Test.zip of "
                "N-MNIST (garrickorchard.com/datasets/n-mnist) or the ten zip files of CIFAR10-DVS "
                "(figshare.com/articles/dataset/CIFAR10-DVS_New/4724671)")
    test = test_part(recordings, split)
    if test.all() or not test.any():
        raise UserError(f"{folder}: split {split} makes {test.sum()} of {len(test)} recordings "
                        "the test set; training and test need some each: choose another")
    paths = [folder / path for path in paths]
    dataset = Recordings(event_set, paths, labels, timesteps, by)
    frames, labels = read_all(dataset, range(len(paths)), workers, "recordings")
    return (frames[~test], labels[~test]), (frames[test], labels[test])


def load_events(name, folder, workers, timesteps, split, by):
    """A data set of recordings from prepared frames, which are made where they are missing."""
    event_set = EVENT_SETS[name]
    size, split = event_set.size, event_set.split or split
    # The names of the files say how the frames were made, and source*.txt from which recordings.
    suffix = f"_T{timesteps}_{by}_{size}_{split}"
    paths, source = array_paths(folder, suffix), folder / f"source{suffix}.txt"
    complete = all(path.exists() for path in paths)
    recordings, checksum = find_recordings(folder, event_set)
    made_from = source.read_text() if source.exists() else None
    # Without the recordings, frames that were made from them earlier are enough.
    if complete and (not recordings or made_from == checksum):
        train, test = read_arrays(paths, (timesteps, 2, size, size), len(event_set.classes))
    else:
        if complete:
            print(f"  {folder}: the recordings have changed, making frames again", flush=True)
        elif name == "shapes-dvs":
            draw_recordings(folder)
        for packed in sorted(folder.glob("[!.]*.zip")):
            unpack(packed, event_set.ending)
        recordings, checksum = find_recordings(folder, event_set)
        train, test = make_frames(event_set, folder, recordings, split, timesteps, by, workers)
        try:
            # Empty until all frames are written.
            write_atomically(source, lambda file: None)
            for path, array in zip(paths, (*train, *test)):
                write_atomically(path, lambda file: np.save(file, array, allow_pickle=False))
            write_atomically(source, lambda file: file.write(checksum.encode()))
        except UserError as error:
            # In a read-only folder, for example, the run goes on with the frames in memory.
            print(f"  {error}: the next run has to make these frames again", flush=True)
    # This deviation undoes the scale, so that the network sees events per pixel. Shifts of up to 5
    # pixels are usual.
    return Resident(name, train, test, event_set.classes, (0.0, 0.0), (event_set.scale / 255,) * 2,
                    pad=5, flip=event_set.flip, split=split)


def draw_recordings(folder, per_class=80, size=128, steps=16):
    """The SHAPES moving in a small circle in front of an event camera, as recordings
    <shape>/drawn_<shape>_<number>.aedat. Numbers begin at 80, so that the split first100 has 20
    test recordings of each."""
    for label, i in np.ndindex(len(SHAPES), per_class):
        path = folder / SHAPES[label] / f"drawn_{SHAPES[label]}_{80 + i}.aedat"
        # An earlier call may have been interrupted.
        if path.exists():
            continue
        rng = np.random.default_rng((label, i))
        radius = rng.uniform(0.25, 0.4) * size
        # A full turn, in either direction and from any angle.
        turn = 2 * np.pi * rng.choice([-1, 1])
        angle = np.linspace(0, turn, steps + 1) + rng.uniform(0, 2 * np.pi)
        circle = 8 * np.stack([np.sin(angle), np.cos(angle)])
        centre = size / 2 + rng.uniform(-1, 1, (2, 1)) * (size / 2 - radius - 8) + circle
        phase = rng.uniform(0, 1, (2, 1, 1, 1))
        # The pixels covered at each step, bool [steps + 1, size, size]. One that becomes covered
        # or uncovered gives an event.
        covered = shape_masks(size, centre[..., None, None], radius, phase, label)
        step, y, x = (covered[1:] != covered[:-1]).nonzero()
        # Some shapes are brighter than the background, some darker.
        p = covered[step + 1, y, x] ^ rng.integers(2)
        # Noise adds a tenth more events, anywhere.
        noise = rng.integers(0, [[steps], [size], [size], [2]], (4, len(step) // 10))
        step, y, x, p = np.concatenate([[step, y, x, p], noise], axis=1)
        # A step takes ten milliseconds.
        t = (10000 * (step + rng.uniform(0, 1, len(step)))).astype(np.int64)
        order = np.argsort(t)
        write_aedat(path, t[order], x[order], y[order], p[order])


# ---- Loading a data set by its name -------------------------------------------------------------

def load_cifar(name, root):
    """CIFAR from prepared arrays in root/name, or else from the original in root."""
    paths, num_classes = array_paths(root / name), {"cifar10": 10, "cifar100": 100}[name]
    if all(path.exists() for path in paths):
        train, test = read_arrays(paths, (32, 32, 3), num_classes)
    else:
        original = getattr(torchvision.datasets, name.upper())
        try:
            # torchvision verifies what is there and downloads the rest.
            parts = original(root, train=True, download=True), original(root, train=False)
        # A download can fail in many ways.
        except Exception as error:
            raise UserError(
                f"{name} is not in {root} and cannot be downloaded ({first_line(error)}): put "
                f"{original.filename} from {original.url} there, or arrays "
                f"{{train,test}}_{{images,labels}}.npy into {root / name}") from error
        train, test = ((part.data, np.array(part.targets)) for part in parts)
    return Resident(name, train, test, [str(c) for c in range(num_classes)], *STATISTICS[name])


def load(name, data_dir="data", image_size=None, workers=None, timesteps=4, dvs_split="first100",
         bin_by="count"):
    """A data set, Resident or Streamed. UserError says what to do where that is not possible.

    image_size  side in pixels of shapes, folder (default 32) and imagenet (224)
    workers     processes that decode images and recordings; 0: this one does it (default: as many
                as there are cores for this process, at most 16)
    timesteps   frames that a recording of events is cut into
    bin_by      how it is cut, see bin_events
    dvs_split   the test set: "first100", recordings 0 to 99 of each class, or "random", a tenth of
                each, always the same. N-MNIST has its own
    """
    root = pathlib.Path(data_dir)
    if image_size is None:
        image_size = 224 if name == "imagenet" else 32
    if workers is None:
        # A process may have only some cores of a machine. On macOS it cannot ask which.
        affinity = hasattr(os, "sched_getaffinity")
        workers = min(16, len(os.sched_getaffinity(0)) if affinity else os.cpu_count())
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    if name == "imagenet":
        return Streamed(name, root / name, image_size, workers)
    if name == "folder" and image_size > RESIDENT_UP_TO:
        return Streamed(name, root, image_size, workers)
    if name == "folder":
        return load_folder(root, image_size, workers)
    if name in EVENT_SETS:
        return load_events(name, root / name, workers, timesteps, dvs_split, bin_by)
    if name == "shapes":
        if image_size > RESIDENT_UP_TO:
            raise UserError(f"shapes have an --image-size up to {RESIDENT_UP_TO}, not {image_size}")
        train, test = draw_shapes(8000, 1, image_size), draw_shapes(1000, 2, image_size)
        return Resident(name, train, test, SHAPES, *STATISTICS[name])
    return load_cifar(name, root)
