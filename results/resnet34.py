"""What keeps the spiking resnet34 back, and a start that helps. See resnet34.md.

    python results/resnet34.py transmit          what a block at its start lets through, by formula
    python results/resnet34.py identity FLAGS    train.py with blocks that start near the identity
"""
import math
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import train


def transmission(tau, theta, weight, bias, rate=0.2):
    """P(a block fires | no spike on its shortcut), P(... | a spike), and their correlation.

    First time step, v[0] = 0. The current is weight z + bias + theta s, where z ~ N(0, 1) comes from
    the last BatchNorm and s, the shortcut's spike, has the given firing rate.
    """
    # The neuron fires where h = current / tau >= theta.
    silent, spike = (0.5 * math.erfc((tau * theta - bias - theta * s) / weight / math.sqrt(2))
                     for s in (0, 1))
    fires = rate * spike + (1 - rate) * silent
    deviations = math.sqrt(rate * (1 - rate) * fires * (1 - fires))
    return silent, spike, (spike - silent) * rate * (1 - rate) / deviations


def print_transmission():
    print("tau  theta  weight  bias   P(fire | 0)  P(fire | 1)  correlation  ... after 13 blocks")
    for tau, theta, weight, bias in ((2, 1, 1, 0), (1.1, 1, 1, 0), (4, 1, 1, 0), (2, 0.5, 1, 0),
                                     (2, 2, 1, 0), (1.25, 1, 0.3, 0.75), (1.25, 1, 0.1, 0.75)):
        silent, spike, correlation = transmission(tau, theta, weight, bias)
        print(f"{tau:4} {theta:5} {weight:7} {bias:6} {silent:11.3f} {spike:12.3f} "
              f"{correlation:12.3f} {correlation**13:18.1e}")


@torch.no_grad()
def start_near_identity(model):
    """Each block passes its shortcut's spikes on: the last BatchNorm is small, and its bias lets the
    neuron fire where the shortcut brings a spike, and stay silent where it brings none."""
    for block in model.blocks:
        norm, neuron = block.conv2[1], block.lif2
        norm.weight.fill_(0.1)
        norm.bias.copy_((neuron.threshold * (neuron.tau - 0.5)).expand_as(norm.bias))


if __name__ == "__main__":
    what = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if what == "transmit":
        print_transmission()
    elif what == "identity":
        make_model = train.make_model

        def make_and_start(args, dataset, device):
            options, model = make_model(args, dataset, device)
            start_near_identity(model)
            return options, model

        train.make_model = make_and_start
        train.run(train.main, "resnet34.py")
    else:
        sys.exit(__doc__)
