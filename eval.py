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
import collections
import copy
import math
import os
import pathlib
import pickle
import sys
import time
import zipfile
import zlib

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


def load_checkpoint(path):
    """A checkpoint as train.py wrote it, on the CPU: plain data and tensors, nothing that could run code."""
    try:
        if zipfile.is_zipfile(path):                             # torch.load would take flipped bits for weights
            with zipfile.ZipFile(path) as parts:
                if parts.testzip():
                    raise UserError(f"{path} is damaged (its checksums do not fit): take another copy, or train again")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:                      # weights_only refused it
        raise UserError(f"{path} is no checkpoint of train.py, or holds objects other than plain data") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read as a checkpoint, it may be truncated: {first_line(error)}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of train.py ('format' is not {FORMAT!r})")
    if missing := {"network", "model", "data", "epoch"} - set(checkpoint):
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}: not as train.py wrote it")
    return checkpoint


def build_network(checkpoint, path="checkpoint"):
    """The network in a checkpoint, in evaluation mode."""
    try:
        model = models.build(**checkpoint["network"])
        model = models.fold(model) if checkpoint.get("folded") else model
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


def check_classes(checkpoint, dataset, data_dir):
    """UserError unless the data set has the very classes that the checkpoint's network was trained on."""
    name, classes = checkpoint["data"]["name"], checkpoint["network"]["num_classes"]
    if len(dataset.classes) != classes:
        raise UserError(f"{name} in {data_dir} has {len(dataset.classes)} classes, the checkpoint's network {classes}")
    if checkpoint["data"].get("names", dataset.classes) != dataset.classes:
        raise UserError(f"{name} in {data_dir} has other classes: they are not those that the checkpoint was trained on, give another --data-dir")


def test_data(checkpoint, data_dir, workers, timesteps=None):
    """The checkpoint's test set, normalised as in its training; recordings of events in frames and split as there."""
    described = checkpoint["data"]
    dataset = data.load(described["name"], data_dir, described["image_size"], workers, timesteps or checkpoint["network"]["timesteps"],
                        described.get("dvs_split"), described.get("bin_by"))
    if described.get("classes"):
        dataset.keep_classes(described["classes"])
    check_classes(checkpoint, dataset, data_dir)
    dataset.mean, dataset.std = described["mean"], described["std"]
    return dataset


def take(dataset, batch_size, images=None):
    """The test batches without padding, of the first `images` images only if given."""
    left = images or math.inf
    for x, y in dataset.test(batch_size):
        n = min(left, (y >= 0).sum().item())
        yield x[:n], y[:n]
        left -= n
        if left == 0:
            return


def neurons_of(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, TrLIF)}


def observe(model, batches):
    """evaluate(), and the spikes that flowed meanwhile, summed over the images: memory does not grow with their number.

    counts: {neuron layer: [T, *neurons], pooling: [*outputs], attention: additions in k^T v, "events", "analog": [C, H, W]}
    """
    model, counts, k_spikes = copy.deepcopy(model), collections.defaultdict(float), {}      # the hooks stay on the copy

    def at_input(_, inputs):
        # An image is analog. A whole number k in an event frame is k spikes, any other value in it analog too.
        x = inputs[0] if inputs[0].dim() == 4 else inputs[0].flatten(0, 1)
        whole = (x == x.round()) & (x >= 0) & (inputs[0].dim() == 5)
        counts["events"] += (x * whole).double().sum(0)
        counts["analog"] += (~whole).double().sum(0)

    def at_spikes(name, dim):                                    # float32 counts exactly up to 2^24 images a batch
        return lambda _, inputs, o: counts.update({name: counts[name] + (o != 0).float().sum(dim).double()})

    def at_attention(name, part, heads):
        # Entry (a, b) of k^T v adds 1 for every token in which k_a and v_b both fired: spikes of k times spikes of v.
        def hook(_, inputs, o):                                  # o [T, B, N, D]
            spikes = (o != 0).unflatten(3, (heads, -1)).sum(4).double()
            if part == "k":
                k_spikes[name] = spikes
            else:
                counts[name] += (k_spikes.pop(name) * spikes).sum()
        return hook

    model.register_forward_pre_hook(at_input)
    pooled = models.wiring(model)[1].values()
    for name, layer in model.named_modules():
        if isinstance(layer, TrLIF):
            layer.register_forward_hook(at_spikes(name, 1))
        elif name in pooled:
            layer.register_forward_hook(at_spikes(name, 0))
        elif isinstance(layer, models.SpikingSelfAttention):
            for part in "kv":
                layer.get_submodule(f"{part}.lif").register_forward_hook(at_attention(name, part, layer.heads))
    return evaluate(model, batches), counts


def fan_out(layer, size):
    """The connections that leave each place of a layer's input: a number, or [H, W] for a convolution on that size.

    The derivative of a convolution with ones, summed, is the number of taps that read a place: borders and strides included."""
    if not isinstance(layer, nn.Conv2d):
        return layer.out_features if layer else 1                # no layer: a shortcut, to one neuron
    x, ones = torch.zeros(1, 1, *size, requires_grad=True), torch.ones(1, 1, *layer.kernel_size)
    with torch.enable_grad():
        reached = F.conv2d(x, ones, None, layer.stride, layer.padding, layer.dilation).sum()
    return torch.autograd.grad(reached, x)[0][0, 0].double() * (layer.out_channels // layer.groups)


def operations(model, counts, images):
    """What each layer did for an image on average, given what observe() counted: [{layer, spikes, acs, macs, dense, pj, dense_pj}].

    spikes arrived there; acs: accumulates, one for each spike and connection; macs: multiply-accumulates, on analog input;
    dense: those of the same layer in a conventional network, one for each input and connection; pj, dense_pj: energy in pJ."""
    (synapses, pooled), layers, rows = models.wiring(model), dict(model.named_modules()), []

    def row(layer, spikes, acs, macs, dense):
        spikes, acs, macs = (float(v) / images for v in (spikes, acs, macs))
        rows.append(dict(layer=layer, spikes=spikes, acs=acs, macs=macs, dense=float(dense),
                         pj=PJ_PER_AC * acs + PJ_PER_MAC * macs, dense_pj=PJ_PER_MAC * float(dense)))

    for name, _, sources in synapses:
        arrived = [counts[pooled[s]].cpu() if s in pooled else counts[s].sum(0).cpu() for s in sources] or [counts["events"].cpu()]
        one = arrived[0]
        fan = fan_out(layers.get(name), one.shape[1:])
        # A conventional head meets the mean over places, [C, H, W] or [N, D]; a plain shortcut only adds.
        places = one[0].numel() if one.dim() == 3 else len(one)
        dense = 0 if name.endswith("shortcut") else (torch.ones_like(one) * fan).sum() / (places if name == "head" else 1)
        row(name, sum(a.sum() for a in arrived), sum((a * fan).sum() for a in arrived), 0 if sources else (counts["analog"].cpu() * fan).sum(), dense)
    for name, layer in layers.items():
        if isinstance(layer, models.SpikingSelfAttention):
            q, k, v = (counts[f"{name}.{part}.lif"] for part in "qkv")                      # [T, N, D]
            width = q.shape[2] // layer.heads                    # of a head: a spike of q adds a row of so many whole numbers
            row(f"{name} k^T v", k.sum() + v.sum(), counts[name], 0, q[0].numel() * width)
            row(f"{name} q (k^T v)", q.sum(), q.sum() * width, 0, q[0].numel() * width)
    return rows


def potentials(model, batches, T, steps, v_init=None):
    """evaluate() over so many steps, and histograms of v[t] / theta after the reset: {neuron layer: [T + 1, BINS]}.

    Rows are t = 1 ... T and, pooled over the last T of the steps, the stationary law. An image is shown on, the frames of
    an event recording are repeated. v_init: where the potentials start, if not where the network has learned to."""
    model, histograms = copy.deepcopy(model), {}                 # the hooks stay on the copy
    model.timesteps = steps

    def at_neurons(histogram):
        def hook(layer, inputs, _):
            v, theta, k = layer.v_init, layer.threshold, layer.decay
            scale = BINS_PER_THRESHOLD / theta
            for t in range(steps):                               # the neuron again, a step at a time, for its potentials
                _, v, _ = lif(inputs[0][t:t + 1], v, theta, k, layer.surrogate)
                if t < T or t >= steps - T:                      # beyond the range: in the last bin
                    bins = (v * scale).add_(BINS / 2).clamp_(0, BINS - 1).int()
                    histogram[min(t, T)] += torch.bincount(bins.flatten(), minlength=BINS)
        return hook
    for name, layer in neurons_of(model).items():
        histograms[name] = torch.zeros(T + 1, BINS, dtype=torch.long, device=layer.v_init.device)
        layer.register_forward_hook(at_neurons(histograms[name]))
        if v_init is not None:
            layer.v_init.fill_(v_init)
    shown = ((x if x.dim() == 4 else x[:, torch.arange(steps) % T], y) for x, y in batches)
    return evaluate(model, shown), {name: h.cpu() for name, h in histograms.items()}


def wasserstein(counts, reference):
    """1-Wasserstein distance, in thresholds, of laws given as counts [..., BINS]: the area between their cumulative laws.
    A bin does not tell where in it a potential is: off by at most one bin."""
    a, b = ((c.double() / c.double().sum(-1, keepdim=True)).cumsum(-1) for c in (counts, reference))
    return (a - b).abs().sum(-1) / BINS_PER_THRESHOLD


def moments(counts):
    """Mean and standard deviation in thresholds of laws given as counts [..., BINS]."""
    middle, p = (torch.arange(BINS).double() + 0.5 - BINS / 2) / BINS_PER_THRESHOLD, counts.double() / counts.double().sum(-1, keepdim=True)
    mean = (p * middle).sum(-1)
    return mean, ((p * middle ** 2).sum(-1) - mean ** 2).clamp(min=0).sqrt()


def inspect(path, checkpoint, model, dataset, batch_size, images=None):
    """All that report() and plot() show of one checkpoint, in a dict."""
    T, neurons = dataset.frames or model.timesteps, neurons_of(model)
    result, counts = observe(model, take(dataset, batch_size, images))
    # Run on for 4 T steps, or longer where a leak is slow: until (1 - k)^steps, what is left of the start, is 1 %.
    kept = min(max(max(1 - layer.decay.item() for layer in neurons.values()), 1e-6), 1 - 1e-6)
    steps = T + min(max(4 * T, math.ceil(math.log(0.01) / math.log(kept))), max(64, T))
    runs = {}
    for start, v_init in ("v[0] = v_init (MP-Init)", None), ("v[0] = 0", 0):
        run_on, laws = potentials(model, take(dataset, max(1, batch_size * T // steps), images), T, steps, v_init)
        runs[start] = dict(top1_at=run_on["top1_at"], laws=laws,
                           shift=torch.stack([wasserstein(law[:T], law[T]) for law in laws.values()]))       # [layers, T]
    rows = operations(model, counts, result["images"])
    network, name, images = checkpoint["network"], checkpoint["data"]["name"], result["images"]
    title = f"{path}: {network['arch']}, width {network['width']}, T = {T}, {name}, {images:,d} test images, top-1 {100 * result['top1']:.2f} %"
    return dict(path=str(path), title=title, arch=network["arch"], T=T, range=RANGE, steps=steps, result=result,
                runs=runs, rows=rows, parameters=sum(p.numel() for p in model.parameters()),
                neurons={n: (layer.threshold.item(), layer.tau.item(), layer.v_init.item()) for n, layer in neurons.items()},
                rates={n: (counts[n].flatten(1).mean(1) / result["images"]).tolist() for n in neurons},
                silent={n: (counts[n].sum(0) == 0).double().mean().item() for n in neurons},
                size=sum(counts[n][0].numel() for n in neurons), spikes=sum(counts[n].sum().item() for n in neurons) / result["images"],
                mj=1e-9 * sum(row["pj"] for row in rows), dense_mj=1e-9 * sum(row["dense_pj"] for row in rows))


def table(header, rows):
    """A Markdown table that is aligned to be read as plain text, too. header: "a | b | c"."""
    rows = [header.split(" | "), *([str(cell) for cell in row] for row in rows)]
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join("| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |" for row in rows) + "\n"


def percent(values):
    return [f"{100 * v:.2f} %" for v in values]


def comparison(looks):
    return table("checkpoint | network | T | parameters | top-1 | after t = 1, 2, ... | firing rate | spikes/image | energy/image | conventional"
                 " | shift at t=1 | with v[0] = 0", [
        [k["path"], k["arch"], k["T"], f"{k['parameters']:,d}", *percent([k["result"]["top1"]]), ", ".join(percent(k["result"]["top1_at"])),
         *percent([k["spikes"] / k["T"] / k["size"]]), f"{k['spikes']:,.0f}", f"{k['mj']:.4g} mJ", f"{k['dense_mj']:.4g} mJ",
         *(f"{run['shift'][:, 0].mean():.3f}" for run in k["runs"].values())] for k in looks]) + """
Firing rate: spikes a neuron and step. Energy: arithmetic only, 45 nm, 4.6 pJ a multiply-accumulate and 0.9 pJ an accumulate; conventional:
the same network in one pass, all multiply-accumulates. Shift: distance of the potentials at t = 1 from their stationary law, in thresholds
(1-Wasserstein, mean over layers), as the network is and started at 0.
"""


def report(look):
    """What inspect() found, as Markdown."""
    T, runs, rows = look["T"], look["runs"], look["rows"]
    at, first = " | ".join(f"t={t}" for t in range(1, T + 1)), next(iter(runs.values()))
    beyond = max((law[:, [0, -1]].sum(1) / law.sum(1)).max().item() for run in runs.values() for law in run["laws"].values())
    laws = {start: {n: [f"{m:.3f} ± {s:.3f}" for m, s in zip(*moments(law))] for n, law in run["laws"].items()} for start, run in runs.items()}
    return f"""# {look["title"]}

Top-1 accuracy when read out after t steps:

{table(f"start | {at}", [[start, *percent(run["top1_at"][:T])] for start, run in runs.items()])}
## Neurons

{table(f"layer | theta | tau | v_init | never fire | {at}", [[n, *(f"{v:.3f}" for v in look["neurons"][n]), *percent([look["silent"][n], *rate])] for n, rate in look["rates"].items()])}
Under t: firing rate, spikes a neuron at that step. Never fire: the share of neurons without a spike on any image. tau in time steps.

## Temporal covariate shift

{table(f"mean over layers | {at}", [[start, *(f"{w:.3f}" for w in run["shift"].mean(0))] for start, run in runs.items()])}
Distance (1-Wasserstein, in thresholds) of the membrane potentials v[t], after the reset, from their stationary law, which is that of the last
{T} of {look["steps"]} steps of the same network on the same images. 0: step t sees the potentials that all later steps see.

{table(" | ".join(["layer", "t", *(f"{start}: mean ± sd | distance" for start in runs), "stationary: mean ± sd"]),
       [[n, t + 1, *(v for start, run in runs.items() for v in (laws[start][n][t], f"{run['shift'][i, t]:.3f}")), laws[next(iter(runs))][n][T]]
        for i, n in enumerate(first["laws"]) for t in range(T)])}
From histograms with bins of 1/{BINS_PER_THRESHOLD} threshold: a distance is off by at most one bin, a mean by half a bin. At most {100 * beyond:.2g} % of a
law lies beyond {RANGE} thresholds and counts as being there.

## Operations and energy for one image

{table("layer | spikes in | accumulates | multiply-accumulates | energy (nJ) | conventional (nJ)", [[r["layer"], f"{r['spikes']:,.1f}", f"{r['acs']:,.0f}", f"{r['macs']:,.0f}", f"{r['pj'] * 1e-3:,.3f}", f"{r['dense_pj'] * 1e-3:,.3f}"] for r in rows])}
{look["spikes"]:,.0f} spikes, {sum(r["acs"] for r in rows):,.0f} accumulates, {sum(r["macs"] for r in rows):,.0f} multiply-accumulates: {look["mj"]:.4g} mJ. The same network as a
conventional one, in one pass: {sum(r["dense"] for r in rows):,.0f} multiply-accumulates, {look["dense_mj"]:.4g} mJ, {look["dense_mj"] / look["mj"]:.2f} times as much.

A spike costs one accumulate (0.9 pJ) for each connection that leaves its place, strides and borders counted exactly; where a residual stream
adds spikes of k neurons, k. An image is analog: its first layer costs multiply-accumulates (4.6 pJ), once for all steps. In event frames a
whole number k counts as k spikes, anything else as analog. Attention: k^T v costs an accumulate for each pair of spikes that meet in a token,
q (k^T v) one of a whole number for each spike of q and column of its head. 45 nm CMOS, arithmetic only: no memory access, biases or
pooling, nor the {look["size"] * T:,d} updates of neurons (each a multiply-accumulate and a comparison).
"""


def pyplot():
    """matplotlib, which only pictures need."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "font.size": 9, "legend.fontsize": 8})
    return plt


def save_figure(figure, heading, path):
    figure.suptitle(heading, fontsize=13)
    data.write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"))


def plot(look, path):
    """Accuracy, firing rates, covariate shift and energy; below, potentials in four layers with MP-Init and without."""
    plt, T, names, rows, runs = pyplot(), look["T"], list(look["rates"]), look["rows"], look["runs"]
    figure, axes = plt.subplots(3, 4, figsize=(20, 13), layout="constrained")
    accuracy, rate, shift, energy = axes[0]
    accuracy.set(title="Accuracy when read out after t steps", xlabel="time step t", ylabel="top-1 (%)")
    accuracy.axvline(T, color="grey", lw=1, ls=":", label=f"T = {T}")
    rate.set(title="Firing rate", xlabel="neuron layer", ylabel="spikes a neuron and step (%)")
    shift.set(title="Covariate shift at t = 1: distance of the\npotentials from their stationary law", xlabel="neuron layer", ylabel="1-Wasserstein distance (thresholds)")
    energy.set(title="Energy an image (45 nm, arithmetic only)", xlabel="layer with weights", ylabel="energy (nJ)")
    for (start, run), style in zip(runs.items(), ("o-", "s--")):
        accuracy.plot(range(1, look["steps"] + 1), [100 * a for a in run["top1_at"]], style, ms=4, label=start)
        shift.plot(run["shift"][:, 0].tolist(), style, ms=4, label=start)
    colours = plt.cm.viridis([t / max(T, 2) for t in range(T)])
    for t in range(T):
        rate.plot([100 * look["rates"][n][t] for n in names], ".-", color=colours[t], label=f"t = {t + 1}")
    energy.bar(range(len(rows)), [r["dense_pj"] * 1e-3 for r in rows], 0.9, color="lightgrey", label=f"conventional: {look['dense_mj']:.3g} mJ")
    energy.bar(range(len(rows)), [r["pj"] * 1e-3 for r in rows], 0.5, label=f"spiking: {look['mj']:.3g} mJ")
    for panel, labels in ((rate, names), (shift, names), (energy, [r["layer"] for r in rows])):
        panel.set_xticks(range(0, len(labels), 1 + len(labels) // 30), labels[::1 + len(labels) // 30], rotation=90, fontsize=7)
    for column, i in enumerate(round(j * (len(names) - 1) / 3) for j in range(4)):
        for panel, (start, run) in zip(axes[1:, column], runs.items()):
            law = run["laws"][names[i]].double().unflatten(1, (-1, 16)).sum(2)               # coarser: 1/16 threshold a bin
            edges = torch.linspace(-look["range"], look["range"], law.shape[1] + 1)
            law = law / law.sum(1, keepdim=True) / (edges[1] - edges[0])
            panel.stairs(law[T], edges, fill=True, color="lightgrey", label="stationary")
            for t in range(T):
                panel.stairs(law[t], edges, color=colours[t], label=f"t = {t + 1}, distance {run['shift'][i, t]:.3f}")
            seen = edges[:-1][law.amax(0) > 0.01].tolist()
            panel.set(title=f"{names[i]}, {start}", xlabel="membrane potential after the reset (thresholds)", ylabel="density",
                      yscale="log", ylim=(0.01, None), xlim=(seen[0] - 0.1, seen[-1] + 0.2))
    for panel in axes.flat:
        panel.legend()
    save_figure(figure, look["title"], path)


def plot_gradients(heading, thetas, sweeps, path):
    """Gradient norms at every neuron layer. sweeps: {case: [({layer: norm}, firing rate) for each of thetas]}, four cases."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(13, 10), sharex=True, sharey=True, layout="constrained")
    for panel, (case, sweep) in zip(axes.flat, sweeps.items()):
        panel.set(title=case, xlabel="threshold", ylabel="norm of the gradient w.r.t. the input current")
        for i, name in enumerate(sweep[0][0]):                   # where nothing fires the gradient is 0: no point
            panel.loglog(thetas, [norms[name] or math.nan for norms, _ in sweep], ".-", label=name,
                         color=plt.cm.viridis(i / len(sweep[0][0])))
    axes[0, 1].legend(title="neuron layer", loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, heading, path)


def gradient_norms(surrogate, theta, follow):
    """{neuron layer: norm of the gradient with respect to its input current} and the mean firing rate of a random resnet19.
    follow: BatchNorm scales the currents with theta, so that neurons fire alike; else their variance is 1."""
    torch.manual_seed(0)
    model, norms, rates = models.build("resnet19", 10, 4, width=8, threshold=theta, surrogate=surrogate).train(), {}, []

    def at_neurons(name):
        def hook(_, inputs, o):
            norms[name] = rates.append((o != 0).float().mean().item())                       # None, until backward is here
            inputs[0].register_hook(lambda gradient: norms.update({name: gradient.norm().item()}))
        return hook
    for name, layer in model.named_modules():
        if isinstance(layer, TrLIF):
            layer.register_forward_hook(at_neurons(name))
        elif isinstance(layer, nn.BatchNorm2d) and follow:
            nn.init.constant_(layer.weight, theta)
    F.cross_entropy(model(torch.randn(16, 3, 16, 16)).mean(0), torch.arange(16) % 10).backward()
    return norms, sum(rates) / len(rates)


def gradients(path):
    """Print gradient norms of five neuron layers against the threshold; draw those of all into path, if given."""
    heading = "Norm of the loss's gradient at each neuron layer against the threshold (resnet19, width 8, T = 4, random weights)"
    thetas, sweeps = [0.1 * 10 ** (i / 4) for i in range(9)], {}
    print(heading + "\n")
    for case in ("currents that scale with the threshold", "currents of variance 1, whatever the threshold"):
        for surrogate in ("trsg", "absolute"):
            sweep = sweeps[f"{surrogate}; {case}"] = [gradient_norms(surrogate, theta, "scale" in case) for theta in thetas]
            names = list(sweep[0][0])
            print(f"{surrogate}; {case}\n\n" + table(" | ".join(["threshold", "firing rate", *names[::4]]), [
                [f"{theta:.2f}", *percent([rate]), *(f"{norms[n]:.2e}" for n in names[::4])] for theta, (norms, rate) in zip(thetas, sweep)]))
    if path:
        plot_gradients(heading, thetas, sweeps, path)


def parser(program, description):
    """An argument parser whose errors are one line."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"{program}: error: {message} (--help explains the flags)\n")
    return p


def number(kind, low, high=math.inf, or_equal=False):
    """A type for argparse: a finite number above low (or equal to it) and below high."""
    def parse(text):
        value = kind(text)
        if not (low < value < high or or_equal and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not {'at least' if or_equal else 'above'} {low}"
                                             + (f" and below {high}" if high < math.inf else " and finite" if kind is float else ""))
        return value
    parse.__name__ = kind.__name__                               # argparse names it where the text is no number
    return parse


def arguments(argv=None):
    p, count = parser("eval.py", __doc__), number(int, 1, or_equal=True)
    p.add_argument("checkpoint", nargs="*", help="last.pt or best.pt of a run; several are compared in one table")
    p.add_argument("--inspect", action="store_true", help="print firing rates, potentials, operations and energy, layer by layer")
    p.add_argument("--report", metavar="FILE.md", help="write these tables into a file")
    p.add_argument("--plot", metavar="FILE.png", help="draw them (needs matplotlib); a second checkpoint into FILE-2.png, and so on")
    p.add_argument("--fold", action="store_true", help="fold thresholds and BatchNorm into the weights, compare predictions, go on with the folded network")
    p.add_argument("--save-folded", metavar="FILE.pt", help="fold, and write the folded network: a checkpoint for eval.py")
    p.add_argument("--gradients", nargs="?", const="", metavar="FILE.png", help="print gradient norms for thresholds from 0.1 to 10, and draw them into a file if given; needs no checkpoint")
    p.add_argument("--data-dir", default="data", help="where the data sets are (default: %(default)s)")
    p.add_argument("--images", type=count, metavar="N", help="use the first N test images only")
    p.add_argument("--batch-size", type=count, default=256, metavar="N", help="images at a time (default: %(default)s)")
    p.add_argument("--timesteps", type=count, metavar="T", help="time steps to run for, if other than in training")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    p.add_argument("--workers", type=number(int, 0, or_equal=True), default=2, metavar="N", help="processes that decode large images (default: %(default)s)")
    args = p.parse_args(argv)
    for flag, path, ending in (("--gradients", args.gradients, ".png"), ("--plot", args.plot, ".png"), ("--report", args.report, ".md")):
        if path and not path.endswith(ending):                   # the place of another file, perhaps: of a checkpoint
            p.error(f"{flag} writes a file *{ending}, and {path} does not end in {ending}")
    if len(args.checkpoint) > 1 and args.save_folded:
        p.error("--save-folded takes one checkpoint")
    if not args.checkpoint and (args.gradients is None or args.inspect or args.report or args.plot or args.fold or args.save_folded):
        p.error("no checkpoint given")
    return args


@torch.no_grad()
def compare_folded(model, folded, batches):
    """Print how far the predictions and logits of a folded network agree with the original's."""
    same = images = difference = 0
    for x, _ in batches:
        a, b = model(x).mean(0), folded(x).mean(0)
        same, images = same + (a.argmax(1) == b.argmax(1)).sum().item(), images + len(x)
        difference = max(difference, ((a - b).abs().max() / a.abs().max()).item())
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, folded))
    print(f"folded: same prediction on {100 * same / images:.2f} % of {images} images, logits differ by {difference:.1e} of the largest at most; "
          f"{after:,d} parameters instead of {before:,d} ({after / before:.2f} times)")


def main(argv=None):
    args, looks = arguments(argv), []
    if args.plot or args.gradients:
        pyplot()                                         # missing? better said now than after the work
    if args.save_folded and os.path.isfile(args.save_folded) and not load_checkpoint(args.save_folded).get("folded"):
        raise UserError(f"--save-folded would replace {args.save_folded}, which is not a folded network: give another name")
    device = data.use_device(args.device)
    if args.gradients is not None:
        gradients(args.gradients)
    for number, path in enumerate(args.checkpoint, 1):
        checkpoint = load_checkpoint(path)
        model = build_network(checkpoint, path).to(device, memory_format=data.memory_format(device))
        network = checkpoint["network"]
        model.timesteps = args.timesteps or network["timesteps"]
        dataset = test_data(checkpoint, args.data_dir, args.workers, args.timesteps).to(device)
        print(f"{path}: {network['arch']}, width {network['width']}, T = {dataset.frames or model.timesteps}, "
              f"{checkpoint['data']['name']}{f', split {dataset.split}' if dataset.split else ''}, epoch {checkpoint['epoch']}{', folded' if checkpoint.get('folded') else ''}"
              + (" (trained in bfloat16, evaluated in float32)" if checkpoint.get("settings", {}).get("amp") else ""))
        if args.fold or args.save_folded:
            if checkpoint.get("folded"):
                raise UserError(f"{path} is folded already")
            original, model = model, models.fold(model).to(memory_format=data.memory_format(device))
            compare_folded(original, model, take(dataset, args.batch_size, args.images))
        if args.save_folded:
            state = {**{k: checkpoint[k] for k in ("format", "network", "data", "epoch")}, "folded": True, "model": model.state_dict()}
            data.write_atomically(args.save_folded, lambda file: torch.save(state, file))
        start = time.perf_counter()
        if args.inspect or args.report or args.plot or len(args.checkpoint) > 1:
            looks.append(inspect(path, checkpoint, model, dataset, args.batch_size, args.images))
            result, speed = looks[-1]["result"], ""
        else:
            result = evaluate(model, take(dataset, args.batch_size, args.images))
            speed = f", {result['images'] / (time.perf_counter() - start):.0f} images/s"
        print(f"top-1 {100 * result['top1']:.2f} %   top-5 {100 * result['top5']:.2f} %   of {result['images']} images{speed}")
        print("read out after  " + "  ".join(f"t={t}: {100 * a:.2f} %" for t, a in enumerate(result["top1_at"], 1)) + "\n")
        if args.plot:
            plot(looks[-1], pathlib.Path(args.plot) if number == 1 else pathlib.Path(args.plot).with_stem(f"{pathlib.Path(args.plot).stem}-{number}"))
    details = "\n".join(report(look) for look in looks)
    if looks:
        print(details if args.inspect else "", comparison(looks), sep="\n")
    if args.report:
        data.write_atomically(args.report, lambda file: file.write(f"# Comparison\n\n{comparison(looks)}\n{details}".encode()))


def run(main, program):
    """Call main(); an expected failure becomes one line on stderr and exit code 2."""
    try:
        main()
    except BrokenPipeError:                                      # whoever read what is printed has gone, head for example
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except ConnectionError:                                      # a worker process died, say: nothing the user can mend
        raise
    except (UserError, OSError) as error:                        # OSError: a name too long, a folder without access, ...
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:                 # PyTorch has few exceptions of its own
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            advice = "out of memory, try a smaller --batch-size"
        elif "shared memory" in str(error):
            advice = "too little shared memory for worker processes, try --workers 0 (or with docker --shm-size 8g)"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            advice = "the network cannot be compiled here, install a C++ compiler or give --no-compile"
        else:
            raise
        print(f"{program}: error: {advice}: {first_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run(main, "eval.py")
