"""What a trained network does and costs:  python eval.py runs/NAME/best.pt

The network is rebuilt from the checkpoint alone. Printed are top-1 and top-5 accuracy on the test
set, and the accuracy when it is read out after t = 1 ... T time steps. Further:

    python eval.py A.pt --inspect     firing rates, potentials, operations, energy, layer by layer
    python eval.py A.pt --report A.md --plot A.png         the same as a file and as a picture
    python eval.py A.pt B.pt ...      compare checkpoints: one table
    python eval.py A.pt --fold        absorb thresholds and BatchNorm into the weights, and compare
    python eval.py A.pt --save-folded F.pt                 ... and write that network

    python eval.py --picture FILE.png       both methods in one picture; needs no checkpoint
    python eval.py --gradients [FILE.png]   gradient norms against the threshold, random weights
    python eval.py --speed                  one layer, plain and fused, beside what memory allows

What the figures mean is written under every table. This file imports all the others.
"""
import argparse
import collections
import copy
import math
import os
import time
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.benchmark import Timer

import data
import models
import neuron
import train
from data import UserError
from neuron import TrLIF, lif
from train import build_network, check_classes, evaluate, load_checkpoint

# Energy of a 32-bit multiply-accumulate and of an accumulate in pJ, in 45 nm CMOS (Horowitz 2014).
PJ_PER_MAC, PJ_PER_AC = 4.6, 0.9
# Histograms of potentials reach from -32 to 32 thresholds.
RANGE, BINS_PER_THRESHOLD = 32, 256
BINS = 2 * RANGE * BINS_PER_THRESHOLD
# What --speed times: layers of so many neurons, each for so many seconds.
NEURONS = {"cpu": (2 ** 18, 2 ** 21, 2 ** 22), "cuda": (2 ** 18, 2 ** 22, 2 ** 24, 2 ** 26)}
SECONDS = 1.0


# ---- Data ---------------------------------------------------------------------------------------

def test_data(checkpoint, data_dir, workers, timesteps=None):
    """The test set of the data a network was trained on, normalised, split and cut as there."""
    described = checkpoint["data"]
    frames = timesteps or checkpoint["network"]["timesteps"]
    events = described.get("dvs_split"), described.get("bin_by")
    size = described["image_size"]
    dataset = data.load(described["name"], data_dir, size, workers, frames, *events)
    if described.get("classes"):
        dataset.keep_classes(described["classes"])
    check_classes(checkpoint, dataset, data_dir)
    # Those of the training images, whatever lies in the folder by now.
    dataset.mean, dataset.std = described["mean"], described["std"]
    return dataset


def take(dataset, batch_size, images=None):
    """The test batches (x, y) without padding, of the first `images` images only if given."""
    left = images or math.inf
    for x, y in dataset.test(batch_size):
        # Padding has the label -1.
        n = min(left, (y >= 0).sum().item())
        yield x[:n], y[:n]
        left -= n
        if left == 0:
            return


# ---- Spikes, operations, energy -----------------------------------------------------------------

def neurons_of(model):
    # {name: layer}, in the order of computation.
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, TrLIF)}


def observe(model, batches, amp=False):
    """evaluate(), and the spikes that flowed meanwhile, summed over the images.

    Returns (result, counts). counts, whose size does not grow with the number of images:
    {neuron layer: [T, *neurons], pooling: [1, *outputs], "NAME k^T v": additions in attention NAME,
    "events": spikes in the input, "analog": other values in the input, both [C, H, W]}.
    """
    # The hooks stay on the copy.
    model = copy.deepcopy(model)
    counts, latest = collections.defaultdict(float), {}

    def at_input(_, inputs):
        x = inputs[0] if inputs[0].dim() == 4 else inputs[0].flatten(0, 1)
        # An image is analog. A whole number k in an event frame is k spikes, all else analog too.
        whole = (x == x.round()) & (x >= 0) & (inputs[0].dim() == 5)
        counts["events"] += (x * whole).double().sum(0)
        counts["analog"] += (~whole).double().sum(0)

    def at_spikes(name):
        def hook(layer, _, output):
            # Of neurons [T, B, ...], of pooling [T*B, ...]: as one step.
            fired = output if isinstance(layer, TrLIF) else output[None]
            # float32 counts exactly up to 2^24 images a batch.
            counts[name] += (fired != 0).float().sum(1).double()
        return hook

    def at_attention(name, part, heads):
        def hook(_, inputs, output):
            # [T, B, N, D] -> [T, B, N, heads]
            latest[name, part] = (output != 0).unflatten(3, (heads, -1)).sum(4).double()
            # v comes after k. Entry (a, b) of k^T v adds 1 for every token in which k_a and v_b
            # both fired: in each head, spikes of k times spikes of v.
            if part == "v":
                counts[f"{name} k^T v"] += (latest[name, "k"] * latest[name, "v"]).sum()
        return hook

    model.register_forward_pre_hook(at_input)
    pools = [pool for _, pool in models.pooling(model)]
    for name, layer in model.named_modules():
        if isinstance(layer, TrLIF) or layer in pools:
            layer.register_forward_hook(at_spikes(name))
        elif isinstance(layer, models.SpikingSelfAttention):
            layer.k.lif.register_forward_hook(at_attention(name, "k", layer.heads))
            layer.v.lif.register_forward_hook(at_attention(name, "v", layer.heads))
    return evaluate(model, batches, amp), counts


def fan_out(layer, size):
    """The connections that leave each place of a layer's input: a number, or [H, W] of size for
    a convolution, borders and strides counted exactly."""
    if isinstance(layer, nn.Sequential) and len(layer) > 0:
        layer = layer[0]
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if not isinstance(layer, nn.Conv2d):
        # A plain shortcut leads to one neuron.
        return 1
    # The derivative of a convolution with ones, summed: the number of taps that read a place.
    x, ones = torch.zeros(1, 1, *size, requires_grad=True), torch.ones(1, 1, *layer.kernel_size)
    with torch.enable_grad():
        reached = F.conv2d(x, ones, None, layer.stride, layer.padding, layer.dilation).sum()
    (taps,) = torch.autograd.grad(reached, x)
    return taps[0, 0].double() * (layer.out_channels // layer.groups)


def operations(model, counts, images):
    """What each layer does for an image on average, given what observe() counted: a list of dicts.

    layer         its name
    spikes        that arrived there
    acs           accumulates: one for each spike and connection
    macs          multiply-accumulates, on analog input
    dense         those of a conventional network's layer: one for each input and connection
    pj, dense_pj  energy in pJ
    """
    names = {module: name for name, module in model.named_modules()}
    pools = dict(models.pooling(model))
    counts = {name: torch.as_tensor(count).cpu() / images for name, count in counts.items()}
    rows = []

    def add(name, spikes, acs, macs, dense):
        row = dict(spikes=float(spikes), acs=float(acs), macs=float(macs), dense=float(dense))
        pj = PJ_PER_AC * row["acs"] + PJ_PER_MAC * row["macs"]
        rows.append({"layer": name, **row, "pj": pj, "dense_pj": PJ_PER_MAC * row["dense"]})

    for layer, sources in models.synapses(model):
        # Spikes that arrived at each place, [C, H, W] or [N, D], source by source: those of all
        # steps, and where there is pooling, what it let through.
        leaving = [names[pools.get(source, source)] for source in sources]
        arrived = [counts[name].sum(0) for name in leaving] or [counts["events"]]
        # Each spike goes to so many neurons.
        fan = fan_out(layer, arrived[0].shape[1:])
        dense = (torch.ones_like(arrived[0]) * fan).sum()
        if layer is model.head:
            # A conventional head reads the mean over places.
            dense = layer.out_features * arrived[0].shape[0 if arrived[0].dim() == 3 else 1]
        elif not any(isinstance(part, (nn.Conv2d, nn.Linear)) for part in layer):
            # A plain shortcut only adds.
            dense = 0
        acs = sum((spikes * fan).sum() for spikes in arrived)
        macs = 0 if sources else (counts["analog"] * fan).sum()
        add(names[layer], sum(spikes.sum() for spikes in arrived), acs, macs, dense)
    # Two more products in attention, of spikes with spikes.
    for name, layer in model.named_modules():
        if isinstance(layer, models.SpikingSelfAttention):
            # Each [T, N, D].
            q, k, v = (counts[f"{name}.{part}.lif"] for part in "qkv")
            # A spike of q adds a row of so many whole numbers.
            width = q.shape[2] // layer.heads
            dense = q[0].numel() * width
            add(f"{name} k^T v", k.sum() + v.sum(), counts[f"{name} k^T v"], 0, dense)
            add(f"{name} q (k^T v)", q.sum(), q.sum() * width, 0, dense)
    return rows


# ---- Membrane potentials ------------------------------------------------------------------------

def histogram(v, theta):
    """The law of v / theta as counts [BINS]. What lies beyond the range is in the last bin."""
    bins = (v * (BINS_PER_THRESHOLD / theta) + BINS / 2).clamp(0, BINS - 1).int()
    return torch.bincount(bins.flatten(), minlength=BINS)


def potentials(model, batches, T, steps, v_init=None, amp=False):
    """evaluate() over so many steps, and the laws of v[t] / theta after the reset.

    v_init   where potentials start, if not where the network has learnt to
    Returns (result, {neuron layer: [T + 1, BINS]}). Rows are t = 1 ... T and the stationary law,
    pooled over the last T steps. An image is shown on, the frames of a recording are repeated.
    """
    # The hooks stay on the copy.
    model, laws = copy.deepcopy(model), {}
    model.timesteps = steps

    def at_neurons(law):
        def hook(layer, inputs, _):
            v, theta = layer.v_init, layer.threshold
            # The neuron again, a step at a time, for its potentials.
            for t in range(steps):
                _, v, _ = lif(inputs[0][t:t + 1], v, theta, layer.decay, layer.surrogate)
                if t < T or t >= steps - T:
                    law[min(t, T)] += histogram(v, theta)
        return hook
    for name, layer in neurons_of(model).items():
        laws[name] = torch.zeros(T + 1, BINS, dtype=torch.long, device=layer.v_init.device)
        layer.register_forward_hook(at_neurons(laws[name]))
        if v_init is not None:
            layer.v_init.fill_(v_init)
    # 0 ... T - 1, 0 ... T - 1, and so on.
    frames = torch.arange(steps) % T
    shown = ((x if x.dim() == 4 else x[:, frames], y) for x, y in batches)
    result = evaluate(model, shown, amp)
    return result, {name: law.cpu() for name, law in laws.items()}


def wasserstein(laws, reference):
    """1-Wasserstein distance in thresholds of laws given as counts [..., BINS]: the area between
    the cumulative laws. A bin does not tell where in it a potential is: off by at most one bin."""
    # From counts to shares: both laws may come from any number of potentials.
    laws, reference = (counts.double() / counts.double().sum(-1, keepdim=True)
                       for counts in (laws, reference))
    return (laws - reference).cumsum(-1).abs().sum(-1) / BINS_PER_THRESHOLD


# ---- Reports ------------------------------------------------------------------------------------

def inspect(path, checkpoint, model, dataset, batch_size, images=None, amp=False):
    # All that report(), comparison() and plot() show of one checkpoint, as attributes.
    result, counts = observe(model, take(dataset, batch_size, images), amp)
    T, network, images = dataset.frames or model.timesteps, checkpoint["network"], result["images"]
    study = SimpleNamespace(path=str(path), arch=network["arch"], T=T, result=result)
    study.title = f"{path}: {network['arch']}, width {network['width']}, T = {T}, "
    study.title += f"{checkpoint['data']['name']}, {images:,d} test images, "
    study.title += f"top-1 {percent(result['top1'])}"
    # A folded network has more where sources keep weights of their own.
    study.parameters = sum(p.numel() for p in model.parameters())
    study.neurons = neurons_of(model)
    # Run on for 4 T steps, or longer where a leak is slow: until (1 - k)^steps, what is left of the
    # start, is 1 %. The last T steps then give the stationary law.
    kept = max(1 - layer.decay.item() for layer in study.neurons.values())
    settled = math.log(0.01) / math.log(min(max(kept, 1e-6), 1 - 1e-6))
    study.steps = T + min(max(4 * T, math.ceil(settled)), max(64, T))
    study.runs = {}
    # So many steps would take longer to compile than these few batches take.
    fused, neuron.COMPILE = neuron.COMPILE, False
    for start, v_init in (("v[0] = v_init (MP-Init)", None), ("v[0] = 0", 0)):
        # More steps, fewer images at a time.
        batches = take(dataset, max(1, batch_size * T // study.steps), images)
        longer, laws = potentials(model, batches, T, study.steps, v_init, amp)
        # [layers, T]
        shift = torch.stack([wasserstein(law[:T], law[T]) for law in laws.values()])
        study.runs[start] = SimpleNamespace(top1_at=longer["top1_at"], laws=laws, shift=shift)
    neuron.COMPILE = fused
    # Spikes an image, {neuron layer: [T, *neurons]}, and their mean over the neurons of a layer.
    spikes = {name: counts[name].cpu() / images for name in study.neurons}
    study.rates = {name: count.flatten(1).mean(1) for name, count in spikes.items()}
    study.size = sum(count[0].numel() for count in spikes.values())
    study.spikes = sum(count.sum().item() for count in spikes.values())
    study.operations = operations(model, counts, images)
    # A conventional network has no spikes: multiply-accumulates everywhere, in a single pass.
    study.mj = 1e-9 * sum(row["pj"] for row in study.operations)
    study.dense_mj = 1e-9 * sum(row["dense_pj"] for row in study.operations)
    return study


def table(header, rows):
    # Markdown, aligned to be read as plain text, too. header: "a | b | c".
    rows = [header.split(" | "), *([str(cell) for cell in row] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    # The first column is left-aligned, the others right-aligned.
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = ""
    for first, *others in [rows[0], rule, *rows[1:]]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines += "| " + " | ".join([first.ljust(widths[0]), *cells]) + " |\n"
    return lines


def percent(value):
    # Of a share from 0 to 1.
    return f"{100 * value:.2f} %"


def comparison(studies):
    # One row a checkpoint.
    rows = []
    for study in studies:
        # The last one is the accuracy proper.
        right = ", ".join(percent(share) for share in study.result["top1_at"])
        rate = percent(study.spikes / study.T / study.size)
        row = [study.path, study.arch, study.T, f"{study.parameters:,d}", right, rate]
        row += [f"{study.spikes:,.0f}", f"{study.mj:.4g} mJ", f"{study.dense_mj:.4g} mJ"]
        rows.append(row + [f"{run.shift[:, 0].mean():.3f}" for run in study.runs.values()])
    header = "checkpoint | network | T | parameters | top-1 after t = 1, 2, ... | firing rate | "
    header += "spikes/image | energy/image | conventional | shift at t=1 | with v[0] = 0"
    return f"""{table(header, rows)}
Firing rate: spikes a neuron and step. Energy: arithmetic only, 45 nm, 4.6 pJ a multiply-accumulate
and 0.9 pJ an accumulate; conventional: the same network in one pass, all multiply-accumulates.
Shift: distance of the potentials at t = 1 from their stationary law, in thresholds (1-Wasserstein,
mean over layers), as the network is and started at 0.
"""


def neuron_table(study, times):
    # What each layer has learnt, and how often it fires.
    rows = []
    for name, layer in study.neurons.items():
        learnt = [f"{value.item():.3f}" for value in (layer.threshold, layer.tau, layer.v_init)]
        rows.append([name, *learnt, *(percent(rate) for rate in study.rates[name])])
    return table(f"layer | theta | tau | v_init | {times}", rows)


def shift_table(study, times):
    # [1 + layers, starts * T], the mean over layers first.
    shift = torch.cat([run.shift for run in study.runs.values()], 1)
    shift = torch.cat([shift.mean(0, keepdim=True), shift])
    rows = []
    for name, distances in zip(["mean over layers", *study.neurons], shift):
        rows.append([name, *(f"{distance:.3f}" for distance in distances)])
    return table(f"layer | {times} | {times.replace('t', 'from 0: t')}", rows)


def operation_table(study):
    # Energies in nJ, as in the picture.
    rows = []
    for row in study.operations:
        counted = [f"{row['spikes']:,.1f}", f"{row['acs']:,.0f}", f"{row['macs']:,.0f}"]
        energy = [f"{row[key] * 1e-3:,.3f}" for key in ("pj", "dense_pj")]
        rows.append([row["layer"], *counted, *energy])
    header = "layer | spikes in | accumulates | multiply-accumulates | energy (nJ)"
    return table(f"{header} | conventional (nJ)", rows)


def report(study):
    # What inspect() found, as Markdown. {times}: one column a time step.
    times = " | ".join(f"t={t}" for t in range(1, study.T + 1))
    accuracy = []
    for start, run in study.runs.items():
        accuracy.append([start, *(percent(share) for share in run.top1_at[:study.T])])
    # Totals over the layers.
    acs, macs, dense = (sum(row[key] for row in study.operations)
                        for key in ("acs", "macs", "dense"))
    return f"""# {study.title}

Top-1 accuracy when read out after t steps:

{table(f"start | {times}", accuracy)}
## Neurons

{neuron_table(study, times)}
tau in time steps. Under t: firing rate, spikes a neuron at that step.

## Temporal covariate shift

{shift_table(study, times)}
Distance (1-Wasserstein, in thresholds) of the membrane potentials v[t], after the reset, from their
stationary law, that of the last {study.T} of {study.steps} steps of the network on the same images;
"from 0": of the same network started at v[0] = 0. Where it is 0, step t sees the potentials that
later steps see. Histograms of 1/{BINS_PER_THRESHOLD} threshold a bin: off by one bin at most.

## Operations and energy for one image

{operation_table(study)}
{study.spikes:,.0f} spikes, {acs:,.0f} accumulates, {macs:,.0f} multiply-accumulates; {dense:,.0f}
multiply-accumulates in a conventional network, {study.dense_mj / study.mj:.2f} times the energy.

A spike costs one accumulate (0.9 pJ) for each connection that leaves its place; where a residual
stream adds spikes of k neurons, k. An image is analog: its first layer costs multiply-accumulates
(4.6 pJ), once for all steps. In event frames a whole number k counts as k spikes, anything else as
analog. Attention: k^T v costs an accumulate for each pair of spikes that meet in a token, q (k^T v)
one for each spike of q and column of its head. 45 nm CMOS, arithmetic only: no memory access,
biases or pooling, nor the {study.size * study.T:,d} updates of neurons.
"""


# ---- Pictures -----------------------------------------------------------------------------------

def pyplot():
    # Only pictures need matplotlib.
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install matplotlib") from error
    # Draws into files, without a screen.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": 8})
    plt.rcParams.update({"font.size": 9, "figure.constrained_layout.use": True})
    return plt


def save_figure(figure, path):
    # Closed, or matplotlib would keep every figure of a comparison.
    data.write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    pyplot().close(figure)


def describe(panel, title, x, y):
    panel.set(title=title, xlabel=x, ylabel=y)


def draw_laws(panel, laws, labels, colours):
    # Densities of v / theta from counts [n + 1, BINS], in bins of 1/16 threshold.
    law = laws.unflatten(1, (-1, BINS_PER_THRESHOLD // 16)).sum(2).double()
    law = 16 * law / law.sum(1, keepdim=True)
    edges = torch.linspace(-RANGE, RANGE, law.shape[1] + 1)
    # Where all laws are next to 0 there is nothing to see.
    visible = (law.amax(0) > 0.01).nonzero()
    first, last = visible[0].item(), visible[-1].item() + 1
    law, edges = law[:, first:last], edges[first:last + 1]
    panel.stairs(law[-1], edges, fill=True, color="lightgrey", label="stationary")
    for density, label, colour in zip(law, labels, colours):
        panel.stairs(density, edges, color=colour, lw=1.5, label=label)


def draw_curves(accuracy, rate, shift, study, colours):
    # The dotted line is where the network was trained to be read out.
    accuracy.axvline(study.T, color="grey", lw=1, ls=":", label=f"T = {study.T}")
    for (start, run), style in zip(study.runs.items(), ("o-", "s--")):
        right = [100 * share for share in run.top1_at]
        accuracy.plot(range(1, study.steps + 1), right, style, ms=4, label=start)
        shift.plot(run.shift[:, 0], style, ms=4, label=start)
    # A line a time step, over the layers.
    for t, colour in enumerate(colours):
        rates = [100 * rates[t] for rates in study.rates.values()]
        rate.plot(rates, ".-", color=colour, label=f"t = {t + 1}")
    describe(accuracy, "Accuracy when read out after t steps", "time step t", "top-1 (%)")
    describe(rate, "Firing rate", "neuron layer", "spikes a neuron and step (%)")
    title = "Covariate shift at t = 1: distance of the\npotentials from their stationary law"
    describe(shift, title, "neuron layer", "1-Wasserstein distance (thresholds)")


def draw_energy(panel, study):
    # Spiking in front of conventional: its bars are lower and narrower.
    conventional = [row["dense_pj"] * 1e-3 for row in study.operations]
    label, layers = f"conventional: {study.dense_mj:.3g} mJ", range(len(conventional))
    panel.bar(layers, conventional, 0.9, color="lightgrey", label=label)
    spiking = [row["pj"] * 1e-3 for row in study.operations]
    panel.bar(layers, spiking, 0.5, label=f"spiking: {study.mj:.3g} mJ")
    title = "Energy an image (45 nm, arithmetic only)"
    describe(panel, title, "layer with weights", "energy (nJ)")


def plot(study, path):
    # Accuracy, firing rates, covariate shift and energy; below, potentials in four layers with
    # MP-Init and without.
    plt, names = pyplot(), list(study.neurons)
    figure, axes = plt.subplots(3, 4, figsize=(20, 13))
    figure.suptitle(study.title, fontsize=13)
    # From dark to light as time passes.
    colours = [plt.cm.viridis(t / max(study.T, 2)) for t in range(study.T)]
    draw_curves(*axes[0, :3], study, colours)
    draw_energy(axes[0, 3], study)
    layers = [row["layer"] for row in study.operations]
    for panel, labels in zip(axes[0, 1:], (names, names, layers)):
        # Thirty names are as many as can be read.
        every = 1 + len(labels) // 30
        panel.set_xticks(range(0, len(labels), every), labels[::every], rotation=90, fontsize=7)
    # One column a layer; above with MP-Init, below without.
    for column in range(4):
        # The first layer, the last, and two in between.
        i = round(column * (len(names) - 1) / 3)
        for panel, (start, run) in zip(axes[1:, column], study.runs.items()):
            labels = [f"t = {t + 1}, distance {run.shift[i, t]:.3f}" for t in range(study.T)]
            draw_laws(panel, run.laws[names[i]], labels, colours)
            x = "membrane potential after the reset (thresholds)"
            describe(panel, f"{names[i]}, {start}", x, "density")
            panel.set(yscale="log", ylim=(0.01, None))
    for panel in axes.flat:
        panel.legend()
    save_figure(figure, path)


# ---- Gradients against the threshold ------------------------------------------------------------

def gradient_norms(surrogate, theta, follow):
    # {neuron layer: norm of the gradient with respect to its input current}, and the mean firing
    # rate, of a random resnet19. follow: BatchNorm scales the currents with theta, so that neurons
    # fire alike whatever theta is; else their variance is 1.
    torch.manual_seed(0)
    model = models.build("resnet19", num_classes=10, timesteps=4, width=8, start="kaiming",
                         threshold=theta, surrogate=surrogate)
    if follow:
        models.scale_currents(model, theta)
    currents, rates = {}, {}

    def at_neurons(name):
        def hook(_, inputs, output):
            currents[name], rates[name] = inputs[0], (output != 0).float().mean().item()
        return hook
    for name, layer in neurons_of(model).items():
        layer.register_forward_hook(at_neurons(name))
    # The value of the loss does not matter, nor what the images show.
    logits = model(torch.randn(16, 3, 16, 16)).mean(0)
    loss = F.cross_entropy(logits, torch.arange(16) % 10)
    norms = [gradient.norm().item() for gradient in torch.autograd.grad(loss, [*currents.values()])]
    return dict(zip(currents, norms)), sum(rates.values()) / len(rates)


def sweep_gradients(path=None):
    # Print gradient norms for thresholds from 0.1 to 10; draw them into path, if given.
    print("Norm of the loss's gradient at each neuron layer against the threshold")
    print("(resnet19, width 8, T = 4, random weights)\n")
    thetas = [0.1 * 10 ** (i / 4) for i in range(9)]
    sweeps = {}
    for follow, currents in ((True, "currents that scale with the threshold"),
                             (False, "currents of variance 1, whatever the threshold")):
        for surrogate in ("trsg", "absolute"):
            sweep = [gradient_norms(surrogate, theta, follow) for theta in thetas]
            sweeps[f"{surrogate}; {currents}"] = [norms for norms, _ in sweep]
            # All layers are in the picture, five in the table.
            names, rows = list(sweep[0][0])[::4], []
            for theta, (norms, rate) in zip(thetas, sweep):
                rows.append([f"{theta:.2f}", percent(rate), *(f"{norms[n]:.2e}" for n in names)])
            print(f"{surrogate}; {currents}\n")
            print(table(" | ".join(["threshold", "firing rate", *names]), rows))
    if path:
        draw_sweeps(thetas, sweeps, path)


def draw_sweeps(thetas, sweeps, path):
    # sweeps: {case: [{layer: norm} for each of thetas]}, four cases.
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(13, 10), sharex=True, sharey=True)
    for panel, (case, sweep) in zip(axes.flat, sweeps.items()):
        describe(panel, case, "threshold", "norm of the gradient w.r.t. the input current")
        for i, name in enumerate(sweep[0]):
            # Where nothing fires the gradient is 0: no point.
            line = [norms[name] or math.nan for norms in sweep]
            panel.loglog(thetas, line, ".-", label=name, color=plt.cm.viridis(i / len(sweep[0])))
    axes[0, 1].legend(title="neuron layer", loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


# ---- Both methods in one picture ----------------------------------------------------------------

# Surrogate, its name, its colour.
WINDOWS = ("absolute", "fixed window", "tab:orange"), ("trsg", "TrSG", "tab:blue")


def draw_start(panel, title, currents, v_init):
    # The law of one layer's potential at t = 1, 2, 4, and after the last of the currents [T, N].
    theta, decay = torch.tensor(1.0), torch.tensor(0.5)
    # Step by step, as lif returns the last potential only.
    v, laws = v_init, []
    for x in currents:
        _, v, _ = lif(x[None], v, theta, decay)
        laws.append(histogram(v, theta))
    laws = torch.stack([laws[0], laws[1], laws[3], laws[-1]])
    # As seen from the last one, the stationary law.
    distances = wasserstein(laws, laws[-1])
    labels = [f"t = {t}: off by {distance:.2f}" for t, distance in zip((1, 2, 4), distances)]
    draw_laws(panel, laws, labels, ("tab:orange", "tab:green", "tab:blue"))
    panel.axvline(v_init, color="black", lw=1, ls=":", label=f"start: {v_init:.2f}")
    describe(panel, title, "membrane potential (thresholds); currents 0.5 ± 0.5", "density")
    panel.set(xlim=(-0.8, 1.2), ylim=(0, 1.7))
    panel.legend(loc="upper left")


def draw_windows(panel):
    # Where on the axis of potentials the surrogate lets gradients pass, and its share of the law.
    start, decay = torch.zeros(()), torch.tensor(0.5)
    for row, value in enumerate((0.25, 1.0, 4.0)):
        theta = torch.tensor(value)
        # Currents that scale with theta.
        x = theta * (0.5 + torch.randn(9, 50000))
        _, v, _ = lif(x[:8], start, theta, decay)
        # charge, in the ninth step: the potential that meets the threshold.
        h = (v + decay * (x[8] - v)).sort().values
        law, edges = torch.histogram(h, 120, range=(-4.0, 8.0))
        panel.stairs(row + 0.6 * law / law.max(), edges, baseline=row, fill=True, color="lightgrey")
        panel.text(-3.9, row + 0.3, f"threshold {theta:g}")
        for top, (surrogate, name, colour) in zip((0, -0.15), WINDOWS):
            # do/dh by the neuron itself: with v[0] = 0 and k = 1 its potential is the current.
            current = h[None].requires_grad_()
            (o,), _, _ = lif(current, start, theta, torch.ones(()), surrogate)
            inside = torch.autograd.grad(o.sum(), current)[0][0] > 0
            seen = h[inside].detach()
            panel.fill_between(seen, row + top - 0.13, row + top, color=colour, lw=0)
            label = f"{name}: {100 * len(seen) / len(h):.0f} %"
            panel.text(6.2, row + top - 0.12, label, color=colour, fontsize=8)
    title = "TrSG: the window scales with the threshold"
    describe(panel, title, "membrane potential before firing (%: share in the window)", None)
    panel.set(yticks=[], xticks=range(-4, 9, 2), xlim=(-4, 10.4), ylim=(-0.4, 2.8))


def draw_gradients(panel):
    # Where currents scale with theta, neurons fire alike: only the window makes a difference.
    thetas = (0.25, 0.5, 1, 2, 4)
    for surrogate, label, colour in WINDOWS:
        norms = [gradient_norms(surrogate, theta, True)[0]["lif"] for theta in thetas]
        panel.loglog(thetas, norms, "o-", color=colour, label=label)
    title = "... so that gradients keep their size"
    describe(panel, title, "threshold (currents scale with it)", "gradient norm, first layer of 17")
    # Ticks at the thresholds themselves, no powers of ten between.
    panel.minorticks_off()
    panel.set_xticks(thetas, thetas)
    panel.legend()


def picture(path):
    # Both methods, without a checkpoint. Left MP-Init, for currents of mean 0.5 and deviation 0.5
    # at threshold 1, tau 2; right TrSG, for currents that scale with the threshold.
    figure, axes = pyplot().subplots(2, 2, figsize=(9, 6))
    torch.manual_seed(0)
    layer = TrLIF()
    # The mean settles: (1 - 0.1)^60 is 0.002.
    for _ in range(60):
        layer(0.5 + 0.5 * torch.randn(4, 10000))
    # After 25 steps nothing is left of the start.
    currents = 0.5 + 0.5 * torch.randn(25, 100000)
    start = torch.zeros(())
    draw_start(axes[0, 0], "Start at 0: early steps are unlike later ones", currents, start)
    draw_start(axes[1, 0], "MP-Init: start at the running mean", currents, layer.v_init)
    draw_windows(axes[0, 1])
    draw_gradients(axes[1, 1])
    save_figure(figure, path)


# ---- Speed --------------------------------------------------------------------------------------

def layer_times(neurons, T, device, dtype):
    # Forward + backward of one layer in ms: plain, fused, and the floor that memory sets.
    x = torch.randn(T, neurons, device=device, dtype=dtype, requires_grad=True)
    # The gradient that would arrive from the next layer, in the dtype of the spikes.
    gradient, copied, layer = torch.randn_like(x), torch.empty_like(x), TrLIF().to(device)

    def step():
        x.grad = None
        layer(x).backward(gradient)

    def milliseconds(function):
        # Timer warms up, and waits for the GPU.
        timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
        return 1e3 * timer.blocked_autorange(min_run_time=SECONDS).median
    # A layer looks at COMPILE in every call.
    before, times = neuron.COMPILE, []
    for fused in (False, True):
        neuron.COMPILE = fused
        times.append(milliseconds(step))
    neuron.COMPILE = before
    # A copy is 2 passes over memory. No layer can do with fewer than 5: read x, write spikes; read
    # x and the gradient, write the gradient.
    return *times, 2.5 * milliseconds(lambda: copied.copy_(gradient))


def speed(device, T=4):
    # Print the time of one layer, plain and fused, beside the time its memory traffic takes.
    # What training computes in.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}, T = {T}")
    print(f"forward + backward in ms, medians of {SECONDS:g} s each\n")
    # What Python and the starting of kernels take, whatever the size.
    _, tiny, _ = layer_times(2 ** 14, T, device, dtype)
    rows = []
    for neurons in NEURONS[device.type]:
        plain, fused, floor = layer_times(neurons, T, device, dtype)
        row = [f"{neurons:,d}", f"{plain:.2f}", f"{fused:.2f}", f"{floor:.2f}"]
        row += [f"{fused / floor:.2f}", f"{plain / fused:.1f}"]
        rows.append([*row, "host-bound" if fused < 1.5 * tiny else ""])
    header = "neurons | plain loop | fused | floor (5 passes) | fused / floor | plain / fused"
    print(table(f"{header} | ", rows))
    print(f"host-bound: starting kernels takes the time ({tiny:.2f} ms for {2 ** 14:,d} neurons)")


# ---- The program --------------------------------------------------------------------------------

def arguments(argv=None):
    p = argparse.ArgumentParser("eval.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add, file = p.add_argument, train.path
    add("checkpoint", nargs="*", type=file, help="last.pt or best.pt of a run")
    add("--inspect", action="store_true", help="print tables, layer by layer")
    add("--report", type=file, metavar="FILE.md", help="write the tables into a file")
    add("--plot", type=file, metavar="FILE.png", help="draw them; the second into FILE-2.png, ...")
    add("--fold", action="store_true", help="fold the network, compare, go on with it folded")
    add("--save-folded", type=file, metavar="FILE.pt", help="fold, and write the folded network")
    add("--picture", type=file, metavar="FILE.png", help="draw what MP-Init and TrSG do")
    add("--gradients", type=file, nargs="?", const=True, metavar="FILE.png",
         help="print gradient norms for thresholds from 0.1 to 10, and draw them into a file")
    add("--speed", action="store_true", help="time one neuron layer")
    add("--data-dir", type=file, default="data", help="where data sets are (%(default)s)")
    add("--images", type=train.count, metavar="N", help="use the first N test images only")
    add("--batch-size", type=train.count, default=256, metavar="N", help="(%(default)s)")
    add("--timesteps", type=train.count, metavar="T", help="steps, if other than in training")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16, if other than in training")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--workers", type=train.count_or_0, default=2, metavar="N",
         help="processes that decode large images (%(default)s)")
    args = p.parse_args(argv)
    # Another file given by mistake might be a checkpoint.
    for name, ending in dict(report=".md", plot=".png", picture=".png", gradients=".png").items():
        path = getattr(args, name)
        if path not in (None, True) and not path.endswith(ending):
            p.error(f"--{name} writes a file *{ending}: {path} does not end in {ending}")
    if args.save_folded and len(args.checkpoint) > 1:
        p.error("--save-folded takes one checkpoint")
    if not (args.checkpoint or args.picture or args.gradients or args.speed):
        p.error("no checkpoint given")
    return args


@torch.no_grad()
def compare_folded(model, folded, batches):
    # Print how far the predictions and logits of a folded network agree with the original's.
    # The largest difference of logits in a batch, in units of its largest logit.
    same = images = difference = 0
    for x, _ in batches:
        a, b = model(x).mean(0), folded(x).mean(0)
        same += (a.argmax(1) == b.argmax(1)).sum().item()
        images += len(x)
        difference = max(difference, ((a - b).abs().max() / a.abs().max()).item())
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, folded))
    print(f"folded: same prediction on {percent(same / images)} of {images} images, in float32; "
          f"logits\ndiffer by {difference:.1e} of the largest at most; {after:,d} parameters "
          f"instead of {before:,d}")


def fold(args, checkpoint, model, dataset):
    # The folded network, compared with the original and saved if asked for.
    if checkpoint.get("folded"):
        raise UserError(f"{args.checkpoint[0]} is folded already")
    folded = models.fold(model).to(memory_format=data.memory_format(args.device))
    compare_folded(model, folded, take(dataset, args.batch_size, args.images))
    if args.save_folded:
        # Without the optimizer's state: a folded network is not trained on.
        kept = {"format", "network", "data", "epoch", "settings"} & set(checkpoint)
        state = {key: checkpoint[key] for key in kept}
        state.update(folded=True, model=folded.state_dict())
        data.write_atomically(args.save_folded, lambda file: torch.save(state, file))
    return folded


def evaluate_checkpoint(args, path, checkpoint, device):
    # Print one checkpoint's accuracy. Returns what inspect() finds, or None if it is not wanted.
    network = checkpoint["network"]
    model = build_network(checkpoint).to(device, memory_format=data.memory_format(device))
    model.timesteps = args.timesteps or network["timesteps"]
    dataset = test_data(checkpoint, args.data_dir, args.workers, args.timesteps).to(device)
    about = [f"{path}: {network['arch']}", f"width {network['width']}"]
    about += [f"T = {dataset.frames or model.timesteps}", dataset.name, dataset.split]
    about += [f"epoch {checkpoint['epoch'] + 1}", "folded" if checkpoint.get("folded") else None]
    print(*filter(None, about), sep=", ")
    # In float32, before anything else is asked of the network.
    if args.fold or args.save_folded:
        model = fold(args, checkpoint, model, dataset)
    # As the training's own evaluation, where the flag does not say otherwise.
    amp = checkpoint.get("settings", {}).get("amp", False) if args.amp is None else args.amp
    print(f"computed in {'bfloat16' if amp else 'float32'}")
    start = time.perf_counter()
    study, rate = None, ""
    if args.inspect or args.report or args.plot or len(args.checkpoint) > 1:
        study = inspect(path, checkpoint, model, dataset, args.batch_size, args.images, amp)
        result = study.result
    else:
        result = evaluate(model, take(dataset, args.batch_size, args.images), amp)
        rate = f", {result['images'] / (time.perf_counter() - start):.0f} images/s"
    print(f"top-1 {percent(result['top1'])}   top-5 {percent(result['top5'])}", end="   ")
    print(f"of {result['images']} images{rate}")
    right = [f"t={t}: {percent(share)}" for t, share in enumerate(result["top1_at"], 1)]
    print("read out after  " + "  ".join(right) + "\n")
    return study


def main(argv=None):
    args = arguments(argv)
    if args.plot or args.picture or args.gradients not in (None, True):
        # If matplotlib is missing, better say so now than after the work.
        pyplot()
    # Not over weights that can still be trained.
    if args.save_folded and os.path.isfile(args.save_folded):
        if not load_checkpoint(args.save_folded).get("folded"):
            raise UserError(f"{args.save_folded} is not a folded network: give another name")
    device = train.use_device(args.device)
    # float32 means float32, on GPUs too, which would round to the 10 bits of TF32.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    if args.speed:
        speed(device)
    if args.picture or args.gradients:
        # Small layers, few calls: compiling would take longer than it saves.
        neuron.COMPILE = False
    if args.picture:
        picture(args.picture)
    if args.gradients:
        sweep_gradients(None if args.gradients is True else args.gradients)
    # A file that cannot be read is found out before the work.
    checkpoints = [load_checkpoint(path) for path in args.checkpoint]
    # One after the other: a picture is there before the next checkpoint is looked at.
    studies = []
    for i, (path, checkpoint) in enumerate(zip(args.checkpoint, checkpoints), 1):
        studies.append(evaluate_checkpoint(args, path, checkpoint, device))
        if args.plot:
            # FILE.png, FILE-2.png, ...
            plot(studies[-1], args.plot if i == 1 else f"{args.plot.removesuffix('.png')}-{i}.png")
    if studies and studies[0]:
        tables = f"# Comparison\n\n{comparison(studies)}\n"
        tables += "\n".join(report(study) for study in studies)
        print(tables if args.inspect else comparison(studies))
        if args.report:
            data.write_atomically(args.report, lambda file: file.write(tables.encode()))


if __name__ == "__main__":
    train.run(main, "eval.py")
