"""Data sets as batches on the training device: data = load("cifar100", "data"); for x, y in data.train(...): ...

    shapes            ten kinds of coloured shapes, drawn from a seed in a second: a smoke test, needs no download
    cifar10, cifar100 downloaded and verified by torchvision
    folder            an image tree  train/<class>/*.png|jpg|webp,  val|test/<class>/*  at --image-size
    imagenet          the same layout under <data-dir>/imagenet, random resized crops at 224

Small sets end as plain arrays, <data-dir>/<name>/{train,test}_{images,labels}.npy (uint8 [N, H, W, C] and [N]), and live on
the device as uint8 (`Resident`): cropping, flipping and normalising happen there a batch at a time, so that the input
pipeline is never what waits. Large images are decoded by worker processes (`Streamed`).

Every random draw is a function of (seed, epoch, batch) alone, never of what was drawn before: an interrupted run
continues exactly, and N processes that share a batch see what one process would see.
"""
import os
import pathlib
import tempfile
import zlib

import numpy as np
import torch
import torchvision
from torchvision import transforms

# Per-channel mean and standard deviation of the training images in 0..1, and the number of classes.
STATISTICS = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 10),
              "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762), 100),
              "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 10),
              "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), None)}
DATASETS = ("cifar10", "cifar100", "shapes", "folder", "imagenet")
RESIDENT_UP_TO = 96                                              # folders of images up to this size live on the device


class UserError(Exception):
    """Something the user can mend: bad input, a missing file, a full disk. Programs print its one line and exit with 2."""


def write_atomically(path, write):
    """write(file) into a temporary file beside path, then rename: whoever reads path sees the old or the new, whole."""
    path = pathlib.Path(path)
    temporary = None
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


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def memory_format(device):
    """channels_last is fastest on GPUs. Not so on CPUs: there oneDNN's backward pass of a 1x1 convolution with stride 2
    and few channels writes past its memory in that format (torch 2.14: 8 to 16 channels at 112x112 end in a crash)."""
    return torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format


def draws(device, *key):
    """A random generator on the device whose state depends on key (whole numbers) alone."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))


class Resident:
    """A data set that lives on the device as uint8. Images [N, H, W, C], or event frames [N, T, 2, H, W].

    pad: random shifts by up to so many pixels, zeros moving in; flip: random horizontal flips; cutout: side of a square
    set to the mean, 0 for none.
    """

    def __init__(self, name, train, test, classes, mean, std, pad=4, flip=True):
        self.name, self.classes, self.mean, self.std = name, classes, tuple(mean), tuple(std)
        self.pad, self.flip, self.cutout = pad, flip, 0
        self.sets = {}
        for split, (images, labels) in {"train": train, "test": test}.items():
            images = torch.from_numpy(np.ascontiguousarray(images))
            self.frames = images.shape[1] if images.dim() == 5 else None
            if self.frames:                                      # pixels first here too: [N, H, W, T*2]
                images = images.flatten(1, 2).permute(0, 2, 3, 1).contiguous()
            self.sets[split] = images, torch.from_numpy(labels.astype(np.int64))
        self.channels = 2 if self.frames else images.shape[3]
        self.size = tuple(images.shape[1:3])

    def __len__(self):
        return len(self.sets["train"][1])

    def limit(self, n):
        """Keep n training images, always the same, drawn from all classes."""
        images, labels = self.sets["train"]
        keep = torch.randperm(len(labels), generator=draws("cpu", 0))[:n]
        self.sets["train"] = images[keep], labels[keep]

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
            x = self._normalise(x * inside[..., None])
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
        self.channels, self.frames, self.device = 3, None, torch.device("cpu")
        self.folders = {split: image_folder(root, split) for split in ("train", "test")}
        self.classes = self.folders["train"].classes
        self.indices = list(range(len(self.folders["train"])))
        self.transforms = {
            "train": transforms.Compose([transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip(),
                                         transforms.PILToTensor()]),
            "test": fixed_crop(image_size, round(image_size * 256 / 224))}

    def __len__(self):
        return len(self.indices)

    def limit(self, n):
        self.indices = torch.randperm(len(self), generator=draws("cpu", 0))[:n].tolist()

    def to(self, device):
        self.device = torch.device(device)
        return self

    def _batches(self, split, batches):
        """batches: lists of (index, seed of its draws). Decoded, cropped, moved and normalised."""
        mean, std = (255 * torch.tensor(v, device=self.device).view(3, 1, 1) for v in (self.mean, self.std))
        for x, y in image_loader(self.folders[split], self.transforms[split], batches, self.workers, self.device):
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            yield ((x.float() - mean) / std).contiguous(memory_format=memory_format(self.device)), y

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


class _Decoded(torch.utils.data.Dataset):
    """(index, seed) -> (uint8 image [3, H, W], label), with the transform's draws taken from the seed."""

    def __init__(self, folder, transform):
        self.folder, self.transform = folder, transform

    def __getitem__(self, key):
        index, seed = key
        path, label = self.folder.samples[index]
        torch.manual_seed(seed)
        try:
            return self.transform(self.folder.loader(path)), label
        except (OSError, ValueError, SyntaxError) as error:      # what Pillow raises for files that are no images
            raise UserError(f"{path}: not a readable image: {first_line(error)}") from error


def image_loader(folder, transform, batches, workers, device=torch.device("cpu")):
    """torch's DataLoader over lists of (index, seed); a bad image gives UserError, from a worker process too."""
    loader = torch.utils.data.DataLoader(_Decoded(folder, transform), batch_sampler=batches, num_workers=workers,
                                         pin_memory=device.type == "cuda", prefetch_factor=4 if workers else None)
    try:
        yield from loader
    except UserError as error:                                   # the loader prepends the worker's traceback
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("data.UserError: ")) from None


def load(name, data_dir="data", image_size=32, workers=2):
    """Read, download or draw a data set. Raises UserError with what to do where that is not possible."""
    root = pathlib.Path(data_dir)
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    if name == "folder":
        if image_size > RESIDENT_UP_TO:
            return Streamed(name, root, image_size, *STATISTICS["imagenet"][:2], workers)
        train, test = (image_folder(root, split) for split in ("train", "test"))
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise UserError(f"{root}: the class folders of training and test differ: {', '.join(odd[:5])}")
        arrays = [decode(folder, image_size, workers) for folder in (train, test)]
        pixels = arrays[0][0].reshape(-1, 3)
        return Resident(name, *arrays, train.classes, (pixels.mean(0) / 255).tolist(),
                        ((pixels.std(0) / 255).clip(1e-3)).tolist(), pad=image_size // 8)
    if name == "imagenet":
        return Streamed(name, root / name, image_size, *STATISTICS[name][:2], workers)
    mean, std, classes = STATISTICS[name]
    if name == "shapes":
        return Resident(name, draw_shapes(8000, seed=1), draw_shapes(1000, seed=2), SHAPES, mean, std, flip=True)
    folder = root / name
    if not all((folder / f"{split}_{kind}.npy").exists() for split in ("train", "test") for kind in ("images", "labels")):
        download_cifar(name, root)
    train, test = (read_arrays(folder, split, (32, 32, 3), classes) for split in ("train", "test"))
    return Resident(name, train, test, [str(c) for c in range(classes)], mean, std)


def read_array(path):
    try:
        return np.load(path, allow_pickle=False)
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


def write_arrays(folder, split, images, labels, suffix=""):
    for kind, array in (("images", images), ("labels", labels)):
        write_atomically(folder / f"{split}_{kind}{suffix}.npy", lambda file, a=array: np.save(file, a, allow_pickle=False))


def download_cifar(name, root):
    """Let torchvision download and verify the original into root, and write the prepared arrays."""
    original, unpacked = ((torchvision.datasets.CIFAR10, "cifar-10-batches-py") if name == "cifar10" else
                          (torchvision.datasets.CIFAR100, "cifar-100-python"))
    try:
        for split in ("train", "test"):
            part = original(root, train=split == "train", download=True)
            write_arrays(root / name, split, part.data, np.array(part.targets, np.uint8))
    except (OSError, RuntimeError) as error:
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
    y, x = ((np.arange(size).reshape(shape) + 0.5 - c) / radius                      # the shape reaches from -1 to 1
            for shape, c in (((1, size, 1), centre[0]), ((1, 1, size), centre[1])))
    box, distance, phase = np.maximum(abs(x), abs(y)), np.hypot(x, y), rng.uniform(0, 1, (2, n, 1, 1))
    bands = [np.floor(2 * axis + p) % 2 == 0 for axis, p in ((y, phase[0]), (x, phase[1]))]
    masks = [distance < 1, (distance < 1) & (distance > 0.6), box < 0.85, (box < 0.9) & (box > 0.55),
             (y < 0.8) & (y > 2 * abs(x) - 0.9), (box < 1) & (np.minimum(abs(x), abs(y)) < 0.25),
             (box < 0.9) & (abs(abs(x) - abs(y)) < 0.3), bands[0] & (box < 1), bands[1] & (box < 1),
             (bands[0] ^ bands[1]) & (box < 1)]
    mask = np.zeros((n, size, size), bool)
    for label, drawn in enumerate(masks):
        mask |= drawn & (labels == label)[:, None, None]
    ground = rng.uniform(40, 215, (n, 1, 1, 3))
    paint = (ground + rng.choice([-1, 1], (n, 1, 1, 3)) * rng.uniform(60, 110, (n, 1, 1, 3))) % 256
    image = np.where(mask[..., None], paint, ground) + rng.normal(0, 12, (n, size, size, 3))
    return image.clip(0, 255).astype(np.uint8), labels
