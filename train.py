"""Train a spiking network with MP-Init and TrSG: python train.py --dataset cifar100 --arch resnet19

Writes into --out: log.csv (a row per epoch), last.pt (everything needed to go on) and best.pt (the
network with the best test accuracy). Look at the result with  python eval.py DIR/best.pt.
A first try that needs no download and takes minutes on two CPU cores:

    python train.py --dataset shapes --arch resnet19 --width 8 --timesteps 2 --epochs 3

Several GPUs:  torchrun --nproc_per_node 8 train.py ...   (--batch-size counts all of them)
Ctrl-C or SIGTERM finishes the step, saves and leaves; --resume DIR goes on as if nothing happened.

To read this file, start with main, then train_step and score: these three are the training. The
sections on the machine and on checkpoints can wait, and a reader with a single GPU skips the one on
several processes.
This file imports neuron.py, models.py and data.py; eval.py imports this one.
"""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import io
import math
import os
import pathlib
import signal
import sys
import threading
import time
import warnings
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
import models
import neuron
from data import UserError, first_line

# What determines a result besides the network and the data. Flags of the same names say what each
# is, and override it. A batch_size of None follows from the size of the data set.
# The neuron_rate is low in the fast recipe, because the gradients of thresholds and time constants
# are sums over a whole layer: at the full rate narrow networks stay at chance or diverge.
RECIPES = {
    # The authors' published code, except that the cosine falls at every step, not every epoch.
    "paper": dict(
        epochs=200, batch_size=64, optimizer="sgd", lr=0.02, warmup=0.0, neuron_rate=1.0,
        weight_decay=5e-4, decayed="all", init="published", label_smoothing=0.0, mixup=0.0,
    ),
    # For short runs and narrow networks.
    "fast": dict(
        epochs=100, batch_size=None, optimizer="nesterov", lr=0.3, warmup=0.05, neuron_rate=0.1,
        weight_decay=5e-4, decayed="weights", init="kaiming", label_smoothing=0.0, mixup=0.0,
    ),
    # As spikformer's authors train it, except for the augmentation.
    "spikformer": dict(
        epochs=100, batch_size=None, optimizer="adamw", lr=5e-4, warmup=0.1, neuron_rate=1.0,
        weight_decay=0.06, decayed="weights", init="kaiming", label_smoothing=0.1, mixup=0.5,
    ),
}
# Settings that a resumed run keeps, because its weights, its data or the state of its optimizer
# would no longer fit.
FIXED = (
    "dataset image_size dvs_split bin_by classes limit recipe optimizer batch_size arch timesteps "
    "width threshold tau mp_init surrogate fixed_neuron scale_currents"
).split()
FORMAT = "MP-Init + TrSG checkpoint 4"


# ---- The command line ---------------------------------------------------------------------------

def number_type(kind, low, high=math.inf, above=False):
    """A type for argparse: a number of kind int or float, at least (or above) low, below high."""

    def convert(text):
        # argparse reports the ValueError of a text that is no number.
        value = kind(text)
        if not low <= value < high or (above and value == low):
            limit = f"{'above' if above else 'at least'} {low}"
            raise argparse.ArgumentTypeError(f"{text} is not {limit} and below {high}")
        return value

    # argparse uses this name in its message.
    convert.__name__ = kind.__name__
    return convert


def path(text):
    """A type for argparse: the name of a file or folder, ~ being the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("a name is needed")
    return os.path.expanduser(text)


# The kinds of numbers that flags take.
count = number_type(int, 1)
count_or_0 = number_type(int, 0)
positive = number_type(float, 0, above=True)
not_negative = number_type(float, 0)
fraction = number_type(float, 0, 1)


def make_parser():
    how = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # The rest of the docstring is for readers of this file.
    about = __doc__.partition("To read this file")[0]
    parser = argparse.ArgumentParser("train.py", description=about, **how)

    add = parser.add_argument_group("network").add_argument
    add("--arch", default="resnet19", choices=models.ARCHS, help="network (%(default)s)")
    add("--timesteps", default=4, type=count, help="T: steps per image, frames per recording (4)")
    add("--width", default=64, type=count, help="channels of the stem, 64 as published (64)")
    add("--threshold", default=1.0, type=positive, help="initial threshold theta (1)")
    above_1 = number_type(float, 1, above=True)
    add("--tau", default=2.0, type=above_1, help="initial time constant tau, in time steps (2)")
    add("--mp-init", default="active", choices=("active", "all", "off"),
        help="initial membrane potential: mean of the neurons that fired, of all, or 0 (active)")
    add("--surrogate", default="trsg", choices=("trsg", "absolute"),
        help="TrSG, whose window scales with theta, or a window of fixed width (trsg)")
    add("--fixed-neuron", action="store_true", help="do not train theta and tau")
    # See models.scale_currents.
    add("--scale-currents", action="store_true",
        help="initialise BatchNorm's weights to theta instead of 1")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="cifar100", choices=data.DATASETS, help="see data.py (%(default)s)")
    add("--data-dir", default="data", type=path, help="where data is; for folder the tree (data)")
    add("--image-size", type=count, help="of shapes and folder (32), of imagenet (224)")
    # The next two concern event recordings only.
    add("--dvs-split", default="first100", choices=("first100", "random"),
        help="test set of cifar10-dvs: recordings 0 to 99 of a class, or a random tenth (first100)")
    add("--bin-by", default="count", choices=("count", "time"),
        help="cut recordings into frames of equally many events, or equally long ones (count)")
    # Smaller tasks for quick trials.
    add("--classes", type=number_type(int, 2), metavar="N", help="use the first N classes only")
    add("--limit", type=count, metavar="N", help="use N training images only")
    add("--workers", type=count_or_0,
        help="processes that decode images (default: one per core, at most 16)")

    # What has no default here is up to the recipe.
    about = "Where a flag is not given, the recipe's value holds:"
    for name, recipe in RECIPES.items():
        about += f"\n{name}: " + ", ".join(f"{flag} {value}" for flag, value in recipe.items())
    add = parser.add_argument_group("recipe", about).add_argument
    add("--recipe", choices=RECIPES, help="fast for shapes, spikformer for spikformer, else paper")
    add("--epochs", type=count, help="passes over the training set")
    add("--batch-size", type=count, help="images per step, of all processes together")
    add("--accumulate", default=1, type=count, help="compute a step in N parts, to save memory (1)")
    add("--optimizer", choices=("sgd", "nesterov", "adamw"), help="SGD has momentum 0.9")
    add("--lr", type=positive, help="peak learning rate, from which a cosine falls to 0")
    add("--warmup", type=fraction, help="fraction of the run in which the rate rises to --lr")
    add("--neuron-rate", type=not_negative, help="learning rate of theta and tau, in units of --lr")
    add("--weight-decay", type=not_negative, help="weight decay of what --decayed says")
    add("--decayed", choices=("all", "weights"),
        help="all parameters, or weights only: no biases, BatchNorm, theta and tau")
    add("--init", choices=models.INITS,
        help="initial weights, see models.build; identity, with --tau 1.25, is for resnet18 and "
             "resnet34 on few images")
    add("--label-smoothing", type=fraction, help="fraction of the target that all classes share")
    add("--mixup", type=not_negative, help="alpha of mixup's Beta distribution, 0 for none")
    add("--seed", default=0, type=number_type(int, 0, 2**63), help="random seed (0)")

    add = parser.add_argument_group("machine and run").add_argument
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=gpu, help="cpu, cuda or cuda:N (%(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction,
        help="compute in bfloat16 (default: on GPUs that do so fast)")
    add("--compile", choices=("network", "neurons", "off"),
        help="what torch.compile fuses (network on CUDA, else neurons)")
    add("--no-compile", dest="compile", action="store_const", const="off", help="--compile off")
    add("--deterministic", action="store_true", help="repeatable on CUDA, slower")
    add("--out", type=path, metavar="DIR", help="log and checkpoints (a new folder in runs/)")
    add("--resume", type=path, metavar="DIR",
        help="go on with the run in DIR (or its last.pt); auto: with that in --out, if any")
    add("--save-every", default=10.0, type=positive, metavar="MINUTES",
        help="write last.pt within epochs too (10)")
    return parser


def parse(argv, settings=None):
    """All settings as a namespace: the flags given, else those of a run that goes on (settings, a
    dict), else the recipe's, else the defaults."""
    parser = make_parser()
    args = parser.parse_args(argv)
    # What argparse cannot check: flags that need or exclude each other.
    if args.resume == "auto" and args.out is None:
        parser.error("--resume auto needs --out DIR")
    if args.resume not in (None, "auto") and args.out is not None:
        parser.error("--resume DIR goes on in that folder: leave --out out")
    recipe = args.recipe
    if recipe is None:
        # Drawn shapes are for a first try, which has to be short.
        recipe = "fast" if args.dataset.startswith("shapes") else "paper"
        if args.arch == "spikformer":
            recipe = "spikformer"
    # Parse again with other defaults: flags that are given still override them.
    parser.set_defaults(recipe=recipe, **RECIPES[recipe])
    if settings:
        # These three always come from the command line.
        own = "device", "out", "resume"
        parser.set_defaults(**{name: v for name, v in settings.items() if name not in own})
    return parser.parse_args(argv)


# ---- The machine --------------------------------------------------------------------------------

def use_device(name):
    """The torch.device of that name, made the current one. UserError where it is unusable."""
    try:
        device = torch.device(name)
        # A device may exist and still be unusable, for example without a driver.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name} cannot be used here: {first_line(error)}") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if device.type == "cpu" and sys.platform == "linux":
        # Let the C library keep the memory of freed tensors for the next ones. Otherwise it returns
        # large blocks to the system and gets them back page by page, which takes a tenth to a half
        # of a training step.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)
        # M_TRIM_THRESHOLD: give nothing back. M_MMAP_MAX: take no block from the system directly.
        mallopt(-1, -1)
        mallopt(-4, 0)
    return device


def set_precision(args, device, say):
    """Settle args.amp, and what the libraries of a GPU may do for speed."""
    on_cuda = device.type == "cuda"
    if on_cuda and torch.__version__ < (2, 13):
        say("The neurons run faster with torch 2.14 or later.")
    if args.amp is None:
        # Older GPUs are slow in bfloat16.
        args.amp = on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    # Without bfloat16 a GPU may round to TF32 inside matrix products.
    torch.set_float32_matmul_precision("high")
    # Try several algorithms and keep the fastest. Which one that is, and with it the rounding, may
    # differ from run to run.
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        # cuBLAS repeats its results only with workspaces of a fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def compile_network(model, x, args, say):
    """Fuse the whole network for batches like x. Where that fails, only its neurons are fused."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # With fullgraph a part that cannot be compiled is an error instead of a slow run.
    models.compile_model(model, fullgraph=True)
    try:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
            # The first calls compile: forward and backward for training, forward for evaluation.
            model(x.chunk(args.accumulate)[0]).float().sum().backward()
            with torch.no_grad():
                model.eval()(x)
    # Running out of memory is no failure to compile.
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        model._compiled_call_impl = None
        say(f"The network cannot be compiled here, only its neurons are: {first_line(error)}")
    # Undo what these calls changed: gradients, running means and statistics.
    model.train().zero_grad(set_to_none=True)
    model.load_state_dict(before, strict=False)


# ---- Several processes. With a single GPU you may skip this section ------------------------------

class Processes:
    """This process, number `rank` of the `world` processes that torchrun started.

    A single process has nobody to talk to: say just prints, from_first and prepare just call their
    function, agree returns its arguments, and leave(0) simply returns.
    """

    def __init__(self, device):
        self.world, self.rank, self.first_here = 1, 0, True
        if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
            self.device = use_device(device)
            return
        if device.startswith("cuda:"):
            raise UserError(f"--device {device}: each process takes a GPU of its own, give cuda")
        on_cuda = device == "cuda"
        # torchrun tells each process in its environment which one it is.
        names = "WORLD_SIZE", "RANK", "LOCAL_RANK"
        try:
            self.world, self.rank, local_rank = (int(os.environ[name]) for name in names)
            if not 0 <= self.rank < self.world:
                raise ValueError(f"no RANK {self.rank} in a WORLD_SIZE of {self.world}")
            self.first_here = local_rank == 0
            self.device = use_device(f"cuda:{local_rank}" if on_cuda else device)
            # Gloo serves what lies on the CPU, so that votes need not wait for the GPU. The timeout
            # is an hour, because the others wait while one process prepares the data.
            backends = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
            hour, device_id = datetime.timedelta(hours=1), self.device if on_cuda else None
            dist.init_process_group(backends, timeout=hour, device_id=device_id)
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError("cannot join the processes that WORLD_SIZE asks for: start them with "
                            "torchrun, or unset WORLD_SIZE for a single one "
                            f"({type(error).__name__}: {first_line(error)})") from error

    def say(self, text):
        """Print in the first process, and at once: output into a file might appear much later."""
        if self.rank > 0:
            return
        try:
            print(text, flush=True)
        except OSError:
            # The reader of our output, tee for example, has quit. We carry on without output.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def from_first(self, function):
        """Call function() in the first process and return its result in all of them, because the
        others may not have the files that it reads."""
        if self.world == 1:
            return function()
        answer = [None]
        if self.rank == 0:
            try:
                answer = [function()]
            except UserError as error:
                # All processes end with this error.
                answer = [error]
        dist.broadcast_object_list(answer, device=torch.device("cpu"))
        if isinstance(answer[0], UserError):
            raise answer[0]
        return answer[0]

    def prepare(self, function):
        """Call function() in one process of each machine first, so that the others of that machine
        find its files written."""
        # The others wait here until the first one is at the barrier below.
        if not self.first_here:
            dist.barrier()
        result = function()
        if self.world > 1 and self.first_here:
            dist.barrier()
        return result

    def agree(self, *values):
        """The largest of each value over all processes, so that all of them act alike."""
        if self.world == 1:
            return values
        votes = torch.tensor([int(value) for value in values])
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return votes.tolist()

    def total(self, sums):
        """The sum of a tensor over all processes."""
        sums = sums.clone()
        if self.world > 1:
            dist.all_reduce(sums)
        return sums

    def equalise(self, model):
        """Give all processes the first one's buffers. Each has BatchNorm statistics of its own, but
        what is evaluated has to be what is saved."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def leave(self, code):
        """End the program, all processes together. A process on its own returns for code 0."""
        if self.world > 1:
            # Nobody leaves while another still waits for its answer.
            dist.barrier()
            dist.destroy_process_group()
            leave_at_once(code)
        if code:
            sys.exit(code)


def leave_at_once(code):
    """End one of several processes by os._exit. In a normal shutdown threads of the process group
    may still run, and crash."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- Checkpoints: a network on disk --------------------------------------------------------------

@dataclasses.dataclass
class Progress:
    """How far a run is. Every checkpoint holds these fields."""

    # The epoch, counted from 0, and the steps done in it.
    epoch: int = 0
    step: int = 0
    # The best test accuracy so far, and the rows of log.csv.
    best: float = -1.0
    rows: list = dataclasses.field(default_factory=list)
    # Time spent on this run, without the breaks before it was resumed.
    seconds: float = 0.0
    # For the row of this epoch: the learning rate of the last step, the speed, and the sums over
    # the training images so far: loss times images, right answers, images.
    lr: float = 0.0
    images_per_s: float = 0.0
    sums: list = dataclasses.field(default_factory=lambda: [0.0, 0.0, 0.0])


def save(file, description, progress, weights, **more):
    """Write a checkpoint. A run that is killed while writing leaves the old one.

    description   format; network, the arguments of models.build; settings, all flags; classes,
                  mean and std of the data
    weights       model.state_dict(), with MP-Init's means
    more          in last.pt: the state of the optimizer

    No random generator has a state to save: all draws depend on seed, epoch and step alone.
    """
    checkpoint = {**description, **vars(progress), "model": weights, **more}
    data.write_atomically(file, lambda f: torch.save(checkpoint, f))


def load_checkpoint(file):
    """A checkpoint as train.py wrote it, on the CPU: plain data and tensors, nothing that could
    run code. UserError for any other file."""
    try:
        with zipfile.ZipFile(file) as archive:
            # torch does not look at the checksums, which reveal damaged weights.
            if archive.testzip():
                raise ValueError("its checksums do not fit")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}): it may be truncated, or no "
                        "checkpoint of train.py") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{file} is no checkpoint of train.py, or of another version: its format "
                        f"is not {FORMAT!r}")
    return checkpoint


def build_network(checkpoint):
    """The network in a checkpoint, in evaluation mode."""
    model = models.build(**checkpoint["network"])
    # A folded network has other layers, so its weights fit only after folding.
    if checkpoint.get("folded"):
        model = models.fold(model)
    model.load_state_dict(checkpoint["model"])
    return model.eval()


def check_classes(checkpoint, dataset, data_dir):
    """UserError unless the data set has the very classes that the network was trained on."""
    # A label is the place of a class among the names, so other names mean other labels.
    classes = checkpoint["classes"]
    if classes != dataset.classes:
        raise UserError(f"{dataset.name} in {data_dir} has other classes than those trained on: "
                        f"{len(dataset.classes)} instead of {len(classes)}, or of other names")


# ---- Evaluation ---------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, batches, amp=False):
    """Accuracy on batches (x, y), over those of all processes together. y = -1 is padding.

    Returns a dict: top1_at, a list of the fraction right when read out after t = 1 ... T steps
    (mean of the logits so far); top1 = top1_at[-1]; top5; images. Waits for the device once.
    UserError where the network's logits are NaN or infinite.
    """
    training = model.training
    model.eval()
    # Numbers of images, on the device: right after each of the T steps, right in the top five, with
    # logits that are not finite, all.
    totals = 0
    for x, y in batches:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits = model(x)
        # Sums of the logits so far, [T, B, classes]. The argmax of a sum is that of the mean.
        so_far = logits.float().cumsum(0)
        right = (so_far.argmax(2) == y).sum(1)
        best5 = so_far[-1].topk(min(5, logits.shape[2])).indices
        among5 = (best5 == y[:, None]).sum()
        bad = (~so_far[-1].isfinite()).any(1).sum()
        images = (y >= 0).sum()
        totals = totals + torch.cat([right, torch.stack([among5, bad, images])])
    model.train(training)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals)
    *right, among5, bad, images = totals.tolist()
    if bad:
        raise UserError("the network's logits are NaN or infinite: it has diverged in training, "
                        "or its images have values that are not finite")
    top1_at = [n / images for n in right]
    return {"top1_at": top1_at, "top1": top1_at[-1], "top5": among5 / images, "images": images}


# ---- One step -----------------------------------------------------------------------------------

def make_optimizer(model, args):
    """The optimizer, with three groups of parameters, told apart by their dimensions."""
    groups = []
    # Weights have 2 or more dimensions, biases and BatchNorm 1, thresholds and time constants 0.
    for dims, lr_scale in ((2, 1.0), (1, 1.0), (0, args.neuron_rate)):
        learnt = [p for p in model.parameters() if p.requires_grad and min(p.dim(), 2) == dims]
        decay = args.weight_decay if dims == 2 or args.decayed == "all" else 0.0
        # With --fixed-neuron the last group is empty.
        if learnt:
            groups.append(dict(params=learnt, lr_scale=lr_scale, weight_decay=decay))
    # With fused=True one kernel updates all parameters of a group.
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr, fused=True)
    nesterov = args.optimizer == "nesterov"
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=nesterov, fused=True)


def learning_rate(step, steps, args):
    """Linear warm-up to args.lr, then a cosine to 0. steps: of the whole run."""
    # The length of the warm-up in steps, which need not be a whole number.
    warmup = args.warmup * steps
    if step < warmup:
        return args.lr * (step + 1) / math.ceil(warmup)
    # Half a period, from 1 to 0.
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def score(logits, y, weight, label_smoothing):
    """The loss, cross-entropy on the mean of the logits over T, and sums [loss, right, images].

    logits [T, B, classes], labels y [B]. weight: mixup's fraction of each image x[i], the rest of
    which is x[-1 - i]; 1 without mixup.
    """
    # [T, B, classes] -> [B, classes], in float32 whatever the network computes in.
    logits = logits.float().mean(0)
    loss = weight * F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    if weight < 1:
        other = F.cross_entropy(logits, y.flip(0), label_smoothing=label_smoothing)
        loss = loss + (1 - weight) * other
    # With mixup, too, only y counts as right. The sums stay on the device, because reading them
    # would make the host wait.
    right = (logits.argmax(1) == y).sum().float()
    images = torch.full_like(right, len(y))
    return loss, torch.stack([loss.detach() * images, right, images])


def train_step(model, loss_and_sums, optimizer, scaler, x, y, args, key):
    """One step of the optimizer on images x and labels y. Returns the sums of score, and does not
    wait for the device.

    loss_and_sums: score, or score compiled. key: (seed, epoch, step), for mixup's draws
    """
    optimizer.zero_grad(set_to_none=True)
    # The gradients of all parts add up before the optimizer's step.
    totals = 0
    parts = zip(x.chunk(args.accumulate), y.chunk(args.accumulate))
    for part, (x_part, y_part) in enumerate(parts):
        weight = 1.0
        if args.mixup:
            # The draw depends on seed, epoch, step and part alone: a resumed run draws the same.
            weight = float(np.random.default_rng((*key, part)).beta(args.mixup, args.mixup))
            x_part = weight * x_part + (1 - weight) * x_part.flip(0)
        # Processes sum their gradients after the last part only.
        last = part == args.accumulate - 1
        skip_sum = isinstance(model, DistributedDataParallel) and not last
        with model.no_sync() if skip_sum else contextlib.nullcontext():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
                logits = model(x_part)
            loss, sums = loss_and_sums(logits, y_part, weight, args.label_smoothing)
            scaler.scale(loss / args.accumulate).backward()
        totals = totals + sums
    # The scaler skips the step if a gradient is not finite.
    scaler.step(optimizer)
    scaler.update()
    return totals


# ---- The run ------------------------------------------------------------------------------------

def open_run(args, argv):
    """(folder of the run, its checkpoint or None, args). Replaces no run unless asked to go on."""
    resume = args.resume
    # With auto a batch system can run the same command again.
    if resume == "auto":
        resume = args.out if os.path.exists(f"{args.out}/last.pt") else None
    # A new run.
    if resume is None:
        # The process number tells apart two runs that start in the same second.
        name = f"{args.dataset}-{args.arch}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        out = pathlib.Path(args.out or f"runs/{name}")
        present = [name for name in ("last.pt", "best.pt", "log.csv") if (out / name).exists()]
        if present and args.resume is None:
            advice = "add --resume auto to go on with it, or give another --out"
            raise UserError(f"{out} holds a run ({', '.join(present)}): {advice}")
        return out, None, args
    # A run that goes on, from its folder or from a file in it.
    file = pathlib.Path(resume)
    if not file.is_file():
        file = file / "last.pt"
    checkpoint = load_checkpoint(file)
    if "optimizer" not in checkpoint:
        raise UserError(f"{file} is a best.pt or folded: for evaluation only")
    # It keeps its settings, except for the flags that this command line gives.
    old = checkpoint["settings"]
    args = parse(argv, old)
    for name in FIXED:
        new = getattr(args, name)
        if new != old[name]:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"the run in {file.parent} has {flag} {old[name]}, not {new}")
    if checkpoint["epoch"] >= args.epochs:
        raise UserError(f"--epochs {args.epochs} is too few: the run in {file.parent} is in epoch "
                        f"{checkpoint['epoch'] + 1} already")
    return file.parent, checkpoint, args


def create_folder(out, resuming):
    """Create the run's folder and log."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.csv").touch(exist_ok=resuming)
    except OSError as error:
        raise UserError(f"cannot write a run into {out}: {error.strerror}") from error


def load_data(settings, data_dir, workers, timesteps):
    """The data set that a run's settings name. timesteps: frames per recording of events."""
    how = settings.image_size, workers, timesteps, settings.dvs_split, settings.bin_by
    dataset = data.load(settings.dataset, data_dir, *how)
    if settings.classes:
        dataset.keep_classes(settings.classes)
    return dataset


def make_dataset(args, procs):
    """The data set on the device. Sets args.batch_size where the recipe leaves it open."""
    # One process of each machine downloads and prepares what is missing, the others wait.
    dataset = procs.prepare(
        lambda: load_data(args, args.data_dir, args.workers, args.timesteps))
    if args.limit:
        dataset.limit("train", args.limit, "--limit")
    images, parts = len(dataset), procs.world * args.accumulate
    if args.batch_size is None:
        # Small sets take small batches, so that an epoch has enough steps.
        args.batch_size = 64
        if images < 20000:
            args.batch_size = 32 if images >= 5000 else 16
        # Rounded down to a multiple of the parts.
        args.batch_size = max(parts, min(args.batch_size, images) // parts * parts)
    if args.batch_size % parts or args.batch_size > images:
        raise UserError(f"--batch-size {args.batch_size} must be divisible by {procs.world} "
                        f"processes x --accumulate {args.accumulate}, and at most the {images} "
                        "training images")
    return dataset.to(procs.device)


def make_model(args, dataset, device):
    """(options, model): models.build(**options) builds a network of the same shape."""
    names = "arch", "timesteps", "width", "threshold", "tau", "mp_init", "surrogate"
    options = {name: getattr(args, name) for name in names}
    options.update(num_classes=len(dataset.classes), in_channels=dataset.channels)
    options.update(learnable=not args.fixed_neuron)
    # models.build checks values that come from flags.
    try:
        model = models.build(**options, init=args.init)
    except ValueError as error:
        raise UserError(str(error)) from error
    if args.scale_currents:
        models.scale_currents(model, args.threshold)
    return options, model.to(device, memory_format=data.memory_format(device))


def start_or_resume(model, checkpoint, args):
    """(optimizer, progress) of a new run or, together with the model's weights, of a checkpoint."""
    optimizer = make_optimizer(model, args)
    if checkpoint is None:
        return optimizer, Progress()
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    # That also restored the old rates and decay. The command line may have changed them.
    for group, new in zip(optimizer.param_groups, make_optimizer(model, args).param_groups):
        group.update(lr_scale=new["lr_scale"], weight_decay=new["weight_decay"])
    # A fused optimizer computes wrong values, without an error, unless its state is laid out as the
    # weights are: channels_last on a GPU, not on a CPU.
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.dim() == 4:
                state[name] = torch.empty_like(parameter).copy_(value)
    names = [field.name for field in dataclasses.fields(Progress)]
    return optimizer, Progress(**{name: checkpoint[name] for name in names})


def make_fast(model, dataset, args, procs):
    """Compile what --compile asks for, and wrap the model where several processes train it.
    Returns (the model to train, score or score compiled)."""
    # On a CPU it takes minutes to fuse the whole network, and gains nothing over its neurons.
    on_cuda = procs.device.type == "cuda"
    fused = args.compile or ("network" if on_cuda else "neurons")
    neuron.COMPILE = fused != "off"
    loss_and_sums = score
    if fused == "network":
        if on_cuda:
            # Augmentation and loss launch many small kernels, too.
            dataset.fused, loss_and_sums = True, torch.compile(score)
        batches = dataset.train(args.batch_size, args.seed, 0, 0, procs.rank, procs.world)
        x, _ = next(iter(batches))
        compile_network(model, x, args, procs.say)
    if procs.world == 1:
        return model, loss_and_sums
    devices = [procs.device.index] if on_cuda else None
    # Each process has BatchNorm statistics of its own until evaluation. torch 2.14 warns that this
    # option has a new name, which torch 2.11 does not know.
    warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
    how = dict(broadcast_buffers=False, gradient_as_bucket_view=True)
    return DistributedDataParallel(model, device_ids=devices, **how), loss_and_sums


def describe(args, dataset, model, out, procs):
    """Print all that determines the result."""
    parameters = sum(p.numel() for p in model.parameters())
    layers = sum(isinstance(layer, neuron.TrLIF) for layer in model.modules())
    drawn = " (drawn: a smoke test, no benchmark)" if args.dataset.startswith("shapes") else ""
    procs.say(f"{args.arch}: {parameters:,d} parameters, {layers} neuron layers; "
              f"{args.dataset}{drawn}: {len(dataset):,d} training images, "
              f"{len(dataset.classes)} classes")
    # The recipe's values first, then everything else.
    recipe = RECIPES[args.recipe]
    values = [f"{name} {getattr(args, name)}" for name in recipe]
    others = [f"{name} {v}" for name, v in sorted(vars(args).items()) if name not in recipe]
    procs.say(f"recipe {args.recipe}: " + ", ".join(values))
    procs.say("settings: " + ", ".join(others))
    procs.say(f"{procs.world} x {procs.device}, torch {torch.__version__}, writing to {out}")


@contextlib.contextmanager
def noted_signals():
    """Inside this block SIGTERM and SIGINT are only noted. The block gets a list whose last item is
    the latest signal, or 0 while there was none."""
    signals = [0]

    def note(signum, frame):
        signals.append(signum)
        # After a first signal Ctrl-C ends the program at once.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # Python allows handlers in the main thread only.
    noted = []
    if threading.current_thread() is threading.main_thread():
        noted = [signal.SIGTERM, signal.SIGINT]
    before = {signum: signal.signal(signum, note) for signum in noted}
    try:
        yield signals
    finally:
        # A program that called main gets its own handlers back.
        for signum, handler in before.items():
            signal.signal(signum, handler)


def stop_by(signum, out, procs):
    """End the program because of a signal. All that it needs to go on is saved."""
    procs.say(f"stopped by {signal.Signals(signum).name}: go on with --resume {out}")
    # By convention the exit code is 128 plus the number of the signal.
    procs.leave(128 + signum)


def watched(batches, images, signals, out, procs):
    """The batches of an evaluation. Prints how far it is, and ends the program at a signal."""
    pace = data.Pace(images, "images")
    for i, (x, y) in enumerate(batches, 1):
        yield x, y
        # The padding of the last batch does not count.
        pace.count(min(len(y) * procs.world, images - pace.done))
        if procs.world > 1 and i % 10:
            continue
        print_due, stop = procs.agree(pace.due(), signals[-1])
        if print_due:
            procs.say(f"{pace}; evaluation")
        if stop:
            stop_by(stop, out, procs)


def log_row(progress, test, split):
    """A row of log.csv: {column: text}."""
    loss, right, images = progress.sums
    row = dict(epoch=str(progress.epoch + 1), lr=f"{progress.lr:.6g}")
    row.update(train_loss=f"{loss / images:.5f}", train_acc=f"{right / images:.5f}")
    for t, accuracy in enumerate(test["top1_at"], 1):
        row[f"test_acc_t{t}"] = f"{accuracy:.5f}"
    row.update(images_per_s=f"{progress.images_per_s:.1f}", seconds=f"{progress.seconds:.1f}")
    # Recordings of events have no usual split, so the log says which one this is.
    if split:
        row["split"] = split
    return row


def write_log(file, rows):
    text = io.StringIO()
    log = csv.DictWriter(text, rows[-1], lineterminator="\n")
    log.writeheader()
    log.writerows(rows)
    data.write_atomically(file, lambda f: f.write(text.getvalue().encode()))


def main(argv=None):
    # Settings and processes, of a new run or of one to resume.
    args = parse(argv)
    procs = Processes(args.device)
    device, rank, world, say = procs.device, procs.rank, procs.world, procs.say
    out, checkpoint, args = procs.from_first(lambda: open_run(args, argv))
    set_precision(args, device, say)
    torch.manual_seed(args.seed)

    # Data, network and optimizer, new or as the checkpoint left them.
    dataset = make_dataset(args, procs)
    options, model = make_model(args, dataset, device)
    if checkpoint:
        check_classes(checkpoint, dataset, args.data_dir)
    optimizer, progress = start_or_resume(model, checkpoint, args)
    # We use the scaler only because it skips steps with gradients that are not finite, without
    # waiting for the device, so the weights survive a divergence. It scales by 1.
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**30)
    # Only now, so that a run without data leaves no folder. Of two runs that start at once in one
    # folder, the second fails here.
    procs.from_first(lambda: create_folder(out, resuming=args.resume is not None))
    describe(args, dataset, model, out, procs)
    ddp_model, loss_and_sums = make_fast(model, dataset, args, procs)

    # The part of a checkpoint that stays the same throughout the run.
    description = dict(format=FORMAT, network=options, settings=vars(args))
    description.update(classes=dataset.classes, mean=dataset.mean, std=dataset.std)
    # A last batch that is not full is left out.
    steps = len(dataset) // args.batch_size
    # A resumed run adds to the seconds it has spent already.
    start = time.perf_counter() - progress.seconds
    saved_at = time.perf_counter()

    def save_last(weights):
        if rank == 0:
            save(out / "last.pt", description, progress, weights, optimizer=optimizer.state_dict())

    with noted_signals() as signals:
        while progress.epoch < args.epochs:
            model.train()
            # This process's sums since the last look at them, on the device.
            sums = torch.zeros(3, device=device)
            pace = data.Pace((steps - progress.step) * args.batch_size, "images")
            for x, y in dataset.train(args.batch_size, args.seed, progress.epoch, progress.step,
                                      rank, world):
                # The learning rate of this step. The neurons get a fraction of it.
                steps_done = progress.epoch * steps + progress.step
                progress.lr = learning_rate(steps_done, args.epochs * steps, args)
                for group in optimizer.param_groups:
                    group["lr"] = progress.lr * group["lr_scale"]
                # Forward, backward, update.
                key = args.seed, progress.epoch, progress.step
                sums += train_step(ddp_model, loss_and_sums, optimizer, scaler, x, y, args, key)
                progress.step += 1
                pace.count(args.batch_size)

                # Print, save or stop? All processes must decide alike. A vote takes time, so they
                # hold one at every tenth step only.
                epoch_done = progress.step == steps
                if world > 1 and progress.step % 10 and not epoch_done:
                    continue
                save_due = time.perf_counter() - saved_at > 60 * args.save_every
                print_due, save_due, stop = procs.agree(pace.due(), save_due, signals[-1])
                if not (print_due or save_due or stop or epoch_done):
                    continue
                # Only here does the host wait for the device.
                new = procs.total(sums).tolist()
                progress.sums = [a + b for a, b in zip(progress.sums, new)]
                sums.zero_()
                loss, right, images = progress.sums
                # The scaler's scale stays 1 until it skips a step and halves it.
                if not math.isfinite(loss) or scaler.get_scale() != 1:
                    raise UserError(
                        f"the loss or a gradient became NaN or infinite by step {progress.step} of "
                        f"epoch {progress.epoch + 1}, at the rate {progress.lr:.3g}: try a lower "
                        "--lr; last.pt, if there is one, holds the last good state")
                progress.images_per_s = pace.rate()
                progress.seconds = time.perf_counter() - start
                if (save_due or stop) and not epoch_done:
                    save_last(model.state_dict())
                    saved_at = time.perf_counter()
                if print_due:
                    say(f"{pace}; epoch {progress.epoch + 1}/{args.epochs}, loss "
                        f"{loss / images:.3f}, accuracy {100 * right / images:.1f} %")
                if stop and not epoch_done:
                    stop_by(stop, out, procs)

            # The epoch is over. It is saved before the evaluation, so a failure there costs no
            # training. One copy from the device serves both checkpoints.
            procs.equalise(model)
            weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
            # A resumed run may have nothing to do but evaluate.
            if pace.done > 0:
                save_last(weights)
            saved_at = time.perf_counter()
            # Each process evaluates its part of the test set.
            batches = dataset.test(args.batch_size // world, rank, world)
            batches = watched(batches, dataset.test_size(), signals, out, procs)
            test = evaluate(model, batches, args.amp)
            progress.seconds = time.perf_counter() - start

            # A row of the log, and the best network so far.
            row = log_row(progress, test, dataset.split)
            progress.rows.append(row)
            better = test["top1"] > progress.best
            progress.best = max(progress.best, test["top1"])
            if rank == 0:
                write_log(out / "log.csv", progress.rows)
                if better:
                    save(out / "best.pt", description, progress, weights)
            # The next epoch.
            progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, [0.0, 0.0, 0.0]
            cells = ", ".join(f"{name} {value}" for name, value in row.items())
            left = (args.epochs - progress.epoch) * progress.seconds / progress.epoch
            say(f"{cells}; {data.duration(left)} left")
    say(f"done: test accuracy {100 * test['top1']:.2f} % after the last epoch, "
        f"{100 * progress.best:.2f} % at best, {out}")
    procs.leave(0)


def run(main, program):
    """Call main(). Errors that the user can fix become one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character must not end a run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
        return
    except (UserError, OSError) as error:
        # An OSError that nobody expected: a name too long, a folder without access.
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not out_of_memory and "can't allocate memory" not in str(error):
            raise
        message = f"out of memory, try a smaller --batch-size: {first_line(error)}"
    except KeyboardInterrupt:
        message = "interrupted"
    print(f"{program}: error: {message}", file=sys.stderr)
    if dist.is_available() and dist.is_initialized():
        leave_at_once(2)
    sys.exit(2)


if __name__ == "__main__":
    run(main, "train.py")
