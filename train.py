"""Train a spiking network with MP-Init and TrSG: python train.py --dataset cifar100 --arch resnet19

Writes into --out: log.csv (a row an epoch), last.pt (everything needed to go on) and best.pt (the
network of the best test accuracy). Look at the result with  python eval.py DIR/best.pt.
A first try that needs no download and four minutes on a laptop:

    python train.py --dataset shapes --arch resnet19 --width 8 --timesteps 2 --epochs 3

Several GPUs:  torchrun --nproc_per_node 8 train.py ...   (--batch-size is that of all together)
Ctrl-C or SIGTERM finishes the step, saves and leaves; --resume DIR goes on as if nothing happened.

This file imports neuron.py, models.py and data.py; eval.py imports this one.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import math
import os
import pathlib
import signal
import sys
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

# What determines a result besides network and data. A flag of the same name overrides a value.
# paper: the authors' published code to the letter, except that the cosine falls at every step
#   instead of every epoch.
# fast: for short runs and narrow networks.
# spikformer: as its authors train it, except for the augmentation.
RECIPES = ("paper", "fast", "spikformer")
RECIPE = {
    # paper, fast, spikformer
    "epochs": (200, 100, 100),
    # None: it follows from the size of the data set, so that small sets have enough steps.
    "batch_size": (64, None, None),
    # SGD with momentum 0.9, with Nesterov's momentum, or AdamW.
    "optimizer": ("sgd", "nesterov", "adamw"),
    # The peak. A linear warm-up leads to it, over a part of the run, and a cosine from it to 0.
    "lr": (0.02, 0.3, 5e-4),
    "warmup": (0.0, 0.05, 0.1),
    # The learning rate of thresholds and time constants, in units of lr. Their gradients are sums
    # over a whole layer. At the full rate narrow networks stayed at chance or diverged.
    "neuron_rate": (1.0, 0.1, 1.0),
    # All parameters decay, or weights only: no biases, BatchNorm, thresholds and time constants.
    "weight_decay": (5e-4, 5e-4, 0.06),
    "decayed": ("all", "weights", "weights"),
    # How weights start, see models.build.
    "start": ("published", "kaiming", "kaiming"),
    "label_smoothing": (0.0, 0.0, 0.1),
    # Alpha of mixup's Beta distribution, 0 for no mixup.
    "mixup": (0.0, 0.0, 0.5),
    # Shifts (for streamed images random resized crops) and flips. "trivial" adds TrivialAugment,
    # which makes a GPU wait for the CPU several times a step.
    "augment": ("plain", "plain", "plain"),
}
# Settings that a resumed run may not change, because its weights, its data or the state of its
# optimizer would no longer fit.
FIXED = (
    *("dataset", "image_size", "dvs_split", "bin_by", "classes", "limit"),
    *("arch", "timesteps", "width", "threshold", "tau", "mp_init", "surrogate"),
    *("fixed_neuron", "scale_currents", "recipe", "optimizer"),
)
FORMAT = "MP-Init + TrSG checkpoint 3"


# ---- The command line ---------------------------------------------------------------------------

def number(kind, low, high=math.inf, above=False):
    """A type for argparse: a number of kind int or float, at least (or above) low, below high."""

    def parse(text):
        # A text that is no number raises ValueError, of which argparse makes a line.
        value = kind(text)
        if not low <= value < high or (above and value == low):
            limit = f"{'above' if above else 'at least'} {low}"
            raise argparse.ArgumentTypeError(f"{text} is not {limit} and below {high}")
        return value

    # argparse uses this name in its message where the text is no number at all.
    parse.__name__ = kind.__name__
    return parse


def path(text):
    """A type for argparse: the name of a file or folder, ~ being the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("a name is needed")
    return os.path.expanduser(text)


# The kinds of numbers that flags take.
count = number(int, 1)
count_or_0 = number(int, 0)
positive = number(float, 0, above=True)
not_negative = number(float, 0)
share = number(float, 0, 1)


def add_network(add):
    add("--arch", default="resnet19", choices=models.ARCHS, help="network (%(default)s)")
    add("--timesteps", default=4, type=count, help="T: steps of an image, or frames of events (4)")
    add("--width", default=64, type=count, help="channels of the stem, 64 as published (64)")
    add("--threshold", default=1.0, type=positive, help="initial threshold theta (1)")
    above_1 = number(float, 1, above=True)
    add("--tau", default=2.0, type=above_1, help="initial time constant tau, in time steps (2)")
    add("--mp-init", default="active", choices=("active", "all", "off"),
        help="start at the mean of neurons that fired, at that of all, or at 0 (active)")
    add("--surrogate", default="trsg", choices=("trsg", "absolute"),
        help="TrSG, whose window scales with theta, or a window of fixed width (trsg)")
    add("--fixed-neuron", action="store_true", help="do not train theta and tau")
    # See models.scale_currents.
    add("--scale-currents", action="store_true",
        help="BatchNorm's weights start at theta instead of 1")


def add_data(add):
    add("--dataset", default="cifar100", choices=data.DATASETS, help="see data.py (%(default)s)")
    add("--data-dir", default="data", type=path, help="where data is; for folder the tree (data)")
    add("--image-size", type=count, help="of shapes and folder (32), of imagenet (224)")
    # The next two concern event recordings only.
    add("--dvs-split", default="first100", choices=("first100", "random"),
        help="test set of cifar10-dvs: recordings 0 to 99 of a class, or a random tenth (first100)")
    add("--bin-by", default="count", choices=("count", "time"),
        help="cut recordings into frames of equally many events, or equally long ones (count)")
    # Smaller tasks for quick trials.
    add("--classes", type=number(int, 2), metavar="N", help="use the first N classes only")
    add("--limit", type=count, metavar="N", help="use N training images only")
    add("--cutout", default=0, type=count_or_0, help="side of a square to blank, in pixels (0)")
    add("--workers", default=2, type=count_or_0, help="processes that decode images (2)")


def add_recipe(add):
    # Most of these have no default, because it is the recipe's.
    add("--recipe", choices=RECIPES, help="fast for shapes, spikformer for spikformer, else paper")
    add("--epochs", type=count, help="passes over the training set")
    add("--batch-size", type=count, help="images a step, of all processes together")
    add("--accumulate", default=1, type=count, help="compute a step in N parts, to save memory (1)")
    add("--optimizer", choices=("sgd", "nesterov", "adamw"), help="SGD has momentum 0.9")
    add("--lr", type=positive, help="peak learning rate, from which a cosine falls to 0")
    add("--warmup", type=share, help="part of the run in which the rate rises linearly to --lr")
    add("--neuron-rate", type=not_negative, help="learning rate of theta and tau, in units of --lr")
    add("--weight-decay", type=not_negative, help="weight decay")
    add("--decayed", choices=("all", "weights"), help="what decays: all parameters, or weights")
    add("--start", choices=("published", "kaiming"), help="how weights start, see models.build")
    add("--label-smoothing", type=share, help="label smoothing")
    add("--mixup", type=not_negative, help="alpha of mixup's Beta distribution, 0 for none")
    add("--augment", choices=("plain", "trivial"), help="shifts and flips, or TrivialAugment too")
    add("--seed", default=0, type=number(int, 0, 2**63), help="random seed (0)")


def add_machine(add):
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    # How to compute.
    add("--device", default=gpu, help="cpu, cuda or cuda:N (%(default)s)")
    add("--amp", action=argparse.BooleanOptionalAction,
        help="compute in bfloat16 (default: on GPUs that have it)")
    add("--compile", choices=("network", "neurons", "off"),
        help="what torch.compile fuses (network on CUDA, else neurons)")
    add("--no-compile", dest="compile", action="store_const", const="off", help="--compile off")
    add("--deterministic", action="store_true", help="repeatable on CUDA, slower")
    # Where results go, and how a run goes on.
    add("--out", type=path, metavar="DIR", help="log and checkpoints (a new folder in runs/)")
    add("--resume", type=path, metavar="DIR", help="go on with a run; auto: that in --out, if any")
    add("--save-every", default=10.0, type=positive, metavar="MINUTES",
        help="write last.pt within epochs too (10)")


def make_parser():
    how = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser("train.py", description=__doc__, **how)
    add_network(parser.add_argument_group("network").add_argument)
    add_data(parser.add_argument_group("data").add_argument)
    about = "What is not given is the recipe's, and printed at the start."
    add_recipe(parser.add_argument_group("recipe", about).add_argument)
    add_machine(parser.add_argument_group("machine and run").add_argument)
    return parser


def parse(argv=None):
    """The command line as (args, given): all settings, and those really given as a dict."""
    parser = make_parser()
    args = parser.parse_args(argv)
    # A run that goes on keeps its own settings, except for the flags really given. To find these,
    # the command line is read again: argparse sets no default where a name has a value already.
    absent = object()
    marked = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), absent)))
    given = {name: value for name, value in vars(marked).items() if value is not absent}
    # What argparse cannot check: flags that need or exclude each other.
    if args.resume == "auto" and args.out is None:
        parser.error("--resume auto needs --out DIR")
    if args.resume not in (None, "auto") and args.out is not None:
        parser.error("--resume DIR goes on in that folder: leave --out out")
    return args, given


def with_recipe(args):
    """A copy of args in which what was not given is the recipe's."""
    args = argparse.Namespace(**vars(args))
    if args.recipe is None:
        args.recipe = "paper"
        # Drawn shapes are for a first try, which has to be short.
        if args.dataset.startswith("shapes"):
            args.recipe = "fast"
        if args.arch == "spikformer":
            args.recipe = "spikformer"
    # A flag that was given stands.
    for name, values in RECIPE.items():
        if getattr(args, name) is None:
            setattr(args, name, values[RECIPES.index(args.recipe)])
    return args


# ---- The machine --------------------------------------------------------------------------------

def use_device(name):
    """The torch.device of that name, as the one to compute on. UserError where it is unusable."""
    try:
        device = torch.device(name)
        # A device may exist and still be unusable, because a driver is missing for example.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name} cannot be used here: {first_line(error)}") from error
    # Whatever takes the current GPU without asking takes this one.
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Let the C library keep the memory of freed tensors for the next ones, on Linux.

    It would give large blocks back to the system and get them anew page by page, which takes a
    tenth to a half of a training step.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)
        # M_TRIM_THRESHOLD: give nothing back. M_MMAP_MAX: take no block from the system directly.
        mallopt(-1, -1)
        mallopt(-4, 0)


def set_precision(args, device, say):
    """Settle args.amp, and what the libraries of a GPU may do for speed."""
    on_cuda = device.type == "cuda"
    if on_cuda and torch.__version__ < (2, 13):
        say("torch 2.13 and later move half the bytes that this version moves for the neurons.")
    if args.amp is None:
        args.amp = on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)
        if on_cuda and not args.amp:
            say("This GPU does not compute in bfloat16: float32 it is (--amp forces it).")
    # Where bfloat16 is off, a GPU may round to TF32 inside of matrix products.
    torch.set_float32_matmul_precision("high")
    # Try out algorithms and keep the fastest. It may differ from run to run, and its rounding too.
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        # cuBLAS repeats its results only with workspaces of a fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def compile_network(model, x, amp, say):
    """Fuse the whole network. Where that fails say so and leave it to the neurons to be fused."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # With fullgraph a part that cannot be compiled is an error instead of a slow run.
    models.compile_model(model, fullgraph=True)
    try:
        # A trial step compiles forward and backward. It changes running means and statistics.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            model(x).float().sum().backward()
    # Running out of memory is no failure to compile.
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        model._compiled_call_impl = None
        say(f"The network cannot be compiled here, only its neurons are: {first_line(error)}")
    # The trial step leaves nothing behind.
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before, strict=False)


# ---- Several processes. With a single GPU you may skip this section ------------------------------

class Processes:
    """This process among those that torchrun started: number `rank` of `world`.

    A process alone communicates nothing: say prints, from_first and prepare call their function,
    agree returns what it gets, and leave ends the program.
    """

    def __init__(self, device):
        # torchrun tells each process in its environment which one it is.
        self.world = int(os.environ.get("WORLD_SIZE") or 1)
        self.rank = int(os.environ["RANK"]) if self.world > 1 else 0
        if self.world == 1:
            self.device = use_device(device)
            return
        if device.startswith("cuda:"):
            raise UserError(f"--device {device}: each process takes a GPU of its own, give cuda")
        on_cuda = device == "cuda"
        self.device = use_device(f"cuda:{os.environ['LOCAL_RANK']}" if on_cuda else device)
        # Gloo serves what lies on the CPU, so that votes need not wait for the GPU. The timeout is
        # an hour, because the others wait while one process prepares the data.
        backends = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        hour, device_id = datetime.timedelta(hours=1), self.device if on_cuda else None
        dist.init_process_group(backends, timeout=hour, device_id=device_id)

    def say(self, text):
        """Print once, and at once, because output into a file might appear much later."""
        if self.rank == 0:
            print(text, flush=True)

    def from_first(self, function):
        """What function() returns in the first process, in all of them: the others read no file,
        which they may not have."""
        if self.world == 1:
            return function()
        answer = [None]
        if self.rank == 0:
            try:
                answer = [function()]
            except UserError as error:
                # Handed on, so that all processes end by it.
                answer = [error]
        dist.broadcast_object_list(answer, device=torch.device("cpu"))
        if isinstance(answer[0], UserError):
            raise answer[0]
        return answer[0]

    def prepare(self, function):
        """function() in one process of each machine first: the others find its files written."""
        waits = self.world > 1 and os.environ["LOCAL_RANK"] != "0"
        # The others of a machine wait here until its first process is at the barrier below.
        if waits:
            dist.barrier()
        result = function()
        if self.world > 1 and not waits:
            dist.barrier()
        return result

    def agree(self, due, *values):
        """The largest of each value over all processes, which then act after the same step.

        due: whether to ask them; if not, all values are 0. Alone: the values as they are.
        """
        if self.world == 1:
            return values
        # A vote costs a round over the network, so it is not taken at every step.
        if not due:
            return [0] * len(values)
        votes = torch.tensor([int(value) for value in values])
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return votes.tolist()

    def gather(self, totals):
        """Add all processes' totals up in the first one, in place."""
        # The others go on from 0, so that adding up once more stays right.
        if self.world > 1:
            dist.all_reduce(totals)
            totals *= self.rank == 0

    def equalise(self, model, totals):
        """Add totals up in all processes, and give them the first one's buffers: BatchNorm's
        statistics are each process's own, and what is evaluated has to be what is saved."""
        if self.world > 1:
            dist.all_reduce(totals)
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def leave(self, code):
        """End the program, all processes together."""
        if self.world > 1:
            # Nobody leaves while another still waits for its answer.
            dist.barrier()
            dist.destroy_process_group()
            leave_at_once(code)
        sys.exit(code)


def leave_at_once(code):
    """End this process of several here and now: the threads of a process group may outlive the
    interpreter, and crash it."""
    # os._exit skips what the interpreter does at its end.
    data.kill_workers()
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
    # The best test accuracy so far. Any accuracy is better than none.
    best: float = -1.0
    # The rows of log.csv.
    rows: list = dataclasses.field(default_factory=list)
    # Since the start of the run, without the time that it lay stopped.
    seconds: float = 0.0
    # The learning rate of the last step, and the speed in this epoch.
    lr: float = 0.0
    images_per_s: float = 0.0


def save(file, description, progress, weights, **more):
    """Write a checkpoint. A run that is killed while writing leaves the old one.

    description   format; network, the arguments of models.build; settings, all flags; classes,
                  mean and std of the data
    weights       model.state_dict(), in which MP-Init's means are
    more          in last.pt also the state of the optimizer, and this epoch's totals

    There is no state of a random generator: all draws depend on seed, epoch and step alone.
    """
    checkpoint = {**description, **vars(progress), "model": weights, **more}
    data.write_atomically(file, lambda f: torch.save(checkpoint, f))


def load_checkpoint(file):
    """A checkpoint as train.py wrote it, on the CPU: plain data and tensors, nothing that could
    run code. UserError for any other file."""
    try:
        with zipfile.ZipFile(file) as archive:
            # The checksums, which torch does not look at, tell damaged weights.
            if archive.testzip():
                raise ValueError("its checksums do not fit")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        advice = "it may be truncated, or no checkpoint of train.py"
        raise UserError(f"{file} cannot be read, {advice}: {first_line(error)}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{file} is no checkpoint of train.py, or of another version of it: its "
                        f"format is not {FORMAT!r}")
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
    # A label is the place of a class among the names. Other names mean other labels.
    classes = checkpoint["classes"]
    if classes != dataset.classes:
        counts = f"{len(dataset.classes)} classes, not the {len(classes)} trained on"
        raise UserError(f"{dataset.name} in {data_dir}: {counts}, or of other names")


# ---- Evaluation ---------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, batches, amp=False):
    """Accuracy on batches (x, y), over those of all processes together. y = -1 is padding.

    Returns a dict: top1_at, a list of the fraction right when read out after t = 1 ... T steps
    (mean of the logits so far); top1 = top1_at[-1]; top5; images. Waits for the device once.
    """
    # Counted on the device: images right after t = 1 ... T, those among the best five, all.
    training, totals = model.training, 0
    model.eval()
    for x, y in batches:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits = model(x)
        # Sums of the logits so far, [T, B, classes]. The largest of a sum is that of the mean.
        so_far = logits.float().cumsum(0)
        right = (so_far.argmax(2) == y).sum(1)
        best5 = so_far[-1].topk(min(5, logits.shape[2])).indices
        among5 = (best5 == y[:, None]).sum()
        images = (y >= 0).sum()
        totals = totals + torch.cat([right, among5[None], images[None]])
    model.train(training)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals)
    *right, among5, images = totals.tolist()
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
    # The number of steps, not always a whole one.
    warmup = args.warmup * steps
    if step < warmup:
        return args.lr * (step + 1) / math.ceil(warmup)
    # Half a period, from 1 to 0.
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def score(logits, y, weight, label_smoothing):
    """The loss, cross-entropy on the mean of the logits over T, and sums [loss, right, images].

    weight: mixup's share of each image x[i]; the rest is x[-1 - i]. 1 without mixup.
    """
    # [T, B, classes] -> [B, classes], in float32 whatever the network computes in.
    logits = logits.float().mean(0)
    loss = weight * F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    if weight < 1:
        other = F.cross_entropy(logits, y.flip(0), label_smoothing=label_smoothing)
        loss = loss + (1 - weight) * other
    # Under mixup, too, an answer is right only if it is y. The sums stay on the device, because
    # reading them would mean waiting for it.
    right = (logits.argmax(1) == y).sum().float()
    images = torch.full_like(right, len(y))
    return loss, torch.stack([loss.detach() * images, right, images])


def train_step(model, loss_and_sums, optimizer, scaler, x, y, args, key):
    """One step of the optimizer. Returns the sums of score, without waiting for them.

    loss_and_sums: score, or score compiled
    """
    optimizer.zero_grad(set_to_none=True)
    # The gradients of all parts add up before the optimizer takes its step.
    totals = 0
    parts = zip(x.chunk(args.accumulate), y.chunk(args.accumulate))
    for part, (x_part, y_part) in enumerate(parts):
        weight = 1.0
        if args.mixup:
            # The draw depends on seed, epoch, step and part alone: a resumed run draws the same.
            weight = float(np.random.default_rng((*key, part)).beta(args.mixup, args.mixup))
            x_part = weight * x_part + (1 - weight) * x_part.flip(0)
        # Gradients are summed over the processes after the last part only.
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


def first_bad_layer(model, x):
    """The first layer, in the order of computation, whose weights or output are not finite."""
    found = []

    def check(name, layer, _, output):
        # Hooks are called in the order of computation, so the first name found is the answer.
        tensors = output, *layer.parameters(recurse=False), *layer.buffers(recurse=False)
        if not all(tensor.isfinite().all() for tensor in tensors):
            found.append(f"{name} ({type(layer).__name__})")

    for name, layer in model.named_modules():
        # Layers that contain others would only repeat what those say.
        if not list(layer.children()):
            layer.register_forward_hook(functools.partial(check, name))
    with torch.no_grad():
        # model(x) may be compiled, and then it does not call hooks.
        model.forward(x)
    return found[0] if found else "none, the loss itself or a gradient overflows"


def stop_if_bad(totals, scaler, model, x, where):
    """UserError where the loss or a gradient was not finite. Waits for the device."""
    # The scaler's scale is 1 until it skips a step with bad gradients and halves it.
    if not totals[0].isfinite() or scaler.get_scale() != 1:
        layer = first_bad_layer(model, x)
        raise UserError(f"the loss or a gradient became NaN or infinite {where}; first layer with "
                        f"such values: {layer}; last.pt, if there is one, holds the last good "
                        "state; try a lower --lr")


# ---- The run ------------------------------------------------------------------------------------

def open_run(args, given):
    """(folder of the run, its checkpoint or None, args). Replaces no run unless asked to go on."""
    resume = args.resume
    # A batch system may repeat a command with --resume auto as it stands.
    if resume == "auto":
        resume = args.out if os.path.exists(f"{args.out}/last.pt") else None
    # A new run.
    if resume is None:
        args = with_recipe(args)
        # Two runs started in the same second differ by the number of their process.
        name = f"{args.dataset}-{args.arch}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        out = pathlib.Path(args.out or f"runs/{name}")
        present = [name for name in ("last.pt", "best.pt", "log.csv") if (out / name).exists()]
        if present and args.resume is None:
            advice = "add --resume auto to go on with it, or give another --out"
            raise UserError(f"{out} holds a run ({', '.join(present)}): {advice}")
        return out, None, args
    # A run that goes on.
    out = pathlib.Path(resume)
    checkpoint = load_checkpoint(out / "last.pt")
    if "optimizer" not in checkpoint:
        raise UserError(f"{out}/last.pt is a best.pt or folded: for evaluation only")
    old = checkpoint["settings"]
    for name in FIXED:
        if name in given and given[name] != old[name]:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"the run in {out} has {flag} {old[name]}, not {given[name]}")
    # The settings of the run, and what this command line changes. Flags that are newer than the
    # run have their default.
    args = argparse.Namespace(**{**vars(args), **old, "device": args.device, **given})
    args = with_recipe(args)
    if checkpoint["epoch"] >= args.epochs:
        raise UserError(f"--epochs {args.epochs} are too few: the run in {out} is in epoch "
                        f"{checkpoint['epoch'] + 1} already")
    return out, checkpoint, args


def claim(out, goes_on):
    """Create the run's folder and log. Of two runs started at once the second fails here."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.csv").touch(exist_ok=goes_on)
    except OSError as error:
        raise UserError(f"cannot write a run into {out}: {error.strerror}") from error


def load_data(settings, data_dir, workers, timesteps):
    """The data set that a run's settings name. timesteps: frames of a recording of events."""
    how = settings.image_size, workers, timesteps, settings.dvs_split, settings.bin_by
    dataset = data.load(settings.dataset, data_dir, *how)
    if settings.classes:
        dataset.keep_classes(settings.classes)
    return dataset


def make_dataset(args, procs):
    """The data set on the device. Sets args.batch_size where the recipe leaves it open."""
    # One process of each machine downloads and prepares what is missing, the others wait.
    load = functools.partial(load_data, args, args.data_dir, args.workers, args.timesteps)
    dataset = procs.prepare(load)
    if args.limit:
        dataset.limit(args.limit)
    images, parts = len(dataset), procs.world * args.accumulate
    if args.batch_size is None:
        # Small sets take small batches, so that an epoch has enough steps.
        args.batch_size = 64
        if images < 20000:
            args.batch_size = 32 if images >= 5000 else 16
        # The nearest size that can be divided into parts.
        args.batch_size = max(parts, min(args.batch_size, images) // parts * parts)
    if args.batch_size % parts or args.batch_size > images:
        raise UserError(f"--batch-size {args.batch_size} must be divisible by {procs.world} "
                        f"processes x --accumulate {args.accumulate}, and at most the {images} "
                        "training images")
    if args.cutout and isinstance(dataset, data.Streamed):
        raise UserError(f"--cutout is for images of up to {data.RESIDENT_UP_TO} pixels")
    dataset.cutout = args.cutout
    # TrivialAugment has no meaning for frames of events, which are counts.
    dataset.augment = args.augment == "trivial" and not dataset.frames
    return dataset.to(procs.device)


def make_model(args, dataset, device):
    """(options, model): models.build(**options) makes a network of the same shape."""
    names = "arch", "timesteps", "width", "threshold", "tau", "mp_init", "surrogate"
    options = {name: getattr(args, name) for name in names}
    options.update(num_classes=len(dataset.classes), in_channels=dataset.channels)
    options.update(learnable=not args.fixed_neuron)
    # What is out of range for a network is a mistake in the flags.
    try:
        model = models.build(**options, init=args.start)
    except ValueError as error:
        raise UserError(str(error)) from error
    if args.scale_currents:
        models.scale_currents(model, args.threshold)
    return options, model.to(device, memory_format=data.memory_format(device))


def start_or_resume(model, checkpoint, args, procs):
    """(optimizer, progress, totals) at the start of a run, or, with the model's weights, as a
    checkpoint left them. totals: this epoch's sums of loss times images, right answers, images."""
    optimizer = make_optimizer(model, args)
    progress, totals = Progress(), torch.zeros(3, device=procs.device)
    if checkpoint is None:
        return optimizer, progress, totals
    model.load_state_dict(checkpoint["model"])
    # Rates and decay are what the command line says now, not what the optimizer's state says.
    now = [(group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups]
    optimizer.load_state_dict(checkpoint["optimizer"])
    for group, (lr_scale, decay) in zip(optimizer.param_groups, now):
        group.update(lr_scale=lr_scale, weight_decay=decay)
    # The state takes the memory format of the weights: channels_last on a GPU, not on a CPU.
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.dim() == 4:
                state[name] = torch.empty_like(parameter).copy_(value)
    progress = Progress(**{name: checkpoint[name] for name in vars(progress)})
    # The batch size of a run may change. Its place in the epoch stays.
    progress.step = progress.step * checkpoint["settings"]["batch_size"] // args.batch_size
    # The checkpoint holds the sums of all processes, and one of them goes on with those.
    if procs.rank == 0:
        totals += checkpoint["totals"].to(procs.device)
    return optimizer, progress, totals


def make_fast(model, dataset, args, procs):
    """Fuse what --compile says and join the processes: (what to train, what computes its loss)."""
    # On a CPU fusing the whole network takes minutes and gains nothing over its neurons.
    on_cuda = procs.device.type == "cuda"
    fused = args.compile or ("network" if on_cuda else "neurons")
    neuron.COMPILE = fused != "off"
    loss_and_sums = score
    if fused == "network":
        if on_cuda:
            # Augmentation and loss are many small kernels, too.
            dataset.fused, loss_and_sums = True, torch.compile(score)
        batches = dataset.train(args.batch_size, args.seed, 0, 0, procs.rank, procs.world)
        x, _ = next(iter(batches))
        compile_network(model, x.chunk(args.accumulate)[0], args.amp, procs.say)
    if procs.world == 1:
        return model, loss_and_sums
    devices = [procs.device.index] if on_cuda else None
    # Each process keeps BatchNorm statistics of its own until evaluation. torch 2.14 warns of a
    # new name of that option, which torch 2.11 does not know.
    warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
    how = dict(broadcast_buffers=False, gradient_as_bucket_view=True)
    return DistributedDataParallel(model, device_ids=devices, **how), loss_and_sums


def describe(args, dataset, model, out, procs):
    """What is printed at the start: all that determines the result."""
    parameters = sum(p.numel() for p in model.parameters())
    layers = sum(isinstance(layer, neuron.TrLIF) for layer in model.modules())
    drawn = " (drawn: a smoke test, no benchmark)" if args.dataset.startswith("shapes") else ""
    procs.say(f"{args.arch}: {parameters:,d} parameters, {layers} neuron layers; "
              f"{args.dataset}{drawn}: {len(dataset):,d} training images, "
              f"{len(dataset.classes)} classes")
    # The recipe's values first, then everything else.
    values = {name: vars(args)[name] for name in RECIPE}
    procs.say(f"recipe {args.recipe}: " + ", ".join(f"{name} {v}" for name, v in values.items()))
    others = {name: v for name, v in sorted(vars(args).items()) if name not in RECIPE}
    procs.say("settings: " + ", ".join(f"{name} {value}" for name, value in others.items()))
    procs.say(f"{procs.world} x {procs.device}, torch {torch.__version__}, writing to {out}")


def note_signals():
    """A list whose last item is the latest SIGTERM or SIGINT, 0 where there was none: the training
    loop finishes its step and looks there."""
    signals = [0]

    def note(signal_number, frame):
        signals.append(signal_number)
        # The next Ctrl-C ends the program at once.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return signals


class Pace:
    """The speed of an epoch. Its first step is left out, because it may have compiled something."""

    def __init__(self, batch_size):
        self.batch_size, self.steps = batch_size, 0
        self.start = time.perf_counter()

    def count(self):
        self.steps += 1
        if self.steps == 1:
            self.after_first = time.perf_counter()

    def images_per_s(self):
        """After one step at least."""
        now = time.perf_counter()
        # If there is no step but the first, that one counts.
        if self.steps == 1:
            return self.batch_size / (now - self.start)
        return self.batch_size * (self.steps - 1) / (now - self.after_first)


def duration(seconds):
    """Seconds as text: "1.6 h" or "12 min 05 s"."""
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s"


def time_left(progress, args, steps, evaluation_seconds):
    """The time that the rest of the run takes, as text. steps: in one epoch."""
    epochs = args.epochs - progress.epoch
    images = (epochs * steps - progress.step) * args.batch_size
    return duration(images / progress.images_per_s + epochs * evaluation_seconds) + " left"


def progress_line(progress, args, steps, totals):
    """What is printed within an epoch: loss and accuracy so far, in this process."""
    loss, right, images = totals.tolist()
    return (f"  epoch {progress.epoch + 1}/{args.epochs}, step {progress.step}/{steps}: "
            f"loss {loss / images:.3f}, accuracy {100 * right / images:.1f} %, "
            f"{progress.images_per_s:.0f} images/s")


def log_row(progress, totals, test, seconds, split):
    """A row of log.csv: {column: text}."""
    loss, right, images = totals.tolist()
    row = dict(epoch=str(progress.epoch + 1), lr=f"{progress.lr:.6g}")
    row.update(train_loss=f"{loss / images:.5f}", train_acc=f"{right / images:.5f}")
    for t, accuracy in enumerate(test["top1_at"], 1):
        row[f"test_acc_t{t}"] = f"{accuracy:.5f}"
    row.update(images_per_s=f"{progress.images_per_s:.1f}", seconds=f"{seconds:.1f}")
    # Recordings of events have no usual split, so every score names its own.
    if split:
        row["split"] = split
    return row


def write_log(file, rows):
    """Write rows, dicts {column: text}, as a CSV file. Older rows may lack newer columns."""
    columns = list(rows[-1])
    lines = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    text = "".join(",".join(cells) + "\n" for cells in lines)
    data.write_atomically(file, lambda f: f.write(text.encode()))


def main(argv=None):
    # Who we are, and whether a run goes on.
    args, given = parse(argv)
    procs = Processes(args.device)
    device, rank, world, say = procs.device, procs.rank, procs.world, procs.say
    out, checkpoint, args = procs.from_first(lambda: open_run(args, given))
    set_precision(args, device, say)
    torch.manual_seed(args.seed)

    # Data, network and optimizer, as at the start or as the checkpoint left them.
    dataset = make_dataset(args, procs)
    options, model = make_model(args, dataset, device)
    if checkpoint:
        check_classes(checkpoint, dataset, args.data_dir)
    optimizer, progress, totals = start_or_resume(model, checkpoint, args, procs)
    # The scaler does not scale. It skips steps whose gradients are not finite, without waiting for
    # the device, so that the weights survive a divergence.
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**30)
    procs.from_first(lambda: claim(out, goes_on=args.resume is not None))
    describe(args, dataset, model, out, procs)
    trained, loss_and_sums = make_fast(model, dataset, args, procs)

    # What every checkpoint of the run says of itself.
    description = dict(format=FORMAT, network=options, settings=vars(args))
    description.update(classes=dataset.classes, mean=dataset.mean, std=dataset.std)
    # A last batch that is not full is left out.
    steps = len(dataset) // args.batch_size
    # Seconds count on from where the run was.
    start = time.perf_counter() - progress.seconds
    saved = printed = time.perf_counter()
    evaluation_seconds = 0.0
    signals = note_signals()

    def save_last(weights):
        progress.seconds = time.perf_counter() - start
        if rank == 0:
            more = dict(optimizer=optimizer.state_dict(), totals=totals)
            save(out / "last.pt", description, progress, weights, **more)

    while progress.epoch < args.epochs:
        model.train()
        pace = Pace(args.batch_size)
        place = args.seed, progress.epoch, progress.step
        for x, y in dataset.train(args.batch_size, *place, rank, world):
            # The learning rate of this step. The neurons have a part of it.
            step = progress.epoch * steps + progress.step
            progress.lr = learning_rate(step, args.epochs * steps, args)
            for group in optimizer.param_groups:
                group["lr"] = progress.lr * group["lr_scale"]
            # Forward, backward, update.
            key = args.seed, progress.epoch, progress.step
            totals += train_step(trained, loss_and_sums, optimizer, scaler, x, y, args, key)
            progress.step += 1
            pace.count()

            # The one place that decides: print, save, stop. All processes decide alike.
            now, last = time.perf_counter(), progress.step == steps
            print_due = now - printed > 10 and pace.steps > 1
            save_due = now - saved > 60 * args.save_every and not last
            ask = last or progress.step % 10 == 0
            print_due, save_due, stop = procs.agree(ask, print_due, save_due, signals[-1])
            if print_due or save_due or stop or last:
                # Only here does the host wait for the device.
                where = f"by step {progress.step} of epoch {progress.epoch + 1}"
                stop_if_bad(totals, scaler, model, x, f"{where}, rate {progress.lr:.3g}")
                progress.images_per_s = pace.images_per_s()
            if print_due:
                printed, left = now, time_left(progress, args, steps, evaluation_seconds)
                say(f"{progress_line(progress, args, steps, totals)}, {left}")
            if save_due or stop:
                # The checkpoint holds the sums of all processes, for one to go on with.
                procs.gather(totals)
                save_last(model.state_dict())
                saved = time.perf_counter()
            if stop:
                # The exit code of a program that a signal ended is 128 and its number.
                name = signal.Signals(stop).name
                say(f"stopped by {name} {where}: go on with --resume {out}")
                procs.leave(128 + stop)

        # The epoch is over. It is saved before the evaluation, which may fail on what it reads.
        procs.equalise(model, totals)
        # One copy from the device serves both checkpoints.
        weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        # A run may go on with an epoch that is trained and only has to be evaluated.
        if pace.steps > 0:
            save_last(weights)
        saved = time.perf_counter()
        # Each process evaluates its part of the test set.
        test = evaluate(model, dataset.test(args.batch_size // world, rank, world), args.amp)
        evaluation_seconds = time.perf_counter() - saved

        # A row of the log, and the best network so far.
        row = log_row(progress, totals, test, time.perf_counter() - start, dataset.split)
        progress.rows.append(row)
        better = test["top1"] > progress.best
        progress.best = max(progress.best, test["top1"])
        if rank == 0:
            write_log(out / "log.csv", progress.rows)
            if better:
                save(out / "best.pt", description, progress, weights)
        # The next epoch.
        progress.epoch, progress.step = progress.epoch + 1, 0
        totals.zero_()
        cells = ", ".join(f"{name} {value}" for name, value in row.items())
        say(f"{cells}; {time_left(progress, args, steps, evaluation_seconds)}")
    say(f"done: best test accuracy {100 * progress.best:.2f} %, {out}")
    procs.leave(0)


def run(main, program):
    """Call main(). What the user can mend becomes one line on stderr and exit code 2."""
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
