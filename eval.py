"""What a trained network does and what it costs.

    python eval.py runs/NAME        accuracy, firing rate and energy of the best.pt in that folder
    python eval.py A.pt B.pt        the same of several checkpoints, side by side
    python eval.py A.pt --inspect   layer by layer: firing rate, potentials, operations, energy
    python eval.py A.pt --report A.md --plot A.png      the same as a file and as a picture
    python eval.py A.pt --save-folded F.pt      absorb thresholds and BatchNorm into the weights

    python eval.py --picture M.png [A.pt B.pt]      what TrSG and MP-Init do, in one picture
    python eval.py --speed          time a neuron layer, eager and fused

A checkpoint tells how to rebuild its network and which test set to take. The text under each table
says what its figures mean. This file imports all the others.
"""
import argparse
import collections
import contextlib
import copy
import os
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
from train import build_network, check_classes, evaluate, load_checkpoint, load_data

# Energy in pJ of a 32-bit multiply-accumulate and of an accumulate in 45 nm CMOS (Horowitz 2014).
PJ_PER_MAC, PJ_PER_AC = 4.6, 0.9
# Histograms of membrane potentials go from -32 to 32 thresholds.
RANGE, BINS_PER_THRESHOLD = 32, 256
BINS = 2 * RANGE * BINS_PER_THRESHOLD
# Where the study of potentials starts them: where the network does (None), and at 0.
STARTS = {"v[0] = v_init (MP-Init)": None, "v[0] = 0": 0.0}
# The sizes of layers that --speed times, and for how many seconds each.
NEURONS = {"cpu": (2**14, 2**18, 2**21), "cuda": (2**14, 2**18, 2**22, 2**26)}
SECONDS = 1.0


# ---- The test set -------------------------------------------------------------------------------

def test_data(checkpoint, data_dir, workers=None, timesteps=None, images=None):
    """The test set for a checkpoint, prepared as in its training. images: how many (all)."""
    settings = SimpleNamespace(**checkpoint["settings"])
    # A recording of events is cut into as many frames as the network takes time steps.
    dataset = load_data(settings, data_dir, workers, timesteps or settings.timesteps)
    check_classes(checkpoint, dataset, data_dir)
    # Normalised as in training. This takes effect when the data set moves to its device.
    dataset.mean, dataset.std = checkpoint["mean"], checkpoint["std"]
    if images:
        dataset.limit("test", images, "--images")
    return dataset


def test_batches(dataset, batch_size):
    """The test set in batches (x, y), without padding. Prints rate and time left now and then."""
    pace = data.Pace(dataset.test_size(), "images")
    for x, y in dataset.test(batch_size):
        # The data set pads its last batch. The padding comes after the real images.
        n = min(len(y), pace.total - pace.done)
        yield x[:n], y[:n]
        pace.count(n)
        if pace.due():
            print(pace, flush=True)


# ---- Spikes -------------------------------------------------------------------------------------

def neurons_of(model):
    """{name: layer} of all neuron layers."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, TrLIF)}


def observe(model, batches, amp=False):
    """Evaluate a network and count its spikes, summed over all images.

    Returns (result of evaluate(), counts). The size of counts does not depend on the number of
    images. Its keys are
        the name of a neuron layer    spikes of each neuron at each time step, [T, *neurons]
        the name of a pooling layer   spikes at each output, all time steps together, [1, *outputs]
        "NAME k^T v"                  additions for k^T v in the attention layer NAME
        "events", "analog"            spikes in the input, and values that are not, [C, H, W]
    """
    # The hooks go on a copy, so the network itself stays as it is.
    model = copy.deepcopy(model)
    counts, latest = collections.defaultdict(float), {}

    def count_input(_, inputs):
        # An image is analog. In event frames a whole number k means k spikes.
        x = inputs[0] if inputs[0].dim() == 4 else inputs[0].flatten(0, 1)
        spikes = (x == x.round()) & (x >= 0) & (inputs[0].dim() == 5)
        counts["events"] += (x * spikes).double().sum(0)
        counts["analog"] += (~spikes).double().sum(0)

    def count_spikes(name):
        def hook(layer, _, output):
            # Neurons return [T, B, ...]. Pooling returns [T*B, ...], counted as one time step.
            spikes = output if isinstance(layer, TrLIF) else output[None]
            # Float32 sums whole numbers exactly up to 2^24, far more than a batch has images.
            counts[name] += (spikes != 0).float().sum(1).double()
        return hook

    def count_products(name, part, heads):
        def hook(_, inputs, output):
            # Spikes of each token in each head: [T, B, N, D] -> [T, B, N, heads].
            latest[part] = (output != 0).unflatten(3, (heads, -1)).sum(4).double()
            # A token adds 1 to entry (a, b) of k^T v where both its k_a and its v_b are spikes: in
            # a head, k's number of spikes times v's. The network computes v after k.
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
    """How many connections leave each place of a layer's input: a number, or for a convolution
    [H, W], the given size, with borders and strides counted exactly."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if not isinstance(layer, nn.Conv2d):
        # A plain shortcut connects each neuron to one other.
        return 1
    # With a kernel of ones, the sum of the output counts each place of the input once for every
    # kernel position that reads it. So its derivative by a place is that number.
    x, ones = torch.zeros(1, 1, *size, requires_grad=True), torch.ones(1, 1, *layer.kernel_size)
    with torch.enable_grad():
        all_reads = F.conv2d(x, ones, None, layer.stride, layer.padding, layer.dilation).sum()
    (reads,) = torch.autograd.grad(all_reads, x)
    return reads[0, 0].double() * (layer.out_channels // layer.groups)


def operations(model, counts, images):
    """What each layer does for one image, from the counts of observe(): a list of dicts.

    layer       its name
    spikes      how many arrive
    acs         accumulates, one for each spike and connection
    macs        multiply-accumulates, on analog input only
    ann_macs    multiply-accumulates of the same layer in an ANN, one for each connection
    pj, ann_pj  energy in pJ
    """
    names = {module: name for name, module in model.named_modules()}
    pools = dict(models.pooling(model))
    # From sums over all images to means.
    counts = {name: torch.as_tensor(count).cpu() / images for name, count in counts.items()}
    rows = []

    def add(name, spikes, acs, macs, ann_macs):
        row = dict(layer=name, spikes=float(spikes), acs=float(acs), macs=float(macs))
        row["ann_macs"] = float(ann_macs)
        row["pj"] = PJ_PER_AC * row["acs"] + PJ_PER_MAC * row["macs"]
        row["ann_pj"] = PJ_PER_MAC * row["ann_macs"]
        rows.append(row)

    for layer, sources in models.synapses(model):
        # The spikes of each source at each place, [C, H, W] or [N, D], summed over time steps.
        # Behind a pooling layer, those are the spikes that leave the pooling.
        leaving = [names[pools.get(source, source)] for source in sources]
        arriving = [counts[name].sum(0) for name in leaving] or [counts["events"]]
        # A convolution or linear layer comes with its BatchNorm.
        weights = layer[0] if isinstance(layer, nn.Sequential) else layer
        fan = fan_out(weights, arriving[0].shape[1:])
        acs = sum((spikes * fan).sum() for spikes in arriving)
        # Only the first layer meets analog values.
        macs = 0 if sources else (counts["analog"] * fan).sum()
        ann_macs = (torch.ones_like(arriving[0]) * fan).sum()
        if layer is model.head:
            # The head of an ANN reads one value for each channel, the mean over all places.
            ann_macs = layer.out_features * len(arriving[0])
        elif not isinstance(weights, (nn.Conv2d, nn.Linear)):
            # A plain shortcut only adds in an ANN.
            ann_macs = 0
        add(names[layer], sum(spikes.sum() for spikes in arriving), acs, macs, ann_macs)
    # Attention also multiplies spikes with spikes, twice.
    for name, layer in model.named_modules():
        if isinstance(layer, models.SpikingSelfAttention):
            q, k, v = (counts[f"{name}.{part}.lif"] for part in "qkv")
            # Each spike of q adds up one row of its head's k^T v.
            width = q.shape[2] // layer.heads
            # q is [T, N, D]. In an ANN, either product takes N * D * width.
            ann_macs = q[0].numel() * width
            add(f"{name} k^T v", k.sum() + v.sum(), counts[f"{name} k^T v"], 0, ann_macs)
            add(f"{name} q (k^T v)", q.sum(), q.sum() * width, 0, ann_macs)
    return rows


def total(rows, key):
    """The sum of a column of operations() over all layers."""
    return sum(row[key] for row in rows)


# ---- Membrane potentials ------------------------------------------------------------------------

def histogram(v, theta):
    """The distribution of v / theta as counts [BINS]. The outermost bins hold whatever lies beyond
    the range."""
    bins = (v * (BINS_PER_THRESHOLD / theta) + BINS / 2).clamp(0, BINS - 1).int()
    return torch.bincount(bins.flatten(), minlength=BINS)


def potentials(model, batches, T, steps, v_init=None, amp=False):
    """Evaluate a network over `steps` time steps, at least 2 T, and record its potentials v after
    the reset.

    An image is shown at every step, the T frames of a recording over and over. v_init: where the
    potentials start, None for where the network starts them.
    Returns (result of evaluate(), {name of a neuron layer: histograms of v / theta [T + 1, BINS]}).
    The rows are the time steps 1 ... T and the stationary distribution, that of the last T steps.
    """
    # The hooks go on a copy, so the network itself stays as it is.
    model, histograms = copy.deepcopy(model), {}
    model.timesteps = steps

    def record(counts):
        def hook(layer, inputs, _):
            # A layer does not return its potentials, so we run its neurons again, step by step.
            v, theta = layer.v_init, layer.threshold
            for t in range(steps):
                _, v, _ = lif(inputs[0][t:t + 1], v, theta, layer.decay, layer.surrogate)
                if t < T or t >= steps - T:
                    counts[min(t, T)] += histogram(v, theta)
        return hook

    for name, layer in neurons_of(model).items():
        histograms[name] = torch.zeros(T + 1, BINS, dtype=torch.long, device=layer.v_init.device)
        layer.register_forward_hook(record(histograms[name]))
        if v_init is not None:
            layer.v_init.fill_(v_init)
    # 0 ... T - 1, 0 ... T - 1, and so on.
    frames = torch.arange(steps) % T
    shown = ((x if x.dim() == 4 else x[:, frames], y) for x, y in batches)
    result = evaluate(model, shown, amp)
    return result, {name: counts.cpu() for name, counts in histograms.items()}


def wasserstein(histograms, reference):
    """The 1-Wasserstein distance of histograms [..., BINS] from another one, in thresholds: the
    area between the cumulative distributions. It is exact to the width of a bin."""
    # Fractions instead of counts, because the histograms may hold different numbers of potentials.
    p, q = (counts.double() / counts.sum(-1, keepdim=True) for counts in (histograms, reference))
    return (p - q).cumsum(-1).abs().sum(-1) / BINS_PER_THRESHOLD


# ---- All about one network ----------------------------------------------------------------------

@contextlib.contextmanager
def fusing(on):
    """A context in which neuron layers run fused, or all eagerly."""
    before, neuron.COMPILE = neuron.COMPILE, on
    try:
        yield
    finally:
        neuron.COMPILE = before


def examine(model, dataset, batch_size, amp=False):
    """Evaluate a network and count what it does.

    Returns a study: a namespace of what tables and pictures show. examine_potentials adds the
    membrane potentials to it, evaluate_checkpoint what the checkpoint is called.
    """
    result, counts = observe(model, test_batches(dataset, batch_size), amp)
    images, neurons = result["images"], neurons_of(model)
    # Spikes for one image: {neuron layer: [T, *neurons]}.
    spikes = {name: counts[name].cpu() / images for name in neurons}
    rows = operations(model, counts, images)
    return SimpleNamespace(
        T=dataset.frames or model.timesteps,
        result=result,
        neurons=neurons,
        parameters=sum(p.numel() for p in model.parameters()),
        # The number of neurons in the network.
        size=sum(count[0].numel() for count in spikes.values()),
        spikes=sum(count.sum().item() for count in spikes.values()),
        # Firing rates in spikes per neuron, {neuron layer: [T]}.
        rates={name: count.flatten(1).mean(1) for name, count in spikes.items()},
        operations=rows,
        # Energy for one image, in µJ.
        uj=1e-6 * total(rows, "pj"),
        ann_uj=1e-6 * total(rows, "ann_pj"))


def examine_potentials(study, model, dataset, batch_size, amp=False):
    """Add to a study how membrane potentials behave. It takes far longer than examine() does.

    steps  for how many time steps the network runs
    runs   {start: a namespace of top1_at, histograms (see potentials) and shift, the distance from
           the stationary distribution in thresholds, [layers, T]}
    """
    # By then the potentials have settled: with tau = 4, a large one, 16 steps leave 1 % of v[0].
    # The frames of a recording are shown five times and more.
    study.steps, study.runs = 5 * study.T + 16, {}
    for start, v_init in STARTS.items():
        print(f"membrane potentials over {study.steps} time steps, {start}", flush=True)
        # More time steps need smaller batches in the same memory.
        batches = test_batches(dataset, max(1, batch_size * study.T // study.steps))
        # Compiling so many steps would take longer than it saves.
        with fusing(False):
            result, histograms = potentials(model, batches, study.T, study.steps, v_init, amp)
        # How far each layer is from its stationary distribution at each step, [layers, T].
        shift = torch.stack([wasserstein(counts[:-1], counts[-1])
                             for counts in histograms.values()])
        study.runs[start] = SimpleNamespace(top1_at=result["top1_at"], histograms=histograms,
                                            shift=shift)


# ---- Tables -------------------------------------------------------------------------------------

def table(header, rows):
    """A Markdown table with aligned columns, so that it reads well as plain text, too.

    header: names of the columns, "a | b | c". rows: lists of texts.
    """
    rows = [header.split(" | "), *rows]
    # A column is as wide as its longest cell. Markdown wants three dashes at least in the rule.
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    # The first column is aligned to the left, the others to the right.
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = ""
    for first, *others in [rows[0], rule, *rows[1:]]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines += "| " + " | ".join([first.ljust(widths[0]), *cells]) + " |\n"
    return lines


def percent(fraction):
    return f"{100 * fraction:.2f} %"


def summary(studies):
    """A table with one row for each checkpoint, as Markdown."""
    rows = []
    for study in studies:
        row = [study.path, study.arch, str(study.T), f"{study.parameters:,d}"]
        row += [percent(study.result["top1_at"][0]), percent(study.result["top1"])]
        row += [percent(study.spikes / study.T / study.size), f"{study.spikes:,.0f}"]
        rows.append(row + [f"{study.uj:,.2f}", f"{study.ann_uj:,.2f}"])
    header = ("checkpoint | network | T | parameters | top-1 at t=1 | top-1 | firing rate | "
              "spikes | energy (µJ) | ANN (µJ)")
    return f"""{table(header, rows)}
T: time steps. Top-1 at t=1: accuracy when the network is read out after its first time step.
Firing rate: spikes per neuron and time step. Spikes and energy: for one image, on average. Energy
counts arithmetic alone, in 45 nm CMOS: {PJ_PER_MAC} pJ a multiply-accumulate, {PJ_PER_AC} pJ an
accumulate. ANN: the same layers without spikes, in one pass.
"""


def neuron_table(study, times):
    """What each neuron layer has learnt, and its firing rate at each time step."""
    rows = []
    for name, layer in study.neurons.items():
        learnt = [f"{value.item():.3f}" for value in (layer.threshold, layer.tau, layer.v_init)]
        rows.append([name, *learnt, *(percent(rate) for rate in study.rates[name])])
    return table(f"layer | theta | tau | v_init | {times}", rows)


def shift_table(study, times):
    """The temporal covariate shift of each layer from both starts. The first row is their mean."""
    # Side by side, [layers, 2 * T].
    shift = torch.cat([run.shift for run in study.runs.values()], 1)
    rows = []
    for name, distances in zip(["mean over layers", *study.neurons], [shift.mean(0), *shift]):
        rows.append([name, *(f"{distance:.3f}" for distance in distances)])
    from_0 = " | ".join(f"from 0: t={t}" for t in range(1, study.T + 1))
    return table(f"layer | {times} | {from_0}", rows)


def operation_table(study):
    """Operations and energy of each layer with weights, for one image."""
    rows = []
    for row in study.operations:
        counted = [f"{row['spikes']:,.1f}", f"{row['acs']:,.0f}", f"{row['macs']:,.0f}"]
        energy = [f"{row[key] * 1e-6:,.3f}" for key in ("pj", "ann_pj")]
        rows.append([row["layer"], *counted, *energy])
    header = "layer | spikes in | accumulates | multiply-accumulates | energy (µJ) | ANN (µJ)"
    return table(header, rows)


def report(study):
    """All about one checkpoint, as Markdown."""
    times = " | ".join(f"t={t}" for t in range(1, study.T + 1))
    accuracy = []
    for start, run in study.runs.items():
        accuracy.append([start, *(percent(fraction) for fraction in run.top1_at[:study.T])])
    acs, macs, ann_macs = (total(study.operations, key) for key in ("acs", "macs", "ann_macs"))
    return f"""# {study.title}

{table(f"potentials start at | {times}", accuracy)}
Top-1 accuracy when the network is read out after t time steps.

## Neurons

{neuron_table(study, times)}
theta: threshold. tau: time constant, in time steps. v_init: where potentials start. t=...: firing
rate at that time step, in spikes per neuron.

## Temporal covariate shift

{shift_table(study, times)}
How far the membrane potentials at time step t, after the reset, are from their stationary
distribution: 1-Wasserstein distance, in thresholds. At 0 the step sees what all later steps see.
"from 0": the same network, its potentials started at 0. Stationary: the last {study.T} of
{study.steps} time steps on the same images. Exact to 1/{BINS_PER_THRESHOLD} threshold.

## Operations and energy for one image

{operation_table(study)}
{study.spikes:,.0f} spikes, {acs:,.0f} accumulates, {macs:,.0f} multiply-accumulates.
An ANN has {ann_macs:,.0f} multiply-accumulates: {study.ann_uj / study.uj:.2f} times the energy.

A spike costs an accumulate ({PJ_PER_AC} pJ) for each connection that leaves its place, also where
it is one of several in a residual stream. An image is analog: its first layer costs a
multiply-accumulate ({PJ_PER_MAC} pJ) for each connection, once for all time steps. In event frames
a whole number k is k spikes, any other value is analog. In attention, k^T v costs an accumulate for
each pair of spikes that meet in a token, q (k^T v) one for each spike of q and channel of a head.
Not counted: memory access, biases, pooling, and the {study.size * study.T:,d} updates of neurons.
"""


# ---- Pictures -----------------------------------------------------------------------------------

# Blue is the method, orange is what it is compared with.
COLOURS = "tab:blue", "tab:orange"


def pyplot():
    """matplotlib.pyplot with the settings of all pictures. Nothing else needs matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install matplotlib") from error
    # Agg draws into files and needs no screen.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": 9,
                         "font.size": 10, "axes.titlesize": 11,
                         "figure.constrained_layout.use": True})
    return plt


def save_figure(figure, path):
    # Nine inches become 1350 pixels. On a web page 900 pixels wide the text has about the page's
    # size.
    data.write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    # matplotlib keeps every figure in memory until it is closed.
    pyplot().close(figure)


def draw_potentials(panel, histograms):
    """Distributions of v / theta as histograms [3, BINS]: two lines at t = 1, from the two STARTS,
    and the stationary one as an area."""
    # From counts to densities, in bins of 1/16 threshold.
    density = histograms.unflatten(1, (-1, BINS_PER_THRESHOLD // 16)).sum(2).double()
    density = 16 * density / density.sum(1, keepdim=True)
    edges = torch.linspace(-RANGE, RANGE, density.shape[1] + 1)
    # The part of the axis where there is something to see.
    visible = edges[:-1][density.amax(0) > 0.01]
    # The area first, so that the lines are in front of it.
    panel.stairs(density[2], edges, fill=True, color="lightgrey", label="stationary")
    distances = wasserstein(histograms, histograms[2])
    for line, start, distance, colour in zip(density, STARTS, distances, COLOURS):
        panel.stairs(line, edges, color=colour, lw=1.5,
                     label=f"t = 1, {start}: off by {distance:.2f}")
    # The legend has its place above the curves.
    panel.set(xlabel="membrane potential after the reset (thresholds)", ylabel="density",
              xlim=(visible[0] - 0.1, visible[-1] + 0.1), ylim=(0, 1.5 * density.max().item()))
    panel.legend(loc="upper left")


def name_layers(panel, names):
    """Write the names of layers under a panel, all of them or as many as there is room for."""
    every = 1 + len(names) // 20
    panel.set_xticks(range(0, len(names), every), names[::every], rotation=90, fontsize=8)
    panel.legend()


def plot(study, path):
    """One checkpoint as a picture: accuracy, firing rate, covariate shift, energy, potentials."""
    plt, names = pyplot(), list(study.neurons)
    figure, axes = plt.subplots(3, 2, figsize=(9, 11.5))
    (accuracy, rate), (shift, energy), distributions = axes
    figure.suptitle(study.title, fontsize=10)
    # The dotted line is where the network is read out.
    accuracy.axvline(study.T, color="grey", lw=1, ls=":", label=f"T = {study.T}")
    for (start, run), colour, style in zip(study.runs.items(), COLOURS, ("o-", "s--")):
        top1 = [100 * fraction for fraction in run.top1_at]
        accuracy.plot(range(1, study.steps + 1), top1, style, color=colour, ms=4, label=start)
        shift.plot(run.shift[:, 0], style, color=colour, ms=4, label=start)
    accuracy.set(title="Accuracy when read out after t steps",
                 xlabel="time step t", ylabel="top-1 accuracy (%)")
    accuracy.legend()
    shift.set(title="Covariate shift at t = 1", ylim=(0, None),
              ylabel="distance from stationary (thresholds)")
    name_layers(shift, names)
    for t in range(study.T):
        # From dark to light.
        colour = plt.cm.viridis(t / max(study.T, 2))
        rates = [100 * layer[t] for layer in study.rates.values()]
        rate.plot(rates, ".-", color=colour, label=f"t = {t + 1}")
    rate.set(title="Firing rate", ylim=(0, None), ylabel="spikes per neuron and time step (%)")
    name_layers(rate, names)
    layers = [row["layer"] for row in study.operations]
    uj = [1e-6 * row["pj"] for row in study.operations]
    ann_uj = [1e-6 * row["ann_pj"] for row in study.operations]
    # The wide bars first, so that the narrow ones are in front of them.
    energy.bar(layers, ann_uj, 0.9, color="lightgrey", label=f"ANN: {study.ann_uj:,.1f} µJ")
    energy.bar(layers, uj, 0.5, label=f"spiking: {study.uj:,.1f} µJ")
    energy.set(title="Energy for one image (45 nm, arithmetic only)", ylabel="energy (µJ)")
    # Room for the legend.
    energy.margins(y=0.25)
    name_layers(energy, layers)
    # Two layers, one in the middle of the network and the last.
    for panel, name in zip(distributions, (names[len(names) // 2], names[-1])):
        learnt, from_0 = (run.histograms[name] for run in study.runs.values())
        draw_potentials(panel, torch.stack([learnt[0], from_0[0], learnt[-1]]))
        panel.set_title(f"Membrane potentials in {name}")
    save_figure(figure, path)


# ---- Both methods in one picture ----------------------------------------------------------------

def gradient_norm(surrogate, theta):
    """The norm of the loss's gradient at the first neuron layer of a resnet19 with random weights,
    whose currents scale with theta."""
    torch.manual_seed(0)
    model = models.build("resnet19", num_classes=10, timesteps=4, width=8, init="kaiming",
                         threshold=theta, surrogate=surrogate)
    # With TrSG the same neurons fire whatever theta is. The fixed window emits 1, not theta, also
    # where that is added to a scaled current, so with it some other neurons fire.
    models.scale_currents(model, theta)
    currents = []
    model.lif.register_forward_pre_hook(lambda layer, inputs: currents.append(inputs[0]))
    # Random images and labels will do, because only sizes of gradients are compared.
    logits = model(torch.randn(16, 3, 16, 16)).mean(0)
    loss = F.cross_entropy(logits, torch.arange(16) % 10)
    return torch.autograd.grad(loss, currents)[0].norm().item()


def draw_gradients(panel):
    """The norm of a gradient by threshold, with TrSG and with a window of fixed width."""
    thetas = (0.25, 0.5, 1, 2, 4)
    for surrogate, colour in zip(("trsg", "absolute"), COLOURS):
        norms = [gradient_norm(surrogate, theta) for theta in thetas]
        panel.loglog(thetas, norms, "o-", color=colour)
    panel.set(title="TrSG: gradients keep their size",
              xlabel="θ, currents scaled alike; untrained ResNet-19",
              ylabel="gradient norm, first layer of 17")
    # Ticks at the thresholds themselves instead of powers of ten.
    panel.minorticks_off()
    panel.set_xticks(thetas, thetas)
    panel.legend(["TrSG", "window of fixed width"])


@torch.no_grad()
def draw_windows(panel):
    """The reason: potentials before firing at three thresholds, with both windows and how many of
    the potentials each window holds."""
    for row, theta in enumerate((0.25, 1.0, 4.0)):
        layer = TrLIF(theta)
        # Currents scale with the threshold. The potentials settle in eight time steps.
        x = theta * (0.5 + torch.randn(9, 50000))
        _, v, _ = lif(x[:8], layer.v_init, layer.threshold, layer.decay)
        # The ninth step up to its charge: the potential before firing.
        h = v + layer.decay * (x[8] - v)
        counts, edges = torch.histogram(h, 120, range=(-4.0, 8.0))
        height = row + 0.6 * counts / counts.max()
        panel.stairs(height, edges, baseline=row, fill=True, color="lightgrey")
        panel.text(-3.9, row + 0.3, f"threshold {theta:g}")
        # TrSG's window reaches from theta / 2 to 3/2 theta, the other has the width 1.
        for half, colour, top in zip((theta / 2, 0.5), COLOURS, (0, -0.15)):
            low, high = theta - half, theta + half
            panel.fill_between([low, high], row + top - 0.13, row + top, color=colour, lw=0)
            inside = ((h >= low) & (h <= high)).float().mean()
            panel.text(6.2, row + top - 0.13, f"{100 * inside:.0f} % inside", color=colour,
                       fontsize=9)
    panel.set(title="... because its window (bar) grows with θ",
              xlabel="potential before firing; one layer, random currents",
              yticks=[], xticks=range(-4, 9, 2), xlim=(-4, 9.5), ylim=(-0.4, 2.8))


@torch.no_grad()
def draw_toy(panel):
    """MP-Init in a toy: potentials of one layer at t = 1, from both starts."""
    torch.manual_seed(0)
    layer, zero = TrLIF(), torch.tensor(0.0)
    # After 60 batches 0.9^60 = 0.2 % of the running mean's first value is left.
    for _ in range(60):
        layer(0.5 + 0.5 * torch.randn(4, 10000))
    # After 25 time steps nothing is left of where the potentials started.
    currents = 0.5 + 0.5 * torch.randn(25, 100000)
    histograms = []
    for x, v_init in (currents[:1], layer.v_init), (currents[:1], zero), (currents, zero):
        _, v, _ = lif(x, v_init, layer.threshold, layer.decay)
        histograms.append(histogram(v, layer.threshold))
    draw_potentials(panel, torch.stack(histograms))
    panel.set_title("MP-Init in a toy: one layer, random currents")


def draw_trained(panel, studies):
    """MP-Init in trained networks: each layer's covariate shift at t = 1."""
    names = "trained with MP-Init", "trained without"
    for study, name, colour in zip(studies, names, COLOURS):
        # The first run starts where the network itself does.
        shift = next(iter(study.runs.values())).shift[:, 0]
        panel.plot(range(1, len(shift) + 1), shift, "o-", color=colour,
                   label=f"{name}: mean {shift.mean():.2f}")
    panel.set(title="MP-Init in trained networks, at t = 1", xlabel="neuron layer",
              ylabel="distance from stationary (thresholds)", ylim=(0, None))
    panel.legend()


def picture(path, studies):
    """Both methods in one picture. studies: of a network trained with MP-Init and of one trained
    without, or none."""
    # Without trained networks the toy has the lower row for itself.
    layout = [["gradients", "windows"], ["toy", "trained" if studies else "toy"]]
    figure, panels = pyplot().subplot_mosaic(layout, figsize=(9, 7))
    draw_gradients(panels["gradients"])
    draw_windows(panels["windows"])
    draw_toy(panels["toy"])
    if studies:
        draw_trained(panels["trained"], studies)
    save_figure(figure, path)


# ---- Speed --------------------------------------------------------------------------------------

def layer_times(neurons, T, device, dtype):
    """Forward and backward of one layer in ms: (eager, fused, memory bound)."""
    x = torch.randn(T, neurons, device=device, dtype=dtype, requires_grad=True)
    gradient, copied, layer = torch.randn_like(x), torch.empty_like(x), TrLIF().to(device)

    def step():
        x.grad = None
        layer(x).backward(gradient)

    def milliseconds(function):
        # The first call may compile, which Timer would take for the time of a step.
        function()
        # Timer waits for a GPU.
        timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
        return 1e3 * timer.blocked_autorange(min_run_time=SECONDS).median

    with fusing(False):
        eager = milliseconds(step)
    with fusing(True):
        fused = milliseconds(step)
    # A layer passes over memory five times at least: it reads x and writes the spikes, then reads
    # x and the gradient and writes the gradient. A copy passes over memory twice.
    return eager, fused, 2.5 * milliseconds(lambda: copied.copy_(gradient))


def speed(device, T=4):
    """Print how long one layer takes, eager and fused, and how long its memory traffic alone."""
    # The dtype of training.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}, T = {T}")
    print(f"forward + backward of one layer in ms, medians over {SECONDS:g} s each\n")
    rows = []
    for neurons in NEURONS[device.type]:
        eager, fused, bound = layer_times(neurons, T, device, dtype)
        rows.append([f"{neurons:,d}", f"{eager:.2f}", f"{fused:.2f}", f"{bound:.2f}",
                     f"{eager / fused:.1f}", f"{fused / bound:.2f}"])
    print(table("neurons | eager | fused | memory bound | eager / fused | fused / bound", rows))
    print("memory bound: the time of the memory traffic that no implementation can avoid. Small\n"
          "layers take longer than that, because launching their kernels takes the time.")


# ---- The program --------------------------------------------------------------------------------

def arguments(argv=None):
    how = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser("eval.py", description=__doc__, **how)
    add = p.add_argument
    # What to do.
    add("checkpoint", nargs="*", type=train.path, help="its file, or the folder of a run (best.pt)")
    add("--inspect", action="store_true", help="print all tables, layer by layer (slow)")
    add("--report", type=train.path, metavar="FILE.md", help="write all tables into a file (slow)")
    add("--plot", type=train.path, metavar="FILE.png",
        help="draw them; the second checkpoint into FILE-2.png, and so on (slow)")
    add("--save-folded", type=train.path, metavar="FILE.pt",
        help="absorb thresholds and BatchNorm into the weights, compare both networks, write the "
             "new one and evaluate it")
    add("--picture", type=train.path, metavar="FILE.png",
        help="draw what TrSG and MP-Init do; with two checkpoints, of a network trained with "
             "MP-Init and of one trained without, also what it does to these (slow)")
    add("--speed", action="store_true", help="time one neuron layer, eager and fused")
    # How to do it.
    add("--data-dir", type=train.path, default="data", help="where the data sets are (%(default)s)")
    add("--images", type=train.count, metavar="N",
        help="use N test images, drawn from all classes, always the same")
    add("--batch-size", type=train.count, default=256, metavar="N", help="images at once (256)")
    add("--timesteps", type=train.count, metavar="T", help="time steps (as in training)")
    add("--amp", action=argparse.BooleanOptionalAction, help="use bfloat16 (as in training)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N (%(default)s)")
    add("--workers", type=train.count_or_0, metavar="N",
        help="processes that decode images (one per core, at most 16)")
    args = p.parse_args(argv)
    # A folder stands for its best.pt.
    args.checkpoint = [os.path.join(path, "best.pt") if os.path.isdir(path) else path
                       for path in args.checkpoint]
    # What argparse cannot check. Endings are checked so that a checkpoint given to --report by
    # mistake is not overwritten.
    for file, ending in (args.report, ".md"), (args.plot, ".png"), (args.picture, ".png"):
        if file and not file.endswith(ending):
            p.error(f"{file} does not end in {ending}")
    if not (args.checkpoint or args.picture or args.speed):
        p.error("no checkpoint given")
    if args.save_folded and len(args.checkpoint) > 1:
        p.error("--save-folded takes one checkpoint")
    if args.picture and len(args.checkpoint) not in (0, 2):
        p.error("--picture takes two checkpoints, trained with MP-Init and without, or none")
    return args


@torch.no_grad()
def save_folded(args, checkpoint, model, dataset):
    """Fold the network, compare it with the original, write it, and return it."""
    if checkpoint.get("folded"):
        raise UserError(f"{args.checkpoint[0]} is folded already")
    folded = models.fold(model).to(memory_format=data.memory_format(args.device))
    same = images = difference = 0
    for x, _ in test_batches(dataset, args.batch_size):
        before, after = model(x).mean(0), folded(x).mean(0)
        if not (before.isfinite() & after.isfinite()).all():
            raise UserError(f"{args.checkpoint[0]}: the network's logits are NaN or infinite")
        same += (before.argmax(1) == after.argmax(1)).sum().item()
        images += len(x)
        # In units of the batch's largest logit.
        relative = (before - after).abs().max() / before.abs().max()
        difference = max(difference, relative.item())
    print(f"folded: same prediction on {percent(same / images)} of {images:,d} images (float32), "
          f"logits differ by\n{difference:.1e} of the largest at most")
    # Without the optimizer, because a folded network cannot be trained.
    kept = "format", "network", "settings", "classes", "mean", "std", "epoch"
    folded_checkpoint = {name: checkpoint[name] for name in kept}
    folded_checkpoint.update(folded=True, model=folded.state_dict())
    data.write_atomically(args.save_folded, lambda file: torch.save(folded_checkpoint, file))
    return folded


def evaluate_checkpoint(args, path, checkpoint, device):
    """Print the accuracy of one checkpoint. Returns what the tables and pictures show of it."""
    network, settings = checkpoint["network"], checkpoint["settings"]
    model = build_network(checkpoint).to(device, memory_format=data.memory_format(device))
    model.timesteps = args.timesteps or network["timesteps"]
    dataset = test_data(checkpoint, args.data_dir, args.workers, args.timesteps, args.images)
    dataset.to(device)
    about = [network["arch"], f"width {network['width']}",
             f"T = {dataset.frames or model.timesteps}", dataset.name, dataset.split,
             f"epoch {checkpoint['epoch'] + 1}", "folded" if checkpoint.get("folded") else None]
    title = f"{path}: {', '.join(filter(None, about))}"
    print(title)
    # The folded network is compared with the original in float32.
    if args.save_folded:
        model = save_folded(args, checkpoint, model, dataset)
    amp = settings["amp"] if args.amp is None else args.amp
    print(f"computed in {'bfloat16' if amp else 'float32'}")
    study = examine(model, dataset, args.batch_size, amp)
    study.path, study.title, study.arch = path, title, network["arch"]
    result = study.result
    print(f"top-1 {percent(result['top1'])}   top-5 {percent(result['top5'])}   "
          f"of {result['images']} images")
    read_out = [f"t={t}: {percent(right)}" for t, right in enumerate(result["top1_at"], 1)]
    print("read out after  " + "  ".join(read_out))
    if args.inspect or args.report or args.plot or args.picture:
        examine_potentials(study, model, dataset, args.batch_size, amp)
    print()
    return study


def main(argv=None):
    args = arguments(argv)
    # Find mistakes before hours of work.
    if args.plot or args.picture:
        pyplot()
    if args.save_folded and os.path.isfile(args.save_folded):
        if not load_checkpoint(args.save_folded).get("folded"):
            raise UserError(f"{args.save_folded} is not a folded network: give another name")
    device = train.use_device(args.device)
    checkpoints = [load_checkpoint(path) for path in args.checkpoint]
    without = [checkpoint["settings"]["mp_init"] == "off" for checkpoint in checkpoints]
    if args.picture and without not in ([], [False, True]):
        raise UserError("--picture takes a network trained with MP-Init, then one trained without")
    # GPUs may round float32 to the 10 bits of TF32. Here they do not.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    if args.speed:
        speed(device)
    studies = []
    for i, (path, checkpoint) in enumerate(zip(args.checkpoint, checkpoints), 1):
        studies.append(evaluate_checkpoint(args, path, checkpoint, device))
        if args.plot:
            # FILE.png, FILE-2.png, ...
            plot(studies[-1], args.plot if i == 1 else f"{args.plot.removesuffix('.png')}-{i}.png")
    if args.picture:
        # Compiling would take longer than these few small layers.
        with fusing(False):
            picture(args.picture, studies)
    if not studies:
        return
    tables = summary(studies)
    print(tables)
    if args.inspect or args.report:
        reports = "\n".join(map(report, studies))
    if args.inspect:
        print(reports)
    if args.report:
        text = f"# Summary\n\n{tables}\n{reports}"
        data.write_atomically(args.report, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    train.run(main, "eval.py")
