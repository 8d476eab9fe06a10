"""The pictures of eval.py, and the only file that needs matplotlib. Each function takes what is measured there and a file name."""
import math

import torch

import data
from data import UserError


def pyplot():
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
        shift.plot(run["shift"][:, 0], style, ms=4, label=start)
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
            seen = edges[:-1][law.amax(0) > 0.01]
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
