"""Look at checkpoints:  python eval.py runs/NAME/best.pt

The network is rebuilt from the checkpoint alone. Printed are top-1 and top-5 accuracy on the test set, and the accuracy
when the network is read out after t = 1 ... T time steps. Further:

    python eval.py A.pt --inspect                 firing rates, membrane potentials, operations and energy, layer by layer
    python eval.py A.pt --report A.md --plot A.png      the same as a file and as a picture
    python eval.py A.pt B.pt ...                  compare checkpoints: one table
    python eval.py A.pt --fold                    absorb thresholds and BatchNorm into the weights and check the result
    python eval.py A.pt --save-folded F.pt        ... and write it; python eval.py F.pt then evaluates that network
    python eval.py --gradients [FILE.png]         gradient norm at each layer against threshold, on random weights

What the figures mean is written under every table.
"""
import argparse
import copy
import math
import pathlib
import pickle
import sys
import time

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
import models
from data import UserError, first_line
from neuron import TrLIF, lif

FORMAT = "MP-Init + TrSG checkpoint 1"
PJ_PER_MAC, PJ_PER_AC = 4.6, 0.9                                 # energy of a 32-bit multiply-accumulate, accumulate: 45 nm CMOS
RANGE, BINS_PER_THRESHOLD = 32, 256                              # potential histograms reach from -32 to 32 thresholds
BINS = 2 * RANGE * BINS_PER_THRESHOLD
START = {"v_init": "v[0] = v_init (MP-Init)", "0": "v[0] = 0"}


def load_checkpoint(path):
    """A checkpoint as train.py wrote it, on the CPU: plain data and tensors, nothing that could run code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:                      # weights_only refused it
        raise UserError(f"{path} is no checkpoint of train.py, or holds objects other than plain data") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint, it may be truncated: {first_line(error)}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of train.py ('format' is not {FORMAT!r})")
    return checkpoint


def build_network(checkpoint, path="checkpoint"):
    """The network in a checkpoint, in evaluation mode."""
    try:
        model = models.build(**checkpoint["network"])
        model = fold(model) if checkpoint.get("folded") else model
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: weights and description of the network do not fit: {first_line(error)}") from error
    return model.eval()


@torch.no_grad()
def evaluate(model, batches, amp=False):
    """Accuracy on (x, y) batches; y = -1 is padding. Under torch.distributed, over what all processes see together.

    Returns a dict: top1_at, a list of the fraction right when read out after t = 1 ... T steps (mean logits so far);
    top1 = top1_at[-1]; top5; images. Waits for the device once, at the end.
    """
    training, totals = model.training, 0
    model.eval()
    for x, y in batches:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits = model(x)                                    # [T, B, classes]
        so_far = logits.float().cumsum(0)                        # the mean's argmax is the sum's
        right = (so_far.argmax(2) == y).sum(1)                   # [T]
        among5 = (so_far[-1].topk(min(5, logits.shape[2])).indices == y[:, None]).sum()
        totals = totals + torch.cat([right, among5[None], (y >= 0).sum()[None]])
    model.train(training)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals)
    *right, among5, images = totals.tolist()
    top1_at = [r / images for r in right]
    return {"top1_at": top1_at, "top1": top1_at[-1], "top5": among5 / images, "images": images}


def test_data(checkpoint, data_dir, workers):
    """The checkpoint's test set, normalised as in its training."""
    described = checkpoint["data"]
    dataset = data.load(described["name"], data_dir, described["image_size"], workers)
    if len(dataset.classes) != checkpoint["network"]["num_classes"]:
        raise UserError(f"{described['name']} in {data_dir} has {len(dataset.classes)} classes, the checkpoint's network "
                        f"{checkpoint['network']['num_classes']}")
    dataset.mean, dataset.std = described["mean"], described["std"]
    return dataset


def take(dataset, batch_size, images=None):
    """The test batches without padding; the first `images` of them only if given."""
    left = math.inf if images is None else images
    for x, y in dataset.test(batch_size):
        keep = int(min(left, (y >= 0).sum().item()))
        if keep:
            yield x[:keep], y[:keep]
        left -= keep
        if left <= 0:
            return


def neurons_of(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, TrLIF)}


# ---- counting spikes and operations

def wiring(model):
    """Who feeds whom, by the names of the modules, in the order of computation.

    synapses  [(layer, its BatchNorm or None, [neuron layers whose spikes arrive, added up])]; a plain resnet's shortcut
              without a convolution is named too: there each spike goes to one neuron
    pooled    {neuron layer: the pooling behind it, whose output is what is really sent}
    """
    if isinstance(model, models.Spikformer):
        synapses = [(f"patches.{i}.0", f"patches.{i}.1", [f"lifs.{i - 1}"] if i else []) for i in range(5)]
        stream = ["lifs.3", "lifs.4"]
        for i in range(len(model.mlp)):
            for stage, inner in ((f"attention.{i}", "q k v"), (f"mlp.{i}", "0")):
                out = f"{stage}.out" if "k" in inner else f"{stage}.1"
                synapses += [(f"{stage}.{n}.linear", f"{stage}.{n}.bn", stream) for n in inner.split()]
                synapses += [(f"{out}.linear", f"{out}.bn", [f"{stage}.lif" if "k" in inner else f"{stage}.0.lif"])]
                stream = stream + [f"{out}.lif"]
        return synapses + [("head", None, stream)], {f"lifs.{i}": f"pools.{i}" for i in range(4)}
    synapses, stream = [("stem.0", "stem.1", [])], ["lif"]
    for i, block in enumerate(model.blocks):
        b, adapts = f"blocks.{i}", isinstance(block.shortcut, nn.Sequential)
        if adapts:
            synapses.append((f"{b}.shortcut.0", f"{b}.shortcut.1", stream))
        elif not block.sew:
            synapses.append((f"{b}.shortcut", None, stream))
        synapses += [(f"{b}.conv1", f"{b}.bn1", stream), (f"{b}.conv2", f"{b}.bn2", [f"{b}.lif1"])]
        kept = [] if not block.sew else [f"{b}.lif_shortcut"] if adapts else stream
        stream = kept + [f"{b}.lif2"]
    return synapses + [("head", None, stream)], {"lif": "pool"}


def observe(model, batches):
    """evaluate(), and the spikes that flowed meanwhile, as sums over all images, which is all the memory it takes:

    {neuron layer: [T, *neurons], pooling: [*outputs], attention: additions in k^T v, "events" and "analog": [C, H, W]}
    """
    counts, kept = {}, {}

    def add(name, tensor):
        counts[name] = counts.get(name, 0) + tensor.double()

    def at_input(_, inputs):
        # An image is analog. A whole number k in an event frame is k spikes, any other value in it analog too.
        x, static = inputs[0], inputs[0].dim() == 4
        frames = x if static else x.flatten(0, 1)
        whole = torch.zeros_like(x, dtype=torch.bool) if static else (frames == frames.round()) & (frames >= 0)
        add("events", (frames * whole).sum(0))
        add("analog", (~whole).float().sum(0))

    def at_neurons(name):                                        # the sum over B is exact: float32 counts to 2^24
        return lambda _, inputs, o: add(name, (o != 0).float().sum(1))

    def at_pooling(name):
        return lambda _, inputs, o: add(name, (o != 0).float().sum(0))

    def at_attention(name, heads):
        # Entry (a, b) of k^T v adds 1 for each token where k_a and v_b both fired: (spikes in k) x (spikes in v) a token.
        def hook(_, inputs, o):                                  # o [T, B, N, D]
            spikes = (o != 0).unflatten(3, (heads, -1)).float().sum(4)
            if name in kept:                                     # k has been here, this is v
                add(name, (kept.pop(name) * spikes).double().sum())
            else:
                kept[name] = spikes
        return hook

    hooks = [model.register_forward_pre_hook(at_input)]
    hooks += [layer.register_forward_hook(at_neurons(name)) for name, layer in neurons_of(model).items()]
    hooks += [model.get_submodule(name).register_forward_hook(at_pooling(name)) for name in wiring(model)[1].values()]
    for name, layer in model.named_modules():
        if isinstance(layer, models.SpikingSelfAttention):
            hooks += [part.lif.register_forward_hook(at_attention(name, layer.heads)) for part in (layer.k, layer.v)]
    try:
        return evaluate(model, batches), counts
    finally:
        for hook in hooks:
            hook.remove()


def fan_out(layer, size):
    """How many connections leave each input place of a layer: a number, or [H, W] for a convolution on that size.

    Every output's derivative with respect to an input is 1 for each tap of an all-ones kernel that reads it; stride and
    padding are thereby right at the borders, too."""
    if layer is None:                                            # a shortcut: one neuron
        return 1
    if isinstance(layer, nn.Linear):
        return layer.out_features
    x = torch.zeros(1, 1, *size, requires_grad=True)
    with torch.enable_grad():
        y = F.conv2d(x, torch.ones(1, 1, *layer.kernel_size), None, layer.stride, layer.padding, layer.dilation)
        taps = torch.autograd.grad(y.sum(), x)[0][0, 0].double()
    return taps * (layer.out_channels // layer.groups)


def operations(model, counts, images):
    """What the layers did for one image on average, from the spikes observe() counted: a list of dicts.

    spikes  that arrived    acs  accumulates: one for each spike and connection    macs  multiply-accumulates: analog input
    dense   multiply-accumulates of the same layer in a conventional network: all connections, once
    """
    synapses, pooled = wiring(model)
    layers, rows = dict(model.named_modules()), []

    def row(name, spikes, acs, macs, dense):
        rows.append({k: v if k == "layer" else float(v) for k, v in dict(
            layer=name, spikes=spikes / images, acs=acs / images, macs=macs / images, dense=dense).items()})

    for name, _, sources in synapses:
        sent = [(counts[pooled[s]] if s in pooled else counts[s].sum(0)).cpu() for s in sources]
        layer, analog = layers.get(name), torch.zeros(())
        if not sources:
            sent, analog = [counts["events"].cpu()], counts["analog"].cpu()
        fan = fan_out(layer, sent[0].shape[1:])
        row(name, sum(s.sum() for s in sent), sum((s * fan).sum() for s in sent), (analog * fan).sum(),
            (torch.ones_like(sent[0]) * fan).sum() if layer is not None and name[-8:] != "shortcut" else 0)
    for name, layer in layers.items():
        if isinstance(layer, models.SpikingSelfAttention):
            q, tokens, dim = counts[f"{name}.q.lif"].sum(), *counts[f"{name}.q.lif"].shape[1:]
            width = dim // layer.heads                           # a spike in q adds one row of k^T v: `width` whole numbers
            spikes = counts[f"{name}.k.lif"].sum() + counts[f"{name}.v.lif"].sum()
            row(f"{name}: k^T v", spikes, counts[name], 0, tokens * dim * width)
            row(f"{name}: q (k^T v)", q, q * width, 0, tokens * dim * width)
    return rows


def picojoule(row):
    return PJ_PER_AC * row["acs"] + PJ_PER_MAC * row["macs"]


# ---- folding thresholds and BatchNorm into the weights

@torch.no_grad()
def fold(model):
    """A copy of a network for inference in which every spike is exactly 1 and BatchNorm is gone. The same predictions.

    A neuron that emits theta s into weights W does the same as one that emits s into theta W. So each neuron layer
    emits 0 or 1 (its threshold still decides when), and the weights behind it take its theta; so do a plain resnet's
    shortcuts, which become one weight a spike. BatchNorm, a fixed scale and shift here, goes into the weights before it
    and a bias. The product q k^T v has no weights: the thetas of its three factors divide the threshold behind it
    instead. Residual streams of sew_resnet* and spikformer add spikes of several thetas, which no common weight can
    absorb: there the spikes of each source stay apart (models.join) and the layers behind get one weight set a source.
    That costs memory for weights, not operations: each spike still meets one weight a connection. The head reads means
    over the image: whole numbers of spikes over the number of places, of which the 1 / places belongs to its weights.
    """
    model = copy.deepcopy(model).eval()
    layers, thetas = dict(model.named_modules()), {n: layer.threshold for n, layer in neurons_of(model).items()}
    for name, bn, sources in wiring(model)[0]:
        layer, parent, last = layers.get(name), *name.rpartition(".")[::2]
        if layer is None:                                        # one connection, of weight theta, for each spike
            channels = layers[f"{parent}.conv2"].out_channels
            new = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
            weight, bias = thetas[sources[0]].expand_as(new.weight), None
        else:
            weight = torch.cat([layer.weight * thetas[s] for s in sources], 1) if sources else layer.weight
            bias = layer.bias if layer.bias is not None else weight.new_zeros(len(weight))
            if bn:
                gain = layers[bn].weight / (layers[bn].running_var + layers[bn].eps).sqrt()
                weight = weight * gain.view(-1, *[1] * (weight.dim() - 1))
                bias = (bias - layers[bn].running_mean) * gain + layers[bn].bias
                setattr(layers[bn.rpartition(".")[0]], bn.rpartition(".")[2], nn.Identity())
            if isinstance(layer, nn.Linear):
                new = nn.Linear(weight.shape[1], len(weight))
            else:
                new = nn.Conv2d(weight.shape[1], len(weight), layer.kernel_size, layer.stride, layer.padding)
        new = new.to(weight)
        new.weight.copy_(weight)
        if bias is not None:
            new.bias.copy_(bias)
        setattr(layers[parent], last, new)
    for name, layer in layers.items():
        if isinstance(layer, models.SpikingSelfAttention):       # current, threshold and start divided alike: same spikes
            scale = math.prod(thetas[f"{name}.{n}.lif"] for n in "qkv")
            theta = thetas[f"{name}.lif"] / scale
            layer.lif.raw_threshold.copy_(theta + torch.log(-torch.expm1(-theta)))           # softplus, inverted
            layer.lif.v_init /= scale
        if isinstance(layer, TrLIF):
            layer.surrogate = "absolute"                         # emits s
        if isinstance(layer, models.Spikformer) or getattr(layer, "sew", False):
            layer.folded = True
    return model


def agreement(model, folded, batches):
    """The share of images for which two networks predict the same, and their largest relative difference in logits."""
    same = images = difference = 0
    with torch.no_grad():
        for x, _ in batches:
            a, b = model(x).mean(0), folded(x).mean(0)
            same, images = same + (a.argmax(1) == b.argmax(1)).sum().item(), images + len(x)
            difference = max(difference, ((a - b).abs().max() / a.abs().max()).item())
    return same / images, difference


# ---- membrane potentials

def potentials(model, batches, T, steps):
    """evaluate() over `steps` time steps, and histograms {neuron layer: [T + 1, BINS]} of the potentials v[t] / theta

    after the reset, at t = 1 ... T and, in the last row, pooled over the last T of the steps: the stationary law. A
    static image is shown on; the frames of an event recording are repeated from the first."""
    histograms, run_for = {}, model.timesteps

    def at_neurons(histogram):
        def hook(layer, inputs):                                 # the neuron itself, step by step
            v, theta = layer.v_init, layer.threshold
            for t, x in enumerate(inputs[0].split(1)):
                _, v, _ = lif(x, v, theta, layer.decay, layer.surrogate)
                if t < T or t >= steps - T:
                    bins = (v / theta * BINS_PER_THRESHOLD + BINS / 2).clamp_(0, BINS - 1).int()   # beyond: in the last bin
                    histogram[min(t, T)] += torch.bincount(bins.flatten(), minlength=BINS)
        return hook
    hooks = []
    for name, layer in neurons_of(model).items():
        histograms[name] = torch.zeros(T + 1, BINS, dtype=torch.long, device=layer.v_init.device)
        hooks.append(layer.register_forward_pre_hook(at_neurons(histograms[name])))
    try:
        model.timesteps = steps
        shown = ((x if x.dim() == 4 else x[:, torch.arange(steps) % T], y) for x, y in batches)
        return evaluate(model, shown), {name: h.cpu() for name, h in histograms.items()}
    finally:
        model.timesteps = run_for
        for hook in hooks:
            hook.remove()


def wasserstein(counts, reference):
    """1-Wasserstein distance of laws given as counts [..., BINS], in thresholds: the area between their cumulative laws.

    Each law is known up to half a bin, so the result is off by at most one bin, 1/256 threshold."""
    cumulative = [(c.double() / c.double().sum(-1, keepdim=True)).cumsum(-1) for c in (counts, reference)]
    return (cumulative[0] - cumulative[1]).abs().sum(-1) / BINS_PER_THRESHOLD


def moments(counts):
    """Mean and standard deviation in thresholds of laws given as counts [..., BINS]."""
    middle = (torch.arange(BINS).double() + 0.5) / BINS_PER_THRESHOLD - RANGE
    p = counts.double() / counts.double().sum(-1, keepdim=True)
    mean = (p * middle).sum(-1)
    return mean, ((p * middle ** 2).sum(-1) - mean ** 2).clamp(min=0).sqrt()


# ---- all of it for one checkpoint, as tables and as a picture

def inspect(path, checkpoint, model, dataset, batch_size, images=None):
    """Everything measured on one checkpoint, in a dict that report() and plot() read."""
    T = dataset.frames or model.timesteps
    result, counts = observe(model, take(dataset, batch_size, images))
    neurons = neurons_of(model)
    # Run on for 4 T steps, and longer where a leak is slow: until (1 - k)^steps, what is left of the start, is 1 %.
    slowest = 1 - min(layer.decay.item() for layer in neurons.values())
    steps = T + min(max(4 * T, math.ceil(math.log(0.01) / math.log(slowest))), 64)
    at_zero = copy.deepcopy(model)
    for layer in neurons_of(at_zero).values():
        layer.v_init.zero_()
    runs = {}
    for start, network in (("v_init", model), ("0", at_zero)):
        run_on, laws = potentials(network, take(dataset, max(1, batch_size * T // steps), images), T, steps)
        runs[start] = dict(top1_at=run_on["top1_at"], laws=laws,
                           w1=torch.stack([wasserstein(law[:T], law[T]) for law in laws.values()]))     # [layers, T]
    rows = operations(model, counts, result["images"])
    rates = {n: (counts[n].flatten(1).mean(1) / result["images"]).tolist() for n in neurons}            # spikes a neuron and step
    return dict(path=str(path), network=checkpoint["network"], data=checkpoint["data"]["name"], T=T, steps=steps, result=result, rates=rates, runs=runs, rows=rows,
                parameters=sum(p.numel() for p in model.parameters()),
                silent={n: (counts[n].sum(0) == 0).double().mean().item() for n in neurons},
                neurons={n: (layer.threshold.item(), layer.tau.item(), layer.v_init.item()) for n, layer in neurons.items()},
                places=sum(counts[n][0].numel() for n in neurons),
                spikes=sum(counts[n].sum().item() for n in neurons) / result["images"],
                energy=sum(map(picojoule, rows)), conventional=sum(PJ_PER_MAC * row["dense"] for row in rows))


def table(header, rows):
    """A Markdown table, aligned so that it reads well as plain text too. header: "a | b | c"."""
    cells = [[c.strip() for c in header.split("|")], *[[str(c) for c in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |" for row in cells]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def percent(values):
    return [f"{100 * v:.2f} %" for v in values]


def comparison(looks):
    return table("checkpoint | network | T | parameters | top-1 | after t = 1, 2, ... | firing rate | spikes/image | energy/image | conventional"
                 " | shift at t=1 | with v[0] = 0", [
        (look["path"], look["network"]["arch"], look["T"], f"{look['parameters']:,d}", *percent([look["result"]["top1"]]),
         ", ".join(f"{100 * a:.2f}" for a in look["result"]["top1_at"]), *percent([look["spikes"] / look["T"] / look["places"]]),
         f"{look['spikes']:,.0f}", f"{look['energy'] * 1e-9:.4g} mJ", f"{look['conventional'] * 1e-9:.4g} mJ",
         *(f"{run['w1'][:, 0].mean():.3f}" for run in look["runs"].values())) for look in looks]) + """
Energy: arithmetic only, 45 nm CMOS, 4.6 pJ a multiply-accumulate, 0.9 pJ an accumulate; conventional: the same network, one pass, all
multiply-accumulates. Shift: distance (1-Wasserstein, in thresholds, mean over layers) of the potentials at t = 1 from their stationary law.
"""


def report(look):
    """What inspect() found, as Markdown."""
    T, network, images = look["T"], look["network"], look["result"]["images"]
    starts = [(START[start], run) for start, run in look["runs"].items()]
    at, laws = " | ".join(f"t={t}" for t in range(1, T + 1)), [run["laws"] for run in look["runs"].values()]
    ends = max((law[..., [0, -1]].sum(-1) / law.sum(-1)).max().item() for run in laws for law in run.values())
    total = {key: sum(row[key] for row in look["rows"]) for key in ("acs", "macs", "dense")}

    def law(counts, w1=None):
        mean, deviation = moments(counts)
        return f"{mean:.3f} ± {deviation:.3f}" + ("" if w1 is None else f" | {w1:.3f}")
    shifts = [[name, t + 1, *" | ".join(law(run["laws"][name][t], run["w1"][i, t]) for _, run in starts).split(" | "),
               law(laws[0][name][T])] for i, name in enumerate(look["rates"]) for t in range(T)]
    return f"""# {look["path"]}

{network["arch"]}, width {network["width"]}, T = {T}, {look["parameters"]:,d} parameters, {look["data"]}, {images:,d} test images: top-1 {100 * look["result"]["top1"]:.2f} %

## Accuracy when read out after t steps

{table(f"potentials start at | {at}", [[start, *percent(run["top1_at"][:T])] for start, run in starts])}
## Neurons

{table(f"layer | theta | tau (steps) | v_init | never fire | rate {at.replace('| ', '| rate ')}", [[n, *(f"{v:.3f}" for v in look["neurons"][n]), *percent([look["silent"][n], *rate])] for n, rate in look["rates"].items()])}
Firing rate: spikes a neuron and time step. Never fire: the share of neurons without a spike on any of the images.

## Temporal covariate shift

{table(f"mean over layers | {at}", [[start, *(f"{w:.3f}" for w in run["w1"].mean(0))] for start, run in starts])}
Distance (1-Wasserstein) of the membrane potentials v[t] after the reset from their stationary law, in thresholds: 0 means that step t sees the
potentials that every later step sees. The stationary law is that of the last {T} of {look["steps"]} steps of the same network on the same images.

{table(" | ".join(["layer | t", *(f"{start}: mean ± sd | distance" for start, _ in starts), "stationary: mean ± sd"]), shifts)}
From histograms with bins of 1/{BINS_PER_THRESHOLD} threshold: distances and means are off by at most that. At most {100 * ends:.2g} % of a law lies
beyond the histograms' {RANGE} thresholds and counts as being there.

## Operations and energy for one image

{table("layer | spikes in | accumulates | multiply-accumulates | energy (uJ) | conventional (uJ)", [[r["layer"], f"{r['spikes']:,.1f}", f"{r['acs']:,.0f}", f"{r['macs']:,.0f}", f"{picojoule(r) * 1e-6:.4g}", f"{PJ_PER_MAC * r['dense'] * 1e-6:.4g}"] for r in look["rows"]])}
**{look["spikes"]:,.0f} spikes, {total["acs"]:,.0f} accumulates, {total["macs"]:,.0f} multiply-accumulates: {look["energy"] * 1e-9:.4g} mJ.** The same network as a conventional one,
one pass: {total["dense"]:,.0f} multiply-accumulates, {look["conventional"] * 1e-9:.4g} mJ, {look["conventional"] / look["energy"]:.2f} times as much.

A spike that arrives costs one accumulate (0.9 pJ) for each connection that leaves its place, borders and strides counted exactly; a place of a
residual stream to which k neurons sent a spike costs k. An image is analog: its first layer costs multiply-accumulates (4.6 pJ), once for all
T steps. Of event frames a whole number k counts as k spikes, anything else as analog. Attention: k^T v costs an accumulate
for each pair of spikes that meet in a token, q (k^T v) one of a whole number for each spike in q and entry of a row. 45 nm CMOS, arithmetic
only: no memory access, biases, pooling, and not the {look["places"] * T:,d} updates of neurons (a multiply-accumulate and a comparison each).
"""


def pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    return plt


def save_figure(figure, path):
    data.write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    print(f"wrote {path}")


def plot(look, path):
    """Accuracy, firing rates, covariate shift, energy; below them potentials of four layers with MP-Init and without."""
    plt, T, names, rows = pyplot(), look["T"], list(look["rates"]), look["rows"]
    figure, axes = plt.subplots(3, 4, figsize=(20, 13), layout="constrained")
    colours = [plt.cm.viridis(t / max(T, 2)) for t in range(T)]
    figure.suptitle(f"{look['path']}: {look['network']['arch']}, width {look['network']['width']}, T = {T}, {look['data']}, {look['result']['images']:,d} test images", fontsize=13)
    accuracy, rate, shift, energy = axes[0]
    for (start, run), style in zip(look["runs"].items(), ("o-", "s--")):
        accuracy.plot(range(1, look["steps"] + 1), [100 * a for a in run["top1_at"]], style, ms=4, label=START[start])
        shift.plot(run["w1"][:, 0], style, ms=4, label=START[start])
    accuracy.axvline(T, color="grey", lw=1, ls=":", label=f"T = {T} of the training")
    accuracy.set(title="Accuracy when read out after t steps", xlabel="time step t", ylabel="top-1 (%)")
    for t in range(T):
        rate.plot([100 * look["rates"][n][t] for n in names], ".-", color=colours[t], label=f"t = {t + 1}")
    rate.set(title="Firing rate", ylabel="spikes a neuron and step (%)")
    shift.set(title="Covariate shift: distance of the potentials\nat t = 1 from their stationary law", ylabel="1-Wasserstein distance (thresholds)")
    energy.bar([i - 0.2 for i in range(len(rows))], [PJ_PER_MAC * r["dense"] * 1e-6 for r in rows], 0.4, color="lightgrey", label=f"conventional: {look['conventional'] * 1e-9:.3g} mJ")
    energy.bar([i + 0.2 for i in range(len(rows))], [picojoule(r) * 1e-6 for r in rows], 0.4, label=f"spiking: {look['energy'] * 1e-9:.3g} mJ")
    energy.set(title="Energy an image (45 nm, arithmetic only)", ylabel="energy (uJ)", xlabel="layer with weights")
    for panel, labels in ((rate, names), (shift, names), (energy, [r["layer"] for r in rows])):
        every = -(-len(labels) // 24)
        panel.set_xticks(range(0, len(labels), every), labels[::every], rotation=90, fontsize=7)
    for panel in axes[0]:
        panel.legend(fontsize=8)
    for column, i in enumerate(sorted({round(j * (len(names) - 1) / 3) for j in range(4)})):
        laws = [run["laws"][names[i]].double().unflatten(1, (-1, 16)).sum(2) for run in look["runs"].values()]      # 1/16 threshold
        laws = [law / law.sum(1, keepdim=True) * BINS_PER_THRESHOLD / 16 for law in laws]
        edges = torch.linspace(-RANGE, RANGE, laws[0].shape[1] + 1)
        held = torch.cat(laws).amax(0).gt(0.01).nonzero()
        for panel, law, (start, run) in zip(axes[1:, column], laws, look["runs"].items()):
            panel.stairs(law[T], edges, fill=True, color="lightgrey", label="stationary")
            for t in range(T):
                panel.stairs(law[t], edges, color=colours[t], label=f"t = {t + 1}, distance {run['w1'][i, t]:.3f}")
            panel.set(title=f"{names[i]}, {START[start]}", xlabel="membrane potential after the reset (thresholds)", ylabel="density",
                      xlim=(edges[held[0]].item() - 0.2, edges[held[-1]].item() + 0.3), yscale="log", ylim=(0.01, None))
            panel.legend(fontsize=8)
    save_figure(figure, path)
    plt.close(figure)


# ---- gradients against threshold

def gradient_norms(surrogate, theta, follow):
    """Norm of the loss's gradient with respect to the current of each neuron layer, and the mean firing rate, of a random resnet19.

    follow: BatchNorm scales the currents with theta, so that the neurons fire alike whatever it is; else currents have variance 1."""
    torch.manual_seed(0)
    model, norms, rates = models.build("resnet19", 10, 4, width=8, threshold=theta, surrogate=surrogate).train(), {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d) and follow:
            nn.init.constant_(layer.weight, theta)
        if isinstance(layer, TrLIF):
            layer.register_forward_hook(lambda _, inputs, o, name=name: (
                rates.append((o != 0).float().mean().item()), inputs[0].register_hook(lambda g: norms.update({name: g.norm().item()}))) and None)
    F.cross_entropy(model(torch.randn(16, 3, 32, 32)).mean(0), torch.arange(16) % 10).backward()
    return {name: norms[name] for name in neurons_of(model)}, sum(rates) / len(rates)


def gradients(path=None):
    """Print gradient norms of the first, middle and last neuron layer against threshold; a picture of all layers into path."""
    thetas, sweeps = [0.1 * 10 ** (i / 4) for i in range(9)], {}
    plt = pyplot() if path else None
    print("Gradient of the loss with respect to a neuron layer's input current, norm; resnet19, width 8, T = 4, random weights\n")
    for follow, title in ((True, "currents scale with the threshold (same firing rate)"), (False, "currents of variance 1 (firing rate falls with the threshold)")):
        for surrogate in ("trsg", "absolute"):
            sweep = sweeps[title, surrogate] = [gradient_norms(surrogate, theta, follow) for theta in thetas]
            names = list(sweep[0][0])
            print(f"{surrogate}, {title}\n\n" + table("threshold | firing rate | " + " | ".join(names[::4]), [
                [f"{theta:.2f}", *percent([rate]), *(f"{norms[n]:.2e}" for n in names[::4])] for theta, (norms, rate) in zip(thetas, sweep)]))
    if path:
        figure, axes = plt.subplots(2, 2, figsize=(13, 10), sharex=True, sharey=True, layout="constrained")
        figure.suptitle("Gradient at each neuron layer against the threshold (resnet19, width 8, T = 4, random weights)", fontsize=13)
        for panel, ((title, surrogate), sweep) in zip(axes.flat, sweeps.items()):
            for i, name in enumerate(names):
                panel.loglog(thetas, [norms[name] or math.nan for norms, _ in sweep], ".-", color=plt.cm.viridis(i / len(names)), label=name)
            panel.set(title=f"{surrogate}\n{title}", xlabel="threshold", ylabel="norm of the gradient w.r.t. the current")
        axes[0, 1].legend(fontsize=7, title="layer", loc="upper left", bbox_to_anchor=(1, 1))
        save_figure(figure, path)


# ---- command line

def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"eval.py: error: {message} (--help explains the flags)\n")
    parser.add_argument("checkpoint", nargs="*", help="last.pt or best.pt of a run, or several to compare")
    g = parser.add_argument_group("what to do")
    g.add_argument("--inspect", action="store_true", help="print tables of firing rates, potentials, operations and energy, layer by layer")
    g.add_argument("--report", metavar="FILE.md", help="write these tables into a file")
    g.add_argument("--plot", metavar="FILE.png", help="draw them (needs matplotlib); for the second checkpoint into FILE-2.png, and so on")
    g.add_argument("--fold", action="store_true", help="fold thresholds and BatchNorm into the weights, compare predictions with the network as trained")
    g.add_argument("--save-folded", metavar="FILE.pt", help="write the folded network, which eval.py reads as any checkpoint")
    g.add_argument("--gradients", nargs="?", const="", metavar="FILE.png", help="print the norm of the gradient at each layer for thresholds from 0.1 to 10, both surrogates; draw it into a file, if given. Needs no checkpoint")
    g = parser.add_argument_group("data and machine")
    g.add_argument("--data-dir", default="data", help="where the data sets are (default: %(default)s)")
    g.add_argument("--images", type=int, metavar="N", help="use the first N test images only")
    g.add_argument("--batch-size", type=int, default=256, help="images at a time (default: %(default)s)")
    g.add_argument("--timesteps", type=int, metavar="T", help="time steps to run for, if other than in training")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    g.add_argument("--workers", type=int, default=2, help="processes that decode large images (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("batch_size", "timesteps", "images"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not args.checkpoint and args.gradients is None:
        parser.error("no checkpoint given")
    if len(args.checkpoint) > 1 and args.save_folded:
        parser.error("--save-folded takes one checkpoint")
    return args


def fold_and_check(args, path, checkpoint, model, dataset):
    if checkpoint.get("folded"):
        raise UserError(f"{path} is folded already")
    folded = fold(model)
    same, difference = agreement(model, folded, take(dataset, args.batch_size, args.images))
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, folded))
    print(f"folded: same prediction on {100 * same:.2f} % of the images, logits differ by {difference:.1e} of the largest at most; "
          f"{after:,d} parameters instead of {before:,d} ({after / before:.2f} x)")
    if args.save_folded:
        state = {key: checkpoint[key] for key in ("format", "network", "data", "epoch")}
        state.update(folded=True, model=folded.state_dict())
        data.write_atomically(args.save_folded, lambda file: torch.save(state, file))
        print(f"wrote {args.save_folded}")
    return folded


def main(argv=None):
    args = arguments(argv)
    if args.plot:
        pyplot()                                                 # missing? say so now rather than after the work
    if args.gradients is not None:
        gradients(args.gradients)
    looks = []
    for number, path in enumerate(args.checkpoint, 1):
        checkpoint = load_checkpoint(path)
        model = build_network(checkpoint, path).to(args.device, memory_format=torch.channels_last)
        network = checkpoint["network"]
        model.timesteps = args.timesteps or network["timesteps"]
        dataset = test_data(checkpoint, args.data_dir, args.workers).to(args.device)
        print(f"{path}: {network['arch']}, width {network['width']}, T = {dataset.frames or model.timesteps}, "
              f"{checkpoint['data']['name']}, epoch {checkpoint['epoch']}{', folded' if checkpoint.get('folded') else ''}")
        if args.fold or args.save_folded:
            model = fold_and_check(args, path, checkpoint, model, dataset).to(memory_format=torch.channels_last)
        start = time.perf_counter()
        look = {}
        if args.inspect or args.report or args.plot or len(args.checkpoint) > 1:
            look = inspect(path, checkpoint, model, dataset, args.batch_size, args.images)
            looks.append(look)
        result = look["result"] if look else evaluate(model, take(dataset, args.batch_size, args.images))
        speed = "" if look else f", {result['images'] / (time.perf_counter() - start):.0f} images/s"
        print(f"top-1 {100 * result['top1']:.2f} %   top-5 {100 * result['top5']:.2f} %   of {result['images']} images{speed}")
        print("read out after  " + "  ".join(f"t={t}: {100 * a:.2f} %" for t, a in enumerate(result["top1_at"], 1)) + "\n")
        if args.inspect:
            print(report(look))
        if args.plot:
            target = pathlib.Path(args.plot)
            plot(look, target if number == 1 else target.with_stem(f"{target.stem}-{number}"))
    if looks:
        print(comparison(looks))
    if args.report:
        text = "\n".join([f"# Comparison\n\n{comparison(looks)}"] * (len(looks) > 1) + [report(look) for look in looks])
        data.write_atomically(args.report, lambda file: file.write(text.encode()))
        print(f"wrote {args.report}")


def run(main, program):
    """Call main(); an expected failure becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main, "eval.py")
