"""Train the same networks with another library's neuron in the place of TrLIF.

    python results/other_neurons.py NEURON FLAGS    train.py with that neuron
    python results/other_neurons.py NEURON kept     what a step keeps for the backward pass, in MB

NEURON  trlif                  as it is
        plif-hard, plif-soft   SpikingJelly's ParametricLIFNode, hard or soft reset
        lif-hard, lif-soft     SpikingJelly's LIFNode
        leaky                  snnTorch's Leaky
        relu                   no neuron at all: an ANN, which computes the same at every step

Network, data, recipe and random draws are those of train.py. SpikingJelly's neurons have what its
own networks use: ATan surrogate, detach_reset. They compute in float32, as TrLIF does.
Needs: pip install spikingjelly==2.0.0 snntorch==1.0.0
"""
import pathlib
import sys

import torch
import torch.nn as nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import models
import train

NEURON = sys.argv[1] if len(sys.argv) > 1 else ""


class OtherNeuron(nn.Module):
    """Takes the place of TrLIF: current [T, B, ...] -> spikes of the same shape and dtype."""

    def __init__(self, threshold=1.0, tau=2.0, learnable=True, **others_of_trlif):
        super().__init__()
        kind, _, reset = NEURON.partition("-")
        if kind in ("plif", "lif"):
            from spikingjelly.activation_based import neuron, surrogate
            # v_reset=None is the soft reset, which takes the threshold away.
            how = dict(v_threshold=threshold, v_reset=0.0 if reset == "hard" else None,
                       surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="m")
            if kind == "plif":
                self.neuron = neuron.ParametricLIFNode(init_tau=tau, **how)
            else:
                self.neuron = neuron.LIFNode(tau=tau, **how)
        elif kind == "leaky":
            import snntorch
            # Its default surrogate is ATan as well, its reset soft.
            self.neuron = snntorch.Leaky(beta=1 - 1 / tau, threshold=threshold)
        elif kind != "relu":
            sys.exit(__doc__)

    def forward(self, x):
        if NEURON == "relu":
            return x.relu()
        current = x.float()
        if NEURON == "leaky":
            potential, spikes = torch.zeros_like(current[0]), []
            for x_t in current:
                spike, potential = self.neuron(x_t, potential)
                spikes.append(spike)
            return torch.stack(spikes).to(x.dtype)
        # The potential of the last batch is forgotten.
        self.neuron.reset()
        return self.neuron(current).to(x.dtype)


def megabytes_kept():
    """What a forward pass of a resnet19 of width 8 keeps for the backward pass, without weights:
    batch of 64 images of 32x32 pixels, T = 2, float32. Tensors that share memory count once."""
    model = models.build("resnet19", num_classes=100, timesteps=2, width=8)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    # The graph holds on to what it keeps, so no address is used twice.
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(torch.randn(64, 3, 32, 32))
    assert logits.requires_grad
    return sum(kept.values()) / 1e6


if __name__ == "__main__":
    if NEURON != "trlif":
        models.TrLIF = OtherNeuron
    if sys.argv[2:] == ["kept"]:
        print(f"{NEURON}: {megabytes_kept():,.0f} MB")
    else:
        train.run(lambda: train.main(sys.argv[2:]), "other_neurons.py")
