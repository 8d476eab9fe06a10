"""What a trained network does and costs:  python eval.py runs/NAME/best.pt

The network is rebuilt from the checkpoint alone. Printed are top-1 and top-5 accuracy on the test
set, and the accuracy when it is read out after t = 1 ... T time steps. Further:

    python eval.py A.pt --inspect     firing rates, potentials, operations, energy, layer by layer
    python eval.py A.pt --report A.md --plot A.png      the same as a file and as a picture
    python eval.py A.pt B.pt ...      compare checkpoints in one table
    python eval.py A.pt --save-folded F.pt      absorb thresholds and BatchNorm into the weights

    python eval.py --picture FILE.png     both methods in one picture; needs no checkpoint
    python eval.py --speed                one layer, plain and fused, beside what memory allows

What the figures mean is written under every table. This file imports all the others.
"""
import argparse
import collections
import contextlib
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
from train import build_network, check_classes, duration, evaluate, load_checkpoint, load_data

# Energy of a 32-bit multiply-accumulate and of an accumulate in pJ, in 45 nm CMOS (Horowitz 2014).
PJ_PER_MAC, PJ_PER_AC = 4.6, 0.9
# Histograms of membrane potentials reach from -32 to 32 thresholds.
RANGE, BINS_PER_THRESHOLD = 32, 256
BINS = 2 * RANGE * BINS_PER_THRESHOLD
# The numbers of neurons that --speed times, and the seconds that each measurement takes.
NEURONS = {"cpu": (2 ** 18, 2 ** 21, 2 ** 22), "cuda": (2 ** 18, 2 ** 22, 2 ** 24, 2 ** 26)}
SECONDS = 1.0


# ---- The test set -------------------------------------------------------------------------------

def test_data(checkpoint, data_dir, workers, timesteps=None):
    """The test set of the data a network was trained on, normalised, split and cut as there."""
    settings = SimpleNamespace(**checkpoint["settings"])
    # Recordings of events are cut into as many frames as the network takes steps.
    frames = timesteps or settings.timesteps
    dataset = load_data(settings, data_dir, workers, frames)
    check_classes(checkpoint, dataset, data_dir)
    # The network expects the scale of its own training images, whatever the folder holds by now.
    dataset.mean, dataset.std = checkpoint["mean"], checkpoint["std"]
    return dataset


def take(dataset, batch_size, images=None):
    """The test batches (x, y) without padding; only the first `images` images, if given. Prints
    how far it is every ten seconds."""
    n, done = min(images or math.inf, dataset.test_size()), 0
    start = printed = time.perf_counter()
    for x, y in dataset.test(batch_size):
        # What fills up the last batch is behind the n images that count.
        taken = min(n - done, len(y))
        yield x[:taken], y[:taken]
        done += taken
        if done == n:
            return
        # A CPU takes long for a large network.
        now = time.perf_counter()
        if now > printed + 10:
            printed, rate = now, done / (now - start)
            print(f"  {done:,d} of {n:,d} images, {rate:.1f} images/s, "
                  f"{duration((n - done) / rate)} left", flush=True)


# ---- Spikes -------------------------------------------------------------------------------------

def neurons_of(model):
    """{name: layer} of all neuron layers, in the order of computation."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, TrLIF)}


def observe(model, batches, amp=False):
    """Run evaluate(), and count the spikes that flow meanwhile, summed over all images.

    Returns (result, counts). The size of counts does not grow with the number of images:
    name of a neuron layer   spikes of each neuron at each step, [T, *neurons]
    name of a pooling        spikes that it let through, all steps together, [1, *outputs]
    "NAME k^T v"             additions inside the attention NAME
    "events", "analog"       spikes, and other values, in the input, both [C, H, W]
    """
    # Hooks go on a copy, so that none stay behind on the network.
    model = copy.deepcopy(model)
    counts, latest = collections.defaultdict(float), {}

    def count_input(_, inputs):
        # An image is analog. In event frames a whole number k stands for k spikes.
        x = inputs[0] if inputs[0].dim() == 4 else inputs[0].flatten(0, 1)
        spikes = (x == x.round()) & (x >= 0) & (inputs[0].dim() == 5)
        counts["events"] += (x * spikes).double().sum(0)
        counts["analog"] += (~spikes).double().sum(0)

    def count_spikes(name):
        def hook(layer, _, output):
            # Neurons give [T, B, ...], pooling gives [T*B, ...] and is counted as a single step.
            spikes = output if isinstance(layer, TrLIF) else output[None]
            # The sum over a batch is exact in float32 up to 2^24 images.
            counts[name] += (spikes != 0).float().sum(1).double()
        return hook

    def count_products(name, part, heads):
        def hook(_, inputs, output):
            # The spikes of each token and head: [T, B, N, D] -> [T, B, N, heads].
            latest[part] = (output != 0).unflatten(3, (heads, -1)).sum(4).double()
            # Entry (a, b) of a head's k^T v adds 1 for every token in which k_a and v_b fire. So a
            # token makes spikes of k times spikes of v additions. v is computed after k.
            if part == "v":
                counts[f"{name} k^T v"] += (latest["k"] * latest["v"]).sum()
        return hook

    model.register_forward_pre_hook(count_input)
    pools = [pool for _, pool in models.pooling(model)]
    for name, layer in model.named_modules():
        if isinstance(layer, TrLIF) or layer in pools:
            layer.register_forward_hook(count_spikes(name))
        elif isinstance(layer, models.SpikingSelfAttention):
            layer.k.lif.register_forward_hook(count_products(name, "k", layer.heads))
            layer.v.lif.register_forward_hook(count_products(name, "v", layer.heads))
    return evaluate(model, batches, amp), counts


# ---- Operations and energy ----------------------------------------------------------------------

def fan_out(layer, size):
    """The connections that leave each place of a layer's input: a number, or for a convolution
    [H, W] of the given size, with borders and strides counted exactly."""
    # Of a convolution and its BatchNorm only the first has connections.
    if isinstance(layer, nn.Sequential) and len(layer) > 0:
        layer = layer[0]
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if not isinstance(layer, nn.Conv2d):
        # A plain shortcut leads from each neuron to one other.
        return 1
    # The output sums, over all kernel positions, the places they read. With a kernel of ones its
    # derivative by a place is the number of positions that read it.
    x, ones = torch.zeros(1, 1, *size, requires_grad=True), torch.ones(1, 1, *layer.kernel_size)
    with torch.enable_grad():
        total = F.conv2d(x, ones, None, layer.stride, layer.padding, layer.dilation).sum()
    (reads,) = torch.autograd.grad(total, x)
    return reads[0, 0].double() * (layer.out_channels // layer.groups)


def operations(model, counts, images):
    """What each layer does for an image on average, given what observe() counted: a list of dicts.

    layer         its name
    spikes        that arrive there
    acs           accumulates: one for each spike and connection
    macs          multiply-accumulates, on analog input
    dense         those of the same layer in a conventional network, one for each connection
    pj, dense_pj  energy in pJ
    """
    names = {module: name for name, module in model.named_modules()}
    pools = dict(models.pooling(model))
    # From sums to means over images.
    counts = {name: torch.as_tensor(count).cpu() / images for name, count in counts.items()}
    rows = []

    def add(name, spikes, acs, macs, dense):
        row = dict(layer=name, spikes=float(spikes), acs=float(acs), macs=float(macs))
        row["pj"] = PJ_PER_AC * row["acs"] + PJ_PER_MAC * row["macs"]
        rows.append({**row, "dense": float(dense), "dense_pj": PJ_PER_MAC * float(dense)})

    for layer, sources in models.synapses(model):
        # The spikes of each source that arrive at each place, [C, H, W] or [N, D], over all steps.
        # Behind a pooling those that it let through arrive.
        leaving = [names[pools.get(source, source)] for source in sources]
        arriving = [counts[name].sum(0) for name in leaving] or [counts["events"]]
        fan = fan_out(layer, arriving[0].shape[1:])
        acs = sum((spikes * fan).sum() for spikes in arriving)
        # Only the first layer sees analog values.
        macs = 0 if sources else (counts["analog"] * fan).sum()
        dense = (torch.ones_like(arriving[0]) * fan).sum()
        if layer is model.head:
            # A conventional head reads the mean over places, one value a channel.
            dense = layer.out_features * arriving[0].shape[0 if arriving[0].dim() == 3 else 1]
        elif len(layer) == 0 or isinstance(layer[0], models.Scale):
            # A plain shortcut of a conventional network has no weights: it only adds.
            dense = 0
        add(names[layer], sum(spikes.sum() for spikes in arriving), acs, macs, dense)
    # Attention multiplies spikes with spikes, twice.
    for name, layer in model.named_modules():
        if isinstance(layer, models.SpikingSelfAttention):
            q, k, v = (counts[f"{name}.{part}.lif"] for part in "qkv")
            # Every spike of q adds one row of its head's k^T v.
            width = q.shape[2] // layer.heads
            # q is [T, N, D]: one step of it tells the size of both dense products.
            dense = q[0].numel() * width
            add(f"{name} k^T v", k.sum() + v.sum(), counts[f"{name} k^T v"], 0, dense)
            add(f"{name} q (k^T v)", q.sum(), q.sum() * width, 0, dense)
    return rows


# ---- Membrane potentials ------------------------------------------------------------------------

def histogram(v, theta):
    """The distribution of v / theta as counts [BINS]. What lies beyond the range is in the last
    bin of its side."""
    bins = (v * (BINS_PER_THRESHOLD / theta) + BINS / 2).clamp(0, BINS - 1).int()
    return torch.bincount(bins.flatten(), minlength=BINS)


def potentials(model, batches, T, steps, v_init=None, amp=False):
    """evaluate() over so many steps, and the distributions of v[t] / theta after the reset.

    v_init   where potentials start, if not where the network has learnt to
    Returns (result, {neuron layer: [T + 1, BINS]}). The rows are t = 1 ... T and the stationary
    distribution, that of the last T steps. An image is shown on, frames are repeated.
    """
    # Hooks go on a copy, so that none stay behind on the network.
    model, histograms = copy.deepcopy(model), {}
    model.timesteps = steps

    def record(counts):
        def hook(layer, inputs, _):
            # A layer returns no potentials. Its neurons run again, a step at a time.
            v, theta = layer.v_init, layer.threshold
            for t in range(steps):
                _, v, _ = lif(inputs[0][t:t + 1], v, theta, layer.decay, layer.surrogate)
                # Each of the first T steps has a row, the last T steps share one.
                if t < T or t >= steps - T:
                    counts[min(t, T)] += histogram(v, theta)
        return hook

    for name, layer in neurons_of(model).items():
        histograms[name] = torch.zeros(T + 1, BINS, dtype=torch.long, device=layer.v_init.device)
        layer.register_forward_hook(record(histograms[name]))
        if v_init is not None:
            layer.v_init.fill_(v_init)
    # The frames of a recording are shown as 0 ... T - 1, 0 ... T - 1, and so on.
    frames = torch.arange(steps) % T
    shown = ((x if x.dim() == 4 else x[:, frames], y) for x, y in batches)
    result = evaluate(model, shown, amp)
    return result, {name: counts.cpu() for name, counts in histograms.items()}


def wasserstein(histograms, reference):
    """1-Wasserstein distance in thresholds between distributions given as counts [..., BINS]: the
    area between their cumulative distributions. It is off by at most the width of a bin."""
    # Counts become shares, because the two may be of different numbers of potentials.
    shares, reference = (counts.double() / counts.double().sum(-1, keepdim=True)
                         for counts in (histograms, reference))
    return (shares - reference).cumsum(-1).abs().sum(-1) / BINS_PER_THRESHOLD


# ---- All about one checkpoint -------------------------------------------------------------------

@contextlib.contextmanager
def fusing(on):
    """Neurons are fused, or not, inside of a with block."""
    before, neuron.COMPILE = neuron.COMPILE, on
    try:
        yield
    finally:
        neuron.COMPILE = before


def examine(path, checkpoint, model, dataset, batch_size, images=None, amp=False):
    """All that report(), comparison() and plot() show of a checkpoint, as attributes."""
    result, counts = observe(model, take(dataset, batch_size, images), amp)
    T, network, images = dataset.frames or model.timesteps, checkpoint["network"], result["images"]
    study = SimpleNamespace(path=str(path), arch=network["arch"], T=T, result=result)
    study.title = (f"{path}: {network['arch']}, width {network['width']}, T = {T}, "
                   f"{dataset.name}, {images:,d} test images, "
                   f"top-1 {percent(result['top1'])}")
    study.parameters = sum(p.numel() for p in model.parameters())
    study.neurons = neurons_of(model)

    # Potentials from both starts, over T steps and on until they have settled: a leak of tau = 4
    # leaves 1 % of the start after 16 steps. The last T steps then show where potentials settle.
    study.steps, study.runs = 5 * T + 16, {}
    for start, v_init in (("v[0] = v_init (MP-Init)", None), ("v[0] = 0", 0)):
        # More steps need smaller batches in the same memory.
        batches = take(dataset, max(1, batch_size * T // study.steps), images)
        print(f"membrane potentials over {study.steps} steps, {start}", flush=True)
        # The plain loop: so many steps take longer to compile than these few batches take.
        with fusing(False):
            longer, histograms = potentials(model, batches, T, study.steps, v_init, amp)
        # The distance of each layer's potentials at each step from where they settle, [layers, T].
        shift = torch.stack([wasserstein(counts[:T], counts[T]) for counts in histograms.values()])
        run = dict(top1_at=longer["top1_at"], histograms=histograms, shift=shift)
        study.runs[start] = SimpleNamespace(**run)

    # Spikes an image: {neuron layer: [T, *neurons]}.
    spikes = {name: counts[name].cpu() / images for name in study.neurons}
    study.rates = {name: count.flatten(1).mean(1) for name, count in spikes.items()}
    study.spikes = sum(count.sum().item() for count in spikes.values())
    # The number of neurons in the network.
    study.size = sum(count[0].numel() for count in spikes.values())
    study.operations = operations(model, counts, images)
    study.mj = 1e-9 * sum(row["pj"] for row in study.operations)
    study.dense_mj = 1e-9 * sum(row["dense_pj"] for row in study.operations)
    return study


# ---- Tables -------------------------------------------------------------------------------------

def table(header, rows):
    """A table in Markdown whose columns are aligned, so that it can be read as plain text too.

    header: the names of the columns as "a | b | c"; rows: lists of cells.
    """
    rows = [header.split(" | "), *([str(cell) for cell in row] for row in rows)]
    # Each column is as wide as its longest cell. Markdown wants three dashes in the rule.
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    # The first column is aligned to the left, the others to the right.
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = ""
    for first, *others in [rows[0], rule, *rows[1:]]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines += "| " + " | ".join([first.ljust(widths[0]), *cells]) + " |\n"
    return lines


def percent(share):
    """A share from 0 to 1 in per cent, as text."""
    return f"{100 * share:.2f} %"


def comparison(studies):
    """A table with a row for each checkpoint, as Markdown."""
    rows = []
    for study in studies:
        # The last of these is the accuracy proper.
        accuracy = ", ".join(percent(share) for share in study.result["top1_at"])
        rate = percent(study.spikes / study.T / study.size)
        row = [study.path, study.arch, study.T, f"{study.parameters:,d}", accuracy, rate]
        row += [f"{study.spikes:,.0f}", f"{study.mj:.4g} mJ", f"{study.dense_mj:.4g} mJ"]
        # The mean over layers of the shift at t = 1, from both starts.
        rows.append(row + [f"{run.shift[:, 0].mean():.3f}" for run in study.runs.values()])
    header = ("checkpoint | network | T | parameters | top-1 after t = 1, 2, ... | firing rate | "
              "spikes/image | energy/image | conventional | shift at t=1 | with v[0] = 0")
    return f"""{table(header, rows)}
Firing rate: spikes per neuron and step. Energy: arithmetic only, 45 nm, {PJ_PER_MAC} pJ for each
multiply-accumulate, {PJ_PER_AC} pJ for each accumulate; conventional: the same network in one pass.
Shift: distance of the potentials at t = 1 from the distribution in which they settle, in thresholds
(1-Wasserstein, mean over layers), as the network is and started at 0.
"""


def neuron_table(study, times):
    """What each neuron layer has learnt, and how often it fires at each step."""
    rows = []
    for name, layer in study.neurons.items():
        learnt = [f"{value.item():.3f}" for value in (layer.threshold, layer.tau, layer.v_init)]
        rows.append([name, *learnt, *(percent(rate) for rate in study.rates[name])])
    return table(f"layer | theta | tau | v_init | {times}", rows)


def shift_table(study, times):
    """The temporal covariate shift of each layer from both starts, their mean in the first row."""
    # Side by side, [layers, starts * T].
    shift = torch.cat([run.shift for run in study.runs.values()], 1)
    rows = []
    for name, distances in zip(["mean over layers", *study.neurons], [shift.mean(0), *shift]):
        rows.append([name, *(f"{distance:.3f}" for distance in distances)])
    from_0 = " | ".join(f"from 0: t={t}" for t in range(1, study.T + 1))
    return table(f"layer | {times} | {from_0}", rows)


def operation_table(study):
    """Operations and energy of each layer with weights, for an image."""
    rows = []
    for row in study.operations:
        counted = [f"{row['spikes']:,.1f}", f"{row['acs']:,.0f}", f"{row['macs']:,.0f}"]
        # From pJ to nJ.
        energy = [f"{row[key] * 1e-3:,.3f}" for key in ("pj", "dense_pj")]
        rows.append([row["layer"], *counted, *energy])
    return table("layer | spikes in | accumulates | multiply-accumulates | energy (nJ) | "
                 "conventional (nJ)", rows)


def report(study):
    """All about one checkpoint, as Markdown."""
    # The names of the columns, one for each time step.
    times = " | ".join(f"t={t}" for t in range(1, study.T + 1))
    accuracy = []
    for start, run in study.runs.items():
        accuracy.append([start, *(percent(share) for share in run.top1_at[:study.T])])
    # The totals of all layers.
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
stationary distribution, that of the last {study.T} of {study.steps} steps of the network on the
same images; "from 0": of the same network started at v[0] = 0. Where it is 0, step t sees the
potentials that later steps see. Histograms of 1/{BINS_PER_THRESHOLD} threshold a bin: off by one
bin at most.

## Operations and energy for one image

{operation_table(study)}
{study.spikes:,.0f} spikes, {acs:,.0f} accumulates, {macs:,.0f} multiply-accumulates; {dense:,.0f}
multiply-accumulates in a conventional network, {study.dense_mj / study.mj:.2f} times the energy.

A spike costs an accumulate ({PJ_PER_AC} pJ) for each connection that leaves its place; where a
residual stream adds spikes of k neurons, k. An image is analog: its first layer costs
multiply-accumulates ({PJ_PER_MAC} pJ), once for all steps. In event frames a whole number k counts
as k spikes, anything else as analog. Attention: k^T v costs an accumulate for each pair of spikes
that meet in a token, q (k^T v) one for each spike of q and column of its head. 45 nm CMOS,
arithmetic only: no memory access, biases or pooling, nor the {study.size * study.T:,d} updates of
neurons.
"""


# ---- Pictures -----------------------------------------------------------------------------------

def pyplot():
    """matplotlib.pyplot, with the settings that all pictures share."""
    # Imported here, because only pictures need it.
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install matplotlib") from error
    # Agg draws into files and needs no screen.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": 8,
                         "font.size": 9, "figure.constrained_layout.use": True})
    return plt


def save_figure(figure, path):
    data.write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))
    # matplotlib keeps every figure in memory until it is closed.
    pyplot().close(figure)


def draw_distributions(panel, histograms, labels, colours):
    """Distributions of v / theta as lines, the stationary one, the last of histograms, as an area.

    histograms: counts [n + 1, BINS]
    """
    # From counts to densities, in wider bins of 1/16 threshold.
    density = histograms.unflatten(1, (-1, BINS_PER_THRESHOLD // 16)).sum(2).double()
    density = 16 * density / density.sum(1, keepdim=True)
    edges = torch.linspace(-RANGE, RANGE, density.shape[1] + 1)
    # Only the part of the axis where there is something to see.
    visible = (density.amax(0) > 0.01).nonzero()
    first, last = visible[0].item(), visible[-1].item() + 1
    density, edges = density[:, first:last], edges[first:last + 1]
    # The area first, so that the lines stand before it.
    panel.stairs(density[-1], edges, fill=True, color="lightgrey", label="stationary")
    for line, label, colour in zip(density, labels, colours):
        panel.stairs(line, edges, color=colour, lw=1.5, label=label)


def draw_curves(accuracy, rate, shift, study, colours):
    """Accuracy over the steps; firing rate and covariate shift over the layers."""
    # The dotted line is where the network was trained to be read out.
    accuracy.axvline(study.T, color="grey", lw=1, ls=":", label=f"T = {study.T}")
    for (start, run), style in zip(study.runs.items(), ("o-", "s--")):
        top1 = [100 * share for share in run.top1_at]
        accuracy.plot(range(1, study.steps + 1), top1, style, ms=4, label=start)
        shift.plot(run.shift[:, 0], style, ms=4, label=start)
    for t, colour in enumerate(colours):
        rates = [100 * layer[t] for layer in study.rates.values()]
        rate.plot(rates, ".-", color=colour, label=f"t = {t + 1}")
    # Titles and axes.
    accuracy.set(title="Accuracy when read out after t steps",
                 xlabel="time step t", ylabel="top-1 (%)")
    rate.set(title="Firing rate", xlabel="neuron layer", ylabel="spikes a neuron and step (%)")
    title = "Covariate shift at t = 1: distance of potentials\nfrom their stationary distribution"
    shift.set(title=title, xlabel="neuron layer", ylabel="1-Wasserstein distance (thresholds)")


def draw_energy(panel, study):
    """The energy of each layer, beside that of a conventional network."""
    layers = range(len(study.operations))
    spiking, dense = ([row[key] * 1e-3 for row in study.operations] for key in ("pj", "dense_pj"))
    # The wide bars are drawn first, so that the narrow ones stand before them.
    panel.bar(layers, dense, 0.9, color="lightgrey", label=f"conventional: {study.dense_mj:.3g} mJ")
    panel.bar(layers, spiking, 0.5, label=f"spiking: {study.mj:.3g} mJ")
    panel.set(title="Energy an image (45 nm, arithmetic only)",
              xlabel="layer with weights", ylabel="energy (nJ)")


def plot(study, path):
    """One checkpoint as a picture: accuracy, firing rates, covariate shift and energy; below them
    the potentials in four layers, with MP-Init and without."""
    plt, names = pyplot(), list(study.neurons)
    figure, axes = plt.subplots(3, 4, figsize=(20, 13))
    figure.suptitle(study.title, fontsize=13)
    # A colour for each time step, from dark to light.
    colours = [plt.cm.viridis(t / max(study.T, 2)) for t in range(study.T)]
    draw_curves(*axes[0, :3], study, colours)
    draw_energy(axes[0, 3], study)
    layers = [row["layer"] for row in study.operations]
    for panel, labels in zip(axes[0, 1:], (names, names, layers)):
        # An axis has room for some thirty names.
        every = 1 + len(labels) // 30
        panel.set_xticks(range(0, len(labels), every), labels[::every], rotation=90, fontsize=7)
    for column in range(4):
        # The first neuron layer, the last, and two in between.
        i = round(column * (len(names) - 1) / 3)
        for panel, (start, run) in zip(axes[1:, column], study.runs.items()):
            labels = [f"t = {t + 1}, distance {run.shift[i, t]:.3f}" for t in range(study.T)]
            draw_distributions(panel, run.histograms[names[i]], labels, colours)
            panel.set(title=f"{names[i]}, {start}",
                      xlabel="membrane potential after the reset (thresholds)", ylabel="density")
            panel.set(yscale="log", ylim=(0.01, None))
    for panel in axes.flat:
        panel.legend()
    save_figure(figure, path)


# ---- Both methods in one picture ----------------------------------------------------------------

# Each surrogate, its name in the picture, its colour.
WINDOWS = ("absolute", "fixed window", "tab:orange"), ("trsg", "TrSG", "tab:blue")
# The neuron of all panels has tau = 2, as a layer starts.
DECAY = torch.tensor(0.5)


def draw_start(panel, title, currents, v_init):
    """MP-Init's half: the distribution of potentials at t = 1, 2, 4, and when they have settled.

    currents: [steps, neurons] of mean and deviation 0.5, at threshold 1
    """
    theta, v, histograms = torch.tensor(1.0), v_init, []
    # One step at a time, because lif returns the last potential only.
    for x in currents:
        _, v, _ = lif(x[None], v, theta, DECAY)
        histograms.append(histogram(v, theta))
    # Those of the steps 1, 2, 4, and the last, which is the stationary one.
    histograms = torch.stack([histograms[0], histograms[1], histograms[3], histograms[-1]])
    distances = wasserstein(histograms, histograms[-1])
    labels = [f"t = {t}: off by {distance:.2f}" for t, distance in zip((1, 2, 4), distances)]
    draw_distributions(panel, histograms, labels, ("tab:orange", "tab:green", "tab:blue"))
    panel.axvline(v_init, color="black", lw=1, ls=":", label=f"start: {v_init:.2f}")
    panel.set(title=title,
              xlabel="membrane potential (thresholds); currents 0.5 ± 0.5", ylabel="density")
    panel.set(xlim=(-0.8, 1.2), ylim=(0, 1.7))
    panel.legend(loc="upper left")


def draw_windows(panel):
    """TrSG's half: for three thresholds, the distribution of the potentials that meet it, and the
    window in which each surrogate lets gradients pass."""
    zero, one = torch.zeros(()), torch.ones(())
    for row, theta in enumerate(torch.tensor([0.25, 1.0, 4.0])):
        # Currents scale with the threshold. Eight steps settle the potentials.
        x = theta * (0.5 + torch.randn(9, 50000))
        _, v, _ = lif(x[:8], zero, theta, DECAY)
        # Charge, in the ninth step: the potential before firing.
        h = (v + DECAY * (x[8] - v)).sort().values
        counts, edges = torch.histogram(h, 120, range=(-4.0, 8.0))
        height = row + 0.6 * counts / counts.max()
        panel.stairs(height, edges, baseline=row, fill=True, color="lightgrey")
        panel.text(-3.9, row + 0.3, f"threshold {theta:g}")
        for top, (surrogate, name, colour) in zip((0, -0.15), WINDOWS):
            # The neuron itself tells do/dh: with v[0] = 0 and k = 1 its potential is the current.
            current = h[None].requires_grad_()
            (o,), _, _ = lif(current, zero, theta, one, surrogate)
            # The gradient passes where it is not 0.
            inside = torch.autograd.grad(o.sum(), current)[0][0] > 0
            seen = h[inside].detach()
            panel.fill_between(seen, row + top - 0.13, row + top, color=colour, lw=0)
            panel.text(6.2, row + top - 0.12, f"{name}: {100 * len(seen) / len(h):.0f} %",
                       color=colour, fontsize=8)
    panel.set(title="TrSG: the window scales with the threshold",
              xlabel="membrane potential before firing (%: share in the window)", ylabel=None)
    panel.set(yticks=[], xticks=range(-4, 9, 2), xlim=(-4, 10.4), ylim=(-0.4, 2.8))


def gradient_norm(surrogate, theta):
    """The norm of the loss's gradient at the first neuron layer of a random resnet19 whose
    currents scale with theta."""
    torch.manual_seed(0)
    model = models.build("resnet19", num_classes=10, timesteps=4, width=8, start="kaiming",
                         threshold=theta, surrogate=surrogate)
    # Neurons then fire alike whatever theta is, and only the window makes a difference.
    models.scale_currents(model, theta)
    currents = []
    model.lif.register_forward_pre_hook(lambda layer, inputs: currents.append(inputs[0]))
    # Random images and labels will do, because only sizes of gradients are compared.
    logits = model(torch.randn(16, 3, 16, 16)).mean(0)
    loss = F.cross_entropy(logits, torch.arange(16) % 10)
    return torch.autograd.grad(loss, currents)[0].norm().item()


def draw_gradients(panel):
    """What the windows make of the gradients of a network."""
    thetas = (0.25, 0.5, 1, 2, 4)
    for surrogate, name, colour in WINDOWS:
        norms = [gradient_norm(surrogate, theta) for theta in thetas]
        panel.loglog(thetas, norms, "o-", color=colour, label=name)
    panel.set(title="... so that gradients keep their size",
              xlabel="threshold (currents scale with it)",
              ylabel="gradient norm, first layer of 17")
    # Ticks at the thresholds themselves instead of powers of ten.
    panel.minorticks_off()
    panel.set_xticks(thetas, thetas)
    panel.legend()


def picture(path):
    """Both methods in one picture, without a checkpoint: MP-Init on the left, TrSG on the right."""
    figure, axes = pyplot().subplots(2, 2, figsize=(9, 6))
    torch.manual_seed(0)
    # A layer learns its start: after 60 batches 0.9^60 = 0.2 % of the first value are left.
    layer = TrLIF()
    for _ in range(60):
        layer(0.5 + 0.5 * torch.randn(4, 10000))
    # After 25 steps nothing is left of the start of a potential.
    currents = 0.5 + 0.5 * torch.randn(25, 100000)
    zero = torch.zeros(())
    draw_start(axes[0, 0], "Start at 0: early steps are unlike later ones", currents, zero)
    draw_start(axes[1, 0], "MP-Init: start at the running mean", currents, layer.v_init)
    draw_windows(axes[0, 1])
    draw_gradients(axes[1, 1])
    save_figure(figure, path)


# ---- Speed --------------------------------------------------------------------------------------

def layer_times(neurons, T, device, dtype):
    """Forward and backward of one layer in ms: (plain, fused, the floor that memory sets)."""
    x = torch.randn(T, neurons, device=device, dtype=dtype, requires_grad=True)
    gradient, copied, layer = torch.randn_like(x), torch.empty_like(x), TrLIF().to(device)

    def step():
        x.grad = None
        # The gradient of the spikes arrives in their dtype.
        layer(x).backward(gradient)

    def milliseconds(function):
        # Timer warms up, and waits for a GPU.
        timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
        return 1e3 * timer.blocked_autorange(min_run_time=SECONDS).median

    # The layer looks at COMPILE in every call.
    with fusing(False):
        plain = milliseconds(step)
    with fusing(True):
        fused = milliseconds(step)
    # A copy passes over memory twice. A layer cannot do with fewer than 5 passes: read x, write
    # the spikes; read x and the gradient, write the gradient.
    return plain, fused, 2.5 * milliseconds(lambda: copied.copy_(gradient))


def speed(device, T=4):
    """Print the time of one layer, plain and fused, beside the time its memory traffic takes."""
    # What training computes in.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}, T = {T}")
    print(f"forward + backward in ms, medians of {SECONDS:g} s each\n")
    # A tiny layer shows what Python and the starting of kernels take, whatever the size.
    _, tiny, _ = layer_times(2 ** 14, T, device, dtype)
    rows = []
    for neurons in NEURONS[device.type]:
        plain, fused, floor = layer_times(neurons, T, device, dtype)
        rows.append([f"{neurons:,d}", f"{plain:.2f}", f"{fused:.2f}", f"{floor:.2f}",
                     f"{fused / floor:.2f}", f"{plain / fused:.1f}",
                     "host-bound" if fused < 1.5 * tiny else ""])
    header = "neurons | plain loop | fused | floor (5 passes) | fused / floor | plain / fused | "
    print(table(header, rows))
    print(f"host-bound: starting kernels takes the time ({tiny:.2f} ms for {2 ** 14:,d} neurons)")


# ---- The program --------------------------------------------------------------------------------

def file_name(ending):
    """A type for argparse: the name of a file to write, with this ending."""

    def parse(text):
        # A checkpoint given here by mistake would be overwritten.
        if not text.endswith(ending):
            raise argparse.ArgumentTypeError(f"{text} does not end in {ending}")
        return train.path(text)

    return parse


def arguments(argv=None):
    how = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser("eval.py", description=__doc__, **how)
    add, png = p.add_argument, file_name(".png")
    # What to do.
    add("checkpoint", nargs="*", type=train.path, help="last.pt or best.pt of a run")
    add("--inspect", action="store_true", help="print tables, layer by layer")
    add("--report", type=file_name(".md"), metavar="FILE.md", help="write the tables into a file")
    add("--plot", type=png, metavar="FILE.png", help="draw them; the second into FILE-2.png, ...")
    add("--save-folded", type=train.path, metavar="FILE.pt",
        help="fold the network, compare it, write it, and go on with it")
    add("--picture", type=png, metavar="FILE.png", help="draw what MP-Init and TrSG do")
    add("--speed", action="store_true", help="time one neuron layer")
    # With what.
    add("--data-dir", type=train.path, default="data", help="where data sets are (%(default)s)")
    add("--images", type=train.count, metavar="N", help="use the first N test images only")
    add("--batch-size", type=train.count, default=256, metavar="N", help="(%(default)s)")
    add("--timesteps", type=train.count, metavar="T", help="steps, if other than in training")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16, if other than in training")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--workers", type=train.count_or_0, default=2, metavar="N",
        help="processes that decode large images (%(default)s)")
    args = p.parse_args(argv)
    # What argparse cannot check.
    if args.save_folded and len(args.checkpoint) > 1:
        p.error("--save-folded takes one checkpoint")
    if not (args.checkpoint or args.picture or args.speed):
        p.error("no checkpoint given")
    return args


@torch.no_grad()
def compare_folded(model, folded, batches):
    """Print how well the predictions and logits of a folded network agree with the original's."""
    same = images = difference = 0
    for x, _ in batches:
        before, after = model(x).mean(0), folded(x).mean(0)
        same += (before.argmax(1) == after.argmax(1)).sum().item()
        images += len(x)
        # In units of the batch's largest logit.
        relative = (before - after).abs().max() / before.abs().max()
        difference = max(difference, relative.item())
    old, new = (sum(p.numel() for p in network.parameters()) for network in (model, folded))
    print(f"folded: same prediction on {percent(same / images)} of {images} images, in float32; "
          f"logits\ndiffer by {difference:.1e} of the largest at most; {new:,d} parameters "
          f"instead of {old:,d}")


def save_folded(args, checkpoint, model, dataset):
    """Fold the network, compare it with the original, write it, and return it."""
    if checkpoint.get("folded"):
        raise UserError(f"{args.checkpoint[0]} is folded already")
    folded = models.fold(model).to(memory_format=data.memory_format(args.device))
    compare_folded(model, folded, take(dataset, args.batch_size, args.images))
    # Without the state of the optimizer, because a folded network is not trained on.
    kept = "format", "network", "settings", "classes", "mean", "std", "epoch"
    folded_checkpoint = {name: checkpoint[name] for name in kept}
    folded_checkpoint.update(folded=True, model=folded.state_dict())
    data.write_atomically(args.save_folded, lambda file: torch.save(folded_checkpoint, file))
    return folded


def evaluate_checkpoint(args, path, checkpoint, device):
    """Print one checkpoint's accuracy. Returns what examine() finds, or None if nobody asked."""
    network = checkpoint["network"]
    model = build_network(checkpoint).to(device, memory_format=data.memory_format(device))
    model.timesteps = args.timesteps or network["timesteps"]
    dataset = test_data(checkpoint, args.data_dir, args.workers, args.timesteps).to(device)
    about = [f"{path}: {network['arch']}", f"width {network['width']}",
             f"T = {dataset.frames or model.timesteps}", dataset.name, dataset.split,
             f"epoch {checkpoint['epoch'] + 1}", "folded" if checkpoint.get("folded") else None]
    print(*filter(None, about), sep=", ")
    # The comparison is in float32, before anything is computed in bfloat16.
    if args.save_folded:
        model = save_folded(args, checkpoint, model, dataset)
    # As the training's own evaluation, unless the flag says otherwise.
    amp = checkpoint["settings"]["amp"] if args.amp is None else args.amp
    print(f"computed in {'bfloat16' if amp else 'float32'}")
    study, rate = None, ""
    if args.inspect or args.report or args.plot or len(args.checkpoint) > 1:
        study = examine(path, checkpoint, model, dataset, args.batch_size, args.images, amp)
        result = study.result
    else:
        start = time.perf_counter()
        result = evaluate(model, take(dataset, args.batch_size, args.images), amp)
        rate = f", {result['images'] / (time.perf_counter() - start):.0f} images/s"
    print(f"top-1 {percent(result['top1'])}   top-5 {percent(result['top5'])}   "
          f"of {result['images']} images{rate}")
    right = [f"t={t}: {percent(share)}" for t, share in enumerate(result["top1_at"], 1)]
    print("read out after  " + "  ".join(right) + "\n")
    return study


def main(argv=None):
    args = arguments(argv)
    # Whatever is missing or would be lost is said before the work.
    if args.plot or args.picture:
        pyplot()
    if args.save_folded and os.path.isfile(args.save_folded):
        if not load_checkpoint(args.save_folded).get("folded"):
            raise UserError(f"{args.save_folded} is not a folded network: give another name")
    device = train.use_device(args.device)
    checkpoints = [load_checkpoint(path) for path in args.checkpoint]
    # float32 means float32 on GPUs too, which would round to the 10 bits of TF32.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    if args.speed:
        speed(device)
    if args.picture:
        # Compiling takes longer than these few small layers.
        with fusing(False):
            picture(args.picture)
    # One after the other: a picture is there before the next checkpoint is looked at.
    studies = []
    for i, (path, checkpoint) in enumerate(zip(args.checkpoint, checkpoints), 1):
        studies.append(evaluate_checkpoint(args, path, checkpoint, device))
        if args.plot:
            # FILE.png, FILE-2.png, ...
            plot(studies[-1], args.plot if i == 1 else f"{args.plot.removesuffix('.png')}-{i}.png")
    # All checkpoints have been examined, or none.
    if studies and studies[0]:
        compared = comparison(studies)
        tables = f"# Comparison\n\n{compared}\n"
        tables += "\n".join(report(study) for study in studies)
        print(tables if args.inspect else compared)
        if args.report:
            data.write_atomically(args.report, lambda file: file.write(tables.encode()))


if __name__ == "__main__":
    train.run(main, "eval.py")
