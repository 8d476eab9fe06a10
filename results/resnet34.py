"""What keeps the spiking resnet34 back, and a start that helps. See resnet34.md.

    python results/resnet34.py transmit       what a block lets through at its start, by formula
    python results/resnet34.py inside FLAGS   what an untrained network does with photographs;
                                              FLAGS are those of train.py
"""
import math
import pathlib
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import neuron
import train


def transmission(tau, theta, weight, bias, rate=0.2):
    """P(a block fires | no spike on its shortcut), P(... | a spike), and their correlation.

    First time step, v[0] = 0. The current is weight z + bias + theta s, where z ~ N(0, 1) comes
    from the last BatchNorm and s, the shortcut's spike, has the given firing rate.
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
                                     (2, 2, 1, 0), (1.25, 1, 1, 0), (1.25, 1, 0.1, 0.625)):
        silent, spike, correlation = transmission(tau, theta, weight, bias)
        print(f"{tau:4} {theta:5} {weight:7} {bias:6} {silent:11.3f} {spike:12.3f} "
              f"{correlation:12.3f} {correlation**13:18.1e}")


def print_inside(flags):
    """Layer by layer: the firing rate, how alike the spikes of an image are to those of the same
    image with a little noise, and the size of the gradient with respect to the current."""
    args = train.parse([*flags, "--batch-size", "32"])
    procs = train.Processes("cpu")
    torch.manual_seed(args.seed)
    dataset = train.make_dataset(args, procs)
    _, model = train.make_model(args, dataset, procs.device)
    batches = dataset.train(args.batch_size, args.seed, 0, 0)
    # In training mode, but without a step: running means settle, weights stay.
    with torch.no_grad():
        for _ in range(30):
            model(next(batches)[0])
    x, y = next(batches)
    spikes, gradients = {}, {}

    def record(name):
        def hook(layer, inputs, output):
            spikes.setdefault(name, []).append(output.detach().flatten())
            if inputs[0].requires_grad:
                inputs[0].register_hook(lambda g: gradients.update({name: g.norm().item()}))
        return hook

    names = [name for name, layer in model.named_modules() if isinstance(layer, neuron.TrLIF)]
    for name in names:
        model.get_submodule(name).register_forward_hook(record(name))
    F.cross_entropy(model(x).mean(0), y).backward()
    with torch.no_grad():
        model(x + 0.1 * x.std() * torch.randn_like(x))
    last = gradients[names[-1]]
    print("layer            firing rate  correlation  gradient / that of the last layer")
    for name in names:
        image, noisy = spikes[name]
        rate = (image > 0).float().mean().item()
        correlation = torch.corrcoef(torch.stack([image, noisy]))[0, 1].item()
        print(f"{name:16} {rate:11.3f} {correlation:12.2f} {gradients[name] / last:10.3g}")


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what == "transmit":
        print_transmission()
    elif what == "inside":
        print_inside(sys.argv[2:])
    else:
        sys.exit(__doc__)
