"""Train a spiking network with MP-Init and TrSG:  python train.py --dataset cifar100 --arch resnet19

Writes into --out: log.csv (a row an epoch), last.pt (everything needed to go on) and best.pt (of the best test accuracy).
Look at the result with  python eval.py DIR/best.pt.  A first try that needs no download and four minutes on a laptop:

    python train.py --dataset shapes --arch resnet19 --width 8 --timesteps 2 --epochs 3

Several GPUs:  torchrun --nproc_per_node 8 train.py ...  (--batch-size is that of all of them together).
Ctrl-C or SIGTERM finishes the step, saves and leaves; the same command with --resume DIR goes on as if nothing happened.
"""
import argparse
import contextlib
import csv
import datetime
import io
import math
import os
import pathlib
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import models
import neuron
from data import UserError
from eval import FORMAT, check_classes, evaluate, load_checkpoint, number, parser, run

# What --arch decides where no flag says otherwise: SGD for the convolutional networks, Spikformer as its authors train it.
# A threshold gathers the gradients of a whole layer: at the full rate of the weights narrow networks stayed at
# chance or diverged, so it learns at a tenth of it. AdamW's steps are all of one size.
RESNET_RECIPE = dict(optimizer="sgd", lr=0.3, weight_decay=5e-4, warmup=0.05, label_smoothing=0.0, mixup=0.0, augment="plain", neuron_rate=0.1)
SPIKFORMER_RECIPE = dict(optimizer="adamw", lr=5e-4, weight_decay=0.06, warmup=0.1, label_smoothing=0.1, mixup=0.5, augment="trivial",
                         neuron_rate=1.0)
# What a resumed run may not change: another network, other data, a start that lies behind it, or the
# optimizer, whose state goes on.
FIXED = ("dataset", "arch", "timesteps", "width", "threshold", "tau", "mp_init", "surrogate", "fixed_neuron", "near_identity", "scale_currents",
         "optimizer", "dvs_split", "bin_by", "classes")


def settings(argv=None):
    """The command line as {flag: value}, and the part of it that was really given."""
    p = parser("train.py", __doc__)
    count, positive, at_least_0 = number(int, 1, or_equal=True), number(float, 0), number(float, 0, or_equal=True)
    g = p.add_argument_group("network")
    g.add_argument("--arch", choices=models.ARCHS, default="resnet19", help="(default: %(default)s)")
    g.add_argument("--timesteps", type=count, default=4, metavar="T", help="time steps an image is shown for, or frames a recording of events is cut into (default: %(default)s)")
    g.add_argument("--width", type=count, default=64, help="channels of the stem: 64 is the published network, 8 one for a laptop (default: %(default)s)")
    g.add_argument("--threshold", type=positive, default=1.0, help="initial threshold theta; with another than 1 try --scale-currents (default: %(default)s)")
    g.add_argument("--tau", type=number(float, 1), default=2.0, help="initial membrane time constant in time steps (default: %(default)s)")
    g.add_argument("--mp-init", choices=("active", "all", "off"), default="active", help="start potentials at their running mean over the neurons that fired (the paper), over all neurons, or at 0 (default: %(default)s)")
    g.add_argument("--surrogate", choices=("trsg", "absolute"), default="trsg", help="threshold-robust surrogate gradient, or the naive window of fixed width (default: %(default)s)")
    g.add_argument("--fixed-neuron", action="store_true", help="do not train thresholds and time constants")
    g.add_argument("--near-identity", action="store_true", help="start every block of a plain resnet as nearly the identity (models.start_near_identity), for deep ones; needs --tau 1.05 or so")
    g.add_argument("--scale-currents", action="store_true", help="start BatchNorm's weights at theta instead of 1 (models.scale_currents), so that currents scale with --threshold")
    g = p.add_argument_group("data")
    g.add_argument("--dataset", choices=data.DATASETS, default="cifar100", help="(default: %(default)s)")
    g.add_argument("--data-dir", default="data", help="where data sets are or are downloaded to; for 'folder' the image tree itself (default: %(default)s)")
    g.add_argument("--image-size", type=count, help=f"side of the images of 'shapes' and 'folder' (default: 32; folders above {data.RESIDENT_UP_TO} are streamed) and 'imagenet' (default: 224)")
    g.add_argument("--dvs-split", choices=("first100", "random"), default="first100", help="test set of cifar10-dvs: the recordings 0-99 of each class, or a tenth of each drawn at random (default: %(default)s)")
    g.add_argument("--bin-by", choices=("count", "time"), default="count", help="cut recordings of events into frames of equal count or of equal duration (default: %(default)s)")
    g.add_argument("--classes", type=number(int, 2, or_equal=True), metavar="N", help="use the first N classes only, a smaller task (default: all)")
    g.add_argument("--limit", type=count, metavar="N", help="use N training images only, for quick trials")
    g.add_argument("--cutout", type=number(int, 0, or_equal=True), default=0, metavar="PIXELS", help="side of a square blanked in each training image (default: none)")
    g.add_argument("--workers", type=number(int, 0, or_equal=True), default=2, help="processes that decode images (default: %(default)s)")
    g = p.add_argument_group("recipe ('by arch': decided by --arch and printed at the start)")
    g.add_argument("--epochs", type=count, default=100, help="(default: %(default)s)")
    g.add_argument("--batch-size", type=count, help="images a step, over all processes together (default: 64; for the sake of enough steps 32 below 20,000 training images and 16 below 5,000)")
    g.add_argument("--accumulate", type=count, default=1, metavar="N", help="compute a step in N parts to save memory; BatchNorm and MP-Init then see the parts (default: %(default)s)")
    g.add_argument("--optimizer", choices=("sgd", "adamw"), help="SGD with Nesterov momentum 0.9, or AdamW (by arch)")
    g.add_argument("--lr", type=positive, help="peak learning rate: linear warm-up to it, then a cosine to 0 (by arch)")
    g.add_argument("--neuron-rate", type=at_least_0, help="learning rate of thresholds and time constants, as a part of --lr (by arch)")
    g.add_argument("--weight-decay", type=at_least_0, help="of weights only, not of biases, BatchNorm, thresholds and time constants (by arch)")
    g.add_argument("--warmup", type=number(float, 0, 1, or_equal=True), help="the warm-up's part of the run (by arch)")
    g.add_argument("--label-smoothing", type=number(float, 0, 1, or_equal=True), help="(by arch)")
    g.add_argument("--mixup", type=at_least_0, help="alpha of mixup's Beta distribution, 0 for no mixup (by arch)")
    g.add_argument("--augment", choices=("plain", "trivial"), help="of training images: shifts (above 96 pixels random resized crops) and flips, or TrivialAugment as well (by arch)")
    g.add_argument("--seed", type=number(int, 0, 2 ** 63, or_equal=True), default=0, help="(default: %(default)s)")
    g = p.add_argument_group("machine and run")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    g.add_argument("--amp", action=argparse.BooleanOptionalAction, help="convolutions in bfloat16 (default: on CUDA)")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, help="fuse the whole network (default: on CUDA; elsewhere the neurons only); --no-compile fuses nothing")
    g.add_argument("--sync-bn", action="store_true", help="BatchNorm statistics over all GPUs instead of each its own")
    g.add_argument("--out", metavar="DIR", help="where log and checkpoints go (default: a new folder in runs/)")
    g.add_argument("--resume", metavar="DIR", help="go on with the run in DIR; 'auto': with the one in --out, if there is one")
    g.add_argument("--save-every", type=positive, default=10.0, metavar="MINUTES", help="save last.pt within epochs too (default: %(default)s)")
    # argparse fills in a default only where the namespace has no value yet: None marks what was not given.
    defaults = vars(p.parse_args([]))
    given = vars(p.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    given = {name: value for name, value in given.items() if value is not None}
    for flag in ("out", "resume"):
        if given.get(flag) == "":                                # an unset variable in a script, perhaps
            p.error(f"--{flag} needs the name of a folder")
    if given.get("resume") == "auto" and "out" not in given:
        p.error("--resume auto needs --out DIR")
    if given.get("resume", "auto") != "auto" and pathlib.Path(given.get("out", given["resume"])).resolve() != pathlib.Path(given["resume"]).resolve():
        p.error(f"--resume {given['resume']} goes on in that folder: leave --out out")
    return {**defaults, **given}, given


def decide(s, given):
    """Fill in, in place, what depends on other settings. UserError for a flag that they leave without effect."""
    if "image_size" in given and s["dataset"] not in ("shapes", "folder", "imagenet"):
        raise UserError(f"--image-size is for shapes, folder and imagenet: {s['dataset']} has its own size, leave the flag out")
    if given.get("augment") == "trivial" and s["dataset"] in data.SENSORS:
        raise UserError(f"--augment trivial is for images: leave it out with {s['dataset']}")
    if "dvs_split" in given and s["dataset"] not in ("cifar10-dvs", "shapes-dvs"):
        raise UserError(f"--dvs-split is for cifar10-dvs and shapes-dvs: leave it out with {s['dataset']}")
    if "bin_by" in given and s["dataset"] not in data.SENSORS:
        raise UserError(f"--bin-by is for recordings of events: leave it out with {s['dataset']}")
    if "neuron_rate" in given and s["fixed_neuron"]:
        raise UserError("--fixed-neuron trains no thresholds: leave --neuron-rate out")
    recipe = SPIKFORMER_RECIPE if s["arch"] == "spikformer" else RESNET_RECIPE
    for name, value in recipe.items():
        s[name] = value if s[name] is None else s[name]
    on_cuda = s["device"].startswith("cuda")
    if s["sync_bn"] and not on_cuda:
        raise UserError("--sync-bn works on GPUs only: leave it out")
    s["amp"] = on_cuda if s["amp"] is None else s["amp"]
    s["image_size"] = s["image_size"] or (224 if s["dataset"] == "imagenet" else 32)


def open_run(s, given):
    """The folder of the run and, when resuming, its checkpoint and settings. Refuses to overwrite another run."""
    if s["resume"] and (s["resume"] != "auto" or (pathlib.Path(s["out"]) / "last.pt").exists()):
        out = pathlib.Path(s["out"] if s["resume"] == "auto" else s["resume"])
        if out.is_file():
            raise UserError(f"{out} is a file: --resume needs the folder of the run, {out.parent}")
        checkpoint = load_checkpoint(out / "last.pt")
        if "settings" not in checkpoint:
            raise UserError(f"{out / 'last.pt'} holds a folded network, which is for evaluation: resume a run that train.py wrote")
        for name in FIXED:
            if name in given and given[name] != checkpoint["settings"].get(name):
                raise UserError(f"the run in {out} has --{name.replace('_', '-')} {checkpoint['settings'].get(name)}, not {given[name]}: "
                                "leave the flag out, or start a new run")
        changed = {k: v for k, v in given.items() if checkpoint["settings"].get(k) != v and k not in ("out", "resume")}
        return out, checkpoint, {**s, **checkpoint["settings"], "device": s["device"], **given}, changed
    name = f"{s['dataset']}-{s['arch']}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    out = pathlib.Path(s["out"] or pathlib.Path("runs") / name)
    if not s["resume"] and (found := [name for name in ("last.pt", "best.pt", "log.csv") if (out / name).exists()]):
        raise UserError(f"{out} holds a run already ({', '.join(found)}): add --resume auto to go on with it, or give another --out")
    return out, None, s, {}


def make_optimizer(model, s):
    """Weights decay; biases, BatchNorm, thresholds and time constants do not, and the last two have a rate of their own."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learnt if p.dim() > 1], "weight_decay": s["weight_decay"], "rate": 1.0},
              {"params": [p for p in learnt if p.dim() == 1], "weight_decay": 0.0, "rate": 1.0},
              {"params": [p for p in learnt if p.dim() == 0], "weight_decay": 0.0, "rate": s["neuron_rate"]}]
    groups = [group for group in groups if group["params"]]      # there is no third with --fixed-neuron
    if s["optimizer"] == "adamw":
        return torch.optim.AdamW(groups, lr=s["lr"], fused=True)
    return torch.optim.SGD(groups, lr=s["lr"], momentum=0.9, nesterov=True, fused=True)


def learning_rate(step, steps, s):
    warmup = s["warmup"] * steps
    if step < warmup:
        return s["lr"] * (step + 1) / math.ceil(warmup)
    return s["lr"] * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def loss_of(model, x, y, s, key):
    """Cross-entropy on the mean of the logits over T, with mixup if asked for; and how many predictions are right."""
    mixed, weight = x, 1.0
    if s["mixup"]:
        weight = float(np.random.default_rng(key).beta(s["mixup"], s["mixup"]))
        mixed = weight * x + (1 - weight) * x.flip(0)
    try:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=s["amp"]):
            logits = model(mixed)
    except ValueError as error:                                  # BatchNorm with a single value a channel
        raise UserError(f"the network cannot learn from such batches: {data.first_line(error)}; try a larger --batch-size or --image-size") from error
    logits = logits.float().mean(0)
    loss = weight * F.cross_entropy(logits, y, label_smoothing=s["label_smoothing"])
    if s["mixup"]:
        loss = loss + (1 - weight) * F.cross_entropy(logits, y.flip(0), label_smoothing=s["label_smoothing"])
    return loss, (logits.argmax(1) == y).sum()


def first_bad_layer(model, x):
    """The name of the first layer, in the order of computation, whose weights or output are not finite."""
    found = []

    def look(name):
        def hook(module, inputs, output):
            tensors = (output, *module.parameters(recurse=False), *module.buffers(recurse=False))
            if not found and not all(t.isfinite().all() for t in tensors):
                found.append(f"{name} ({type(module).__name__})")
        return hook
    hooks = [m.register_forward_hook(look(n)) for n, m in model.named_modules() if not list(m.children())]
    with torch.no_grad():
        model.forward(x)                                         # not model(x): that may be compiled, without the hooks
    for hook in hooks:
        hook.remove()
    return found[0] if found else "none: the loss itself overflows"


def write_log(path, rows):
    """Write rows, dicts of the same keys, as a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    data.write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def duration(seconds):
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"


class Interrupt:
    """Remembers SIGTERM and SIGINT, so that the training loop can finish its step and save."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame):
        if self.signal is not None and number == signal.SIGINT:  # asked twice: leave at once. Batch systems send SIGTERM twice
            sys.exit(128 + number)
        self.signal = number


def main(argv=None):
    s, given = settings(argv)
    out, checkpoint, s, changed = open_run(s, given)
    decide(s, given)
    world = int(os.environ.get("WORLD_SIZE") or 1)
    rank = int(os.environ.get("RANK", 0)) if world > 1 else 0
    say = print if rank == 0 else lambda *_, **__: None
    if world > 1 and (missing := {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ)):
        raise UserError(f"WORLD_SIZE is {world}, but {', '.join(sorted(missing))} not set: start with torchrun, or unset WORLD_SIZE")
    several_gpus = world > 1 and s["device"].startswith("cuda")
    device = data.use_device(f"cuda:{os.environ['LOCAL_RANK']}" if several_gpus else s["device"])
    torch.manual_seed(s["seed"])
    torch.set_float32_matmul_precision("high")                   # TF32 where bfloat16 is off
    torch.backends.cudnn.benchmark = True

    if world > 1:
        # An hour, because the first process may have to prepare the data while the others wait.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
        if rank > 0:
            dist.barrier()                                       # the first process downloads or prepares the data alone
    dataset = data.load(s["dataset"], s["data_dir"], s["image_size"], s["workers"], s["timesteps"], s["dvs_split"], s["bin_by"])
    if world > 1 and rank == 0:
        dist.barrier()
    if s["classes"]:
        dataset.keep_classes(s["classes"])
    if s["limit"]:
        if s["limit"] > len(dataset):
            raise UserError(f"--limit {s['limit']} is more than the {len(dataset)} training images of {s['dataset']}")
        dataset.limit(s["limit"])
    s["batch_size"] = s["batch_size"] or (64 if len(dataset) >= 20000 else 32 if len(dataset) >= 5000 else 16)
    if s["batch_size"] % (world * s["accumulate"]):
        raise UserError(f"--batch-size {s['batch_size']} does not divide by {world} processes x --accumulate {s['accumulate']}")
    steps = len(dataset) // s["batch_size"]
    if steps == 0:
        raise UserError(f"--batch-size {s['batch_size']} is larger than the data set of {len(dataset)} training images")
    if s["cutout"] and isinstance(dataset, data.Streamed):
        raise UserError(f"--cutout is for images of up to {data.RESIDENT_UP_TO} pixels: leave it out")
    dataset.cutout, dataset.augment = s["cutout"], s["augment"] == "trivial" and not dataset.frames
    dataset.to(device)

    network = dict(arch=s["arch"], num_classes=len(dataset.classes), timesteps=s["timesteps"], in_channels=dataset.channels,
                   width=s["width"], threshold=s["threshold"], tau=s["tau"], mp_init=s["mp_init"],
                   surrogate=s["surrogate"], learnable=not s["fixed_neuron"])
    try:
        model = models.build(**network)
        if s["scale_currents"]:
            models.scale_currents(model, s["threshold"])
        if s["near_identity"]:
            models.start_near_identity(model)
        model.to(device, memory_format=data.memory_format(device))
    except ValueError as error:
        raise UserError(str(error)) from error
    optimizer = make_optimizer(model, s)
    # The scaler multiplies by 1: it is here because it skips a step whose gradients are not finite, on the device and
    # without waiting for it, so that the weights survive a divergence.
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2 ** 30)
    epoch, step, best, rows, spent = 0, 0, 0.0, [], 0.0
    totals = torch.zeros(3, device=device)                       # of this epoch: loss, right, images
    if checkpoint:
        check_classes(checkpoint, dataset, s["data_dir"])
        try:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        except (ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{out / 'last.pt'} does not fit these settings: {data.first_line(error)}") from error
        for parameter, state in optimizer.state.items():         # channels_last on a GPU, and not on a CPU: as the weights here
            state.update({k: torch.empty_like(parameter).copy_(v) for k, v in state.items() if k != "step" and v is not None})
        for group, fresh in zip(optimizer.param_groups, make_optimizer(model, s).param_groups):
            group.update(weight_decay=fresh["weight_decay"], rate=fresh["rate"])              # a flag given anew counts
        scaler.load_state_dict(checkpoint["scaler"])
        epoch, step, best, rows, spent = (checkpoint[k] for k in ("epoch", "step", "best", "rows", "seconds"))
        totals = checkpoint["totals"].to(device) * (rank == 0)
        step = min(step * checkpoint["settings"]["batch_size"] // s["batch_size"], steps)
    neuron.COMPILE = s["compile"] is not False
    trained = model
    if s["sync_bn"]:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if s["compile"] or (s["compile"] is None and device.type == "cuda"):
        models.compile_model(model)
    if world > 1:
        trained = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    held = data.lock(out, wait=False) if rank == 0 else None     # noqa: F841 (the lock lives as long as the name)

    say(f"network   {s['arch']}, width {s['width']}, T = {s['timesteps']}, {sum(p.numel() for p in model.parameters()):,d} parameters, "
        f"{sum(isinstance(m, neuron.TrLIF) for m in model.modules())} neuron layers: theta {s['threshold']:g}, tau {s['tau']:g}"
        f"{' (fixed)' if s['fixed_neuron'] else ''}, MP-Init {s['mp_init']}, surrogate {s['surrogate']}{', currents scaled' * s['scale_currents']}{', blocks near the identity' * s['near_identity']}")
    say(f"data      {s['dataset']}, {len(dataset):,d} training images of {dataset.size[0]}x{dataset.size[1]}, {len(dataset.classes)} classes"
        + (f", {dataset.frames} frames each by {s['bin_by']}, split {dataset.split}" if dataset.frames else "")
        + ("  (drawn shapes: a smoke test, no benchmark)" if s["dataset"].startswith("shapes") else ""))
    say(f"recipe    {s['epochs']} epochs of {steps} steps of {s['batch_size']}, {s['optimizer']}, lr {s['lr']:g}, warm-up {100 * s['warmup']:.0f} %, "
        f"cosine to 0, {s['neuron_rate']:g} of it for the neurons, weight decay {s['weight_decay']:g}, label smoothing {s['label_smoothing']:g}, mixup {s['mixup']:g}, cutout {s['cutout']}, augmentation {s['augment']}, seed {s['seed']}")
    say(f"machine   {world} x {device}, {'bfloat16' if s['amp'] else 'float32'}, writing to {out}")
    if checkpoint:
        say(f"resumed   at epoch {epoch + 1}, step {step}" + "".join(f"; --{k.replace('_', '-')} is now {v}" for k, v in changed.items()))

    def save(name):
        state = dict(format=FORMAT, network=network, model=model.state_dict(), settings=s, epoch=epoch, step=step, best=best,
                     rows=rows, seconds=spent + time.perf_counter() - start, totals=totals, optimizer=optimizer.state_dict(),
                     scaler=scaler.state_dict(), data=dict(name=s["dataset"], mean=dataset.mean, std=dataset.std, image_size=s["image_size"],
                               dvs_split=s["dvs_split"], bin_by=s["bin_by"], classes=s["classes"], names=list(dataset.classes)))
        data.write_atomically(out / name, lambda file: torch.save(state, file))

    def time_left():
        done = epoch * steps + step
        return duration((time.perf_counter() - start) * (s["epochs"] * steps - done) / max(done - done_before, 1))

    def stop_if_bad(x):                                          # several processes: all of them after the same step
        if not math.isfinite(totals[0].item()) or scaler.get_scale() != 1:
            layer = first_bad_layer(model, x)
            kept = f"{out / 'last.pt'} holds the last good state" if (out / "last.pt").exists() else "nothing was saved yet"
            raise UserError(f"the loss or a gradient became NaN or infinite in epoch {epoch + 1}, by step {step}, learning rate "
                            f"{rate:.3g}; first layer with such values: {layer}; {kept}; try a lower --lr")

    interrupt, start = Interrupt(), time.perf_counter()
    saved, printed = start, start
    done_before = epoch * steps + step
    while epoch < s["epochs"]:
        model.train()
        epoch_start, first_step = time.perf_counter(), step
        x, rate = None, learning_rate(epoch * steps + steps - 1, s["epochs"] * steps, s)     # if only the evaluation is left
        for x, y in dataset.train(s["batch_size"], s["seed"], epoch, step, rank, world):
            rate = learning_rate(epoch * steps + step, s["epochs"] * steps, s)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate"]
            optimizer.zero_grad(set_to_none=True)
            for i, (xs, ys) in enumerate(zip(x.chunk(s["accumulate"]), y.chunk(s["accumulate"]))):
                last = i == s["accumulate"] - 1
                with contextlib.nullcontext() if last or world == 1 else trained.no_sync():
                    loss, right = loss_of(trained, xs, ys, s, (s["seed"], epoch, step, i))
                    scaler.scale(loss / s["accumulate"]).backward()
                totals += torch.stack([loss.detach() * len(ys), right.float(), torch.full_like(loss.detach(), len(ys))])
            scaler.step(optimizer)
            scaler.update()
            step += 1
            now = time.perf_counter()
            if now - printed > 10:                               # the only time the host waits for the device in an epoch
                printed = now
                if world == 1:
                    stop_if_bad(x)
                say(f"  epoch {epoch + 1}/{s['epochs']}, step {step}/{steps}: loss {totals[0] / totals[2]:.3f}, accuracy {100 * totals[1] / totals[2]:.1f} %, "
                    f"{(step - first_step) * s['batch_size'] / (now - epoch_start):.0f} images/s, {time_left()} left", flush=True)
            stopping, due = interrupt.signal, now - saved > 60 * s["save_every"]
            if world > 1:                                        # all processes have to stop, and to save, after the same step
                if step % 10 and step < steps:
                    continue
                dist.all_reduce(agreed := torch.tensor([stopping or 0, due], device=device), dist.ReduceOp.MAX)
                stopping, due = agreed.tolist()
            if world > 1 or stopping or due:
                stop_if_bad(x)
            if stopping or due:
                if world > 1:                                    # the checkpoint holds the sums of all, for one to go on with
                    dist.all_reduce(totals)
                    totals *= rank == 0
                if rank == 0:
                    save("last.pt")
                saved = time.perf_counter()
                if stopping:
                    say(f"stopped by {signal.Signals(stopping).name} in epoch {epoch + 1} after step {step}: go on with --resume {out}")
                    sys.exit(128 + stopping)
        stop_if_bad(x)
        if world > 1:
            dist.all_reduce(totals)
            for buffer in model.buffers():                       # BatchNorm's statistics are each process's own: evaluate
                dist.broadcast(buffer, 0)                        # the network that is saved
        train_seconds = time.perf_counter() - epoch_start
        loss, right, images = totals.tolist()
        test = evaluate(model, dataset.test(s["batch_size"] // world, rank, world), s["amp"])
        rows.append(dict(epoch=epoch + 1, lr=f"{rate:.6g}", train_loss=f"{loss / images:.5f}", train_acc=f"{right / images:.5f}",
                         **{f"test_acc_t{t}": f"{a:.5f}" for t, a in enumerate(test["top1_at"], 1)},
                         images_per_s=f"{(steps - first_step) * s['batch_size'] / train_seconds:.1f}",
                         seconds=f"{spent + time.perf_counter() - start:.1f}", **({"split": dataset.split} if dataset.split else {})))
        epoch, step, better = epoch + 1, 0, test["top1"] > best
        best = max(best, test["top1"])
        totals.zero_()
        if rank == 0:
            write_log(out / "log.csv", rows)
            if better:
                save("best.pt")
            save("last.pt")
        saved = time.perf_counter()
        say(f"epoch {epoch}/{s['epochs']}: loss {loss / images:.4f}, accuracy {100 * right / images:.2f} %, test {100 * test['top1']:.2f} % "
            f"({', '.join(f't={t} {100 * a:.2f}' for t, a in enumerate(test['top1_at'], 1))}), {rows[-1]['images_per_s']} images/s, "
            f"{time_left()} left", flush=True)
    say(f"done: {s['arch']} on {s['dataset']}, T = {s['timesteps']}: test accuracy {100 * float(rows[-1]['test_acc_t' + str(s['timesteps'])]):.2f} %, best {100 * best:.2f} %, "
        f"{duration(spent + time.perf_counter() - start)}, {out}")
    if world > 1:
        dist.barrier()
        del trained                                              # its threads must have ended before the program does
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main, "train.py")
