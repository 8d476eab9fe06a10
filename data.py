"""Data sets as batches on the training device, uint8 until the last moment:

    dataset = data.load("cifar100").to("cuda")
    for x, y in dataset.train(batch_size=64, seed=0, epoch=0): ...

    shapes            ten kinds of drawn shapes at --image-size: a smoke test without download
    cifar10, cifar100 downloaded and verified by torchvision
    folder            an image tree train/<class>/*.png|jpg|webp, test|val/<class>/* at --image-size
    imagenet          the same layout in <data-dir>/imagenet, random resized crops at 224
    cifar10-dvs       event recordings in <data-dir>/cifar10-dvs, ten class folders or zip files
    nmnist            event recordings in <data-dir>/nmnist, Train|Test/<digit>/*.bin
    shapes-dvs        the shapes in motion, written as event recordings and read back

Small sets live on the device (`Resident`): cropping, flipping, normalising happen there, a batch
at a time. CIFAR and recordings are prepared once, as arrays {train,test}_{images,labels}.npy in
<data-dir>/<name>: images uint8 [N, H, W, C], frames of events uint8 [N, T, 2, H, W]. Large images
are decoded by worker processes (`Streamed`).

Every random draw depends on (seed, epoch, place in the epoch) alone, never on what was drawn
before: a resumed run sees what an unbroken one sees, and N processes see what one would.
This file imports nothing of the project.
"""
import atexit
import glob
# At exit its handler runs after kill_workers, because it is registered here and so before.
import multiprocessing.util
import os
import pathlib
import re
import signal
import tempfile
import time
import typing
import warnings
import zipfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

DATASETS = ("cifar10", "cifar100", "shapes", "folder", "imagenet",
            "cifar10-dvs", "nmnist", "shapes-dvs")
# Mean and standard deviation of each channel of the training images, in 0..1.
STATISTICS = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
              "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
              "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
              "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
# Folders of images up to this size live on the device. Larger images are streamed.
RESIDENT_UP_TO = 96


class UserError(Exception):
    """Something the user can mend: bad input, a missing file, a full disk. Programs print its one
    line and exit with 2."""


def first_line(error):
    """What an error says in one line."""
    # The first line, and the next one where the first is only a heading.
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[:2 if lines[0].endswith(":") else 1])


def draws(device, *key):
    """A random generator on the device whose state depends on key (whole numbers) alone."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))


def memory_format(device):
    """The memory format of images and convolutions that serves a device best."""
    # channels_last is fastest on GPUs. On CPUs oneDNN's backward pass of a 1x1 convolution with
    # stride 2 and few channels writes past its memory in that format (torch 2.14).
    cuda = torch.device(device).type == "cuda"
    return torch.channels_last if cuda else torch.contiguous_format


def check_at_most(flag, n, most, what):
    if n > most:
        raise UserError(f"{flag} {n} is more than the {most} {what}")


# ---- Progress -----------------------------------------------------------------------------------

def duration(seconds):
    """Seconds as text: "1.6 h" or "12 min 05 s"."""
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s"


class Pace:
    """The speed of a long job of `total` items (a text: images, recordings), and its time left.

        pace = Pace(len(files), "recordings")
        for batch in batches:
            ...
            pace.count(len(batch))
            if pace.due():
                print(pace)
    """

    def __init__(self, total, items):
        self.total, self.items, self.done = total, items, 0
        self.start = self.printed = time.perf_counter()

    def count(self, n):
        if self.done == 0:
            # The first batch may start worker processes or compile something: it is not timed.
            self.first, self.after_first = n, time.perf_counter()
        self.done += n

    def rate(self):
        """Items a second, of the first batch only where there is no other. Call count() first."""
        now = time.perf_counter()
        if self.done == self.first:
            return self.done / (now - self.start)
        return (self.done - self.first) / (now - self.after_first)

    def due(self):
        """Whether it is time for a line: true once every ten seconds."""
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
    """write(file) into a file that becomes path: readers see the old or the new, whole."""
    path = pathlib.Path(path)
    # In the same folder, because between two disks a rename would be a copy.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            # On the disk before it is renamed, so that a power failure leaves no empty file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    # torch.save reports a full disk as RuntimeError.
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {first_line(error)}") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def array_paths(folder, suffix=""):
    return [folder / f"{part}_{kind}{suffix}.npy"
            for part in ("train", "test") for kind in ("images", "labels")]


def write_arrays(paths, arrays):
    for path, array in zip(paths, arrays):
        write_atomically(path, lambda file: np.save(file, array, allow_pickle=False))


def read_arrays(paths, shape, num_classes):
    """Prepared arrays, checked: (images uint8 [N, *shape], labels [N]) of training and of test."""
    arrays = []
    for path in paths:
        try:
            arrays.append(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is no readable .npy array ({first_line(error)}): delete it to "
                            "have it made again") from error
    pairs = list(zip(arrays[::2], arrays[1::2]))
    for (images, labels), images_path, labels_path in zip(pairs, paths[::2], paths[1::2]):
        if images.dtype != np.uint8 or images.shape[1:] != shape or images.size == 0:
            raise UserError(f"{images_path} must be uint8 [N, {', '.join(map(str, shape))}] with "
                            f"N > 0, not {images.dtype} {list(images.shape)}")
        # Labels are compared with the number of classes only where they are whole numbers.
        numbers = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
        if not numbers or labels.min() < 0 or labels.max() >= num_classes:
            raise UserError(f"{labels_path} must hold {len(images)} whole numbers from 0 to "
                            f"{num_classes - 1}, one for each image")
    return pairs


# ---- Small sets, on the device ------------------------------------------------------------------

class Resident:
    """A data set that lives on the device as uint8, in batches.

    train, test  images [N, H, W, C] or event frames [N, T, 2, H, W], uint8, and their labels [N]
    classes      names, in the order of their labels
    mean, std    of each channel, in 0..1
    pad          random shifts by up to so many pixels (default: an eighth of the side)
    flip         whether to mirror at random
    split        how a set of recordings was divided, for the log

    Set later: cutout, side of a square set to the mean, 0 for none; augment, TrivialAugment for
    colour images; fused, compiled cropping and normalising, two launches instead of a dozen.
    """

    def __init__(self, name, train, test, classes, mean, std, pad=None, flip=True, split=None):
        self.name, self.classes, self.split = name, classes, split
        self.mean, self.std = tuple(mean), tuple(std)
        shape = train[0].shape
        self.frames = shape[1] if len(shape) == 5 else None
        self.channels = 2 if self.frames else shape[3]
        self.size = tuple(shape[3:] if self.frames else shape[1:3])
        self.pad = self.size[0] // 8 if pad is None else pad
        self.flip, self.cutout, self.augment, self.fused = flip, 0, False, False
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

    def limit(self, n):
        """Keep n training images, always the same, drawn from all classes."""
        check_at_most("--limit", n, len(self), "training images of " + self.name)
        images, labels = self.sets["train"]
        # The first n might all be of one class.
        keep = torch.randperm(len(self), generator=draws("cpu", 0))[:n]
        self.sets["train"] = images[keep], labels[keep]

    def limit_test(self, n):
        """The same for the test images."""
        check_at_most("--images", n, self.test_size(), "test images of " + self.name)
        images, labels = self.sets["test"]
        keep = torch.randperm(len(labels), generator=draws("cpu", 0))[:n]
        self.sets["test"] = images[keep], labels[keep]

    def keep_classes(self, n):
        """Keep the images, training and test, of the first n classes: a smaller task."""
        check_at_most("--classes", n, len(self.classes), "classes of " + self.name)
        self.classes = self.classes[:n]
        for part, (images, labels) in self.sets.items():
            self.sets[part] = images[labels < n], labels[labels < n]
            # Prepared arrays may hold so few images that none is left.
            if not (labels < n).any():
                raise UserError(f"--classes {n} leaves no {part} image of {self.name}: take more")

    def to(self, device):
        for part, (images, labels) in self.sets.items():
            self.sets[part] = images.to(device), labels.to(device)
        # The statistics of a frame serve each frame of a recording. They move once, because a
        # transfer in every batch would wait for the device every time.
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

    def normalise(self, x, centre=None):
        """uint8 [B, H, W, C] -> float32 [B, C, H, W], of events [B, T, 2, H, W]. centre [B, 2], in
        0..1: where a square of the side self.cutout is set to the mean."""
        mean, std = self.scale
        x = ((x.float() - mean) / std).permute(0, 3, 1, 2)
        if centre is not None:
            # A pixel is outside of the square if it is far away in one direction at least.
            rows, columns = (torch.arange(n, device=x.device) + 0.5 for n in self.size)
            far_y = (rows - centre[:, :1] * len(rows)).abs() > self.cutout / 2
            far_x = (columns - centre[:, 1:] * len(columns)).abs() > self.cutout / 2
            x = x * (far_y[:, :, None] | far_x[:, None, :])[:, None]
        x = x.contiguous(memory_format=memory_format(x.device))
        return x.unflatten(1, (self.frames, 2)) if self.frames else x

    def train(self, batch_size, seed, epoch, start=0, rank=0, world=1):
        """Shuffled, augmented full batches (x, y) from the start-th on; a rank's part of each."""
        images, labels = self.sets["train"]
        n, device = len(self), images.device
        crop, normalise = self.crop, self.normalise
        if self.fused:
            crop, normalise = torch.compile(crop), torch.compile(normalise)
        # Drawn for the whole epoch, by place in it. So an image is treated alike however many
        # processes there are and wherever a run goes on. The order is drawn on the CPU, so that it
        # is the same on every device.
        order = torch.randperm(n, generator=draws("cpu", seed, epoch)).to(device)
        how = dict(generator=draws(device, seed, epoch), device=device)
        shift = torch.randint(-self.pad, self.pad + 1, (n, 2), **how)
        mirror = (torch.rand(n, **how) < 0.5) & self.flip
        centre = torch.rand(n, 2, **how)
        for step in range(start, n // batch_size):
            part = slice(step * batch_size + rank, (step + 1) * batch_size, world)
            chosen = order[part]
            x = crop(images, chosen, shift[part], mirror[part])
            if self.augment:
                x = trivial_augment(x, batch_size, rank, world, (seed, epoch, step))
            yield normalise(x, centre[part] if self.cutout else None), labels[chosen]

    def test(self, batch_size, rank=0, world=1):
        """All test images in order, a rank's part of each batch. All batches are full: images that
        only fill up have the label -1 and belong into no count."""
        images, labels = self.sets["test"]
        for first in range(0, len(labels), batch_size * world):
            index = first + rank + world * torch.arange(batch_size, device=labels.device)
            inside, index = index < len(labels), index.clamp(max=len(labels) - 1)
            yield self.normalise(images[index]), torch.where(inside, labels[index], -1)


def trivial_augment(x, batch_size, rank, world, key):
    """torchvision's TrivialAugmentWide (Mueller 2021) on a process's images of a batch, uint8
    [B, H, W, 3], in place: one random operation of random strength for each sixteenth of the
    (shuffled) whole batch, as one for each image would keep a GPU waiting."""
    # The sixteenth that each image belongs to. This process has every world-th of the batch.
    group = (rank + world * np.arange(len(x))) * 16 // batch_size
    parts = x.permute(0, 3, 1, 2).split(np.bincount(group, minlength=16).tolist())
    # torchvision draws from the CPU's global generator, whose state comes back afterwards.
    with torch.random.fork_rng(devices=[]):
        for g, part in enumerate(parts):
            if len(part):
                torch.set_rng_state(draws("cpu", *key, g).get_state())
                part.copy_(v2.TrivialAugmentWide()(part))
    return x


# ---- Large images, from worker processes --------------------------------------------------------

def files_below(folder, endings):
    """Relative paths of the files below a folder that have one of the endings, sorted by folder
    and name."""
    # glob leaves out what begins with a dot: ._0.png is no image, .ipynb_checkpoints no class.
    paths = glob.glob("**/*", root_dir=folder, recursive=True)
    return sorted((p for p in paths if p.lower().endswith(endings)), key=os.path.split)


def class_folders(folder):
    """The names of the folders in a folder, sorted."""
    # A pattern that ends in / finds folders only, and none that begins with a dot.
    return sorted(os.path.dirname(name) for name in glob.glob("*/", root_dir=folder))


class ImageTree:
    """The images <class>/** in a folder, as a torch data set: item (index, seed) is an image, uint8
    [3, H, W], and its label."""

    def __init__(self, folder):
        self.classes, self.transform = class_folders(folder), None
        labels = {name: label for label, name in enumerate(self.classes)}
        # The class is the first folder of a path.
        self.samples = [(os.path.join(folder, path), labels[path.split(os.sep)[0]])
                        for path in files_below(folder, IMG_EXTENSIONS) if os.path.dirname(path)]
        empty = set(labels.values()) - {label for _, label in self.samples}
        if empty:
            raise UserError(f"{folder / self.classes[min(empty)]} holds no image")

    def __getitem__(self, key):
        index, seed = key
        path, label = self.samples[index]
        image = read_image(path)
        # The transform draws from the global generator, whose state comes back afterwards. What it
        # draws depends on the seed alone. torch.manual_seed would visit every kind of device.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            # The index -1 stands for an image that only fills up a batch.
            return self.transform(image), label if index >= 0 else -1


def image_trees(root):
    """The training and the test images below root, of the same classes."""
    train, test, val = (class_folders(root / name) for name in ("train", "test", "val"))
    for name, classes in (("train", train), ("test or val", test or val)):
        if not classes:
            raise UserError(f"{root}: no folder {name} with class folders; expected train/<class>/"
                            "*.png|jpg|webp and test/<class>/* or val/<class>/*")
    # The test set is in the folder with the classes of training. ImageNet's test/ has no classes.
    for name, classes in (("test", test), ("val", val)):
        if classes == train:
            return ImageTree(root / "train"), ImageTree(root / name)
    differing = sorted(set(train) ^ set(test or val))
    raise UserError(f"{root}: the class folders of training and test differ: {differing[:5]}")


def read_image(path):
    """An image file as 8-bit RGB."""
    try:
        with Image.open(path) as image:
            # Pillow would cut the values of the modes I, I;16 and F off at 255 without a word.
            if image.mode[0] in "IF":
                raise ValueError("more than 8 bits a channel, convert it to 8")
            return image.convert("RGB")
    # Bad files end in nearly every kind of error that there is.
    except Exception as error:
        raise UserError(f"{path}: not a readable image: {first_line(error)}") from error


def fixed_crop(size, resize):
    return transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size),
                               transforms.PILToTensor()])


def worker_batches(dataset, batches, workers, device="cpu"):
    """torch's DataLoader over batches, lists of keys of the data set."""
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_signals,
        prefetch_factor=4 if workers else None, pin_memory=torch.device(device).type == "cuda")
    try:
        yield from loader
    except UserError as error:
        # The traceback would keep the loader alive, and with it the workers.
        error.__traceback__ = None
        # The message of the worker's error is in the last line of the worker's traceback.
        message = str(error).strip().splitlines()[-1]
        raise UserError(message.partition("UserError: ")[2] or message) from None


def ignore_signals(_):
    # Ctrl-C and a batch system's SIGTERM reach worker processes, too. They must go on, so that the
    # training process can finish its step and save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def kill_workers():
    # At exit multiprocessing would send the remaining workers a SIGTERM, which they ignore, and
    # wait for them forever. torch would report their end as an error.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class Streamed:
    """An image tree decoded by worker processes, in batches as Resident's. There is no cutout."""

    def __init__(self, name, root, image_size, mean, std, workers=2):
        self.name, self.size, self.workers = name, (image_size, image_size), workers
        self.mean, self.std, self.device = mean, std, torch.device("cpu")
        self.channels, self.frames, self.split = 3, None, None
        self.cutout, self.augment = 0, False
        self.trees = image_trees(root)
        self.classes = self.trees[0].classes
        self.indices = list(range(len(self.trees[0].samples)))

    def __len__(self):
        return len(self.indices)

    def test_size(self):
        return len(self.trees[1].samples)

    def limit(self, n):
        check_at_most("--limit", n, len(self), "training images of " + self.name)
        self.indices = torch.randperm(len(self), generator=draws("cpu", 0))[:n].tolist()

    def limit_test(self, n):
        check_at_most("--images", n, self.test_size(), "test images of " + self.name)
        keep = torch.randperm(self.test_size(), generator=draws("cpu", 0))[:n].tolist()
        self.trees[1].samples = [self.trees[1].samples[i] for i in keep]

    def keep_classes(self, n):
        check_at_most("--classes", n, len(self.classes), "classes of " + self.name)
        self.classes, (train, test) = self.classes[:n], self.trees
        self.indices = [i for i in self.indices if train.samples[i][1] < n]
        test.samples = [(path, label) for path, label in test.samples if label < n]

    def to(self, device):
        self.device = torch.device(device)
        return self

    def normalised(self, tree, batches):
        """Batches of (index, seed) as images on the device, each channel of mean 0, deviation 1."""
        mean, std = (255 * torch.tensor(value, device=self.device).view(3, 1, 1)
                     for value in (self.mean, self.std))
        for x, y in worker_batches(tree, batches, self.workers, self.device):
            # The images move as uint8, a quarter of the size, while the device still computes.
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            x = x.float().sub_(mean).div_(std)
            yield x.contiguous(memory_format=memory_format(self.device)), y

    def train(self, batch_size, seed, epoch, start=0, rank=0, world=1):
        tree, augment = self.trees[0], [transforms.TrivialAugmentWide()] * self.augment
        tree.transform = transforms.Compose([
            transforms.RandomResizedCrop(self.size[0]), transforms.RandomHorizontalFlip(),
            *augment, transforms.PILToTensor()])
        order = torch.randperm(len(self), generator=draws("cpu", seed, epoch)).tolist()
        # Each place in an epoch has a seed of its own.
        keys = [(self.indices[chosen], zlib.crc32(repr((seed, epoch, place)).encode()))
                for place, chosen in enumerate(order)]
        return self.normalised(tree, [keys[step * batch_size:(step + 1) * batch_size][rank::world]
                                      for step in range(start, len(self) // batch_size)])

    def test(self, batch_size, rank=0, world=1):
        # As Resident's: the label -1 marks images that only fill up.
        tree, size, whole = self.trees[1], self.size[0], batch_size * world
        # ImageNet's images are usually resized to 256 pixels and cut to 224. Others in proportion.
        tree.transform = fixed_crop(size, round(size * 256 / 224))
        n = self.test_size()
        # Nothing is drawn here, so every seed is 0.
        keys = [(i, 0) for i in range(n)] + [(-1, 0)] * (-n % whole)
        return self.normalised(tree, [keys[first:first + whole][rank::world]
                                      for first in range(0, n, whole)])


# ---- Drawn shapes -------------------------------------------------------------------------------

SHAPES = ["disc", "ring", "square", "frame", "triangle", "plus", "cross", "rows", "columns",
          "checkers"]


def draw_shapes(n, seed, size=32):
    """n images of the ten SHAPES at random places, sizes and colours on noisy ground: uint8
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
    # Colours of shape and ground are drawn alike, so that no single pixel tells anything.
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
    # These are functions, so that only the one that is asked for is computed.
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
    """The events of a recording as they stand in it, uint8 [N, event_bytes]: 8 in AEDAT 2.0, 5 in
    N-MNIST, which has no header."""
    try:
        raw, begin = pathlib.Path(path).read_bytes(), 0
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    if event_bytes == 8 and not raw.startswith(b"#!AER-DAT2"):
        raise UserError(f"{path} is no AEDAT 2.0 recording: replace it by the original")
    # AEDAT's header is the lines that begin with '#'. Events follow, whatever they look like.
    while event_bytes == 8 and raw[begin:begin + 1] == b"#":
        end = raw.find(b"\n", begin)
        begin = end + 1 if end >= 0 else len(raw)
    if begin == len(raw) or (len(raw) - begin) % event_bytes:
        raise UserError(f"{path} holds no events or ends in the middle of one: replace it by the "
                        "original")
    return np.frombuffer(raw, np.uint8, offset=begin).reshape(-1, event_bytes)


def read_aedat(path):
    """The events of an AEDAT 2.0 recording of a DVS128, in file order: t int64 [N] in microseconds;
    x, y, p int16 [N]. UserError for a file that is anything else.

    x is the column and y the row, 0..127, p the polarity, 1 = ON, in the orientation that all
    readers of CIFAR10-DVS use; for a DVS128 held upright it is the mirror image. Where the 32-bit
    clock wraps, t goes on. External triggers are left out.
    """
    # An event is an address of 32 bits and a time of 32 bits, the highest byte first.
    words = read_events(path, 8).view(">u4")
    address, t = words[:, 0].astype(np.uint32), words[:, 1].astype(np.int64)
    if (t[1:] < t[:-1]).any():
        # The clock wraps. A step is the difference nearest to 0 of those possible modulo 2^32.
        t[1:] = t[0] + np.cumsum(np.diff(t).astype(np.int32), dtype=np.int64)
    if (address & 0x7FFF0000).any():
        raise UserError(f"{path} holds the address {address.max():#x}, beyond the 128x128 pixels "
                        "of a DVS128: replace it by the original")
    if address.max() > 0x7FFF:
        # Bits 15 and 31 mark external triggers, which are no events of a pixel.
        event = address <= 0x7FFF
        address, t = address[event], t[event]
    if len(t) == 0:
        raise UserError(f"{path} holds triggers only: replace it by the original")
    # Bits 8-14 are 127 - x, bits 1-7 are 127 - y, bit 0 is 1 - p.
    place = address.astype(np.int16) ^ 0x7FFF
    return t, place >> 8, place >> 1 & 127, place & 1


def read_nmnist(path):
    """The events of an N-MNIST recording, as read_aedat's; x and y 0..33."""
    # An event is x (8 bits), y (8), the polarity (1) and the time (23).
    x, y, high, middle, low = read_events(path, 5).astype(np.int64).T
    t, p = (high & 127) << 16 | middle << 8 | low, high >> 7
    # y = 240 is no event. It says that the clock has run over, after 2^13 microseconds.
    event = y != 240
    t = t + (np.cumsum(~event) << 13)
    t, x, y, p = (value[event] for value in (t, x, y, p))
    if len(t) == 0:
        raise UserError(f"{path} holds no event: replace it by the original")
    if (np.maximum(x, y) > 33).any():
        raise UserError(f"{path} holds an address x {x.max()}, y {y.max()}, beyond 34x34 pixels: "
                        "replace it by the original")
    return t, x.astype(np.int16), y.astype(np.int16), p.astype(np.int16)


def bin_events(t, x, y, p, frames, height, width, by="count"):
    """Events [N] counted into frames uint16 [frames, 2, height, width]: frame[p, y, x], at most
    65,535.

    by "count": N // frames events in file order each, the rest in the last. by "time": (last -
    first time) // frames microseconds each, at least 1, the rest in the last; a slice may be empty.
    ValueError for what lies outside.
    """
    if by not in ("count", "time") or frames < 1:
        raise ValueError(f"by must be 'count' or 'time', frames at least 1, not {by!r}, {frames}")
    n = len(x)
    for value, end in ((x, width), (y, height), (p, 2)):
        if n and not (0 <= value.min() and value.max() < end):
            raise ValueError(f"events outside of 2 x {height} x {width}")
    # In the smallest type that holds them, because moving them is what takes the time.
    place = p.astype(np.int16 if 2 * height * width <= 2 ** 15 else np.int64)
    place = (place * height + y) * width + x
    # Frame i has the events from edges[i] on, up to edges[i + 1].
    edges = n // frames * np.arange(frames + 1)
    if by == "time" and n:
        # Where a clock was set back, times are out of order.
        order = np.argsort(t, kind="stable")
        t, place = t[order], place[order]
        edges = np.searchsorted(t, t[0] + max((t[-1] - t[0]) // frames, 1) * np.arange(frames + 1))
    edges[-1] = n
    counts = np.empty((frames, 2 * height * width), np.uint16)
    for frame, a, b in zip(counts, edges, edges[1:]):
        count = np.bincount(place[a:b], minlength=counts.shape[1])
        # Only where it is possible, because comparing takes half as long as counting.
        frame[:] = np.minimum(count, 65535) if b - a > 65535 else count
    return counts.reshape(frames, 2, height, width)


def area_mean(frames, size):
    """[..., n, n] -> float32 [..., size, size]: means over areas of n/size x n/size pixels, cut
    ones counting in part."""
    n = frames.shape[-1]
    low, pixel = np.arange(size)[:, None] * n / size, np.arange(n)
    # The part of each pixel that lies in each area, along one axis: [size, n].
    part = (np.minimum(low + n / size, pixel + 1) - np.maximum(low, pixel)).clip(0)
    # torch keeps to one thread in a worker process, numpy does not.
    part = torch.from_numpy(part.astype(np.float32) * np.float32(size / n))
    return (part @ torch.from_numpy(frames.astype(np.float32)) @ part.T).numpy()


class EventSet(typing.NamedTuple):
    """What distinguishes one set of recordings from another."""

    # In the order of their labels.
    classes: list
    # read(path) -> t, x, y, p.
    read: typing.Callable
    # The end of a recording's name. Before it stands the recording's number.
    ending: str
    # The sides of the sensor and of the frames, in pixels.
    pixels: int
    size: int
    # The value in a frame that stands for one event per pixel. Where frames are smaller than the
    # sensor, means over areas are fractions. In sixteenths they stay exact enough, and uint8 still
    # holds 15.9 events per pixel. More count as that.
    scale: int
    flip: bool = True
    # The split that the set itself comes with, if any.
    split: str | None = None


EVENT_SETS = {
    "cifar10-dvs": EventSet(CIFAR10, read_aedat, ".aedat", 128, 48, 16),
    "nmnist": EventSet(list("0123456789"), read_nmnist, ".bin", 34, 34, 1, False, "official"),
    "shapes-dvs": EventSet(SHAPES, read_aedat, ".aedat", 128, 32, 16),
}


class Recordings:
    """Recordings as a torch data set: item i is frames uint8 [T, 2, size, size]."""

    def __init__(self, name, paths, timesteps, by):
        self.event_set, self.paths = EVENT_SETS[name], paths
        self.timesteps, self.by = timesteps, by

    def __getitem__(self, i):
        path, pixels, size = self.paths[i], self.event_set.pixels, self.event_set.size
        events = self.event_set.read(path)
        # The first step is 0, so that a recording of a single event has one, too.
        steps = np.append(0, np.diff(events[0]))
        # Disorder of a few microseconds and short rests are usual. More than that means a clock
        # that was set back, or events left over from before the recording.
        if self.by == "time" and (steps.min() < -1000 or steps.max() > steps.sum() / 4 > 0):
            warnings.warn(f"{path}: its clock jumps, slices of equal time hold unequal parts")
        frames = bin_events(*events, self.timesteps, pixels, pixels, self.by)
        # Where the sizes are equal there is nothing to average.
        frames = frames if size == pixels else area_mean(frames, size)
        return np.rint(np.minimum(frames * float(self.event_set.scale), 255)).astype(np.uint8)


# What to do where recordings are missing.
ORIGINALS = (
    "put Train.zip and Test.zip of N-MNIST (garrickorchard.com/datasets/n-mnist), or the ten zip "
    "files of CIFAR10-DVS (figshare.com/articles/dataset/CIFAR10-DVS_New/4724671), there")


def unpack(packed, ending):
    """Unpack the recordings of a zip file into a folder of its name."""
    # Its recordings may lie below such a folder already, wherever that is. Or some of them do,
    # because the user's own unpacking was interrupted.
    pattern = f"**/{glob.escape(packed.stem)}/**/*{ending}"
    beside = glob.glob(pattern, root_dir=packed.parent, recursive=True)
    try:
        with zipfile.ZipFile(packed) as archive:
            inside = [name for name in archive.namelist() if name.endswith(ending)
                      and not os.path.basename(name).startswith(".")]
            if not inside:
                return
            # The last file of an interrupted unpacking is shorter than it should be.
            sizes = {os.path.basename(name): archive.getinfo(name).file_size for name in inside}
            whole = [path for path in beside
                     if os.path.getsize(packed.parent / path) == sizes.get(os.path.basename(path))]
            if beside and len(whole) < len(inside):
                raise ValueError(f"only {len(whole)} of its {len(inside)} recordings lie whole "
                                 "beside it, delete those and they will be unpacked again")
            if not beside:
                # The folder gets its name when all is there. What a killed process leaves behind
                # begins with a dot and is never looked at.
                with tempfile.TemporaryDirectory(dir=packed.parent, prefix=".") as temporary:
                    archive.extractall(f"{temporary}/all", inside)
                    # Another process that unpacks the same file may have been faster.
                    if not any(packed.with_suffix("").glob(f"**/*{ending}")):
                        os.rename(f"{temporary}/all", packed.with_suffix(""))
    # Bad archives end in many kinds of errors.
    except Exception as error:
        raise UserError(f"{packed} cannot be unpacked: {first_line(error)}") from error


def find_recordings(folder, classes, ending):
    """All recordings of the classes as sorted [(label, number, path, size, time)]."""
    found = []
    for path in files_below(folder, ending):
        # The recordings of a class lie below a folder of its name, wherever that is in the tree.
        inside = [part for part in path.split(os.sep)[:-1] if part in classes]
        number = re.search(r"(\d+)\.\w+$", path)
        # What has no class or no number is no recording.
        if inside and number:
            # lstat, because a link that leads nowhere is reported later, when it is read.
            stat = os.lstat(folder / path)
            label = classes.index(inside[-1])
            found.append((label, int(number[1]), path, stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def in_test_folder(path):
    """Whether the innermost folder named train or test is one of test."""
    return path.lower().rfind("test") > path.lower().rfind("train")


def test_part(recordings, split):
    """bool [N]: which recordings are the test set; see load."""
    labels, numbers, paths, *_ = zip(*recordings)
    if split == "official":
        return np.array([in_test_folder(path) for path in paths])
    if split == "first100":
        return np.array(numbers) < 100
    if split != "random":
        raise UserError(f"unknown split {split!r} of event recordings: choose first100 or random")
    test = np.zeros(len(labels), bool)
    # A random tenth of each class, the same in every process and on every machine.
    for c in np.unique(labels):
        shuffled = np.random.default_rng(c).permutation(np.flatnonzero(np.equal(labels, c)))
        test[shuffled[:max(1, len(shuffled) // 10)]] = True
    return test


def fingerprint(recordings):
    return f"{zlib.crc32(repr(recordings).encode()):08x}"


def complete_recordings(folder, classes, ending, split):
    """(recordings, bool [N]: which are the test set) of a folder that holds all it has to."""
    for packed in sorted(folder.glob("[!.]*.zip")):
        unpack(packed, ending)
    recordings = find_recordings(folder, classes, ending)
    missing = set(range(len(classes))) - {label for label, *_ in recordings}
    if missing:
        label = classes[min(missing)]
        raise UserError(f"{folder} has no recordings of class {label}: {ORIGINALS}")
    test = test_part(recordings, split)
    if test.all() or not test.any():
        raise UserError(f"{folder}: split {split} makes {test.sum()} of {len(test)} recordings "
                        "the test set; training and test need some each: choose another")
    # A recording that lies there twice could be on both sides of a random split. N-MNIST has the
    # same numbers in training and test.
    seen = {}
    for label, number, path, *_ in recordings:
        twin = seen.setdefault((label, number, in_test_folder(path)), path)
        if twin != path:
            raise UserError(f"{folder}: {twin} and {path} are one recording, delete one")
    return recordings, test


def load_events(name, folder, workers, timesteps, split, by):
    """A data set of recordings from prepared frames, which are made where they are missing."""
    event_set = EVENT_SETS[name]
    classes, ending, size = event_set.classes, event_set.ending, event_set.size
    split = event_set.split or split
    # What frames depend on is in their name, or, the recordings, in the file beside them.
    suffix = f"_T{timesteps}_{by}_{size}_{split}"
    paths, source = array_paths(folder, suffix), folder / f"source{suffix}.txt"
    complete = all(path.exists() for path in paths)
    recordings = find_recordings(folder, classes, ending)
    known = source.read_text() if source.exists() else None
    # Complete frames serve alone, too, when the recordings are gone.
    if not complete or recordings and known != fingerprint(recordings):
        if complete:
            print(f"  {folder}: other recordings than before, making frames again", flush=True)
        elif name == "shapes-dvs":
            draw_recordings(folder)
        recordings, test = complete_recordings(folder, classes, ending, split)
        files = Recordings(name, [folder / path for _, _, path, *_ in recordings], timesteps, by)
        frames, labels = make_frames(files, workers), np.uint8([label for label, *_ in recordings])
        # While frames are written, the file that vouches for them is empty.
        write_atomically(source, lambda file: None)
        write_arrays(paths, (frames[~test], labels[~test], frames[test], labels[test]))
        write_atomically(source, lambda file: file.write(fingerprint(recordings).encode()))
    train, test = read_arrays(paths, (timesteps, 2, size, size), len(classes))
    # This deviation undoes the scale, so that the network sees events per pixel. Shifts of up to 5
    # pixels are usual. Digits are not mirrored.
    return Resident(name, train, test, classes, (0.0, 0.0), (event_set.scale / 255,) * 2, pad=5,
                    flip=event_set.flip, split=split)


def make_frames(recordings, workers):
    """The frames of all recordings, uint8 [N, T, 2, size, size], made by worker processes."""
    n, size, done = len(recordings.paths), recordings.event_set.size, 0
    frames = np.empty((n, recordings.timesteps, 2, size, size), np.uint8)
    start = printed = time.perf_counter()
    batches = [range(first, min(first + 25, n)) for first in range(0, n, 25)]
    for batch in worker_batches(recordings, batches, workers):
        # Copied at once, because few batches fit into the memory that is shared with workers.
        frames[done:done + len(batch)] = batch.numpy()
        done += len(batch)
        now = time.perf_counter()
        # CIFAR10-DVS takes a minute.
        if now > printed + 5:
            printed, rate = now, done / (now - start)
            print(f"  frames of {done:,d} of {n:,d} recordings, {rate:.0f}/s, "
                  f"{(n - done) / rate:.0f} s left", flush=True)
    return frames


def write_aedat(path, t, x, y, p):
    """Events, as read_aedat gives them, as an AEDAT 2.0 recording."""
    # The reverse of what read_aedat does with an address.
    events = np.stack([127 - x << 8 | 127 - y << 1 | 1 - p, t], 1).astype(">u4")
    header = b"#!AER-DAT2.0\r\n# drawn, not recorded\r\n"
    write_atomically(path, lambda file: file.write(header + events.tobytes()))


def draw_recordings(folder, per_class=80, size=128, steps=16):
    """The SHAPES going round in a small circle before a camera of events, as recordings
    <shape>/drawn_<shape>_<number>.aedat. Numbers begin at 80, so that the split first100 has 20 in
    its test set."""
    for label, i in np.ndindex(len(SHAPES), per_class):
        path = folder / SHAPES[label] / f"drawn_{SHAPES[label]}_{80 + i}.aedat"
        # An earlier call may have been interrupted.
        if path.exists():
            continue
        rng = np.random.default_rng((label, i))
        radius = rng.uniform(0.25, 0.4) * size
        # Once round, in either direction and from any angle.
        turn = 2 * np.pi * rng.choice([-1, 1])
        angle = np.linspace(0, turn, steps + 1) + rng.uniform(0, 2 * np.pi)
        circle = 8 * np.stack([np.sin(angle), np.cos(angle)])
        centre = size / 2 + rng.uniform(-1, 1, (2, 1)) * (size / 2 - radius - 8) + circle
        phase = rng.uniform(0, 1, (2, 1, 1, 1))
        # The pixels covered at each step, bool [steps + 1, size, size]. One that becomes covered
        # or uncovered gives an event.
        covered = shape_masks(size, centre[..., None, None], radius, phase, label)
        step, y, x = (covered[1:] != covered[:-1]).nonzero()
        # Some shapes are brighter than the ground, some darker.
        p = covered[step + 1, y, x] ^ rng.integers(2)
        # Noise adds a tenth more events, anywhere.
        noise = rng.integers(0, [[steps], [size], [size], [2]], (4, len(step) // 10))
        step, y, x, p = np.concatenate([[step, y, x, p], noise], axis=1)
        # A step takes ten milliseconds.
        t = (10000 * (step + rng.uniform(0, 1, len(step)))).astype(np.int64)
        order = np.argsort(t)
        write_aedat(path, t[order], x[order], y[order], p[order])


# ---- Loading a data set by its name -------------------------------------------------------------

def download_cifar(name, root):
    """Images and labels of training and of test, from the original in root."""
    original = getattr(torchvision.datasets, name.upper())
    try:
        # torchvision verifies what is there and downloads the rest.
        train, test = (original(root, train=train, download=True) for train in (True, False))
    # A download fails in many ways.
    except Exception as error:
        raise UserError(f"{name} is not in {root} and cannot be downloaded ({first_line(error)}): "
                        f"put {original.filename} from {original.url} there, or prepared arrays "
                        f"{{train,test}}_{{images,labels}}.npy into {root / name}") from error
    return train.data, np.uint8(train.targets), test.data, np.uint8(test.targets)


def load_folder(root, size, workers):
    """A tree of images small enough to live on the device, decoded once."""
    trees, arrays = image_trees(root), []
    for tree in trees:
        tree.transform = fixed_crop(size, size)
        keys = [(i, 0) for i in range(len(tree.samples))]
        # The size of these batches only says how work is handed out.
        batches = [keys[first:first + 64] for first in range(0, len(keys), 64)]
        images, labels = zip(*worker_batches(tree, batches, workers))
        arrays.append((torch.cat(images).permute(0, 2, 3, 1).numpy(), torch.cat(labels).numpy()))
    # Mean and deviation come from a histogram of each channel, [3, 256], because np.std would
    # make a copy of 8 times the size.
    counts = np.zeros((3, 256), np.int64)
    for image in arrays[0][0]:
        counts += [np.bincount(channel, minlength=256) for channel in image.reshape(-1, 3).T]
    share, values = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = share @ values
    std = (share @ values ** 2 - mean ** 2).clip(1e-6) ** 0.5
    return Resident("folder", *arrays, trees[0].classes, mean.tolist(), std.tolist())


def load(name, data_dir="data", image_size=None, workers=2, timesteps=4, dvs_split="first100",
         bin_by="count"):
    """A data set, Resident or Streamed. UserError with what to do where that is not possible.

    image_size  side of shapes, folder (32 unless given) and imagenet (224)
    timesteps   frames that a recording of events is cut into
    bin_by      how it is cut, see bin_events
    dvs_split   the test set: "first100", recordings 0 to 99 of each class, or "random", a tenth of
                each, always the same. N-MNIST has its own
    """
    root = pathlib.Path(data_dir)
    if image_size is None:
        image_size = 224 if name == "imagenet" else 32
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    # Large images would not fit on the device.
    if name == "imagenet" or name == "folder" and image_size > RESIDENT_UP_TO:
        tree = root / name if name == "imagenet" else root
        return Streamed(name, tree, image_size, *STATISTICS["imagenet"], workers)
    if name == "folder":
        return load_folder(root, image_size, workers)
    if name in EVENT_SETS:
        return load_events(name, root / name, workers, timesteps, dvs_split, bin_by)
    if name == "shapes":
        if image_size > RESIDENT_UP_TO:
            raise UserError(f"shapes have an --image-size up to {RESIDENT_UP_TO}, not {image_size}")
        train, test = draw_shapes(8000, 1, image_size), draw_shapes(1000, 2, image_size)
        return Resident(name, train, test, SHAPES, *STATISTICS[name])
    # CIFAR remains.
    paths, num_classes = array_paths(root / name), {"cifar10": 10, "cifar100": 100}[name]
    if not all(path.exists() for path in paths):
        write_arrays(paths, download_cifar(name, root))
    train, test = read_arrays(paths, (32, 32, 3), num_classes)
    return Resident(name, train, test, [str(c) for c in range(num_classes)], *STATISTICS[name])
